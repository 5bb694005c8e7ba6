"""Write incidents.jsonl and outcome.json of a run.

A rank exits with the code of the outcome, but torchrun turns every code into 1. So launchers read
outcome.json, which is absent while a run trains and after a crash:

    code 0   finished     the run has trained on all its tokens
    code 75  interrupted  stopped by a signal or a time limit, saved; the same command continues
    code 2   failed       a restart does not help; the reason says what to change
    absent   crashed      start it again

75 is EX_TEMPFAIL of sysexits.h. Earlier versions wrote "requeue" and "stopped" for
"interrupted" and "failed"; readers go by the code.
"""

import json
import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field
from typing_extensions import TypedDict

from core.errors import USER_ERROR
from core.files import append_json_line, fsync, rename, write_json
from core.ranges import Whole
from core.records import read_or_rebuild, read_typed_lines
from core.run import RunFiles
from train.resilience.run_lock import LOCK_TIMEOUT_SECONDS

logger = logging.getLogger(__name__)

FINISHED = 0
INTERRUPTED = 75
HUNG = 76  # exited because a peer hung; any code other than 0, 75 and 2 requests a restart
OUTCOME_BYTES = 4096  # at most; a block of most file systems
NAMES = {FINISHED: "finished", INTERRUPTED: "interrupted", USER_ERROR: "failed"}


def check_code(code: int) -> int:
    """Return an exit code of an outcome; ValueError if it is none."""
    if code not in NAMES:
        raise ValueError(f"it must be one of {', '.join(map(str, NAMES))}")
    return code


class OutcomeRecord(TypedDict):
    """Content of outcome.json."""

    outcome: str
    code: Annotated[int, AfterValidator(check_code)]
    reason: str


class StartsRecord(TypedDict):
    """Content of starts.json: the starts from a token position."""

    tokens: Whole
    starts: Whole


class Incident(TypedDict):
    """Keys that every line of incidents.jsonl has."""

    time: str
    incident: str
    text: str


class Begin(TypedDict):
    """A start's line of attempts.jsonl."""

    event: Literal["begin"]
    time: str
    nodes: list[str]


class End(TypedDict):
    """The line of a start's end; `crashed_at` is the newest checkpoint of a crash."""

    event: Literal["end"]
    time: str
    reason: str
    crashed_at: str | None


ATTEMPT: Any = Annotated[Begin | End, Field(discriminator="event")]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, and the reason in one line."""

    code: int
    reason: str

    def write(self, folder: Path) -> None:
        """Write outcome.json at once, on a full disk in the space that reserve_space took.

        A failed write does not change the exit code.
        """
        files = RunFiles(folder)
        content = {"outcome": NAMES[self.code], **asdict(self)}
        try:
            with suppress(OSError):
                write_json(files.outcome, content, indent=None)
                return
            with files.outcome_space.open("r+b") as file:
                file.write((json.dumps(content) + "\n").encode())
                file.truncate()
                os.fsync(file.fileno())
            rename(files.outcome_space, files.outcome)
        except OSError as error:
            logger.warning(f"cannot write outcome.json: {error}")


def reserve_space(folder: Path) -> None:
    """Reserve disk space for outcome.json until the run ends. Raises OSError."""
    space = RunFiles(folder).outcome_space
    try:
        space.write_bytes(b" " * OUTCOME_BYTES)
    except OSError:
        space.unlink(missing_ok=True)
        raise


def read_outcome(folder: Path) -> Outcome | None:
    """Return how the last start of a run ended, or None if it is running or crashed.

    A damaged file counts as a crash, with a warning.
    """
    record = read_or_rebuild(
        RunFiles(folder).outcome, OutcomeRecord, "the run counts as crashed", extra="ignore"
    )
    return None if record is None else Outcome(record["code"], record["reason"])


def is_running(folder: Path) -> bool:
    """Whether a process holds the run's lock, on any machine: it renews the lock's time."""
    try:
        age = time.time() - RunFiles(folder).lock.stat().st_mtime
    except OSError:
        return False
    return age < LOCK_TIMEOUT_SECONDS


def describe_state(folder: Path) -> str:
    """How the last start of a run ended, or that it is running, in one line."""
    outcome = read_outcome(folder)
    if outcome is not None:
        return outcome.reason
    if is_running(folder):
        return "running"
    name = RunFiles(folder).outcome
    return f"unknown: {name.name} is damaged" if name.exists() else "running or crashed"


def sync_records(folder: Path, on_sync: Callable[[], object]) -> None:
    """Make the lines of metrics.jsonl and incidents.jsonl durable; a failure is only logged.

    `on_sync` is called after each sync, which may take long.
    """
    files = RunFiles(folder)
    try:
        for path in filter(Path.is_file, (files.metrics, files.incidents)):
            fsync(path)
            on_sync()
        fsync(folder)
        on_sync()
    except OSError as error:
        logger.warning(f"cannot sync metrics.jsonl and incidents.jsonl: {error}")


class Incidents:
    """Writes events other than plain steps as JSON lines, and logs them."""

    def __init__(self, folder: Path) -> None:
        self.path = RunFiles(folder).incidents

    def log(self, kind: str, text: str, **facts: Any) -> None:
        """Log and write an incident; a full disk or a closed console does not stop the run."""
        logger.warning(f"{kind}: {text}")
        self.write(kind, text, **facts)

    def write(self, kind: str, text: str, **facts: Any) -> None:
        """Write an incident to incidents.jsonl only."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "incident": kind,
            "text": text,
            **facts,
        }
        with suppress(OSError):
            append_json_line(self.path, line)


class Starts:
    """Counts starts from the same position, to stop a run that crashes before every save."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.path = RunFiles(folder).starts
        self.limit = limit

    def count(self, tokens: int, incidents: Incidents) -> str | None:
        """Count a start at token position `tokens`; returns why the run must stop, or None."""
        last = read_or_rebuild(self.path, StartsRecord, "starts are counted from 1 again")
        starts = last["starts"] + 1 if last is not None and last["tokens"] == tokens else 1
        if starts > self.limit:
            crashes = [
                entry
                for entry in read_typed_lines(incidents.path, Incident)
                if entry["incident"] in ("crash", "hang")
            ]
            cause = (
                crashes[-1]["text"] if crashes else "no message, as after kill -9 or out of memory"
            )
            return (
                f"{self.limit} starts from {tokens:,} tokens crashed before a new checkpoint: fix "
                f"the cause, remove {self.path}, start again; the last crash: {cause}"
            )
        write_json(self.path, {"tokens": tokens, "starts": starts}, indent=None)
        return None
