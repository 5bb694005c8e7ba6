"""Runs on one page: curves and tables, without scripts and without a network."""

from collections import Counter
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup
from omegaconf import OmegaConf

from core.files import read_json, read_json_lines, write_text
from core.old_keys import load_config
from core.run import MANIFEST, RunFiles, iter_committed_checkpoints
from core.templates import render
from train.metrics.curves import Plan, figure
from train.metrics.records import Record, read_lines, read_scores, short
from train.resilience.incidents import read_outcome

TEMPLATE = Path(__file__).with_name("page.html.jinja")
Rows = list[tuple[Any, ...]]


def page(folders: list[Path], path: Path) -> Path:
    """One HTML file with every panel of every run, and what happened to them."""
    runs = {
        name: read_lines(RunFiles(folder).metrics)
        for name, folder in zip(names(folders), folders, strict=True)
    }
    configs = [config_of(folder) for folder in folders]
    plans = {name: planned(config) for name, config in zip(runs, configs, strict=True)}
    picture = StringIO()
    figure(runs, plans).savefig(picture, format="svg")
    svg = picture.getvalue()
    facts = [
        {
            "name": name,
            "facts": facts_of(folder, config, runs[name]),
            "mixture": mixture_rows(runs[name], plans[name]),
            "scores": score_tables(read_scores(RunFiles(folder).metrics)),
            "events": events_of(folder),
            "checkpoints": checkpoints_of(folder),
        }
        for name, folder, config in zip(runs, folders, configs, strict=True)
    ]
    write_text(path, render(TEMPLATE, picture=Markup(svg[svg.index("<svg") :]), runs=facts))
    return path


def names(folders: list[Path]) -> list[str]:
    """What each run is called: its folder, by the whole path where others are called the same."""
    short_ones = [folder.name for folder in folders]
    return (
        short_ones if len(set(short_ones)) == len(folders) else [str(folder) for folder in folders]
    )


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


def mixture_rows(records: list[Record], plan: Plan) -> Rows:
    """Stage, source, planned and realised share, tokens; nothing of records of older versions."""
    rows: Rows = []
    if not any("source_tokens" in record for record in records):
        return rows
    for stage, inside in groupby(records, key=lambda record: record["stage"]):
        read: Counter[str] = Counter()
        for record in inside:
            read.update(record.get("source_tokens", {}))
        for source in sorted({*plan.get(stage, {}), *read}):
            share = plan.get(stage, {}).get(source)
            said = "" if share is None else f"{share:.2%}"
            part = f"{read[source] / max(read.total(), 1):.2%}"
            rows.append((stage, source, said, part, short(read[source])))
    return rows


def facts_of(folder: Path, config: dict[str, Any], records: list[Record]) -> Rows:
    """Where the run stands."""
    outcome = read_outcome(folder)
    facts: Rows = [("state", "running or crashed" if outcome is None else outcome.reason)]
    if code := config.get("code"):
        facts.append(("code", code["commit"] + (", with changes" if code["dirty"] else "")))
    if records:
        last = records[-1]
        facts += [
            ("step", last["step"]),
            ("tokens", short(last["tokens"])),
            ("stage", last["stage"]),
            ("skipped updates", sum(bool(record["skipped"]) for record in records)),
        ]
    return facts


def events_of(folder: Path) -> Rows:
    """Starts, ends and incidents in the order of time."""
    files = RunFiles(folder)
    begun = [
        (e["time"], e["event"], e.get("reason") or ", ".join(e.get("nodes", [])))
        for e in read_json_lines(files.attempts)
    ]
    happened = [
        (e.get("time"), e.get("incident"), e.get("text")) for e in read_json_lines(files.incidents)
    ]
    return sorted([*begun, *happened], key=lambda event: str(event[0]))


def checkpoints_of(folder: Path) -> Rows:
    """Name, size and count of files of each committed checkpoint."""
    rows: Rows = []
    for checkpoint in reversed(list(iter_committed_checkpoints(RunFiles(folder).checkpoints))):
        files = read_json(checkpoint / MANIFEST).get("files", {}).values()
        size = sum(entry["bytes"] for entry in files)
        rows.append((checkpoint.name, f"{size / 2**30:.3g} GiB", len(files)))
    return rows


def score_tables(scores: list[Record]) -> dict[str, tuple[list[str], Rows]]:
    """Head and rows for each suite; a column for each checkpoint in the order of tokens."""
    tables = {}
    for suite in sorted({suite for record in scores for suite in record["scores"]}):
        columns = {r["tokens"]: r["scores"][suite] for r in scores if suite in r["scores"]}
        labels = dict.fromkeys(label for rows in columns.values() for label in rows)
        cells = [
            (label, *(f"{rows[label]:.2f}" if label in rows else "-" for rows in columns.values()))
            for label in labels
        ]
        tables[suite] = (["", *(f"{tokens:,} tokens" for tokens in columns)], cells)
    return tables
