"""Curves of runs over tokens: curves.png of one run, and all panels of a page."""

from collections import Counter
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from core.run import RunFiles
from train.metrics.records import POINTS, Record, curve, read_lines

PANELS = {  # title, key of a record
    "loss": ("loss, nats per token", "loss"),
    "validation": ("held-out loss, nats per token", None),
    "mixture": ("share of a stage's tokens so far by source, planned ones dotted", None),
    "rate": ("learning rate", "lr"),
    "batch": ("batch, sequences", "batch"),
    "context": ("context, tokens", "seq_len"),
    "gradient": ("gradient norm before clipping, skipped updates crossed", "grad_norm"),
    "throughput": ("tokens per second", "tokens_per_second"),
    "utilisation": ("MFU", "mfu"),
    "waiting": ("seconds of a step spent waiting for data", "data_wait_seconds"),
}
IN_PICTURE = ("loss", "rate", "batch", "context")
STEPPED = ("batch", "context")  # panels of what jumps
DASHES = ("-", ":", "--", "-.", (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)))
Plan = dict[str, dict[str, float]]  # stage, source -> share
Points = list[tuple[int, float | None]]

matplotlib.rcParams |= {"text.parse_math": False, "svg.fonttype": "none"}  # names are text


def draw(folder: Path) -> Path:
    """Write curves.png of a run; returns its path."""
    files = RunFiles(folder)
    figure({folder.name: read_lines(files.metrics)}, {}, IN_PICTURE).savefig(files.curves, dpi=120)
    return files.curves


def figure(
    runs: dict[str, list[Record]], plans: dict[str, Plan], panels: tuple[str, ...] = tuple(PANELS)
) -> Figure:
    """Panels of runs, one below another: a colour per run, or per source where there is one run.

    Runs without MFU, as on CPUs, have no panel of it.
    """
    if not any("mfu" in record for records in runs.values() for record in records):
        panels = tuple(name for name in panels if name != "utilisation")
    heights = [2 if name == "loss" else 1 for name in panels]
    whole = Figure(figsize=(11, 2.2 * sum(heights)), layout="constrained")
    axes = whole.subplots(len(panels), sharex=True, height_ratios=heights)
    for axis, name in zip(axes, panels, strict=True):
        axis.set_gid(name)
        axis.set_title(PANELS[name][0], loc="left", y=1.06)
        axis.tick_params(labelbottom=True)
        axis.grid(alpha=0.3)
        most = max(200, POINTS // len(runs))
        for number, (run, records) in enumerate(runs.items()):
            _total(axis, name, run, records, most, f"C{number}" if len(runs) > 1 else "black")
            if len(runs) == 1 or PANELS[name][1] is None:
                several = number if len(runs) > 1 else None
                _sources(axis, name, run, records, plans.get(run, {}), most, several)
        _stages(axis, next(iter(runs.values())))
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    axes[-1].set_xlabel("tokens")
    return whole


def _total(axis: Any, name: str, run: str, records: list[Record], most: int, colour: str) -> None:
    key = PANELS[name][1]
    if key is not None:
        x, y = curve([(record["tokens"], record.get(key)) for record in records], most)
        axis.plot(x, y, color=colour, label=run, ds="steps-pre" if name in STEPPED else None)
    if name == "gradient":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter())
        # at the panel's foot: a skipped update has no finite norm
        x = [record["tokens"] for record in records if record["skipped"]]
        foot = axis.get_xaxis_transform()
        axis.plot(x, [0.04] * len(x), "x", color=colour, transform=foot)


def _sources(
    axis: Any,
    name: str,
    run: str,
    records: list[Record],
    plan: Plan,
    most: int,
    several: int | None,
) -> None:
    """Curves of each source; `several` is the number of the run among several."""
    for place, (source, points) in enumerate(by_source(name, records).items()):
        look: dict[str, Any] = {"color": f"C{place}", "label": source, "lw": 0.8}
        if several is not None:
            dash = DASHES[place % len(DASHES)]
            look |= {"color": f"C{several}", "label": f"{run}: {source}", "ls": dash}
        axis.plot(*curve(points, most), marker="." if name == "validation" else None, **look)
        if name == "mixture" and several is None:
            axis.plot(*plan_line(records, plan, source), color=look["color"], ls=":", lw=0.8)


def _stages(axis: Any, records: list[Record]) -> None:
    """A line where each stage but the first begins."""
    for before, after in pairwise(records):
        if before["stage"] != after["stage"]:
            axis.axvline(before["tokens"], color="gray", ls=":")
            axis.text(
                before["tokens"],
                1.01,
                after["stage"],
                color="gray",
                fontsize="small",
                transform=axis.get_xaxis_transform(),
            )


def by_source(name: str, records: list[Record]) -> dict[str, Points]:
    """Points of each source: training losses, measured held-out losses, or shares; else nothing."""
    if name == "mixture":
        return realised(records)
    found: dict[str, Points] = {}
    if name in ("loss", "validation"):
        for record in records:
            losses = record["source_loss"] if name == "loss" else record.get("validation") or {}
            for source, value in losses.items():
                loss = value if name == "loss" else value["loss"]
                found.setdefault(source, []).append((record["tokens"], loss))
    return dict(sorted(found.items()))


def realised(records: list[Record]) -> dict[str, Points]:
    """Share of each source in its stage's tokens up to each step; older records have no tokens."""
    found: dict[str, Points] = {}
    read: Counter[str] = Counter()
    for before, record in zip([None, *records], records, strict=False):
        if before is None or before["stage"] != record["stage"]:
            read.clear()
        read.update(record.get("source_tokens", {}))
        for source, tokens in read.items():
            found.setdefault(source, []).append((record["tokens"], tokens / read.total()))
    return dict(sorted(found.items()))


def plan_line(
    records: list[Record], plan: Plan, source: str
) -> tuple[list[int], list[float | None]]:
    """A source's planned share in the stages begun so far: constant per stage, gaps in between."""
    x: list[int] = []
    y: list[float | None] = []
    for stage, inside in groupby(records, key=lambda record: record["stage"]):
        tokens = [record["tokens"] for record in inside]
        share = plan.get(stage, {}).get(source)
        x += [tokens[0], tokens[-1], tokens[-1]]
        y += [share, share, None]
    return x, y
