"""A run's starts under Slurm: attempts.jsonl, strikes against nodes, decisions to requeue."""

import logging
import os
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

from core.errors import InputError
from core.files import append_json_line, append_line, make_folder, read_regular
from core.records import BLOCKED, Damage, read_typed_lines, shown
from core.run import RunFiles, iter_committed_checkpoints
from train.resilience.incidents import (
    ATTEMPT,
    FINISHED,
    INTERRUPTED,
    NAMES,
    Incident,
    Outcome,
    read_outcome,
)

logger = logging.getLogger(__name__)
Record = dict[str, Any]
NODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def newest_checkpoint_name(folder: Path) -> str:
    """Name of the newest committed checkpoint, or an empty string."""
    checkpoints = iter_committed_checkpoints(RunFiles(folder).checkpoints)
    return next((path.name for path in checkpoints), "")


def record_start(folder: Path, nodes: list[str], down_nodes: list[str], bad_nodes: Path) -> None:
    """Record a start on `nodes`, and a strike against each node lost during the previous start.

    A node counts as lost if it is in `down_nodes` and the previous start has no recorded end.
    """
    make_folder(folder)
    attempts = read_attempts(folder)
    if attempts and attempts[-1]["event"] == "begin":  # Slurm killed its batch script
        for node in set(down_nodes) & set(attempts[-1]["nodes"]):
            add_strike(bad_nodes, node, folder, "went down during a run")
    outcome = read_outcome(folder)
    if outcome is None or outcome.code != FINISHED:
        # record_end would take it for this start's
        RunFiles(folder).outcome.unlink(missing_ok=True)
    append_record(folder, event="begin", nodes=nodes)


def record_end(folder: Path, code: int, max_crashes: int, bad_nodes: Path) -> tuple[str, str]:
    """Record that a start's ranks exited with `code`; return done, requeue or stop, and the reason.

    Adds a strike against each node whose ranks crashed or hung.
    """
    attempts = read_attempts(folder)
    outcome = read_outcome(folder)
    if outcome is None and code in NAMES:  # a full disk has left no outcome.json
        outcome = Outcome(code, f"all ranks exited with code {code} ({NAMES[code]})")
    crashed_at = None
    if outcome is not None:
        verdict = {FINISHED: "done", INTERRUPTED: "requeue"}.get(outcome.code, "stop")
        reason = outcome.reason
    else:
        crashed_at = newest_checkpoint_name(folder)
        crashes = 1 + consecutive_crashes(folder, crashed_at)
        verdict = "stop" if crashes >= max_crashes else "requeue"
        reason = (
            f"crash (exit code {code}), {crashes} in a row since {crashed_at or 'the beginning'}"
        )
        # a damaged last line leaves the nodes of this start unknown
        if attempts and attempts[-1]["event"] == "begin":
            for node in failed_nodes(folder, attempts[-1]):
                add_strike(bad_nodes, node, folder, "a rank crashed or hung")
    try:
        append_record(
            folder, event="end", code=code, verdict=verdict, reason=reason, crashed_at=crashed_at
        )
    except OSError as error:
        reason += f"; attempts.jsonl cannot be written ({error})"
        if crashed_at is not None:  # crashes that are not counted would be repeated for ever
            verdict = "stop"
    return verdict, reason


def consecutive_crashes(folder: Path, checkpoint: str) -> int:
    """Number of last ends in a row that were crashes with this checkpoint as the newest."""
    ends = [entry for entry in read_attempts(folder) if entry["event"] == "end"]
    return next(
        (i for i, entry in enumerate(reversed(ends)) if entry["crashed_at"] != checkpoint),
        len(ends),
    )


def failed_nodes(folder: Path, start: Record) -> set[str]:
    """Nodes of a start that incidents.jsonl names for a crash or a hang, not for a lost peer."""
    failed = set()
    for entry in read_typed_lines(RunFiles(folder).incidents, Incident):
        if entry["incident"] in ("crash", "hang") and entry["time"] >= start["time"]:
            words = {word.strip(",.:") for word in entry["text"].split()}
            names = words | {word.split(".")[0] for word in words}  # without a domain
            failed |= names & set(start["nodes"])
    return failed


def add_strike(bad_nodes: Path, node: str, folder: Path, reason: str) -> None:
    """Append a line against a node, durably."""
    make_folder(bad_nodes.parent)
    line = f"{node} {utc_now()} {folder.name} {reason}"
    append_line(bad_nodes, line.encode(errors="replace"), sync=True)
    logger.info(f"strike against node {node}: {reason} (recorded in {bad_nodes})")


def excluded_nodes(bad_nodes: Path, strikes: int) -> list[str]:
    """Nodes with at least this many strikes; a line that begins with no node name is reported.

    Raises InputError if the file cannot be read.
    """
    try:
        lines = read_regular(bad_nodes).split(b"\n")
    except FileNotFoundError:
        return []
    except BLOCKED as error:
        raise InputError(
            f"slurm.bad_nodes_file {bad_nodes} cannot be read ({error.strerror}): move it away"
        ) from error
    damage = Damage(bad_nodes)
    counts: Counter[str] = Counter()
    for number, line in enumerate(lines, 1):
        words = line.decode(errors="replace").split()
        if not words or words[0].startswith("#"):
            continue
        if NODE.fullmatch(words[0]):
            counts[words[0]] += 1
        else:
            damage.add(number, f"{shown(words[0])} is no name of a node")
    damage.report()
    return sorted(node for node, count in counts.items() if count >= strikes)


def read_attempts(folder: Path) -> list[Record]:
    """Lines of attempts.jsonl."""
    return list(read_typed_lines(RunFiles(folder).attempts, ATTEMPT))


def append_record(folder: Path, **fields: Any) -> None:
    """Append a line to attempts.jsonl, durably."""
    job = {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
    }
    append_json_line(RunFiles(folder).attempts, {"time": utc_now(), **job, **fields}, sync=True)


def utc_now() -> str:
    """UTC time in the format of incidents.jsonl."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
