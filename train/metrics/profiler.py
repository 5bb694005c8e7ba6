"""A close look at a few steps: a table of their time by phase, and a trace for Perfetto or
chrome://tracing.

The profiler listens to the loop's phases (train/phases.py), so a run without one pays nothing. Some
steps are only timed, by marks on the clock; then a few are traced by torch.profiler, which slows
them. The trace tells which part of a phase is spent in collectives that no computation hides, and
the table gives that part of the timed steps a row of its own.
"""

import gzip
import json
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from core.log import ALL_RANKS
from core.run import RunFiles
from train.config import ProfileConfig
from train.distributed import Ranks
from train.phases import Phases

logger = logging.getLogger(__name__)

ROWS = {
    "read": "data",
    "forward": "forward",
    "backward": "backward",
    "reduce": "reduce",
    "update": "optimizer",
    "reduce_stats": "stats",
    "validate": "validation",
    "log": "log",
    "check": "checks",
    "save": "checkpoint",
}
MODEL = ("forward", "backward", "reduce", "update")  # what a step is for; the rest is overhead
PREFIX = "step: "  # of the phases' ranges in a trace
Span = tuple[str, float, float]  # phase, begin and end in seconds since the first one began
Interval = tuple[float, float]


@contextmanager
def profiling(config: ProfileConfig, folder: Path, ranks: Ranks, phases: Phases) -> Iterator[None]:
    """Profile the chosen steps of the run inside, if this rank is to."""
    if not config.steps or ranks.rank not in config.ranks:
        yield
        return
    profiler = Profiler(config, RunFiles(folder).profile, ranks)
    phases.listeners.append(profiler.at)
    try:
        yield
    finally:
        phases.listeners.remove(profiler.at)
        profiler.close()


class Clock:
    """Marks on a rank's time line: on its GPU's stream, as the host runs ahead, or on the host."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Here a phase begins."""
        if self.cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))

    def spans(self) -> list[Span]:
        """The phases between the marks; the last mark ends the last one."""
        if self.cuda:
            torch.cuda.synchronize()
        first = self.marks[0][1]
        times = [first.elapsed_time(at) / 1000 if self.cuda else at - first for _, at in self.marks]
        return [(self.marks[i][0], times[i], times[i + 1]) for i in range(len(times) - 1)]


class Profiler:
    """One rank's profile: `after_steps` pass, `timed_steps` are timed, then `steps` are traced."""

    def __init__(self, config: ProfileConfig, folder: Path, ranks: Ranks) -> None:
        self.config, self.folder, self.ranks = config, folder, ranks
        # steps of this start, and all is seen
        self.last = config.after_steps + config.timed_steps + config.steps
        self.begun = -1  # steps of this start that are behind it
        self.first = 0  # number of the first step that is timed, or else traced
        self.clock: Clock | None = None
        self.timed: list[Span] = []
        self.trace: torch.profiler.profile | None = None
        self.range: record_function | None = None
        self.done = False

    def at(self, step: int, phase: str, patience: float = 1.0) -> None:
        """The loop comes to a phase of the step after `step` others."""
        if phase == "read":
            self._begin_step(step)
        elif phase == "exit" and self.begun + 1 == self.last:
            self._finish(step)
        if self.clock is None:
            return
        if self.trace is not None:
            if self.range is not None:
                self.range.__exit__(None, None, None)
            self.range = record_function(PREFIX + ROWS.get(phase, phase))
            self.range.__enter__()
        self.clock.mark(phase)

    def close(self) -> None:
        """The run ends or leaves; say so when that was too soon."""
        if self.trace is not None:
            self.trace.stop()
        if not self.done:
            logger.warning(
                f"no profile: this start ended before its {self.last} steps "
                "(train.profile.after_steps, timed_steps and steps together)"
            )

    def _begin_step(self, step: int) -> None:
        self.begun += 1
        config = self.config
        if self.begun == config.after_steps and config.timed_steps:
            self.clock, self.first = Clock(self.ranks.device), step + 1
        if self.begun == config.after_steps + config.timed_steps:
            self.timed = self._end_clock()
            self.first = self.first or step + 1
            activities = [ProfilerActivity.CPU]
            if self.ranks.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.synchronize()  # so that the first mark is made when the host says so
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.start()
            self.clock = Clock(self.ranks.device)
        if self.begun == self.last:
            self._finish(step)

    def _end_clock(self) -> list[Span]:
        if self.clock is None:
            return []
        self.clock.mark("end")
        spans = self.clock.spans()
        self.clock = None
        return spans

    def _finish(self, step: int) -> None:
        """Write trace and table, which takes seconds; a disk that refuses costs the files alone."""
        assert self.trace is not None and self.range is not None
        traced = self._end_clock()
        self.range.__exit__(None, None, None)
        self.trace.stop()
        stem = f"step-{step:08d}-rank-{self.ranks.rank:05d}"
        path = self.folder / f"{stem}.trace.json.gz"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.trace.export_chrome_trace(str(path))
            with gzip.open(path, "rt", encoding="utf-8") as file:
                waits = waiting(json.load(file)["traceEvents"], traced)
            steps = self.config.timed_steps or self.config.steps
            rows = by_phase(self.timed or traced, traced, waits, steps)
            head = (
                f"steps {self.first} to {self.first + steps - 1} of rank {self.ranks.rank} by phase"
            )
            text = table(head, rows) + f"\ntrace of the last {self.config.steps} steps: {path}"
            (self.folder / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")
            logger.info(text, extra=ALL_RANKS)
        except OSError as error:
            logger.warning(f"cannot write the profile: {error}")
        self.trace, self.done = None, True


def waiting(events: list[dict[str, Any]], spans: list[Span]) -> dict[str, float]:
    """Seconds of each phase in which collectives are under way and this rank computes nothing.

    `events` are those of a Chrome trace (microseconds), `spans` the same steps by the clock. On a
    GPU the two kinds of kernels are compared, as Meta's HolisticTraceAnalysis does; elsewhere
    gloo's work with the operators of the loop.
    """
    whole = [event for event in events if event.get("ph") == "X" and "dur" in event]
    ranges = [
        event
        for event in whole
        if event["name"].startswith(PREFIX) and event.get("cat") == "user_annotation"
    ]
    start = min(ranges, key=lambda event: event["ts"])
    device = [
        event for event in whole if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    if device:
        talk = [event for event in device if event["name"].startswith("nccl")]
        work = [event for event in device if not event["name"].startswith("nccl")]
    else:
        talk = [event for event in whole if event["name"].startswith("gloo:")]
        work = [
            event
            for event in whole
            if event["name"].startswith("aten::") and event["tid"] == start["tid"]
        ]
    waits: dict[str, float] = defaultdict(float)
    alone = minus(union(intervals(talk, start["ts"])), union(intervals(work, start["ts"])))
    for begin, end in alone:
        for phase, phase_begin, phase_end in spans:
            waits[phase] += max(0.0, min(end, phase_end) - max(begin, phase_begin))
    return waits


def intervals(events: list[dict[str, Any]], zero: float) -> list[Interval]:
    """Begin and end of a trace's events in seconds since `zero`, which is in its microseconds."""
    return [
        ((event["ts"] - zero) / 1e6, (event["ts"] + event["dur"] - zero) / 1e6) for event in events
    ]


def union(pieces: list[Interval]) -> list[Interval]:
    """The same time without overlaps, in order."""
    merged: list[Interval] = []
    for begin, end in sorted(pieces):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def minus(pieces: list[Interval], taken: list[Interval]) -> list[Interval]:
    """What is left of ordered pieces without the ordered others."""
    left: list[Interval] = []
    place = 0
    for begin, end in pieces:
        while place < len(taken) and taken[place][1] <= begin:
            place += 1
        look = place
        while look < len(taken) and taken[look][0] < end:
            if taken[look][0] > begin:
                left.append((begin, taken[look][0]))
            begin = max(begin, taken[look][1])
            look += 1
        if begin < end:
            left.append((begin, end))
    return left


def by_phase(
    timed: list[Span], traced: list[Span], waits: dict[str, float], steps: int
) -> dict[str, float]:
    """Seconds per step of every phase; `reduce` is the model's time that the trace saw waiting."""
    seconds, traced_seconds = (dict.fromkeys(ROWS, 0.0) for _ in range(2))
    for total, spans in ((seconds, timed), (traced_seconds, traced)):
        for phase, begin, end in spans:
            total[phase] = total.get(phase, 0.0) + (end - begin)
    for phase in ("forward", "backward", "update"):
        part = seconds[phase] * waits.get(phase, 0.0) / max(traced_seconds[phase], 1e-12)
        seconds[phase] -= part
        seconds["reduce"] += part
    return {phase: value / steps for phase, value in seconds.items()}


def table(head: str, rows: dict[str, float]) -> str:
    """The phases in milliseconds a step and shares, and what does not belong to the model."""
    whole = sum(rows.values())
    lines = [head, f"{'phase':<12}{'ms a step':>10}{'share':>8}"]
    lines += [
        f"{ROWS.get(key, key):<12}{1000 * value:>10.2f}{value / whole:>8.1%}"
        for key, value in rows.items()
    ]
    outside = sum(value for key, value in rows.items() if key not in (*MODEL, "validate"))
    lines += [
        f"{'all':<12}{1000 * whole:>10.2f}{1:>8.1%}",
        "outside the model (all but forward, backward, reduce, optimizer and validation): "
        f"{outside / whole:.2%}",
    ]
    return "\n".join(lines)
