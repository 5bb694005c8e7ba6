"""Runs on one page, with Plotly and without a network."""

import html
from collections import Counter
from itertools import groupby
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from core.files import read_json, read_json_lines, write_text
from core.old_keys import load_config
from core.run import MANIFEST, RunFiles, committed
from train.metrics.records import Record, curve, read_lines, read_scores, short
from train.resilience.incidents import read_outcome

COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f")
DASHES = ("solid", "dot", "dash", "longdash", "dashdot", "longdashdot")
PANELS = {
    "loss": ("loss, nats per token", ["loss"]),
    "validation": ("held-out loss, nats per token", []),
    "mixture": ("share of a stage's tokens so far by source, planned ones dotted", []),
    "rate": ("learning rate", ["lr"]),
    "batch": ("batch, sequences", ["batch"]),
    "context": ("context, tokens", ["seq_len"]),
    "gradient": ("gradient norm before clipping", ["grad_norm"]),
    "throughput": ("tokens per second", ["tokens_per_second"]),
    "utilisation": ("MFU", ["mfu"]),
    "waiting": ("seconds of a step spent waiting for data", ["data_wait_seconds"]),
}
BY_SOURCE = ("loss", "validation", "mixture")
STEPPED = ("batch", "context")  # panels of what jumps
Plan = dict[str, dict[str, float]]  # stage, source -> share


def page(folders: list[Path], path: Path) -> Path:
    """One HTML file with every panel of every run, and what happened to them; it holds Plotly
    itself (5 MB).
    """
    from plotly.offline import get_plotlyjs

    runs = {
        name: read_lines(RunFiles(folder).metrics)
        for name, folder in zip(names(folders), folders, strict=True)
    }
    parts = [
        '<!doctype html><html><head><meta charset="utf-8"><title>'
        + html.escape(", ".join(runs))
        + "</title>",
        "<style>body{font:15px "
        "sans-serif;margin:2em}table{border-collapse:collapse}td,th{padding:.2em "
        ".8em;text-align:left;border-bottom:1px solid #ddd}</style>",
        f"<script>{get_plotlyjs()}</script></head><body><h1>{html.escape(', '.join(runs))}</h1>",
    ]
    plans = {name: planned(config_of(folder)) for name, folder in zip(runs, folders, strict=True)}
    parts += [panel(name, runs, plans) for name in PANELS]
    for name, folder in zip(runs, folders, strict=True):
        parts += [f"<h2>{html.escape(name)}</h2>", *tables(folder, runs[name])]
    write_text(path, "\n".join([*parts, "</body></html>\n"]))
    return path


def names(folders: list[Path]) -> list[str]:
    """What each run is called: its folder, by the whole path where others are called the same."""
    short_ones = [folder.name for folder in folders]
    return (
        short_ones if len(set(short_ones)) == len(folders) else [str(folder) for folder in folders]
    )


def panel(name: str, runs: dict[str, list[Record]], plans: dict[str, Plan]) -> str:
    """One figure: a colour per run; sources of a loss are dashed and, with several runs, hidden at
    first.
    """
    import plotly.graph_objects as go

    title, keys = PANELS[name]
    figure = go.Figure()
    for number, (run, records) in enumerate(runs.items()):
        colour = COLOURS[number % len(COLOURS)]
        for key in keys:
            x, y = curve([(record["tokens"], record[key]) for record in records])
            shape = "vh" if name in STEPPED else "linear"
            figure.add_scatter(
                x=x, y=y, name=run, mode="lines", line={"color": colour, "width": 2, "shape": shape}
            )
        if name in BY_SOURCE:
            for place, (source, points) in enumerate(by_source(name, records).items()):
                x, y = curve(points)
                line = {
                    "color": COLOURS[place % len(COLOURS)] if len(runs) == 1 else colour,
                    "width": 1,
                }
                line["dash"] = "solid" if len(runs) == 1 else DASHES[place % len(DASHES)]
                hidden = "legendonly" if len(runs) > 1 and name == "loss" else True
                mode = "lines+markers" if name == "validation" else "lines"
                figure.add_scatter(
                    x=x, y=y, name=f"{run}: {source}", mode=mode, line=line, visible=hidden
                )
                if name == "mixture" and len(runs) == 1:
                    x, y = plan_line(records, plans[run], source)
                    line = {"color": line["color"], "width": 1, "dash": "dot"}
                    figure.add_scatter(
                        x=x, y=y, name=f"{run}: {source}, planned", mode="lines", line=line
                    )
        if name == "gradient":
            skipped = [record for record in records if record["skipped"]]
            figure.add_scatter(
                x=[record["tokens"] for record in skipped],
                y=[record["grad_norm"] for record in skipped],
                name=f"{run}: skipped updates",
                mode="markers",
                marker={"color": colour, "symbol": "x", "size": 9},
            )
        for before, after in zip(records, records[1:], strict=False):
            if before["stage"] != after["stage"] and number == 0:
                figure.add_vline(
                    before["tokens"],
                    line_dash="dot",
                    line_color="gray",
                    annotation_text=after["stage"],
                    annotation_yanchor="bottom",
                )
    figure.update_layout(
        title=title, xaxis_title="tokens", template="simple_white", height=420, showlegend=True
    )
    if name == "gradient":
        figure.update_yaxes(type="log")
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=name)


def by_source(name: str, records: list[Record]) -> dict[str, list[tuple[int, float | None]]]:
    """Points of each source: training losses, held-out ones where they were measured, or shares of
    the tokens.
    """
    if name == "mixture":
        return realised(records)
    found: dict[str, list[tuple[int, float | None]]] = {}
    for record in records:
        losses = record["source_loss"] if name == "loss" else record.get("validation") or {}
        for source, value in losses.items():
            found.setdefault(source, []).append(
                (record["tokens"], value if name == "loss" else value["loss"])
            )
    return dict(sorted(found.items()))


def config_of(folder: Path) -> dict[str, Any]:
    """What the run was told, or nothing."""
    path = RunFiles(folder).config
    found: Any = OmegaConf.to_container(load_config(path)) if path.is_file() else {}
    return dict(found)


def planned(config: dict[str, Any]) -> Plan:
    """Share of each source in the tokens of each stage."""
    stages = config.get("data", {}).get("stages", [])
    return {
        stage["name"]: {
            source: part / sum(stage["mixture"].values())
            for source, part in stage["mixture"].items()
        }
        for stage in stages
    }


def realised(records: list[Record]) -> dict[str, list[tuple[int, float | None]]]:
    """Share of each source in the tokens of its stage up to each step; records of older versions
    have no tokens.
    """
    found: dict[str, list[tuple[int, float | None]]] = {}
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
    """A source's planned share over the stages that the run has come to: flat pieces with gaps
    between them.
    """
    x: list[int] = []
    y: list[float | None] = []
    for stage, inside in groupby(records, key=lambda record: record["stage"]):
        tokens = [record["tokens"] for record in inside]
        share = plan.get(stage, {}).get(source)
        x += [tokens[0], tokens[-1], tokens[-1]]
        y += [share, share, None]
    return x, y


def mixture_rows(records: list[Record], plan: Plan) -> list[tuple[Any, ...]]:
    """Stage, source, planned and realised share, tokens."""
    rows = []
    for stage, inside in groupby(records, key=lambda record: record["stage"]):
        read: Counter[str] = Counter()
        for record in inside:
            read.update(record.get("source_tokens", {}))
        for source in sorted({*plan.get(stage, {}), *read}):
            share = plan.get(stage, {}).get(source)
            said = "" if share is None else f"{share:.2%}"
            rows.append(
                (
                    stage,
                    source,
                    said,
                    f"{read[source] / max(read.total(), 1):.2%}",
                    short(read[source]),
                )
            )
    return rows


def tables(folder: Path, records: list[Record]) -> list[str]:
    """Where the run stands, its starts and incidents, its checkpoints."""
    outcome = read_outcome(folder)
    last = records[-1] if records else None
    facts: list[tuple[str, Any]] = [
        ("state", "running or crashed" if outcome is None else outcome.reason)
    ]
    config = config_of(folder)
    if code := config.get("code"):
        facts.append(("code", code["commit"] + (", with changes" if code["dirty"] else "")))
    if last is not None:
        facts += [
            ("step", last["step"]),
            ("tokens", short(last["tokens"])),
            ("stage", last["stage"]),
        ]
        facts.append(("skipped updates", sum(bool(record["skipped"]) for record in records)))
    starts = read_json_lines(RunFiles(folder).attempts)
    begun = [
        (e["time"], e["event"], e.get("reason") or ", ".join(e.get("nodes", []))) for e in starts
    ]
    happened = [
        (e.get("time"), e.get("incident"), e.get("text"))
        for e in read_json_lines(RunFiles(folder).incidents)
    ]
    events = sorted([*begun, *happened], key=lambda event: str(event[0]))
    saved = []
    for checkpoint in reversed(list(committed(RunFiles(folder).checkpoints))):
        sizes = [
            entry["bytes"] for entry in read_json(checkpoint / MANIFEST).get("files", {}).values()
        ]
        saved.append((checkpoint.name, f"{sum(sizes) / 2**30:.3g} GiB", len(sizes)))
    mixture = (
        mixture_rows(records, planned(config))
        if any("source_tokens" in record for record in records)
        else []
    )
    return [
        table(("", ""), facts),
        "<h3>mixture</h3>",
        table(("stage", "source", "planned", "realised", "tokens"), mixture)
        if mixture
        else "<p>not recorded</p>",
        *score_tables(read_scores(RunFiles(folder).metrics)),
        "<h3>starts, restarts and faults</h3>",
        table(("time", "what", ""), events) if events else "<p>none</p>",
        "<h3>checkpoints</h3>",
        table(("name", "size", "files"), saved) if saved else "<p>none</p>",
    ]


def score_tables(scores: list[Record]) -> list[str]:
    """A table for each suite: its rows, and a column for each checkpoint in the order of tokens."""
    parts = []
    for suite in sorted({suite for record in scores for suite in record["scores"]}):
        columns = [
            (record["tokens"], record["scores"][suite])
            for record in scores
            if suite in record["scores"]
        ]
        labels = dict.fromkeys(label for _, rows in columns for label in rows)
        cells = [
            (label, *(f"{rows[label]:.2f}" if label in rows else "-" for _, rows in columns))
            for label in labels
        ]
        head = ("", *(f"{tokens:,} tokens" for tokens, _ in columns))
        parts += [f"<h3>{html.escape(suite)}</h3>", table(head, cells)]
    return parts


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    """A table of escaped text."""
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    top = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    return f"<table><tr>{top}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"
