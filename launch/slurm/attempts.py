"""A run's starts under Slurm: attempts.jsonl, strikes against nodes, decisions to requeue."""

import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from core.files import append_json_line, make_folder, read_json_lines
from core.run import RunFiles, iter_committed_checkpoints
from train.resilience.incidents import FINISHED, INTERRUPTED, read_outcome

logger = logging.getLogger(__name__)
Record = dict[str, Any]


def newest_checkpoint_name(folder: Path) -> str:
    """Name of the newest committed checkpoint, or an empty string."""
    checkpoints = iter_committed_checkpoints(RunFiles(folder).checkpoints)
    return next((path.name for path in checkpoints), "")


def record_start(folder: Path, nodes: list[str], down_nodes: list[str], bad_nodes: Path) -> None:
    """Record a start on `nodes`, and a strike against each node lost during the previous start.

    A node counts as lost if it is in `down_nodes` and the previous start has no recorded end.
    """
    make_folder(folder)
    attempts = read_json_lines(RunFiles(folder).attempts)
    if attempts and attempts[-1]["event"] == "begin":  # Slurm killed its batch script
        for node in set(down_nodes) & set(attempts[-1]["nodes"]):
            add_strike(bad_nodes, node, folder, "went down during a run")
    outcome = read_outcome(folder)
    if outcome is not None and outcome.code != FINISHED:
        RunFiles(folder).outcome.unlink()  # else record_end would take it for this start's
    append_record(folder, event="begin", nodes=nodes)


def record_end(folder: Path, code: int, max_crashes: int, bad_nodes: Path) -> tuple[str, str]:
    """Record that a start's ranks exited with `code`; return done, requeue or stop, and the reason.

    Adds a strike against each node whose ranks crashed or hung.
    """
    attempts = read_json_lines(RunFiles(folder).attempts)
    start = [entry for entry in attempts if entry["event"] == "begin"][-1]
    outcome = read_outcome(folder)
    crashed_at = None
    if outcome is not None:
        verdict = {FINISHED: "done", INTERRUPTED: "requeue"}.get(outcome.code, "stop")
        reason = outcome.reason
    elif code == 0:
        verdict = "done"
        reason = "all ranks exited with code 0"
    else:
        crashed_at = newest_checkpoint_name(folder)
        crashes = 1 + consecutive_crashes(folder, crashed_at)
        verdict = "stop" if crashes >= max_crashes else "requeue"
        reason = (
            f"crash (exit code {code}), {crashes} in a row since {crashed_at or 'the beginning'}"
        )
        for node in failed_nodes(folder, start):
            add_strike(bad_nodes, node, folder, "a rank crashed or hung")
    append_record(
        folder, event="end", code=code, verdict=verdict, reason=reason, crashed_at=crashed_at
    )
    return verdict, reason


def consecutive_crashes(folder: Path, checkpoint: str) -> int:
    """Number of last ends in a row that were crashes with this checkpoint as the newest."""
    attempts = read_json_lines(RunFiles(folder).attempts)
    ends = [entry for entry in attempts if entry["event"] == "end"]
    return next(
        (i for i, entry in enumerate(reversed(ends)) if entry["crashed_at"] != checkpoint),
        len(ends),
    )


def failed_nodes(folder: Path, start: Record) -> set[str]:
    """Nodes of a start that incidents.jsonl names for a crash or a hang, not for a lost peer."""
    failed = set()
    for entry in read_json_lines(RunFiles(folder).incidents):
        if (
            entry.get("incident") in ("crash", "hang")
            and str(entry.get("time", "")) >= start["time"]
        ):
            words = {word.strip(",.:") for word in str(entry.get("text", "")).split()}
            names = words | {word.split(".")[0] for word in words}  # without a domain
            failed |= names & set(start["nodes"])
    return failed


def add_strike(bad_nodes: Path, node: str, folder: Path, reason: str) -> None:
    """Append a line against a node, in one write, so that jobs never mix lines."""
    make_folder(bad_nodes.parent)
    with bad_nodes.open("ab", buffering=0) as file:
        file.write(f"{node} {utc_now()} {folder.name} {reason}\n".encode())
    logger.info(f"strike against node {node}: {reason} (recorded in {bad_nodes})")


def excluded_nodes(bad_nodes: Path, strikes: int) -> list[str]:
    """Nodes with at least this many strikes."""
    lines = bad_nodes.read_text(encoding="utf-8").splitlines() if bad_nodes.is_file() else []
    counts = Counter(line.split()[0] for line in lines if line.strip() and not line.startswith("#"))
    return sorted(node for node, count in counts.items() if count >= strikes)


def append_record(folder: Path, **fields: Any) -> None:
    """Append a line to attempts.jsonl."""
    job = {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }
    append_json_line(RunFiles(folder).attempts, {"time": utc_now(), **job, **fields})


def utc_now() -> str:
    """UTC time in the format of incidents.jsonl."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
