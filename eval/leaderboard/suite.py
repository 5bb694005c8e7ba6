"""A leaderboard: run its rows with lm-evaluation-harness, keep each as it is done, print them
beside published scores.

A step folder of ours is scored through our model, a Hugging Face folder through the harness's own
HFLM. Results lie in `scores/SUITE-SUBJECT.json` of the run's folder; a row found there for the same
weights is not run again. Under torchrun the ranks share the documents.
"""

import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from core.errors import InputError
from core.files import read_json, write_json
from eval.config import EvaluationConfig, Suite, SuiteRow
from eval.model_source import ModelSource, find_model

logger = logging.getLogger(__name__)

Result = dict[str, Any]
WIDTH = 110  # columns that a table takes at least
FIX = (
    "Data sets must be in the cache (HF_HOME) or reachable: run once with a network, or name a "
    "folder of task files in leaderboard.suite.include"
)
BOOTSTRAP = 100  # any number above 0 asks for standard errors; those of means are exact, not drawn


def run_suite(config: EvaluationConfig) -> None:
    """Score every row that can be scored; raises InputError at the end when some could not."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    suite = config.leaderboard.suite
    assert suite is not None
    source = find_model(config)
    path = source.results_dir / f"{suite.name}-{source.name}.json"
    made_of = {
        **source.provenance,
        "suite": suite.name,
        "max_length": suite.max_length_tokens,
        "limit": suite.limit_documents,
    }
    stored = read_json(path)
    results: dict[str, Result] = {}
    if {key: stored.get(key) for key in made_of} == made_of:
        results = {
            row.label: entry
            for row in suite.rows
            if (entry := stored["rows"].get(row.label)) and fits(entry, row)
        }
    missing: dict[str, str] = {}
    wanted = [row for row in suite.rows if row.label not in results]
    first = int(os.environ.get("RANK", "0")) == 0
    run = runner(config, source) if wanted else None
    for row in wanted:
        assert run is not None
        if first:
            logger.info(f"{suite.name}: {row.label} ({row.task}, {row.shots} shots)")
        try:
            raw = run(row)
        except MissingTask as error:
            missing[row.label] = str(error)
            continue
        if raw is not None:  # the first rank's
            results[row.label] = {"row": asdict(row), **score(row, raw)}
            write(path, made_of, suite, results)
    if missing and first:
        write(path, made_of, suite, results, missing)
    if dist.is_initialized():
        dist.destroy_process_group()
    if first:
        Console(width=max(WIDTH, Console().width)).print(
            table(suite, source.name, results, siblings(suite, path))
        )
        logger.info(f"scores: {path}" if results else "no row could be scored")
    if missing:
        reasons = "; ".join(f"{label}: {why}" for label, why in missing.items())
        raise InputError(
            f"{len(missing)} of {len(suite.rows)} rows of {suite.name} were not scored: "
            f"{reasons}. {FIX}"
        )


def write(
    path: Path, made_of: Result, suite: Suite, rows: Result, missing: dict[str, str] | None = None
) -> None:
    """Write the rows that are done; `missing` says of the others why, once no more will come."""
    path.parent.mkdir(parents=True, exist_ok=True)
    complete = len(rows) == len(suite.rows)
    write_json(path, {**made_of, "complete": complete, "rows": rows, "missing": missing or {}})


def fits(entry: Result, row: SuiteRow) -> bool:
    """Whether a stored result is of this very row."""
    return bool(entry.get("row") == asdict(row))


class MissingTask(Exception):
    """A row whose task or data set is not here."""


def runner(config: EvaluationConfig, source: ModelSource) -> Callable[[SuiteRow], Result | None]:
    """The function that runs a row and gives the harness's results on the first rank."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from eval.leaderboard.harness import language_model

    suite = config.leaderboard.suite
    assert suite is not None
    # it warns at every row that shots were set
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = language_model(source, suite.max_length_tokens, config.leaderboard.batch_tokens)
    manager = TaskManager(include_path=suite.include, include_defaults=suite.include is None)
    if any(row.task not in manager.all_tasks for row in suite.rows) and suite.include is not None:
        # its own tasks too: reading their 14,000 files takes seconds
        manager = TaskManager(include_path=suite.include)

    def run(row: SuiteRow) -> Result | None:
        try:
            tasks = manager.load([row.task])["tasks"]
        except Exception as error:  # datasets, the hub and the tasks' own modules raise anything
            raise MissingTask(reason(row, error)) from error
        evaluated: Any = simple_evaluate(
            model=model,
            tasks=list(tasks.values()),
            num_fewshot=row.shots,
            limit=suite.limit_documents,
            bootstrap_iters=BOOTSTRAP,
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

    return run


def reason(row: SuiteRow, error: Exception) -> str:
    """Why a task cannot be loaded, in one line."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")[
        :120
    ]
    return f"{row.task} ({type(error).__name__}: {line})"


def score(row: SuiteRow, raw: Result) -> Result:
    """Score of a row in percent, its standard error, and the parts it was made of.

    `raw` holds the harness's results of each leaf task. Standard errors of leaves are taken as
    independent, those of two metrics of one leaf as equal to their mean (they rest on the same
    documents).
    """
    weights = [leaf["documents"] if row.by_size else 1 for leaf in raw.values()]
    values, errors, parts = [], [], {}
    for name, leaf in raw.items():
        floor = row.floors.get(name, row.floor)
        value = sum(leaf[metric] for metric in row.metrics) / len(row.metrics)
        spread = [leaf.get(metric.replace(",", "_stderr,", 1)) for metric in row.metrics]
        known = [float(error) for error in spread if isinstance(error, int | float)]
        values.append(100 * value)
        errors.append(100 * sum(known) / len(known) if known else math.nan)
        parts[name] = {"raw": 100 * value, "documents": leaf["documents"], "floor": 100 * floor}
    if row.by_size:  # the floor is subtracted of the group's score
        mean = sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
        slope = 1 / (1 - row.floor)
        total = max(0.0, (mean - 100 * row.floor) * slope)
        slopes = [slope] * len(values)
    else:
        slopes = [1 / (1 - part["floor"] / 100) for part in parts.values()]
        scaled = [
            max(0.0, (v - part["floor"]) * k)
            for v, part, k in zip(values, parts.values(), slopes, strict=True)
        ]
        total = sum(scaled) / len(scaled)
    squares = [
        (w * k * e / sum(weights)) ** 2 for w, k, e in zip(weights, slopes, errors, strict=True)
    ]
    stderr = math.sqrt(sum(squares))
    return {"score": total, "stderr": stderr if math.isfinite(stderr) else None, "parts": parts}


def average(scores: list[float]) -> float:
    """Mean of a model's scores."""
    return sum(scores) / len(scores)


def siblings(suite: Suite, path: Path) -> dict[str, list[float]]:
    """Scores of the run's other checkpoints on the whole suite, such as before and after decay."""
    found = {}
    for other in sorted(path.parent.glob(f"{suite.name}-*.json")):
        stored = read_json(other)
        rows = [stored.get("rows", {}).get(row.label) for row in suite.rows]
        if other != path and all(
            entry and fits(entry, row) for entry, row in zip(rows, suite.rows, strict=True)
        ):
            place = f"\n{stored['tokens']:,} tokens" if "tokens" in stored else ""
            found[other.stem.removeprefix(f"{suite.name}-") + place] = [
                entry["score"] for entry in rows
            ]
    return found


def table(
    suite: Suite,
    name: str,
    results: dict[str, Result],
    others: dict[str, list[float]] | None = None,
) -> Table:
    """Ours with standard errors; other checkpoints and published models, and ours minus each."""
    grid = Table(title=f"{suite.name}, and below each score how far ours is above it")
    for label in ("model", *(row.label for row in suite.rows), "average"):
        grid.add_column(label, no_wrap=True)
    ours = [results[row.label]["score"] if row.label in results else None for row in suite.rows]
    errors = [results[row.label]["stderr"] if row.label in results else None for row in suite.rows]
    cells = [with_error(value, error) for value, error in zip(ours, errors, strict=True)]
    whole = [value for value in ours if value is not None]
    known = [error for error in errors if error is not None]
    complete = len(whole) == len(ours)
    spread = (
        math.sqrt(sum(error**2 for error in known)) / len(ours) if len(known) == len(ours) else None
    )
    grid.add_row(
        name, *cells, with_error(average(whole), spread) if complete else "-", style="bold"
    )
    for model, scores in {**(others or {}), **suite.published}.items():
        columns = [against(theirs, mine) for theirs, mine in zip(scores, ours, strict=True)]
        grid.add_row(
            model, *columns, against(average(scores), average(whole) if complete else None)
        )
    return grid


def with_error(value: float | None, error: float | None) -> str:
    """A score and its standard error."""
    if value is None:
        return "-"
    return f"{value:.2f}" if error is None else f"{value:.2f}\n+-{error:.2f}"


def against(theirs: float, ours: float | None) -> str:
    """A published score and how far ours is above it."""
    return f"{theirs:.2f}" if ours is None else f"{theirs:.2f}\n{ours - theirs:+.2f}"
