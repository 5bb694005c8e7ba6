"""Run a leaderboard suite with lm-evaluation-harness and print it beside published scores.

A checkpoint is scored with our model, a Hugging Face folder with the harness's HFLM. Each row is
saved to `scores/SUITE-MODEL.json` in the run's folder as soon as it is done; a row saved there for
the same weights is not run again. Under torchrun each rank scores a part of the documents.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.table import Table

from core.console import table_console
from core.errors import InputError
from core.files import make_folder, write_json
from eval.config import EvaluationConfig, Suite, SuiteRow
from eval.leaderboard.hub import use_cache_without_hub
from eval.leaderboard.stored import read_stored
from eval.model_source import ModelSource, find_model

logger = logging.getLogger(__name__)

Result = dict[str, Any]
MIN_WIDTH = 110  # console columns of a table
FIX = (
    "run once with network access to fill the data set cache (HF_HOME), or set "
    "leaderboard.suite.include to a folder of task files"
)
# above 0 for standard errors; those of means are computed exactly, without bootstrap
BOOTSTRAP_ITERS = 100


def run_suite(config: EvaluationConfig) -> None:
    """Score all rows of the suite; raises InputError at the end if some could not be loaded."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    suite = config.leaderboard.suite
    assert suite is not None
    source = find_model(config)
    path = source.results_dir / f"{suite.name}-{source.name}.json"
    provenance = {
        **source.provenance,
        "suite": suite.name,
        "max_length": suite.max_length_tokens,
        "limit": suite.limit_documents,
    }
    stored = read_stored(path, "its rows are scored again")
    results: dict[str, Result] = {}
    if {key: stored.get(key) for key in provenance} == provenance:
        results = {
            row.label: entry
            for row in suite.rows
            if (entry := stored["rows"].get(row.label)) and is_result_of(entry, row)
        }
    missing: dict[str, str] = {}
    pending = [row for row in suite.rows if row.label not in results]
    is_first = int(os.environ.get("RANK", "0")) == 0
    run_row = build_runner(config, source) if pending else None
    for row in pending:
        assert run_row is not None
        try:
            raw = run_row(row)
        except MissingTaskError as error:
            missing[row.label] = str(error)
            if is_first:
                logger.warning(f"{suite.name}: {row.label} is not scored: {error}: {FIX}")
            continue
        if raw is not None:  # on rank 0
            results[row.label] = {"row": asdict(row), **score_row(row, raw)}
            write_results(path, provenance, suite, results)
    if missing and is_first:
        write_results(path, provenance, suite, results, missing)
    if dist.is_initialized():
        dist.destroy_process_group()
    if is_first:
        table_console(max(MIN_WIDTH, table_console().width)).print(
            score_table(suite, source.name, results, other_checkpoints(suite, path))
        )
        logger.info(f"scores: {path}" if results else "no row was scored")
    if missing:
        raise InputError(
            f"{len(missing)} of {len(suite.rows)} rows of {suite.name} were not scored "
            f"({', '.join(missing)}): {FIX}"
        )


def write_results(
    path: Path,
    provenance: Result,
    suite: Suite,
    rows: Result,
    missing: dict[str, str] | None = None,
) -> None:
    """Write the finished rows; `missing` maps each row that failed to its error."""
    make_folder(path.parent)
    complete = len(rows) == len(suite.rows)
    write_json(path, {**provenance, "complete": complete, "rows": rows, "missing": missing or {}})


def is_result_of(entry: Result, row: SuiteRow) -> bool:
    """Whether a stored result was scored with the same row settings."""
    return bool(entry.get("row") == asdict(row))


class MissingTaskError(Exception):
    """The task or data set of a row cannot be loaded."""


def build_runner(
    config: EvaluationConfig, source: ModelSource
) -> Callable[[SuiteRow], Result | None]:
    """Return a function that runs a row and returns the harness's results on rank 0, else None."""
    use_cache_without_hub()  # before lm_eval imports huggingface_hub
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from eval.leaderboard.harness import load_language_model

    suite = config.leaderboard.suite
    assert suite is not None
    # lm_eval warns at every row that shots were set
    logging.getLogger("lm_eval").setLevel(logging.ERROR)

    @cache
    def load_model() -> Any:  # when a row has its data
        return load_language_model(source, suite.max_length_tokens, config.leaderboard.batch_tokens)

    manager = TaskManager(include_path=suite.include, include_defaults=suite.include is None)
    if any(row.task not in manager.all_tasks for row in suite.rows) and suite.include is not None:
        # index lm_eval's own tasks only if needed: reading its 14,000 files takes seconds
        manager = TaskManager(include_path=suite.include)

    def run_row(row: SuiteRow) -> Result | None:
        try:
            tasks = manager.load([row.task])["tasks"]
        except Exception as error:  # datasets, the hub and task modules raise any type
            raise MissingTaskError(format_load_error(row, error)) from error
        logger.info(f"{suite.name}: {row.label} ({row.task}, {row.shots} shots)")
        evaluated: Any = simple_evaluate(
            model=load_model(),
            tasks=list(tasks.values()),
            num_fewshot=row.shots,
            limit=suite.limit_documents,
            bootstrap_iters=BOOTSTRAP_ITERS,
            log_samples=False,
            task_manager=manager,
        )
        if evaluated is None:
            return None
        samples = evaluated["n-samples"]
        return {
            name: {**evaluated["results"][name], "documents": samples[name]["effective"]}
            for name in tasks
        }

    return run_row


def format_load_error(row: SuiteRow, error: Exception) -> str:
    """Format the task, and the type and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    first_line = lines[0][:120] if lines else "no message"
    return f"{row.task} ({type(error).__name__}: {first_line})"


def score_row(row: SuiteRow, raw: Result) -> Result:
    """Return a row's score in percent, its standard error and the scores of its subtasks.

    `raw` holds the harness's results of each subtask. Subtask errors count as independent. The
    error of a subtask with two metrics is their mean, since both use the same documents.
    """
    weights = [subtask["documents"] if row.by_size else 1 for subtask in raw.values()]
    if not sum(weights):
        raise InputError(f"{row.label}: the harness scored no document of {row.task}")
    values = []
    errors = []
    parts = {}
    for name, subtask in raw.items():
        floor = row.floors.get(name, row.floor)
        value = sum(subtask[metric] for metric in row.metrics) / len(row.metrics)
        stderrs = [subtask.get(metric.replace(",", "_stderr,", 1)) for metric in row.metrics]
        known = [float(error) for error in stderrs if isinstance(error, int | float)]
        values.append(100 * value)
        errors.append(100 * mean(known) if known else math.nan)
        parts[name] = {
            "raw": 100 * value,
            "documents": subtask["documents"],
            "floor": 100 * floor,
        }
    if row.by_size:  # subtract the floor from the group's score
        group_mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        scale = 1 / (1 - row.floor)
        total = max(0.0, (group_mean - 100 * row.floor) * scale)
        scales = [scale] * len(values)
    else:
        scales = [1 / (1 - part["floor"] / 100) for part in parts.values()]
        rescaled = [
            max(0.0, (value - part["floor"]) * scale)
            for value, part, scale in zip(values, parts.values(), scales, strict=True)
        ]
        total = mean(rescaled)
    variance = sum(
        (weight * scale * error / sum(weights)) ** 2
        for weight, scale, error in zip(weights, scales, errors, strict=True)
    )
    stderr = math.sqrt(variance)
    return {"score": total, "stderr": stderr if math.isfinite(stderr) else None, "parts": parts}


def mean(values: list[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def other_checkpoints(suite: Suite, path: Path) -> dict[str, list[float]]:
    """Complete scores of the run's other checkpoints, such as before and after the decay."""
    scores = {}
    for other in sorted(path.parent.glob(f"{suite.name}-*.json")):
        stored = read_stored(other, "it is left out")
        rows = [stored.get("rows", {}).get(row.label) for row in suite.rows]
        if other != path and all(
            entry and is_result_of(entry, row) for entry, row in zip(rows, suite.rows, strict=True)
        ):
            tokens = f"\n{stored['tokens']:,} tokens" if "tokens" in stored else ""
            name = other.stem.removeprefix(f"{suite.name}-") + tokens
            scores[name] = [entry["score"] for entry in rows]
    return scores


def score_table(
    suite: Suite,
    name: str,
    results: dict[str, Result],
    others: dict[str, list[float]] | None = None,
) -> Table:
    """Table of the model's scores with standard errors, then of other checkpoints and models.

    Below each of the others' scores is the model's score minus it.
    """
    table = Table(title=f"{suite.name}; below each score: {name} minus it")
    for label in ("model", *(row.label for row in suite.rows), "average"):
        table.add_column(label, no_wrap=True)
    scores = [results[row.label]["score"] if row.label in results else None for row in suite.rows]
    errors = [results[row.label]["stderr"] if row.label in results else None for row in suite.rows]
    known_scores = [score for score in scores if score is not None]
    known_errors = [error for error in errors if error is not None]
    average = average_error = None
    if len(known_scores) == len(scores):
        average = mean(known_scores)
    if len(known_errors) == len(errors):
        average_error = math.sqrt(sum(error**2 for error in known_errors)) / len(errors)
    cells = [format_score(score, error) for score, error in zip(scores, errors, strict=True)]
    table.add_row(name, *cells, format_score(average, average_error), style="bold")
    for model, published in {**(others or {}), **suite.published}.items():
        cells = [format_difference(*pair) for pair in zip(published, scores, strict=True)]
        table.add_row(model, *cells, format_difference(mean(published), average))
    return table


def format_score(score: float | None, error: float | None) -> str:
    """Format a score with its standard error below it."""
    if score is None:
        return "-"
    return f"{score:.2f}" if error is None else f"{score:.2f}\n+-{error:.2f}"


def format_difference(published: float, score: float | None) -> str:
    """Format a published score with our score minus it below it."""
    if score is None:
        return f"{published:.2f}"
    return f"{published:.2f}\n{score - published:+.2f}"
