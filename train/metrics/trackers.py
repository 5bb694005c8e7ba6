"""Trackers (W&B, TensorBoard, accelerate's), in threads that cannot delay or stop the run."""

import hashlib
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from core.credentials import has_wandb_key
from core.entry import install_command
from core.errors import InputError
from core.files import ROOT
from core.run import RunFiles
from train.config import MetricsConfig
from train.metrics.records import Record, finite

logger = logging.getLogger(__name__)

# Names of accelerate's trackers and of their packages. Ours are used for W&B and TensorBoard:
# accelerate's cannot resume a run offline, use tokens as the axis or purge records after a restart.
ACCELERATED = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio")


class Tracker(ABC):
    """A tracker in its own thread behind a queue: it can neither delay nor fail the run."""

    NAME: str
    CLOSE_SECONDS = 15.0

    def __init__(self) -> None:
        self.queue: queue.Queue[Record | None] = queue.Queue(100_000)
        self.thread = threading.Thread(target=self._work, name=self.NAME, daemon=True)
        self.thread.start()

    def log(self, record: Record) -> None:
        """Queue a record; if the thread is dead or the queue full, only metrics.jsonl has it."""
        if self.thread.is_alive() and not self.queue.full():
            self.queue.put_nowait(record)

    def close(self) -> None:
        """Wait up to CLOSE_SECONDS for the thread to finish."""
        self.queue.put(None, timeout=1) if not self.queue.full() else None
        self.thread.join(self.CLOSE_SECONDS)
        if self.thread.is_alive():
            logger.warning(
                f"{self.NAME} did not finish within {self.CLOSE_SECONDS:.0f} s; "
                "metrics.jsonl has all records"
            )

    def _work(self) -> None:
        try:
            self._open()
            while (record := self.queue.get()) is not None:
                self._write(finite(record))
            self._finish()
        except Exception as error:  # no error of a tracker may stop the run
            reason = f"{type(error).__name__}: {error}"
            logger.warning(f"{self.NAME} is disabled ({reason}); metrics.jsonl has all records")

    @abstractmethod
    def _open(self) -> None:
        """Start the tracker; called in its thread."""

    @abstractmethod
    def _write(self, record: Record) -> None:
        """Send a record, in which None stands for NaN and infinity."""

    @abstractmethod
    def _finish(self) -> None:
        """Flush and end."""


class Wandb(Tracker):
    """W&B: online if there is a key and the server answers, else offline in the run's folder.

    WANDB_MODE chooses another mode. The W&B run id is derived from the folder, so a restart
    continues the same W&B run.
    """

    NAME = "W&B"
    ANSWER_SECONDS = 15.0

    def __init__(self, config: MetricsConfig, name: str, folder: Path, run_config: Record) -> None:
        digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        run_id = re.sub(r"[^A-Za-z0-9_-]", "-", f"{name}-{digest}")
        self.folder = folder
        self.settings: Record = {
            "project": config.wandb_project,
            "entity": config.wandb_entity,
            "group": config.wandb_group,
            "tags": config.wandb_tags or None,
            "name": name,
            "id": run_id,
            "dir": str(folder),
        }
        self.run_config = run_config
        self.last_step: Record = {}  # argument `step` of wandb.log; empty before the first step
        self.defined: set[str] = set()  # metrics with their own axis
        super().__init__()

    def _open(self) -> None:
        self.run = self._start()
        # the commit may differ from that of the first start
        self.run.config.update({"code": self.run_config.get("code")}, allow_val_change=True)
        # runs with different batch sizes are compared over tokens
        self.run.define_metric("*", step_metric="tokens")

    def _write(self, record: Record) -> None:
        if "scores" in record:
            self._write_scores(record)
            return
        self.last_step = {"step": record["step"]}
        self.run.log(grouped(record), **self.last_step)

    def _write_scores(self, record: Record) -> None:
        """Log scores over the tokens of their checkpoint, since steps of W&B can only increase."""
        values = {**flatten({"scores": record["scores"]}), "scores/tokens": record["tokens"]}
        for key in values.keys() - self.defined - {"scores/tokens"}:
            self.run.define_metric(key, step_metric="scores/tokens")
            self.defined.add(key)
        self.run.log(values, **self.last_step)

    def _finish(self) -> None:
        import wandb

        self.run.finish()
        # finish() does not wait for the last write of W&B's service; teardown() does
        wandb.teardown()

    def _start(self) -> Any:
        import wandb

        settings = wandb.Settings(init_timeout=self.ANSWER_SECONDS, console="off", silent=True)
        arguments: Record = {
            **self.settings,
            "config": self.run_config,
            "resume": "allow",
            "settings": settings,
        }
        mode: Any = os.environ.get("WANDB_MODE", "online")
        reason = f"WANDB_MODE={mode}"
        if mode == "online" and not has_wandb_key():
            mode, reason = "offline", "no WANDB_API_KEY and no key in ~/.netrc"
        if mode == "online":
            try:
                run = wandb.init(mode="online", **arguments)
                logger.info(f"W&B: {run.url}")
                return run
            except Exception as error:  # unreachable, refused or timed out
                mode, reason = "offline", f"it does not answer ({type(error).__name__})"
                wandb.teardown()  # its service still holds the id of the run that failed to start
        if mode == "offline":
            folder = self.folder / "wandb"
            logger.info(f"W&B: logging offline in {folder}, for `wandb sync`: {reason}")
        return wandb.init(mode=mode, **arguments)


class TensorBoard(Tracker):
    """TensorBoard over tokens: `tensorboard --logdir RUN_FOLDER/tensorboard`.

    A restart purges values that an earlier start wrote after the tokens at which it continues.
    """

    NAME = "TensorBoard"

    def __init__(self, folder: Path, run_config: Record, tokens: int) -> None:
        self.folder = folder
        self.run_config = run_config
        self.tokens = tokens
        super().__init__()

    def _open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(
            str(RunFiles(self.folder).tensorboard), purge_step=self.tokens + 1
        )
        text = "\n".join(
            f"    {line}" for line in json.dumps(self.run_config, indent=2).splitlines()
        )
        self.writer.add_text("config", text, self.tokens)

    def _write(self, record: Record) -> None:
        for key, value in numbers(record).items():
            self.writer.add_scalar(key, value, record["tokens"])

    def _finish(self) -> None:
        self.writer.close()


class Accelerated(Tracker):
    """A tracker of accelerate over tokens, in a separate process whose working folder is the run's.

    The process has no rank variables, since accelerate would join the ranks' process group. It is
    separate because Comet and ClearML patch functions of torch.
    """

    CODE = "import sys; sys.path[0] = {!r}; from train.metrics.trackers import serve; serve()"

    def __init__(self, name: str, project: str, folder: Path, run_config: Record) -> None:
        self.NAME = name
        self.folder = folder
        self.header = [name, project, str(folder.resolve()), run_config]
        super().__init__()

    def _open(self) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("LOCAL_RANK", None)
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE.format(str(ROOT))],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            cwd=self.folder,
            env=environment,
            start_new_session=True,
        )
        self._write(self.header)

    def _write(self, record: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(record) + "\n")

    def _finish(self) -> None:
        self.process.communicate()
        if self.process.returncode:
            raise RuntimeError(f"its process exited with code {self.process.returncode}")


def serve() -> None:
    """Main function of the process of an Accelerated.

    Reads lines of JSON: first [tracker, project, folder, config of the run], then records.
    """
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the loggers of accelerate's trackers need it
    name, project, folder, run_config = json.loads(sys.stdin.readline())
    tracker_class = LOGGER_TYPE_TO_CLASS[name]
    if tracker_class.requires_logging_directory:
        tracker = tracker_class(project, folder)
    else:
        tracker = tracker_class(project)
    tracker.start()
    tracker.store_init_configuration(flatten(run_config))
    for line in sys.stdin:
        record = json.loads(line)
        tracker.log(numbers(record), step=record["tokens"])
    tracker.finish()


def check_trackers(config: MetricsConfig) -> None:
    """Raise InputError if a configured tracker is unknown or its package is not installed."""
    for name in config.trackers:
        if name not in ACCELERATED:
            raise InputError(f"metrics.trackers has {name!r}; it takes {', '.join(ACCELERATED)}")
        if find_spec(name) is None:
            raise InputError(
                f"metrics.trackers has {name}, but its package is not installed: pip install {name}"
            )
    if config.tensorboard and find_spec("tensorboard") is None:
        raise InputError(
            "metrics.tensorboard needs the tensorboard package: "
            f"{install_command('tensorboard')}, or metrics.tensorboard=false"
        )


def flatten(record: Record, prefix: str = "") -> Record:
    """Flatten nested records to keys with slashes, by which W&B groups them."""
    flat: Record = {}
    for key, value in record.items():
        flat |= (
            flatten(value, f"{prefix}{key}/") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


SECTIONS = {
    "schedule": ("lr", "batch", "seq_len", "stage"),
    "health": ("grad_norm", "skipped", "memory_gib"),
    "speed": ("tokens_per_second", "mfu", "step_seconds", "data_wait_seconds"),
}
GROUPS = {"loss": "loss/all", "source_loss": "loss", "source_tokens": "mixture"} | {
    key: f"{section}/{key}" for section, keys in SECTIONS.items() for key in keys
}


def numbers(record: Record) -> Record:
    """Numbers of a record by `grouped` key, without tokens, which are the axis."""
    return {
        key: value
        for key, value in grouped(record).items()
        if isinstance(value, int | float) and key != "tokens"
    }


def grouped(record: Record) -> Record:
    """Flatten a record to keys that W&B shows in sections; `step` and `tokens` keep their keys."""
    return flatten({GROUPS.get(key, key): value for key, value in record.items()})
