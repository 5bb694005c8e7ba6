"""Draw the pictures of the README and of the site from a run's records.

    python docs/pictures.py                                         # after `make demo`
    python docs/pictures.py runs/demo --output docs/pages/images

demo_curves.svg: loss per source and learning rate over tokens. console.svg: what training prints,
in a log and in a terminal; the run's metrics.jsonl is replayed through train/metrics/console.py.
"""

import argparse
import io
import logging
import re
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import matplotlib
import rich
from omegaconf import OmegaConf
from rich.console import Console
from rich.text import Text

from core import log
from core.run import RunFiles
from train.checkpoint.manager import format_age
from train.metrics.console import LiveConsole, PlainConsole
from train.metrics.curves import figure
from train.metrics.records import Record, read_lines
from train.metrics.throughput import Throughput

STEPS = 5  # a point of the curve of all sources is the mean of so many, as of each source
COLUMNS = 120  # of the console
LOG_LINES = 10
LIVE_AT = 0.6  # of the tokens: what the terminal shows then
COMMAND = "$ torchrun --nproc-per-node {ranks} train/pretrain.py +experiment={name}"
logger = logging.getLogger(__name__)


def draw_curves(run: Path, path: Path) -> None:
    """Write loss per source and learning rate as SVG; the same run gives the same bytes."""
    style: Any = {"svg.hashsalt": "demo", "svg.fonttype": "path"}
    records = list(averaged(read_lines(RunFiles(run).metrics)))
    with matplotlib.rc_context(style):
        picture = figure({run.name: records}, {}, ("loss", "rate"))
        picture.set_size_inches(10, 5.6)
        picture.savefig(path, metadata={"Date": None})


def averaged(records: list[Record]) -> Iterator[Record]:
    """Records with the loss averaged over the last STEPS steps of their stage.

    The figure averages the losses of sources itself.
    """
    for _, group in groupby(records, key=lambda record: record["stage"]):
        stage = list(group)
        for end, record in enumerate(stage, start=1):
            steps = stage[max(0, end - STEPS) : end]
            yield record | {"loss": mean([step["loss"] for step in steps])}


def mean(values: list[float | None]) -> float | None:
    """Mean of the values that are not None."""
    present = [value for value in values if value is not None]
    return fmean(present) if present else None


class Replay:
    """The records of a finished run, shown at the times of the run."""

    def __init__(self, run: Path) -> None:
        files = RunFiles(run)
        self.config: Any = OmegaConf.load(files.config)
        self.records = read_lines(files.metrics)
        self.total = self.records[-1]["tokens"]
        cluster = self.config.cluster
        self.ranks = cluster.nodes * cluster.ranks_per_node
        self.seconds = sum(record["step_seconds"] for record in self.records)
        self.started_at = files.metrics.stat().st_mtime - self.seconds
        self.now = 0.0  # seconds since the start

    def throughput(self) -> Throughput:
        """Rates as of a CPU, whose peak is not known."""
        return Throughput(self.ranks, flops_per_token=0.0, peak_flops=None)

    def show(
        self, console: PlainConsole | LiveConsole, throughput: Throughput, tokens: int
    ) -> None:
        """Show the records of the first `tokens` tokens."""
        self.now = 0.0
        saved: tuple[int, float] | None = None  # step and time of the last checkpoint
        with (
            mock.patch("time.time", lambda: self.started_at + self.now),
            mock.patch("time.monotonic", lambda: self.now),
        ):
            for record, after in zip(self.records, [*self.records[1:], None], strict=True):
                self.now += record["step_seconds"]
                if record["tokens"] > tokens:
                    break
                throughput.add(record)
                checkpoints = "no checkpoint yet"
                if saved is not None:
                    checkpoints = f"step {saved[0]:,} saved {format_age(self.now - saved[1])} ago"
                console.show(record, checkpoints)
                if self.is_saved(record, after):
                    saved = (record["step"], self.now)

    def is_saved(self, record: Record, after: Record | None) -> bool:
        """Whether a checkpoint followed: at multiples of its interval, and where a stage ends."""
        every = self.config.checkpoint.every_tokens
        before = record["tokens"] - record["batch"] * record["seq_len"]
        ends = after is None or after["stage"] != record["stage"]
        return bool(ends or record["tokens"] // every > before // every)


def log_lines(replay: Replay) -> list[str]:
    """The run's log if it showed LOG_LINES steps, evenly spread, and the last one."""
    stream = io.StringIO()
    throughput = replay.throughput()
    console = PlainConsole(replay.total, throughput, replay.seconds / LOG_LINES)
    with mock.patch("sys.stdout", stream):
        replay.show(console, throughput, replay.total)
    return stream.getvalue().splitlines()


def live_frame(replay: Replay) -> Text:
    """The terminal after LIVE_AT of the run."""
    rich.reconfigure(**recording(get_time=lambda: replay.now))
    throughput = replay.throughput()
    live = LiveConsole(replay.total, throughput)
    replay.show(live, throughput, round(LIVE_AT * replay.total))
    rich.get_console().export_text(clear=True)  # earlier frames
    live.close()
    return Text.from_ansi(rich.get_console().export_text(styles=True))


def recording(**options: Any) -> dict[str, Any]:
    """Options of a console that records what it prints and shows nothing."""
    terminal = {"force_terminal": True, "color_system": "truecolor", "width": COLUMNS}
    return {"record": True, "file": io.StringIO(), **terminal, **options}


def draw_console(run: Path, path: Path) -> None:
    """Write the console as SVG: the log of the run, and the terminal in the middle of it."""
    replay = Replay(run)
    command = COMMAND.format(ranks=replay.ranks, name=replay.config.run.name)
    console = Console(**recording())
    console.print(Text(f"{command} > demo.log", style="bold"))
    for line in log_lines(replay):
        console.print(Text(line))
    console.print(Text(f"\n{command}", style="bold"))
    console.print(live_frame(replay))
    svg = console.export_svg(title="Training the demo", unique_id="console")
    # its fonts come from a server; an image in a page loads nothing
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


def main() -> None:
    """The command line."""
    log.init_logger()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, nargs="?", default=ROOT / "runs" / "demo")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "pages" / "images")
    given = parser.parse_args()
    if not RunFiles(given.run).metrics.is_file():
        parser.error(f"{given.run} holds no metrics.jsonl: run `make demo` first")
    given.output.mkdir(parents=True, exist_ok=True)
    for name, draw in (("demo_curves.svg", draw_curves), ("console.svg", draw_console)):
        draw(given.run, given.output / name)
        logger.info(f"wrote {given.output / name}")


if __name__ == "__main__":
    main()
