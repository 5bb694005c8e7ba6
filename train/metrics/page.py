"""HTML page of one or more runs: curves and tables, without scripts or network requests."""

from collections import Counter
from io import StringIO
from itertools import groupby
from pathlib import Path
from typing import Any

from markupsafe import Markup
from typing_extensions import TypedDict

from core.files import write_text
from core.old_keys import read_record
from core.ranges import Finite, Whole
from core.records import DamagedRecord, read_or_rebuild, read_typed, read_typed_lines
from core.run import MANIFEST, RunFiles, iter_committed_checkpoints
from core.templates import render
from core.units import short
from model.checkpoint_records import ManifestRecord
from train.metrics.curves import Mixture, figure
from train.metrics.forgetting import TITLES, forgetting_rows
from train.metrics.records import Record, read_initial, read_lines, read_scores
from train.resilience.incidents import ATTEMPT, Incident, describe_state

SETTINGS = (
    *("model.d_model", "model.n_layer", "model.vocab_size", "optim.lr", "schedule.min_lr"),
    *("schedule.warmup_tokens", "schedule.decay_tokens", "schedule.batch_end_sequences"),
    *("parallel.engine", "compute.precision", "compute.kernels", "run.seed", "run.init_from"),
)
TEMPLATE = Path(__file__).with_name("page.html.jinja")
Rows = list[tuple[Any, ...]]


class HeldoutRow(TypedDict):
    """A source's row of eval.json, or that of all sources."""

    tokens: Whole
    bits_per_byte: Finite
    unigram_bits_per_byte: Finite


class Evaluation(TypedDict):
    """What is shown of eval.json."""

    checkpoint: str
    heldout: dict[str, HeldoutRow]
    sample: str


def page(folders: list[Path], path: Path, refresh_seconds: int | None = None) -> Path:
    """Write one HTML file with the curves and tables of all runs; returns its path.

    A browser loads it again every `refresh_seconds`; None for a page that is not written again.
    """
    runs = {
        name: read_lines(RunFiles(folder).metrics)
        for name, folder in zip(run_names(folders), folders, strict=True)
    }
    configs = [read_record(RunFiles(folder).config) for folder in folders]
    plans = {name: planned_mixture(config) for name, config in zip(runs, configs, strict=True)}
    picture = StringIO()
    figure(runs, plans).savefig(picture, format="svg")
    svg = picture.getvalue()
    tables = [
        {
            "name": name,
            "facts": fact_rows(folder, config, runs[name]),
            "settings": setting_rows(config),
            "config": config_text(folder),
            "heldout": heldout_rows(evaluation := read_evaluation(folder)),
            "evaluation": evaluation,
            "mixture": mixture_rows(runs[name], plans[name]),
            "forgetting": forgetting_rows(
                config, read_initial(RunFiles(folder).metrics), runs[name]
            ),
            "scores": score_tables(read_scores(RunFiles(folder).metrics)),
            "starts": start_rows(config),
            "events": event_rows(folder),
            "checkpoints": checkpoint_rows(folder),
        }
        for name, folder, config in zip(runs, folders, configs, strict=True)
    ]
    values = {"picture": Markup(svg[svg.index("<svg") :]), "runs": tables}
    write_text(
        path,
        render(TEMPLATE, **values, forgetting_titles=TITLES, refresh_seconds=refresh_seconds),
    )
    return path


def run_names(folders: list[Path]) -> list[str]:
    """Names of the folders, or their full paths if two have the same name."""
    names = [folder.name for folder in folders]
    return names if len(set(names)) == len(folders) else [str(folder) for folder in folders]


def planned_mixture(config: dict[str, Any]) -> Mixture:
    """Planned share of each source in the tokens of each stage."""
    stages = config.get("data", {}).get("stages", [])
    return {
        stage["name"]: {
            source: weight / (sum(stage["mixture"].values()) or 1)
            for source, weight in stage["mixture"].items()
        }
        for stage in stages
    }


def mixture_rows(records: list[Record], plan: Mixture) -> Rows:
    """Stage, source, planned and actual share, tokens.

    Empty for records of older versions, which have no `source_tokens`.
    """
    rows: Rows = []
    if not any("source_tokens" in record for record in records):
        return rows
    for stage, stage_records in groupby(records, key=lambda record: record["stage"]):
        tokens: Counter[str] = Counter()
        for record in stage_records:
            tokens.update(record.get("source_tokens", {}))
        for source in sorted({*plan.get(stage, {}), *tokens}):
            share = plan.get(stage, {}).get(source)
            planned = "" if share is None else f"{share:.2%}"
            actual = f"{tokens[source] / max(tokens.total(), 1):.2%}"
            rows.append((stage, source, planned, actual, short(tokens[source])))
    return rows


def fact_rows(folder: Path, config: dict[str, Any], records: list[Record]) -> Rows:
    """State, commit and progress of a run."""
    rows: Rows = [("state", describe_state(folder))]
    if commit := config.get("code", {}).get("commit"):
        rows.append(("code", commit + (", with changes" if config["code"].get("dirty") else "")))
    if records:
        last = records[-1]
        rows += [
            ("step", last["step"]),
            ("tokens", short(last["tokens"])),
            ("stage", last["stage"]),
            ("loss", "not finite" if last["loss"] is None else f"{last['loss']:.3f}"),
            ("held-out loss", heldout_text(records)),
            ("skipped updates", sum(bool(record["skipped"]) for record in records)),
        ]
    return rows


def heldout_text(records: list[Record]) -> str:
    """The newest held-out loss of each source, and the tokens at which it was measured."""
    newest = next((record for record in reversed(records) if record.get("validation")), None)
    if newest is None:
        return "not measured yet"
    losses = [
        f"{name} {'-' if score['loss'] is None else format(score['loss'], '.3f')}"
        for name, score in newest["validation"].items()
    ]
    return f"{', '.join(losses)} at {short(newest['tokens'])} tokens"


def setting_rows(config: dict[str, Any]) -> Rows:
    """The settings that a reader of the curves asks for first, as far as the record has them."""
    rows: Rows = []
    for key in SETTINGS:
        section, _, name = key.partition(".")
        value = (config.get(section) or {}).get(name)
        if value is not None:
            rows.append((key, f"{value:,}" if isinstance(value, int) else value))
    for stage in config.get("data", {}).get("stages", []):
        if "tokens" in stage and "seq_len" in stage:
            text = f"{short(stage['tokens'])} tokens, context {stage['seq_len']:,}"
            rows.append((f"stage {stage['name']}", text))
    return rows


def config_text(folder: Path) -> str:
    """config.yaml as it is in the folder; empty without one."""
    path = RunFiles(folder).config
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def read_evaluation(folder: Path) -> Evaluation | None:
    """Scores and sample of eval.json; None if it is absent or damaged."""
    return read_or_rebuild(
        RunFiles(folder).evaluation, Evaluation, "it is left out of the page", extra="ignore"
    )


def heldout_rows(evaluation: Evaluation | None) -> Rows:
    """Source, tokens, bits per byte, those of the unigram model, and how many fewer they are."""
    if evaluation is None:
        return []
    return [
        (
            source,
            f"{row['tokens']:,}",
            f"{row['bits_per_byte']:.3f}",
            f"{row['unigram_bits_per_byte']:.3f}",
            f"{1 - row['bits_per_byte'] / (row['unigram_bits_per_byte'] or 1):.0%}",
        )
        for source, row in evaluation["heldout"].items()
    ]


def start_rows(config: dict[str, Any]) -> Rows:
    """Time, tokens, ranks, commit and torch of each start, and what differs from the one before."""
    rows: Rows = []
    for entry in config.get("history") or []:
        changes = {**entry.get("decisive", {}), **entry.get("operational", {})}
        texts = [f"{key} {before} -> {now}" for key, (before, now) in changes.items()]
        texts += [
            f"{key.replace('_', ' ')} {entry[key]}"
            for key in ("branch_of", "initial_weights")
            if key in entry
        ]
        commit = entry["code"].get("commit", "")[:12]
        tokens, torch_version = short(entry["tokens"]), entry["versions"].get("torch", "")
        rows.append(
            (entry["time"], tokens, entry["ranks"], commit, torch_version, "; ".join(texts))
        )
    return rows


def event_rows(folder: Path) -> Rows:
    """Starts, ends and incidents, ordered by time."""
    files = RunFiles(folder)
    attempts = [
        (e["time"], e["event"], e.get("reason") or ", ".join(e.get("nodes", [])))
        for e in read_typed_lines(files.attempts, ATTEMPT)
    ]
    incidents = [
        (e["time"], e["incident"], e["text"]) for e in read_typed_lines(files.incidents, Incident)
    ]
    return sorted([*attempts, *incidents], key=lambda event: event[0])


def checkpoint_rows(folder: Path) -> Rows:
    """Name, size and number of files of each committed checkpoint, oldest first."""
    rows: Rows = []
    for checkpoint in reversed(list(iter_committed_checkpoints(RunFiles(folder).checkpoints))):
        try:
            files = read_typed(checkpoint / MANIFEST, ManifestRecord).files.values()
        except (OSError, DamagedRecord):
            rows.append((checkpoint.name, "unknown", f"{MANIFEST} is damaged"))
            continue
        size = sum(file.bytes for file in files)
        rows.append((checkpoint.name, f"{size / 2**30:.3g} GiB", len(files)))
    return rows


def format_score(score: float | None) -> str:
    """A score of a table; a dash for one that is missing or was not finite."""
    return "-" if score is None else f"{score:.2f}"


def score_tables(scores: list[Record]) -> dict[str, tuple[list[str], Rows]]:
    """Column titles and rows of each suite; a column per checkpoint, ordered by tokens."""
    tables = {}
    for suite in sorted({suite for record in scores for suite in record["scores"]}):
        columns = {r["tokens"]: r["scores"][suite] for r in scores if suite in r["scores"]}
        labels = dict.fromkeys(label for rows in columns.values() for label in rows)
        cells = [
            (label, *map(format_score, (rows.get(label) for rows in columns.values())))
            for label in labels
        ]
        tables[suite] = (["", *(f"{tokens:,} tokens" for tokens in columns)], cells)
    return tables
