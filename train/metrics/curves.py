"""Curves of runs over tokens, for curves.png and the HTML page of runs."""

from collections import Counter, deque
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogFormatter

from core.files import write_atomic
from core.run import RunFiles
from core.units import short
from train.metrics.records import POINTS, Record, curve, read_lines

PANELS = {  # panel -> title, and the key of a record for a curve over all sources
    "loss": ("loss, nats per token; of sources a running mean", "loss"),
    "validation": ("held-out loss, nats per token", None),
    "mixture": ("share of each source in the stage's tokens so far; dotted: planned", None),
    "rate": ("learning rate", "lr"),
    "batch": ("batch, sequences", "batch"),
    "context": ("context, tokens", "seq_len"),
    "gradient": ("gradient norm before clipping; crosses: skipped updates", "grad_norm"),
    "throughput": ("tokens per second", "tokens_per_second"),
    "utilisation": ("MFU", "mfu"),
    "waiting": ("data wait, seconds per step", "data_wait_seconds"),
}
IN_PICTURE = ("loss", "rate", "batch", "context")
STEPPED = ("mixture", "batch", "context")  # panels drawn as steps
DASHES = ("-", ":", "--", "-.", (0, (8, 2)), (0, (5, 1, 1, 1, 1, 1)))
SMOOTHED_STEPS = 5  # of the losses of sources, at least; a batch holds few sequences of a source
SMOOTHED_SHARE = 0.01  # of all steps
Mixture = dict[str, dict[str, float]]  # stage -> source -> share of the tokens
Points = list[tuple[int, float | None]]

matplotlib.rcParams |= {"text.parse_math": False, "svg.fonttype": "none"}  # names stay plain text


def draw(folder: Path) -> Path:
    """Write curves.png of a run; returns its path."""
    files = RunFiles(folder)
    picture = figure({folder.name: read_lines(files.metrics)}, {}, IN_PICTURE)
    write_atomic(files.curves, lambda file: picture.savefig(file, dpi=120))
    return files.curves


def figure(
    runs: dict[str, list[Record]],
    plans: dict[str, Mixture],
    panels: tuple[str, ...] = tuple(PANELS),
) -> Figure:
    """Panels of runs, one below another. A single run has a colour per source, several runs have a
    colour each. The MFU panel is left out if no run records MFU, as on CPUs.
    """
    if not any("mfu" in record for records in runs.values() for record in records):
        panels = tuple(name for name in panels if name != "utilisation")
    heights = [2 if name == "loss" else 1 for name in panels]
    result = Figure(figsize=(11, 2.4 * sum(heights)), layout="constrained")
    axes = result.subplots(len(panels), sharex=True, height_ratios=heights)
    max_points = max(200, POINTS // len(runs))
    for axis, name in zip(axes, panels, strict=True):
        axis.set_gid(name)
        axis.set_title(PANELS[name][0], loc="left", y=1.08)
        axis.tick_params(labelbottom=True)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short(tokens)))
        axis.grid(alpha=0.3)
        for index, (run, records) in enumerate(runs.items()):
            colour, label = (f"C{index}", run) if len(runs) > 1 else ("black", "all sources")
            _draw_total(axis, name, label, records, max_points, colour)
            if len(runs) == 1 or PANELS[name][1] is None:
                run_index = index if len(runs) > 1 else None
                _draw_sources(axis, name, run, records, plans.get(run, {}), max_points, run_index)
        _draw_stages(axis, next(iter(runs.values())))
        if len(axis.get_legend_handles_labels()[0]) > 1:
            axis.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize="small")
    axes[-1].set_xlabel("tokens")
    return result


def _draw_total(
    axis: Any, name: str, label: str, records: list[Record], max_points: int, colour: str
) -> None:
    """Draw the curve over all sources; mark skipped updates in the panel of gradient norms."""
    key = PANELS[name][1]
    if key is not None:
        x, y = curve([(record["tokens"], record.get(key)) for record in records], max_points)
        style = "steps-pre" if name in STEPPED else None
        axis.plot(x, y, color=colour, label=label, ds=style, zorder=3)  # above the sources
    if name == "gradient":
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter())
        # at the bottom of the panel: a skipped update has no finite norm
        x = [record["tokens"] for record in records if record["skipped"]]
        transform = axis.get_xaxis_transform()
        axis.plot(x, [0.04] * len(x), "x", color=colour, transform=transform)


def _draw_sources(
    axis: Any,
    name: str,
    run: str,
    records: list[Record],
    plan: Mixture,
    max_points: int,
    run_index: int | None,
) -> None:
    """Draw a curve per source. `run_index` chooses the colour of a run; None for a single run."""
    for index, (source, points) in enumerate(points_by_source(name, records).items()):
        style: dict[str, Any] = {"color": f"C{index}", "label": source, "lw": 0.8}
        if run_index is not None:
            dashes = DASHES[index % len(DASHES)]
            style |= {"color": f"C{run_index}", "label": f"{run}: {source}", "ls": dashes}
        marker = "." if name == "validation" else None
        drawn = "steps-pre" if name in STEPPED else None
        axis.plot(*curve(points, max_points), marker=marker, ds=drawn, **style)
        if name == "mixture" and run_index is None:
            axis.plot(*planned_curve(records, plan, source), color=style["color"], ls=":", lw=0.8)


def _draw_stages(axis: Any, records: list[Record]) -> None:
    """Draw a vertical line where each stage except the first begins."""
    for last, first in pairwise(records):
        if last["stage"] != first["stage"]:
            axis.axvline(last["tokens"], color="#555", ls="--", lw=1, zorder=1)
            axis.text(
                last["tokens"],
                1.03,
                first["stage"],
                color="#333",
                fontsize="small",
                transform=axis.get_xaxis_transform(),
            )


def points_by_source(name: str, records: list[Record]) -> dict[str, Points]:
    """Points of each source: training losses, held-out losses or shares; empty for other panels."""
    if name == "mixture":
        return actual_mixture(records)
    points: dict[str, Points] = {}
    if name == "validation":
        for record in records:
            for source, value in (record.get("validation") or {}).items():
                points.setdefault(source, []).append((record["tokens"], value["loss"]))
    if name == "loss":
        steps = max(SMOOTHED_STEPS, int(SMOOTHED_SHARE * len(records)))
        for _, stage in groupby(records, key=lambda record: record["stage"]):
            for source, losses in smoothed_losses(list(stage), steps).items():
                points.setdefault(source, []).extend(losses)
    return dict(sorted(points.items()))


def smoothed_losses(records: list[Record], steps: int) -> dict[str, Points]:
    """Mean loss of each source over its last `steps` steps of a stage, without None values."""
    points: dict[str, Points] = {}
    windows: dict[str, deque[float]] = {}
    for record in records:
        for source, loss in record["source_loss"].items():
            window = windows.setdefault(source, deque(maxlen=steps))
            if loss is not None:
                window.append(loss)
            mean = sum(window) / len(window) if window else None
            points.setdefault(source, []).append((record["tokens"], mean))
    return points


def actual_mixture(records: list[Record]) -> dict[str, Points]:
    """Share of each source in the tokens of the stage up to each step.

    Empty for records of older versions, which have no `source_tokens`.
    """
    points: dict[str, Points] = {}
    totals: Counter[str] = Counter()
    for previous, record in zip([None, *records], records, strict=False):
        if previous is None or previous["stage"] != record["stage"]:
            totals.clear()
        totals.update(record.get("source_tokens", {}))
        for source, tokens in totals.items():
            points.setdefault(source, []).append(
                (record["tokens"], tokens / max(1, totals.total()))
            )
    return dict(sorted(points.items()))


def planned_curve(
    records: list[Record], plan: Mixture, source: str
) -> tuple[list[int], list[float | None]]:
    """Planned share of a source, constant within a stage, with a gap between stages.

    Only stages that have started are included.
    """
    x: list[int] = []
    y: list[float | None] = []
    for stage, stage_records in groupby(records, key=lambda record: record["stage"]):
        tokens = [record["tokens"] for record in stage_records]
        share = plan.get(stage, {}).get(source)
        x += [tokens[0], tokens[-1], tokens[-1]]
        y += [share, share, None]
    return x, y
