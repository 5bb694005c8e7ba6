"""Where the numbers of a run go: metrics.jsonl, the console, and the trackers that are wanted.

The file is the record; the others are views of it and can neither delay nor stop the run.
"""

import logging
import sys
from contextlib import suppress
from pathlib import Path

from core.run import RunFiles
from train.config import MetricsConfig
from train.metrics.console import LiveConsole, PlainConsole
from train.metrics.records import JsonLines, Record
from train.metrics.trackers import Accelerated, TensorBoard, Tracker, Wandb

logger = logging.getLogger(__name__)


class Metrics:
    """All sinks of one run; only its first rank makes one."""

    def __init__(
        self,
        folder: Path,
        name: str,
        config: MetricsConfig,
        run_config: Record,
        tokens: int,
        total: int,
    ) -> None:
        """`tokens`: the run goes on here; later records are dropped. `total`: it ends here."""
        self.file = JsonLines(RunFiles(folder).metrics, tokens)
        self.console = (
            LiveConsole(total)
            if sys.stdout.isatty()
            else PlainConsole(total, config.console_seconds)
        )
        self.trackers = trackers(folder, name, config, run_config, tokens)

    def log(self, record: Record, saves: str) -> None:
        """Write one step's record everywhere; `saves` tells the console the checkpoints' state."""
        self.file.write(record)
        with suppress(OSError):  # standard output may go to a full disk
            self.console.show(record, saves)
        for tracker in self.trackers:
            tracker.log(record)

    def log_scores(self, record: Record) -> None:
        """Write the scores of a checkpoint wherever they belong."""
        self.file.write(record)
        say(record)
        for tracker in self.trackers:
            tracker.log(record)

    def close(self) -> None:
        """Flush and stop every sink."""
        self.file.close()
        self.console.close()
        for tracker in self.trackers:
            tracker.close()


def trackers(
    folder: Path, name: str, config: MetricsConfig, run_config: Record, tokens: int
) -> list[Tracker]:
    """The views that the config wants; `tokens` is where the run goes on."""
    chosen: list[Tracker] = []
    if config.wandb_project is not None:
        chosen.append(Wandb(config.wandb_project, name, folder, run_config))
    if config.tensorboard:
        chosen.append(TensorBoard(folder, run_config, tokens))
    return chosen + [Accelerated(other, name, folder, run_config) for other in config.trackers]


def say(record: Record) -> None:
    """A line for each suite of a record of scores."""
    for suite, rows in record["scores"].items():
        line = ", ".join(f"{label} {score:.2f}" for label, score in rows.items())
        logger.info(f"{suite} at step {record['step']}, {record['tokens']:,} tokens: {line}")
