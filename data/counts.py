"""What happened to every document: datatrove's statistics, merged per step and balanced.

datatrove's own `stats.json` covers only the tasks of the last launch, so the per-task files are added up here.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# An extractor does not count these under `dropped`, though the document is gone.
FAILURES = ("timeout", "broken_process", "clean_error")
EXTRACTOR = "Trafilatura"
# A run that extracts text from fewer pages than this is broken, not picky: crawls give well over half.
MIN_YIELD = 0.5


@dataclass
class Step:
    """Documents through one step of a pipeline."""

    name: str
    total: int
    forwarded: int
    dropped: dict[str, int]  # reason -> documents


def read_counts(stats: Path, tasks: int) -> list[Step]:
    """The steps of a finished pipeline in order, summed over tasks; asserts that documents are conserved."""
    merged: list[Step] = []
    for rank in range(tasks):
        raw = json.loads((stats / f"{rank:05d}.json").read_text(encoding="utf-8"))
        steps = [read_step(step) for step in raw]
        if not merged:
            merged = steps
            continue
        for ours, theirs in zip(merged, steps, strict=True):
            ours.total += theirs.total
            ours.forwarded += theirs.forwarded
            for reason, count in theirs.dropped.items():
                ours.dropped[reason] = ours.dropped.get(reason, 0) + count
    check_conservation(merged)
    return merged


def read_step(raw: dict[str, Any]) -> Step:
    """One step of one task; a step without `forwarded` (a writer) passes all on."""
    counts = {name: int(value["total"] if isinstance(value, dict) else value) for name, value in raw["stats"].items()}
    dropped = {name.removeprefix("dropped_"): n for name, n in counts.items() if name.startswith("dropped_") and n}
    unnamed = counts.get("dropped", 0) - sum(dropped.values())
    dropped |= {name: counts[name] for name in FAILURES if counts.get(name)}
    if unnamed:
        dropped["no_text" if EXTRACTOR in raw["name"] else "unnamed"] = unnamed
    total = counts.get("total", 0)
    writes = "forwarded" not in counts and not dropped
    name = raw["name"].encode("ascii", "ignore").decode().split(":")[-1].strip()
    return Step(name, total, total if writes else counts.get("forwarded", 0), dropped)


def check_conservation(steps: list[Step]) -> None:
    """Assert in = out + dropped in every step, and that a step gets all that the one before passed on."""
    for step in steps:
        assert step.total == step.forwarded + sum(step.dropped.values()), f"documents lost inside a step: {step}"
    for before, after in zip(steps, steps[1:], strict=False):
        assert before.forwarded == after.total, f"documents lost between steps: {before} -> {after}"


def check_yield(source: str, steps: list[Step]) -> None:
    """Raise RuntimeError when text was extracted from less than MIN_YIELD of the pages."""
    for step in steps:
        if EXTRACTOR in step.name and step.forwarded < MIN_YIELD * step.total:
            raise RuntimeError(
                f"source {source}: text was extracted from {step.forwarded} of {step.total} pages, below "
                f"{MIN_YIELD:.0%} ({step.dropped}): the extractor is broken or the input is no HTML; see its logs"
            )


def reasons(steps: list[Step]) -> str:
    """`step: reason n, reason n; step: ...`, most frequent first; empty when nothing was dropped."""
    lines = []
    for step in steps:
        ranked = sorted(step.dropped.items(), key=lambda item: (-item[1], item[0]))
        if ranked:
            lines.append(f"{step.name}: " + ", ".join(f"{reason} {count}" for reason, count in ranked))
    return "; ".join(lines)
