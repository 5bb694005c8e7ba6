"""Send a run's records to W&B, TensorBoard and others, in threads that cannot delay or stop it."""

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

from core.entry import install_command
from core.errors import InputError
from core.files import ROOT
from core.run import RunFiles
from train.config import MetricsConfig
from train.metrics.records import Record, finite

logger = logging.getLogger(__name__)

# accelerate's names, which are their packages' too; it has W&B and TensorBoard as well, but no run
# that goes on offline, no axis of tokens, no lost future
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
        """Let the thread finish, for a bounded time."""
        self.queue.put(None, timeout=1) if not self.queue.full() else None
        self.thread.join(self.CLOSE_SECONDS)
        if self.thread.is_alive():
            logger.warning(
                f"{self.NAME} has not sent its last records in time; metrics.jsonl has them all"
            )

    def _work(self) -> None:
        try:
            self._open()
            while (record := self.queue.get()) is not None:
                self._write(finite(record))
            self._finish()
        except (
            Exception
        ) as error:  # whatever it raises must not reach the run; the message says what is lost
            what = f"{type(error).__name__}: {error}"
            logger.warning(f"{self.NAME} is disabled ({what}); metrics.jsonl has all records")

    @abstractmethod
    def _open(self) -> None:
        """Start, in the thread."""

    @abstractmethod
    def _write(self, record: Record) -> None:
        """Show a record; numbers that are not finite are None."""

    @abstractmethod
    def _finish(self) -> None:
        """Write what is held back, and end."""


class Wandb(Tracker):
    """W&B.

    Online with WANDB_API_KEY in the environment, else offline into the run's folder; offline too
    when the server does not answer. The run id follows from the folder, so that a restarted run
    goes on in the same W&B run.
    """

    NAME = "W&B"
    ANSWER_SECONDS = 15.0

    def __init__(self, project: str, name: str, folder: Path, run_config: Record) -> None:
        digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]
        run_id = re.sub(r"[^A-Za-z0-9_-]", "-", f"{name}-{digest}")
        self.settings = {"project": project, "name": name, "id": run_id, "dir": str(folder)}
        self.run_config = run_config
        self.at: Record = {}  # the step that W&B counts, once there is one
        self.defined: set[str] = set()
        super().__init__()

    def _open(self) -> None:
        self.run = self._start()
        # of this start
        self.run.config.update({"code": self.run_config.get("code")}, allow_val_change=True)
        # runs of other batches are compared by what they have read
        self.run.define_metric("*", step_metric="tokens")

    def _write(self, record: Record) -> None:
        if "scores" in record:
            self._write_scores(record)
            return
        self.at = {"step": record["step"]}
        self.run.log(grouped(record), **self.at)

    def _write_scores(self, record: Record) -> None:
        """Log scores over their checkpoint's tokens: W&B's own steps can only grow."""
        values = {**flatten({"scores": record["scores"]}), "scores/tokens": record["tokens"]}
        for key in values.keys() - self.defined - {"scores/tokens"}:
            self.run.define_metric(key, step_metric="scores/tokens")
            self.defined.add(key)
        self.run.log(values, **self.at)

    def _finish(self) -> None:
        import wandb

        self.run.finish()
        # finish does not wait for the service's last write; the end of its process does
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
        if not os.environ.get("WANDB_API_KEY"):
            return wandb.init(mode="offline", **arguments)
        try:
            return wandb.init(mode="online", **arguments)
        except (
            Exception
        ) as error:  # unreachable, refused or timed out: keep the numbers for a later `wandb sync`
            logger.warning(f"W&B does not answer ({type(error).__name__}); logging offline")
            wandb.teardown()  # its service still holds the id of the run that failed to start
            return wandb.init(mode="offline", **arguments)


class TensorBoard(Tracker):
    """TensorBoard's files in the run's folder, by torch's writer: `tensorboard --logdir
    RUN_FOLDER/tensorboard`.

    Its axis is tokens. A restart hides what an earlier start wrote beyond the tokens it goes on
    from.
    """

    NAME = "TensorBoard"

    def __init__(self, folder: Path, run_config: Record, tokens: int) -> None:
        self.folder, self.run_config, self.tokens = folder, run_config, tokens
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
    """A tracker of accelerate's, in a process of its own, which starts in the run's folder.

    The process knows nothing of ranks: accelerate would join their process group, and Comet and
    ClearML replace functions of torch. Its axis is tokens.
    """

    CODE = "import sys; sys.path[0] = {!r}; from train.metrics.trackers import serve; serve()"

    def __init__(self, name: str, project: str, folder: Path, run_config: Record) -> None:
        self.NAME, self.folder = name, folder
        self.opening = [name, project, str(folder.resolve()), run_config]
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
        self._write(self.opening)

    def _write(self, record: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(record) + "\n")

    def _finish(self) -> None:
        self.process.communicate()
        if self.process.returncode:
            raise RuntimeError(f"its process exited with code {self.process.returncode}")


def serve() -> None:
    """The process of an Accelerated: what it is, then records, come as lines of JSON."""
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # the log lines of accelerate's trackers ask for it
    name, project, folder, run_config = json.loads(sys.stdin.readline())
    kind = LOGGER_TYPE_TO_CLASS[name]
    view = kind(project, *([folder] if kind.requires_logging_directory else []))
    view.start()
    view.store_init_configuration(flatten(run_config))
    for line in sys.stdin:
        record = json.loads(line)
        view.log(numbers(record), step=record["tokens"])
    view.finish()


def check_trackers(config: MetricsConfig) -> None:
    """Raise InputError when a view is asked for that is not known, or whose package is absent."""
    for name in config.trackers:
        if name not in ACCELERATED:
            raise InputError(f"metrics.trackers has {name!r}; it takes {', '.join(ACCELERATED)}")
        if find_spec(name) is None:
            raise InputError(
                f"metrics.trackers has {name}, but its package is not installed: pip install {name}"
            )
    if config.tensorboard and find_spec("tensorboard") is None:
        raise InputError(
            "metrics.tensorboard is true and the tensorboard package is absent: "
            f"{install_command('tensorboard')}, or metrics.tensorboard=false"
        )


def flatten(record: Record, prefix: str = "") -> Record:
    """Nested records with slashes in their keys, as W&B groups them."""
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
    """The numbers of a record by the keys of their panels, its tokens aside, which are the axis."""
    return {
        key: value
        for key, value in grouped(record).items()
        if isinstance(value, int | float) and key != "tokens"
    }


def grouped(record: Record) -> Record:
    """A record with keys that W&B shows in sections; step and tokens stay as they are: axes."""
    return flatten({GROUPS.get(key, key): value for key, value in record.items()})
