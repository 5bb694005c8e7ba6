"""The whole training state on disk: committed at once or not at all, verified before use, free of
pickle.

`python train/checkpoints.py ls|verify|diff DIR` looks at what lies there.
Commit: every rank writes its pieces into `step-N.part` and syncs them; sizes and SHA-256 are
gathered; the first rank writes the state and, last, the manifest, then renames the folder to
`step-N`; only after that older ones are removed. A reader sees a complete folder or none, and a
damaged one is passed over for the newest that verifies.
Cost: each rank writes 12 bytes per parameter it owns (weights and two moments, fp32); the loop
waits for the copy to host memory only (train/checkpoint/writer.py does the rest).
"""

import logging
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError

from core.errors import InputError
from core.run import MANIFEST, newest, step_of
from model.checkpoint import CheckpointReader, read_state, verify_checkpoint
from train.checkpoint.writer import Writer, remove, sync_folder
from train.config import CheckpointConfig
from train.distributed import Ranks
from train.engines.protocol import Engine

logger = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Where a run stands; everything else follows from the config."""

    tokens: int  # of the run's stream that are behind it
    step: int
    updates: int  # steps whose update was not skipped
    plan: str  # hash of the data order
    model: dict[str, Any]
    # of train/resilience/health.py: a restart must not forget it
    health: dict[str, Any] = field(default_factory=dict)


class CheckpointManager:
    """The checkpoint folder of one run, shared by its ranks."""

    def __init__(
        self, folder: Path, config: CheckpointConfig, ranks: Ranks, stage_ends: frozenset[int]
    ) -> None:
        """`edges` are the tokens at which stages end."""
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.stage_ends = stage_ends
        self.writer = Writer(folder, ranks)
        self.failures = 0  # saves in a row that did not come to be; the same on every rank
        self.saved: TrainState | None = None  # what the save in flight, or the last one, holds
        self.retry_at: float | None = None

    def find(self, before: int | None = None) -> Path | None:
        """The newest checkpoint that verifies, the same on every rank; the first rank reads and
        hashes it.

        `before` leaves out those that have more tokens behind them.
        """
        step = torch.full((1,), -1, dtype=torch.int64)
        if self.ranks.is_first:
            for folder in newest(self.folder):
                why = invalid_reason(folder)
                if why is not None:
                    # out of the way: retention counts good ones, and the step will be saved anew
                    aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
                    logger.warning(
                        f"checkpoint {folder} is not used: {why}; it is kept as {aside.name}"
                    )
                    folder.rename(aside)
                elif before is None or read_state(folder)["tokens"] <= before:
                    step[0] = step_of(folder)
                    break
        dist.broadcast(step, src=0)
        return None if step < 0 else self.folder / f"step-{int(step):08d}"

    def load(self, folder: Path, engine: Engine) -> TrainState:
        """Fill the engine from a verified checkpoint, whatever layout of ranks wrote it.

        Raises InputError when the files are what their manifest says and still no checkpoint.
        """
        try:
            state = TrainState(
                **{key: value for key, value in read_state(folder).items() if key != "format"}
            )
            engine.load(CheckpointReader(folder), state.updates)
            self.writer.done = self.writer.done or (
                folder.name,
                (folder / MANIFEST).stat().st_mtime,
            )
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{folder} verifies and is no checkpoint of this run ({type(error).__name__}: "
                f"{error}): somebody made it; move it away to go on from the one before"
            ) from error
        return state

    def due(self, before: int, tokens: int) -> bool:
        """Whether `before` to `tokens` passes a multiple of the interval, or ends a stage."""
        every = self.config.every_tokens
        return tokens // every > before // every or tokens in self.stage_ends

    @property
    def wants_retry(self) -> bool:
        """Whether the save failed and its pause is over; the first rank asks, for all ranks."""
        if self.writer.busy or self.writer.thread is None or self.writer.error is None:
            return False
        if self.retry_at is None:
            self.retry_at = time.monotonic() + self.config.retry_seconds * 2**self.failures
        return time.monotonic() >= self.retry_at

    def status(self) -> str:
        """How far back a crash throws the run: the last save and its age, and the one in flight."""
        parts = ["no checkpoint yet"]
        if self.writer.done is not None:
            name, when = self.writer.done
            parts = [f"saved {name} {age(time.time() - when)} ago"]
        if self.writer.busy and self.saved is not None:
            parts.append(f"saving step {self.saved.step}")
        elif self.writer.error is not None and self.saved is not None:
            parts.append(f"save of step {self.saved.step} failed: {self.writer.error}")
        return ", ".join(parts)

    def save(self, state: TrainState, engine: Engine) -> float:
        """Start to commit the training state; every rank takes part. Returns the seconds that the
        loop waited.

        Raises InputError, on every rank, when max_failures saves in a row have failed.
        """
        begun = time.monotonic()
        self.flush()
        self.writer.copy.take(engine.state_shards())
        self.saved, self.retry_at = TrainState(**asdict(state)), None
        self.writer.start(f"step-{state.step:08d}", asdict(state), self._retain)
        return time.monotonic() - begun

    def flush(self) -> bool:
        """Wait until the save in flight has ended; False when it failed."""
        if self.writer.thread is None:
            return self.failures == 0
        why = self.writer.wait()
        self.failures = 0 if why is None else self.failures + 1
        if self.failures >= self.config.max_failures:
            raise InputError(
                f"{self.failures} checkpoints in a row could not be written to {self.folder}: "
                f"{why}; make room there, or choose another run.dir, and start again"
            )
        if why is not None and self.ranks.is_first:
            logger.warning(f"a checkpoint was not written: {why}; older ones are untouched")
        return why is None

    def save_and_wait(self, state: TrainState, engine: Engine) -> None:
        """Save until it is on disk: at the end of a run, or before it leaves for a while."""
        held = self.saved is not None and self.saved.step == state.step
        while not (held and self.flush()):
            if self.failures:
                time.sleep(self.config.retry_seconds * 2 ** (self.failures - 1))
            self.save(state, engine)
            held = True

    def _retain(self) -> None:
        """Remove what the config does not keep: beside the last ones, ends of stages and one of
        every so many tokens.

        Of damaged ones the newest is kept for whoever wants to look. What cannot be removed does
        not undo the save.
        """
        found = {folder: tokens_of(folder) for folder in newest(self.folder)}
        keep = set(list(found)[: self.config.keep_last]) | self._permanent(found)
        damaged = sorted(self.folder.glob("step-*.damaged-*"), key=lambda path: path.name[-19:])
        try:
            for folder in [*(folder for folder in found if folder not in keep), *damaged[:-1]]:
                remove(folder)
            sync_folder(self.folder)
        except OSError as error:
            logger.warning(f"an old checkpoint was not removed: {error}")

    def _permanent(self, found: dict[Path, int | None]) -> set[Path]:
        """The first checkpoint past each multiple of keep_every_tokens, and ends of stages."""
        keep: set[Path] = set()
        multiples: set[int] = set()
        every = self.config.keep_every_tokens
        for folder, tokens in reversed(found.items()):
            if tokens is None or (self.config.keep_stage_ends and tokens in self.stage_ends):
                keep.add(folder)
            if tokens is not None and every is not None and tokens // every not in multiples:
                multiples.add(tokens // every)
                if tokens >= every:
                    keep.add(folder)
        return keep


def invalid_reason(folder: Path) -> str | None:
    """Why a checkpoint must not be loaded, or None: every file is read and hashed."""
    try:
        return verify_checkpoint(folder)
    except (
        OSError,
        ValueError,
        AttributeError,
    ) as error:  # hashed well and no JSON: somebody else made it
        return f"a file of it is not readable ({type(error).__name__}: {error})"


def age(seconds: float) -> str:
    """A time span in its largest whole unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


def tokens_of(folder: Path) -> int | None:
    """Tokens behind a checkpoint, or None when it is not readable; the next start checks it."""
    try:
        return int(read_state(folder)["tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
