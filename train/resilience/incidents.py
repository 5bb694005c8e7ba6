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

import logging
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from core.errors import USER_ERROR
from core.files import append_json_line, read_json, read_json_lines, write_json
from core.run import RunFiles

logger = logging.getLogger(__name__)

FINISHED = 0
INTERRUPTED = 75
HUNG = 76  # exited because a peer hung; any code other than 0, 75 and 2 requests a restart
NAMES = {FINISHED: "finished", INTERRUPTED: "interrupted", USER_ERROR: "failed"}


@dataclass(frozen=True)
class Outcome:
    """How a run ended: exit code, and the reason in one line."""

    code: int
    reason: str

    def write(self, folder: Path) -> None:
        """Write outcome.json at once; a failed write does not change the exit code."""
        try:
            write_json(
                RunFiles(folder).outcome, {"outcome": NAMES[self.code], **asdict(self)}, indent=None
            )
        except OSError as error:
            logger.warning(f"cannot write outcome.json: {error}")


def read_outcome(folder: Path) -> Outcome | None:
    """Return how the last start of a run ended, or None if it is running or crashed."""
    raw = read_json(RunFiles(folder).outcome)
    try:
        return Outcome(int(raw["code"]), str(raw["reason"]))
    except (ValueError, KeyError, TypeError):
        return None


class Incidents:
    """Writes events other than plain steps as JSON lines, and logs them."""

    def __init__(self, folder: Path) -> None:
        self.path = RunFiles(folder).incidents

    def log(self, kind: str, text: str, **facts: Any) -> None:
        """Write an incident; a full disk or a closed console does not stop the run."""
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "incident": kind,
            "text": text,
            **facts,
        }
        logger.warning(f"{kind}: {text}")
        with suppress(OSError):
            append_json_line(self.path, line)


class Starts:
    """Counts starts from the same position, to stop a run that crashes before every save."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.path = RunFiles(folder).starts
        self.limit = limit

    def count(self, tokens: int, incidents: Incidents) -> str | None:
        """Count a start at token position `tokens`; returns why the run must stop, or None."""
        raw = read_json(self.path)
        try:
            starts = int(raw["starts"]) + 1 if int(raw["tokens"]) == tokens else 1
        except (ValueError, KeyError, TypeError):
            starts = 1
        if starts > self.limit:
            crashes = [
                entry
                for entry in read_json_lines(incidents.path)
                if entry.get("incident") in ("crash", "hang")
            ]
            last = (
                crashes[-1]["text"] if crashes else "no message, as after kill -9 or out of memory"
            )
            return (
                f"{self.limit} starts from {tokens:,} tokens crashed before a new checkpoint: fix "
                f"the cause, remove {self.path}, start again; the last crash: {last}"
            )
        write_json(self.path, {"tokens": tokens, "starts": starts}, indent=None)
        return None
