"""What a batch script notes before and after every start of a run."""

import logging
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

from core.files import append_json_line, read_json_lines
from core.run import RunFiles, list_committed_checkpoints
from train.resilience.incidents import FINISHED, REQUEUE, read_outcome

logger = logging.getLogger(__name__)
Record = dict[str, Any]


def newest_name(folder: Path) -> str:
    """Name of the newest committed checkpoint, or nothing."""
    return next(
        (path.name for path in list_committed_checkpoints(RunFiles(folder).checkpoints)), ""
    )


def begin(folder: Path, nodes: list[str], lost: list[str], bad_nodes: Path) -> None:
    """Note a start on `nodes`; `lost` are nodes of the start before that Slurm calls down."""
    folder.mkdir(parents=True, exist_ok=True)
    before = read_json_lines(RunFiles(folder).attempts)
    if before and before[-1]["event"] == "begin":  # Slurm ended it: the batch script could not
        for node in set(lost) & set(before[-1]["nodes"]):
            strike(bad_nodes, node, folder, "lost by Slurm under a run")
    ended = read_outcome(folder)
    if ended is not None and ended.code != FINISHED:
        # what an earlier start left must not be taken for this one's
        RunFiles(folder).outcome.unlink()
    note(folder, event="begin", nodes=nodes)


def end(folder: Path, code: int, crashes: int, bad_nodes: Path) -> tuple[str, str]:
    """Decide after a start's ranks ended with `code`: done, requeue or stop, and why."""
    start = [
        entry for entry in read_json_lines(RunFiles(folder).attempts) if entry["event"] == "begin"
    ][-1]
    how = read_outcome(folder)
    ended = how is not None or code == 0
    if how is not None:
        verdict = {FINISHED: "done", REQUEUE: "requeue"}.get(how.code, "stop")
        why = how.reason
    elif ended:
        verdict, why = "done", "the ranks ended without a complaint"
    else:
        barren = 1 + crashes_before(folder, newest_name(folder))
        verdict = "stop" if barren >= crashes else "requeue"
        why = (
            f"crash (exit code {code}), {barren} in a row from "
            f"{newest_name(folder) or 'the beginning'}"
        )
        for node in suspects(folder, start):
            strike(bad_nodes, node, folder, "a rank there crashed or hung")
    note(
        folder,
        event="end",
        code=code,
        verdict=verdict,
        reason=why,
        crashed_at=None if ended else newest_name(folder),
    )
    return verdict, why


def crashes_before(folder: Path, checkpoint: str) -> int:
    """Ends in a row, up to the last one, that were crashes and left this checkpoint the newest."""
    ends = [
        entry for entry in read_json_lines(RunFiles(folder).attempts) if entry["event"] == "end"
    ]
    return next(
        (i for i, entry in enumerate(reversed(ends)) if entry["crashed_at"] != checkpoint),
        len(ends),
    )


def suspects(folder: Path, start: Record) -> set[str]:
    """Nodes of a start whose ranks crashed or hung themselves, from the run's incidents.jsonl."""
    blamed = set()
    for entry in read_json_lines(RunFiles(folder).incidents):
        if (
            entry.get("incident") in ("crash", "hang")
            and str(entry.get("time", "")) >= start["time"]
        ):
            words = {word.strip(",.:") for word in str(entry.get("text", "")).split()}
            blamed |= {
                node
                for node in start["nodes"]
                if node in words or any(w.split(".")[0] == node for w in words)
            }
    return blamed


def strike(bad_nodes: Path, node: str, folder: Path, reason: str) -> None:
    """One line against a node, in one write, so that lines of several jobs stay whole."""
    bad_nodes.parent.mkdir(parents=True, exist_ok=True)
    with bad_nodes.open("ab", buffering=0) as file:
        file.write(f"{node} {now()} {folder.name} {reason}\n".encode())
    logger.info(f"strike against {node}: {reason}; {bad_nodes} has them all")


def excluded(bad_nodes: Path, strikes: int) -> list[str]:
    """Nodes with that many strikes."""
    lines = bad_nodes.read_text(encoding="utf-8").splitlines() if bad_nodes.is_file() else []
    counts = Counter(line.split()[0] for line in lines if line.strip() and not line.startswith("#"))
    return sorted(node for node, count in counts.items() if count >= strikes)


def note(folder: Path, **facts: Any) -> None:
    """Append a line to attempts.jsonl."""
    job = {
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
    }
    append_json_line(RunFiles(folder).attempts, {"time": now(), **job, **facts})


def now() -> str:
    """UTC, as incidents.jsonl writes it."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
