"""Profiler of a few steps: a table of time by phase, and a trace for Perfetto or chrome://tracing.

The profiler listens to the phases of the loop (train/phases.py), so a run without it has no cost.
Some steps are only timed. The next ones are traced by torch.profiler, which slows them down. The
trace gives the share of a phase that is exposed communication (collectives that no computation
hides); the table applies that share to the timed steps and shows it in the row `reduce`.
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

from core.files import fsync, make_folder, write_text
from core.log import ALL_RANKS
from core.run import RunFiles
from train.config import ProfileConfig
from train.distributed import Ranks
from train.phases import Phases

logger = logging.getLogger(__name__)

ROWS = {  # phase -> row of the table
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
MODEL = ("forward", "backward", "reduce", "update")  # all other phases but validation are overhead
PREFIX = "step: "  # of the ranges of phases in a trace
Span = tuple[str, float, float]  # phase, begin and end in seconds since the first phase began
Interval = tuple[float, float]  # begin and end in seconds


@contextmanager
def profiling(config: ProfileConfig, folder: Path, ranks: Ranks, phases: Phases) -> Iterator[None]:
    """Profile the configured steps of the run inside the context, if this rank is configured."""
    if not config.steps or ranks.rank not in config.ranks:
        yield
        return
    profiler = Profiler(config, RunFiles(folder).profile, ranks)
    phases.listeners.append(profiler.enter_phase)
    try:
        yield
    finally:
        phases.listeners.remove(profiler.enter_phase)
        profiler.close()


class PhaseTimer:
    """Times at which phases begin: CUDA events on a GPU, since the host runs ahead, else
    perf_counter.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[tuple[str, Any]] = []

    def mark(self, phase: str) -> None:
        """Record that a phase begins."""
        if self.cuda:
            now: Any = torch.cuda.Event(enable_timing=True)
            now.record()
        else:
            now = time.perf_counter()
        self.marks.append((phase, now))

    def spans(self) -> list[Span]:
        """Phases between the marks; the last mark only ends the phase before it."""
        if self.cuda:
            torch.cuda.synchronize()
        first = self.marks[0][1]
        times = [first.elapsed_time(at) / 1000 if self.cuda else at - first for _, at in self.marks]
        return [(self.marks[i][0], times[i], times[i + 1]) for i in range(len(times) - 1)]


class Profiler:
    """Profile of one rank: skip `after_steps`, time `timed_steps`, then trace `steps`."""

    def __init__(self, config: ProfileConfig, folder: Path, ranks: Ranks) -> None:
        self.config = config
        self.folder = folder
        self.ranks = ranks
        self.total_steps = config.after_steps + config.timed_steps + config.steps
        self.step_index = -1  # of the current step, counted from this start
        self.first_step = 0  # number of the first timed step, or traced step if none is timed
        self.timer: PhaseTimer | None = None
        self.timed: list[Span] = []
        self.trace: torch.profiler.profile | None = None
        self.range: record_function | None = None
        self.done = False

    def enter_phase(self, step: int, phase: str, patience: float = 1.0) -> None:
        """Handle the begin of a phase, after `step` finished steps."""
        if phase == "read":
            self._begin_step(step)
        elif phase == "exit" and self.step_index + 1 == self.total_steps:
            self._finish(step)
        if self.timer is None:
            return
        if self.trace is not None:
            if self.range is not None:
                self.range.__exit__(None, None, None)
            self.range = record_function(PREFIX + ROWS.get(phase, phase))
            self.range.__enter__()
        self.timer.mark(phase)

    def close(self) -> None:
        """Stop a trace in progress; log a warning if the run ended before the profile was done."""
        if self.trace is not None:
            self.trace.stop()
        if not self.done:
            logger.warning(
                f"no profile: this start ended before its {self.total_steps} steps "
                "(train.profile.after_steps, timed_steps and steps together)"
            )

    def _begin_step(self, step: int) -> None:
        self.step_index += 1
        config = self.config
        if self.step_index == config.after_steps and config.timed_steps:
            self.timer = PhaseTimer(self.ranks.device)
            self.first_step = step + 1
        if self.step_index == config.after_steps + config.timed_steps:
            self.timed = self._end_timer()
            self.first_step = self.first_step or step + 1
            activities = [ProfilerActivity.CPU]
            if self.ranks.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
                torch.cuda.synchronize()  # the first mark is made when the host reaches it
            self.trace = torch.profiler.profile(activities=activities)
            self.trace.start()
            self.timer = PhaseTimer(self.ranks.device)
        if self.step_index == self.total_steps:
            self._finish(step)

    def _end_timer(self) -> list[Span]:
        if self.timer is None:
            return []
        self.timer.mark("end")
        spans = self.timer.spans()
        self.timer = None
        return spans

    def _finish(self, step: int) -> None:
        """Write the trace and the table, which takes seconds. A disk error is only logged."""
        assert self.trace is not None and self.range is not None
        traced = self._end_timer()
        self.range.__exit__(None, None, None)
        self.trace.stop()
        rank = self.ranks.rank
        stem = f"step-{step:08d}-rank-{rank:05d}"
        path = self.folder / f"{stem}.trace.json.gz"
        try:
            make_folder(self.folder)
            self.trace.export_chrome_trace(str(path))
            fsync(path)
            with gzip.open(path) as file:
                exposed = exposed_comm_seconds(json.load(file)["traceEvents"], traced)
            steps = self.config.timed_steps or self.config.steps
            rows = seconds_by_phase(self.timed or traced, traced, exposed, steps)
            title = (
                f"steps {self.first_step} to {self.first_step + steps - 1} of rank {rank} by phase"
            )
            text = format_table(title, rows)
            text += f"\ntrace of the last {self.config.steps} steps: {path}"
            write_text(self.folder / f"{stem}.txt", text + "\n")
            logger.info(text, extra=ALL_RANKS)
        except (OSError, EOFError, ValueError) as error:
            logger.warning(f"cannot write the profile: {error}")
        self.trace = None
        self.done = True


def exposed_comm_seconds(events: list[dict[str, Any]], spans: list[Span]) -> dict[str, float]:
    """Exposed communication of each phase: seconds in which a collective runs and this rank
    computes nothing.

    `events` are those of a Chrome trace (microseconds), `spans` the same steps by the timer. On a
    GPU, NCCL kernels are compared with all other kernels, as in Meta's HolisticTraceAnalysis. On a
    CPU, gloo's work is compared with the operators of the loop's thread.
    """
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    ranges = [
        event
        for event in complete
        if event["name"].startswith(PREFIX) and event.get("cat") == "user_annotation"
    ]
    start = min(ranges, key=lambda event: event["ts"])
    kernels = [
        event for event in complete if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")
    ]
    if kernels:
        comm = [event for event in kernels if event["name"].startswith("nccl")]
        compute = [event for event in kernels if not event["name"].startswith("nccl")]
    else:
        comm = [event for event in complete if event["name"].startswith("gloo:")]
        compute = [
            event
            for event in complete
            if event["name"].startswith("aten::") and event["tid"] == start["tid"]
        ]
    comm_intervals = merge_intervals(to_intervals(comm, start["ts"]))
    compute_intervals = merge_intervals(to_intervals(compute, start["ts"]))
    exposed: dict[str, float] = defaultdict(float)
    for begin, end in subtract_intervals(comm_intervals, compute_intervals):
        for phase, phase_begin, phase_end in spans:
            exposed[phase] += max(0.0, min(end, phase_end) - max(begin, phase_begin))
    return exposed


def to_intervals(events: list[dict[str, Any]], origin: float) -> list[Interval]:
    """Begin and end of trace events in seconds since `origin` (microseconds of the trace)."""
    return [
        ((event["ts"] - origin) / 1e6, (event["ts"] + event["dur"] - origin) / 1e6)
        for event in events
    ]


def merge_intervals(intervals: list[Interval]) -> list[Interval]:
    """Union of intervals: sorted, without overlaps."""
    merged: list[Interval] = []
    for begin, end in sorted(intervals):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged


def subtract_intervals(intervals: list[Interval], others: list[Interval]) -> list[Interval]:
    """Difference of two lists of intervals, both sorted and without overlaps."""
    remaining: list[Interval] = []
    first = 0  # the first of the others that can overlap
    for begin, end in intervals:
        while first < len(others) and others[first][1] <= begin:
            first += 1
        i = first
        while i < len(others) and others[i][0] < end:
            if others[i][0] > begin:
                remaining.append((begin, others[i][0]))
            begin = max(begin, others[i][1])
            i += 1
        if begin < end:
            remaining.append((begin, end))
    return remaining


def seconds_by_phase(
    timed: list[Span], traced: list[Span], exposed: dict[str, float], steps: int
) -> dict[str, float]:
    """Seconds per step of every phase.

    The share of forward, backward and update that the trace shows as exposed communication moves
    to `reduce`.
    """
    seconds = dict.fromkeys(ROWS, 0.0)
    traced_seconds = dict.fromkeys(ROWS, 0.0)
    for total, spans in ((seconds, timed), (traced_seconds, traced)):
        for phase, begin, end in spans:
            total[phase] = total.get(phase, 0.0) + (end - begin)
    for phase in ("forward", "backward", "update"):
        share = exposed.get(phase, 0.0) / max(traced_seconds[phase], 1e-12)
        moved = seconds[phase] * share
        seconds[phase] -= moved
        seconds["reduce"] += moved
    return {phase: value / steps for phase, value in seconds.items()}


def format_table(title: str, rows: dict[str, float]) -> str:
    """Table of the phases in milliseconds per step and as shares, and the time outside the model.

    `rows` are seconds per step by phase.
    """
    total = sum(rows.values())
    lines = [title, f"{'phase':<12}{'ms a step':>10}{'share':>8}"]
    lines += [
        f"{ROWS.get(key, key):<12}{1000 * value:>10.2f}{value / total:>8.1%}"
        for key, value in rows.items()
    ]
    outside = sum(value for key, value in rows.items() if key not in (*MODEL, "validate"))
    lines += [
        f"{'all':<12}{1000 * total:>10.2f}{1:>8.1%}",
        "outside the model (all but forward, backward, reduce, optimizer and validation): "
        f"{outside / total:.2%}",
    ]
    return "\n".join(lines)
