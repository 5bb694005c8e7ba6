"""Checkpoints of the whole training state: committed atomically, verified before use, no pickle.

Inspect them with `python train/checkpoints.py ls|verify|diff DIR`.

Commit: every rank writes its tensor shards into `step-N.part` and syncs them; ranks gather sizes
and SHA-256; the first rank writes the state and, last, the manifest, and renames the folder to
`step-N`. Only then are older checkpoints removed. A reader sees a complete folder or none, and
skips a damaged one for the newest that verifies.

Cost: each rank writes 12 bytes per parameter that it owns (weights and two moments, fp32). The loop
waits only for the copy to host memory (train/checkpoint/writer.py does the rest).
"""

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.errors import InputError
from core.run import MANIFEST, STEP_NAME, iter_checkpoints, step_number
from model.checkpoint import CheckpointReader, read_state, read_tokens, verify_checkpoint
from train.checkpoint.writer import (
    CheckpointWriter,
    fsync,
    is_folder,
    remove_checkpoint,
    set_aside,
)
from train.config import CheckpointConfig
from train.distributed import Ranks, errors_on_all_ranks
from train.engines.protocol import Engine
from train.resilience.progress import Progress

logger = logging.getLogger(__name__)
DAMAGED = re.compile(rf"{STEP_NAME.pattern}\.damaged-[0-9]{{19}}")
MAX_NAMES = 8  # of strays in a warning
ASIDE = re.compile(r".*\.(damaged|stray)-[0-9]{19}")


@dataclass
class TrainState:
    """Position of a run, and the record of what it was trained with."""

    tokens: int  # trained on so far
    step: int
    updates: int  # steps whose update was not skipped
    plan: str  # hash of the order of these tokens (Plan.hash_at)
    model: dict[str, Any]
    # state of the spike detector (train/resilience/health.py), which a restart must keep
    health: dict[str, Any] = field(default_factory=dict)
    # every setting of the start that saved it, and its code's version; empty before version 0.3
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = ""  # SHA-256 of the tokenizer.json of the data
    # lines of metrics.jsonl up to here that the disk had no room for when it was saved
    unwritten: list[str] = field(default_factory=list)


class CheckpointManager:
    """Saves, verifies, loads and removes the checkpoints of one run; all ranks call it together."""

    def __init__(
        self,
        folder: Path,
        config: CheckpointConfig,
        ranks: Ranks,
        stage_ends: frozenset[int],
        beat: Callable[[], object] = lambda: None,
    ) -> None:
        """`stage_ends` are the token counts at which stages end.

        `beat` is called while the loop waits for a save or a read that goes on on any rank.
        """
        self.folder = folder
        self.config = config
        self.ranks = ranks
        self.stage_ends = stage_ends
        self.beat = beat
        self.writer = CheckpointWriter(folder, ranks, beat)
        self.failures = 0  # failed saves in a row; the same on every rank
        self.saved: TrainState | None = None  # of the save in flight, or of the last one
        self.retry_at: float | None = None

    def find_latest(self, max_tokens: int | None = None) -> Path | None:
        """Return the newest checkpoint that verifies, the same on every rank.

        The first rank reads and hashes it. Checkpoints of more than `max_tokens` tokens are
        skipped. A damaged checkpoint is renamed, so that retention does not count it and its step
        can be saved again. Raises InputError on every rank, and renames nothing, if one cannot be
        read for a reason that is not in its content.
        """
        progress = Progress()

        def find() -> int:
            return self._find_latest(max_tokens, progress.add) if self.ranks.is_first else -1

        step = torch.full((1,), -1, dtype=torch.int64)
        with errors_on_all_ranks():
            step[0] = progress.run(find, self.beat)
        dist.broadcast(step, src=0)
        return None if step < 0 else self.folder / f"step-{int(step):08d}"

    def _find_latest(self, max_tokens: int | None, on_read: Callable[[int], object]) -> int:
        """Return the step of the newest checkpoint that verifies, or -1."""
        try:
            if strays := find_strays(self.folder):
                logger.warning(
                    f"{self.folder} has {', '.join(strays[:MAX_NAMES])}, which are no checkpoints: "
                    "ignored"
                )
            for folder in iter_checkpoints(self.folder):
                reason = verify_checkpoint(folder, on_read)
                if reason is not None:
                    set_aside(folder, reason)
                elif max_tokens is None or read_state(folder)["tokens"] <= max_tokens:
                    return step_number(folder)
        except OSError as error:
            raise InputError(f"cannot read the checkpoints in {self.folder}: {error}") from error
        return -1

    def load(self, folder: Path, engine: Engine) -> TrainState:
        """Load a verified checkpoint, written by any layout of ranks, into the engine.

        Raises InputError when the files match their manifest but are no checkpoint of this run.
        """
        with errors_on_all_ranks(), loading(folder):
            state, reader = read_train_state(folder), CheckpointReader(folder, self.beat)
            saved_at = (folder / MANIFEST).stat().st_mtime
        with loading(folder):
            engine.load(reader, state.updates)
        if self.writer.last_commit is None:
            self.writer.last_commit = (f"step-{state.step:08d}", saved_at)
        return state

    def is_due(self, before: int, tokens: int) -> bool:
        """Whether a step from `before` to `tokens` passes the interval or ends a stage."""
        every = self.config.every_tokens
        return tokens // every > before // every or tokens in self.stage_ends

    @property
    def retry_due(self) -> bool:
        """Whether the last save failed and its pause is over; only the first rank decides."""
        if self.writer.is_saving or self.writer.thread is None or self.writer.error is None:
            return False
        if self.retry_at is None:
            self.retry_at = time.monotonic() + self.config.retry_seconds * 2**self.failures
        return time.monotonic() >= self.retry_at

    def status(self) -> str:
        """Checkpoint status for the console: last committed save, its age, any save in progress."""
        parts = ["no checkpoint yet"]
        if self.writer.last_commit is not None:
            name, when = self.writer.last_commit
            age = format_age(time.time() - when)
            parts = [f"step {step_number(Path(name)):,} saved {age} ago"]
        if self.writer.is_saving and self.saved is not None:
            parts.append(f"saving step {self.saved.step:,}")
        elif self.writer.error is not None and self.saved is not None:
            parts.append(f"step {self.saved.step:,} failed: {self.writer.error}")
        return ", ".join(parts)

    def save(self, state: TrainState, engine: Engine) -> float:
        """Start an asynchronous save on every rank; return the seconds that the loop waited.

        Raises InputError, on every rank, when max_failures saves in a row have failed.
        """
        started_at = time.monotonic()
        self.wait()
        self.writer.host_buffers.copy_from(engine.state_shards(), self.beat)
        self.saved = TrainState(**asdict(state))
        self.retry_at = None
        self.writer.start(f"step-{state.step:08d}", asdict(state), self._remove_old)
        return time.monotonic() - started_at

    def wait(self) -> bool:
        """Wait for the save in flight; return whether the last save succeeded."""
        if self.writer.thread is None:
            return self.failures == 0
        error = self.writer.wait()
        self.failures = 0 if error is None else self.failures + 1
        if self.failures >= self.config.max_failures:
            raise InputError(
                f"cannot write to {self.folder}, {self.failures} saves in a row failed ({error}): "
                "free disk space or choose another run.dir"
            )
        if error is not None and self.ranks.is_first:
            logger.warning(f"checkpoint not saved: {error}; older ones are intact")
        return error is None

    def save_and_wait(self, state: TrainState, engine: Engine) -> None:
        """Save, and retry until the checkpoint is on disk or max_failures saves have failed.

        The pauses between them are at most retry_seconds * (2 ** (max_failures - 1) - 1) in all.
        """
        is_started = self.saved is not None and self.saved.step == state.step
        while not (is_started and self.wait()):
            if self.failures:
                self._pause(self.config.retry_seconds * 2 ** (self.failures - 1))
            self.save(state, engine)
            is_started = True

    def _pause(self, seconds: float) -> None:
        """Sleep; to wait for a disk is no hang."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 1.0))
            self.beat()

    def _remove_old(self) -> None:
        """Remove checkpoints that the config does not keep, and all damaged ones but the newest.

        Counts only folders with the state of their step: copies, links and what cannot be read
        remain, and the next start checks them. The save stays valid if a removal fails.
        """
        try:
            tokens_by_folder = {
                folder: tokens
                for folder in iter_checkpoints(self.folder)
                if is_folder(folder) and (tokens := read_tokens(folder)) is not None
            }
            keep = set(list(tokens_by_folder)[: self.config.keep_last])
            keep |= self._permanent_checkpoints(tokens_by_folder)
            old = [folder for folder in tokens_by_folder if folder not in keep]
            damaged = sorted(
                (path for path in self.folder.iterdir() if DAMAGED.fullmatch(path.name)),
                key=lambda path: path.name[-19:],
            )
            for folder in [*old, *filter(is_folder, damaged[:-1])]:
                remove_checkpoint(folder)
                self.writer.progress.add()
            fsync(self.folder)
        except OSError as error:
            logger.warning(f"cannot remove an old checkpoint: {error}")

    def _permanent_checkpoints(self, tokens_by_folder: dict[Path, int]) -> set[Path]:
        """Checkpoints at stage ends, and the first past each multiple of keep_every_tokens."""
        keep: set[Path] = set()
        multiples: set[int] = set()
        every = self.config.keep_every_tokens
        for folder, tokens in reversed(tokens_by_folder.items()):
            if self.config.keep_stage_ends and tokens in self.stage_ends:
                keep.add(folder)
            if every is not None and tokens // every not in multiples:
                multiples.add(tokens // every)
                if tokens >= every:
                    keep.add(folder)
        return keep


def read_train_state(folder: Path) -> TrainState:
    """Read the position and record of a verified checkpoint; InputError if it has none of ours."""
    with loading(folder):
        values = {key: value for key, value in read_state(folder).items() if key != "format"}
        return TrainState(**values)


@contextmanager
def loading(folder: Path) -> Iterator[None]:
    """Raise InputError where the files of a verified checkpoint are no checkpoint of this run."""
    try:
        yield
    except (InputError, OSError) as error:
        raise InputError(
            f"{folder} matches its manifest but cannot be loaded ({error}): move it away to load "
            "the one before"
        ) from error


def find_strays(folder: Path) -> list[str]:
    """Names in the folder of the checkpoints that look like ours and are no checkpoints."""
    strays = []
    for name in sorted(os.listdir(folder) if folder.exists() else []):
        if STEP_NAME.fullmatch(name) or name.endswith(".part"):
            is_stray = not (folder / name).is_dir() or not name.startswith("step-")
        else:
            is_stray = name.startswith("step") and not ASIDE.fullmatch(name)
        strays += [name] * is_stray
    return strays


def format_age(seconds: float) -> str:
    """Format a time span in its largest whole unit."""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
