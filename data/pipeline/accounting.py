"""Document counts of every pipeline step, merged over tasks and checked for losses.

datatrove's own `stats.json` covers only the tasks of the last launch, so this module sums the
per-task files.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from typing_extensions import TypedDict

from core.ranges import Finite, Whole
from core.records import read_required
from data.readers.listing import Listing
from data.stream.manifests import SPLITS, Manifest

EXTRACTOR = "Trafilatura"
ONLY_REASON = {"Near duplicates": "near_duplicate"}  # for a datatrove step that records no reason


@dataclass
class StepCounts:
    """Document counts of one pipeline step."""

    name: str
    total: Whole
    forwarded: Whole
    dropped: dict[str, Whole]  # reason -> documents
    characters: Whole = 0  # of forwarded documents, where the step counts them
    # "documents" that had text removed, and the removed "characters"
    cut: dict[str, Whole] = field(default_factory=dict)
    files: Whole = 0  # that a reader opened
    unchanged: Whole = 0  # forwarded documents that the step does not apply to
    added: Whole = 0  # parts of split documents beyond the first of each


def read_counts(stats: Path, tasks: int, before: Sequence[StepCounts] = ()) -> list[StepCounts]:
    """Read the counts of a finished pipeline's steps in order, summed over tasks.

    Asserts that no document was lost, from the last step of `before` on.
    """
    merged: list[StepCounts] = []
    fix = f"remove {stats.parent} and run the same command again"
    for rank in range(tasks):
        raw = read_required(stats / f"{rank:05d}.json", list[TaskStep], fix, extra="ignore")
        steps = [read_step(step) for step in raw]
        if not merged:
            merged = steps
            continue
        for total, step in zip(merged, steps, strict=True):
            add_counts(total, step)
    check_conservation([*before, *merged])
    return merged


def add_counts(total: StepCounts, step: StepCounts) -> None:
    """Add one task's counts of a step to the total of that step, in place."""
    total.total += step.total
    total.forwarded += step.forwarded
    total.characters += step.characters
    total.files += step.files
    total.unchanged += step.unchanged
    total.added += step.added
    for sums, counts in ((total.dropped, step.dropped), (total.cut, step.cut)):
        for name, count in counts.items():
            sums[name] = sums.get(name, 0) + count


class Statistic(TypedDict):
    """What is read of a number of datatrove."""

    total: Finite


class TaskStep(TypedDict):
    """What is read of a step in datatrove's statistics of a task."""

    name: str
    stats: dict[str, Statistic | Finite]


def read_step(raw: TaskStep) -> StepCounts:
    """Parse one step of one task; a step without `forwarded` (a writer) forwards everything."""
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
    is_writer = "forwarded" not in counts and not dropped
    forwarded = total if is_writer else counts.get("forwarded", 0)
    cut = {name.removeprefix("cut_"): n for name, n in counts.items() if name.startswith("cut_")}
    return StepCounts(
        name,
        total,
        forwarded,
        dropped,
        characters=counts.get("doc_len", 0),
        cut=cut,
        files=counts.get("input_files", 0),
        unchanged=counts.get("unchanged", 0),
        added=counts.get("added", 0),
    )


def check_conservation(steps: list[StepCounts]) -> None:
    """Assert that no step loses a document, and that its input is the previous step's output."""
    for step in steps:
        assert step.total + step.added == step.forwarded + sum(step.dropped.values()), (
            f"documents lost inside a step: {step}"
        )
    for before, after in zip(steps, steps[1:], strict=False):
        assert before.forwarded == after.total, f"documents lost between steps: {before} -> {after}"


def check_files(source: str, steps: list[StepCounts], listing: Listing) -> None:
    """Assert that the first step opened every listed file once."""
    opened, listed = steps[0].files, len(listing.files)
    assert opened == listed, f"source {source}: {opened} of {listed} input files were read"


def check_yield(source: str, steps: list[StepCounts], min_yield: float) -> None:
    """Raise RuntimeError if text was extracted from less than `min_yield` of the pages."""
    for step in steps:
        pages, extracted = step.total - step.unchanged, step.forwarded - step.unchanged
        if EXTRACTOR in step.name and extracted < min_yield * pages:
            raise RuntimeError(
                f"source {source}: text was extracted from {extracted} of {pages} "
                f"pages, below min_yield {min_yield:.0%} ({step.dropped}): the extractor is "
                "broken or the input is not HTML; see its logs"
            )


def drop_reasons(steps: list[StepCounts]) -> str:
    """`step: reason n, reason n; step: ...`, most frequent first; empty if nothing was dropped."""
    return "; ".join(
        f"{step.name}: {ranked_reasons(step.dropped)}" for step in steps if step.dropped
    )


def ranked_reasons(dropped: dict[str, int]) -> str:
    """`reason n, reason n`, most frequent first."""
    return ", ".join(
        f"{reason} {n:,}" for reason, n in sorted(dropped.items(), key=lambda kv: (-kv[1], kv[0]))
    )


def table(steps: dict[str, list[StepCounts]]) -> list[str]:
    """Table of in, out and dropped by reason, per step and source; omits steps that only copy."""
    lines = [f"{'source':<14}{'step':<22}{'in':>13}{'out':>13}{'dropped':>12}  reasons"]
    for source, source_steps in steps.items():
        for index, step in enumerate(source_steps):
            if index and not step.dropped and not step.cut and not step.added:
                continue
            dropped = sum(step.dropped.values())
            row = f"{source:<14}{step.name:<22}{step.total:>13,}{step.forwarded:>13,}{dropped:>12,}"
            cut = f" (cut: {ranked_reasons(step.cut)})" if step.cut else ""
            cut += f" (split: {step.added:,} more parts)" if step.added else ""
            lines.append(f"{row}  {ranked_reasons(step.dropped)}{cut}".rstrip())
        total, out = source_steps[0].total, source_steps[-1].forwarded
        dropped = sum(sum(step.dropped.values()) for step in source_steps)
        lines.append(f"{source:<14}{'= all':<22}{total:>13,}{out:>13,}{dropped:>12,}")
    return lines


def token_table(steps: dict[str, list[StepCounts]], manifests: dict[str, Manifest]) -> list[str]:
    """Table of documents, tokens per split and bytes of every source."""
    lines = [f"{'source':<14}{'documents':>12}{'train tokens':>18}{'held out':>14}{'bytes':>18}"]
    for name, source_steps in steps.items():
        train, heldout = (manifests[name].tokens(split) for split in SPLITS)
        documents = source_steps[-1].forwarded
        num_bytes = manifests[name].dtype.itemsize * (train + heldout)
        lines.append(f"{name:<14}{documents:>12,}{train:>18,}{heldout:>14,}{num_bytes:>18,}")
    return lines
