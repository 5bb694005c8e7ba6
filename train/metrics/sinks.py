"""Sinks of the records of a run: metrics.jsonl, the console, and the configured trackers.

metrics.jsonl has every record. Console and trackers can neither delay nor stop the run.
"""

import logging
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from core.run import RunFiles
from core.units import short
from train.config import MetricsConfig
from train.metrics.console import LiveConsole, PlainConsole, wrap
from train.metrics.records import JsonLines, Record
from train.metrics.throughput import Throughput
from train.metrics.trackers import Accelerated, TensorBoard, Tracker, Wandb

logger = logging.getLogger(__name__)


class Metrics:
    """All sinks of a run, on the first rank."""

    def __init__(
        self,
        folder: Path,
        name: str,
        config: MetricsConfig,
        run_config: Record,
        throughput: Throughput,
        tokens: int,
        total: int,
        report: Callable[[str], None] = logger.warning,
    ) -> None:
        """Continue at `tokens` and cut off later records; the run ends at `total` tokens.

        Damaged records of earlier starts are reported by `report`.
        """
        self.throughput = throughput
        self.file = JsonLines(RunFiles(folder).metrics, tokens, report)
        self.console = (
            LiveConsole(total, throughput)
            if sys.stdout.isatty()
            else PlainConsole(total, throughput, config.console_seconds)
        )
        self.trackers = make_trackers(folder, name, config, run_config, tokens)

    def log(self, record: Record, checkpoints: str) -> None:
        """Add tokens/s and MFU to the record of a step and write it to every sink.

        `checkpoints` is the status of the checkpoints, for the console.
        """
        self.throughput.add(record)
        record = {**record, "tokens_per_second": self.throughput.tokens_per_second}
        if self.throughput.mfu is not None:
            record["mfu"] = self.throughput.mfu
        self.file.write(record)
        with suppress(OSError):  # standard output may go to a full disk
            self.console.show(record, checkpoints)
            if record.get("validation"):
                log_validation(record)
        for tracker in self.trackers:
            tracker.log(record)

    def log_initial(self, validation: Record) -> None:
        """Write the held-out losses of initial weights to the file, the console and the trackers.

        Trackers take them as the first point of the curves of validation.
        """
        start = {"step": 0, "tokens": 0}
        self.file.write({**start, "initial_validation": validation})
        shown = {**start, "validation": validation}
        with suppress(OSError):  # standard output may go to a full disk
            log_validation(shown)
        for tracker in self.trackers:
            tracker.log(shown)

    def log_scores(self, record: Record) -> None:
        """Write the scores of a checkpoint to the file, the console and the trackers."""
        self.file.write(record)
        log_suites(record)
        for tracker in self.trackers:
            tracker.log(record)

    def close(self) -> None:
        """Flush and stop every sink."""
        self.file.close()
        self.console.close()
        for tracker in self.trackers:
            tracker.close()


def make_trackers(
    folder: Path, name: str, config: MetricsConfig, run_config: Record, tokens: int
) -> list[Tracker]:
    """Trackers of the config, for a run that continues at `tokens`."""
    trackers: list[Tracker] = []
    if config.wandb_project is not None:
        trackers.append(Wandb(config, name, folder, run_config))
    if config.tensorboard:
        trackers.append(TensorBoard(folder, run_config, tokens))
    return trackers + [Accelerated(other, name, folder, run_config) for other in config.trackers]


def log_validation(record: Record) -> None:
    """Log the held-out loss of each source in a step's record."""
    title = (
        f"held-out at step {record['step']:,}, {short(record['tokens'])} tokens, "
        "nats per token (bits per byte):"
    )
    texts = [
        f"{name} {score['loss']:.3f} ({score['bits_per_byte']:.3f})"
        for name, score in record["validation"].items()
    ]
    first, *lines = [title, *wrap(texts)]
    logger.info("\n  ".join([first, *lines]))


def log_suites(record: Record) -> None:
    """Log the scores of each suite in a record."""
    for suite, rows in record["scores"].items():
        title = f"{suite} at step {record['step']:,}, {short(record['tokens'])} tokens:"
        texts = [f"{label} {score:.2f}" for label, score in rows.items()]
        logger.info("\n".join(wrap([title, *texts])))
