"""What happened to every document: datatrove's statistics, merged per step and balanced.

datatrove's own `stats.json` covers only the tasks of the last launch, so the per-task files are
added up here.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

EXTRACTOR = "Trafilatura"
ONLY_REASON = {"Near duplicates": "near_duplicate"}  # of datatrove's step that gives none


@dataclass
class Step:
    """Documents through one step of a pipeline."""

    name: str
    total: int
    forwarded: int
    dropped: dict[str, int]  # reason -> documents
    characters: int = 0  # of the documents passed on, where the step counts them
    # "documents" and "characters" that were cut out of others
    cut: dict[str, int] = field(default_factory=dict)


def read_counts(stats: Path, tasks: int, before: Sequence[Step] = ()) -> list[Step]:
    """The steps of a finished pipeline in order, summed over tasks.

    Asserts that documents are conserved, from the last step of `before` on.
    """
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
            ours.characters += theirs.characters
            for sums, more in ((ours.dropped, theirs.dropped), (ours.cut, theirs.cut)):
                for name, count in more.items():
                    sums[name] = sums.get(name, 0) + count
    check_conservation([*before, *merged])
    return merged


def read_step(raw: dict[str, Any]) -> Step:
    """One step of one task; a step without `forwarded` (a writer) passes all on."""
    counts = {
        name: int(value["total"] if isinstance(value, dict) else value)
        for name, value in raw["stats"].items()
    }
    name = raw["name"].encode("ascii", "ignore").decode().split(":")[-1].strip()
    dropped = {
        name.removeprefix("dropped_"): n
        for name, n in counts.items()
        if name.startswith("dropped_") and n
    }
    if unnamed := counts.get("dropped", 0) - sum(dropped.values()):
        dropped[ONLY_REASON.get(name, "unnamed")] = unnamed
    total = counts.get("total", 0)
    writes = "forwarded" not in counts and not dropped
    forwarded = total if writes else counts.get("forwarded", 0)
    cut = {name.removeprefix("cut_"): n for name, n in counts.items() if name.startswith("cut_")}
    return Step(name, total, forwarded, dropped, counts.get("doc_len", 0), cut)


def check_conservation(steps: list[Step]) -> None:
    """Assert in = out + dropped in every step, and that its input is the previous step's output."""
    for step in steps:
        assert step.total == step.forwarded + sum(step.dropped.values()), (
            f"documents lost inside a step: {step}"
        )
    for before, after in zip(steps, steps[1:], strict=False):
        assert before.forwarded == after.total, f"documents lost between steps: {before} -> {after}"


def check_yield(source: str, steps: list[Step], least: float) -> None:
    """Raise RuntimeError when text was extracted from less than `least` of the pages."""
    for step in steps:
        if EXTRACTOR in step.name and step.forwarded < least * step.total:
            raise RuntimeError(
                f"source {source}: text was extracted from {step.forwarded} of {step.total} "
                f"pages, below min_yield {least:.0%} ({step.dropped}): the extractor is broken "
                "or the input is no HTML; see its logs"
            )


def reasons(steps: list[Step]) -> str:
    """`step: reason n, reason n; step: ...`, most frequent first; empty if nothing was dropped."""
    lines = []
    for step in steps:
        if step.dropped:
            lines.append(f"{step.name}: {ranked(step.dropped)}")
    return "; ".join(lines)


def ranked(dropped: dict[str, int]) -> str:
    """`reason n, reason n`, most frequent first."""
    return ", ".join(
        f"{why} {n:,}" for why, n in sorted(dropped.items(), key=lambda item: (-item[1], item[0]))
    )


def table(steps: dict[str, list[Step]]) -> list[str]:
    """In = out + dropped, by reason, for every step of every source; omits steps that only copy."""
    lines = [f"{'source':<14}{'step':<22}{'in':>13}{'out':>13}{'dropped':>12}  reasons"]
    for source, found in steps.items():
        for place, step in enumerate(found):
            if place and not step.dropped and not step.cut:
                continue
            dropped = step.total - step.forwarded
            row = f"{source:<14}{step.name:<22}{step.total:>13,}{step.forwarded:>13,}{dropped:>12,}"
            cut = f" (cut: {ranked(step.cut)})" if step.cut else ""
            lines.append(f"{row}  {ranked(step.dropped)}{cut}".rstrip())
        total, out = found[0].total, found[-1].forwarded
        lines.append(f"{source:<14}{'= all':<22}{total:>13,}{out:>13,}{total - out:>12,}")
    return lines
