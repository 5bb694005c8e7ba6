"""`make soak`: the demo under seeded faults of all kinds, to the end, and its weights beside a
clean run's.

The clean run gets the losses that are not finite and the spikes too, for these change a run's
course on purpose; all else must leave no trace: weights, moments, and every line's loss and
gradient norm are the same, bit for bit. It can be paused by Ctrl-C, SIGTERM or --seconds: the same
command then goes on.
"""

import argparse
import json
import random
import shutil
import signal
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from core.run import Run
from model.checkpoint import CheckpointReader, newest_valid, read_state
from tests.injector import NUMERIC, Fault, samples
from tests.supervisor import CANARY, History, supervise
from train.config import RunConfig
from train.metrics.records import read_lines
from train.resilience.incidents import INTERRUPTED
from train.run_context import code_version, to_plain
from train.schedule import Schedule

PLAN = "plan.json"  # of a soak that is not over
# (kind, share): the ones that wait for the watchdog cost the most time
KINDS = (
    ("kill", 10),
    ("kill in save", 8),
    ("checkpoint damaged", 6),
    ("SIGTERM", 4),
    ("SIGUSR1", 2),
    ("stop", 3),
    ("disk full", 4),
    ("disk error", 2),
    ("nan", 3),
    ("inf", 1),
    ("spike", 2),
    ("loader dies", 2),
    ("loader hangs", 1),
    ("weights flip", 2),
    ("slow", 1),
    ("log disk full", 2),
    ("clock jumps", 2),
    ("second job", 2),
)
LENGTH = {"slow": 20, "log disk full": 5, "nan": 1, "inf": 1, "spike": 1}


@dataclass
class Result:
    """What a soak has shown."""

    folder: Path
    faults: list[Fault]
    fired: set[str]
    history: History
    clean_seconds: float
    steps: int
    lost: int  # steps done more than once
    differences: list[str]  # what is not as in the clean run
    secrets: list[str]  # files with the canary


def schedule(
    seed: int, count: int, steps: int, ranks: int, kinds: tuple[tuple[str, int], ...] = KINDS
) -> list[Fault]:
    """`count` faults, every kind at least once where there is room, at random steps and ranks."""
    chance = random.Random(seed)
    names = [kind for kind, _ in kinds] + chance.choices(
        *zip(*kinds, strict=True), k=max(0, count - len(kinds))
    )
    faults = []
    for kind in names[:count]:
        rank = (
            0
            if kind in ("log disk full", "second job", "checkpoint damaged")
            else chance.randrange(ranks)
        )
        first = steps // 3 if kind == "spike" else 1  # once its window is full
        detail = LENGTH.get(kind, chance.randrange(10_000))
        faults.append(Fault(kind, rank, chance.randrange(first, steps - steps // 10), detail))
    return sorted(faults, key=lambda fault: fault.step)


def steps_of(run: RunConfig) -> int:
    """Steps that a run takes."""
    plan, tokens, steps = Schedule(run.schedule, run.optim.lr, run.data), 0, 0
    while tokens < plan.total:
        tokens, steps = tokens + plan.at(tokens).tokens, steps + 1
    return steps


def soak(
    run: RunConfig, faults: list[Fault], home: Path, ranks: int = 2, clean: History | None = None
) -> Result:
    """A clean run, or the one that is there already, and a run under faults, compared."""
    name = f"faulty-{len(list(home.glob('faulty*-log')))}"
    if clean is None:
        name = "faulty"
        clean = supervise(
            moved(run, home / "clean"),
            ranks,
            [f for f in faults if f.kind in NUMERIC],
            home / "clean-log",
        )
    log = home / f"{name}-log"
    history = supervise(moved(run, home / name), ranks, faults, log)
    begun = (log / "faults" / "steps").read_text().split()
    fired = {
        fault.name
        for fault in faults
        if (log / "faults" / fault.name).exists() or fault.kind in NUMERIC
    }
    return Result(
        home / name,
        faults,
        fired,
        history,
        clean.seconds,
        len(set(begun)),
        len(begun) - len(set(begun)),
        differences(home / "clean", home / name, ranks),
        secrets(home),
    )


def moved(run: RunConfig, folder: Path) -> RunConfig:
    """The same run in another folder."""
    return replace(run, run=Run(folder.name, str(folder), run.run.seed))


def differences(clean: Path, faulty: Path, ranks: int) -> list[str]:
    """Where the faulty run is not the clean one."""
    found = []
    folders = [newest_valid(run / "checkpoints")[0] for run in (clean, faulty)]
    if None in folders:
        return ["a run has no checkpoint that verifies"]
    left, right = (CheckpointReader(folder) for folder in folders if folder is not None)
    for kind, name in left.where:
        if not torch.equal(
            left.read_full(kind, name).view(torch.int32),
            right.read_full(kind, name).view(torch.int32),
        ):
            found.append(f"{kind} {name}")
    if read_state(left.folder) != read_state(right.folder):
        found.append("state")
    keys = (
        "step",
        "tokens",
        "loss",
        "grad_norm",
        "skipped",
        "lr",
        "batch",
        "seq_len",
        "source_loss",
    )
    lines = [
        [{key: line[key] for key in keys} for line in read_lines(run / "metrics.jsonl")]
        for run in (clean, faulty)
    ]
    if lines[0] != lines[1]:
        found.append("metrics.jsonl")
    if samples(log_of(clean) / "faults", ranks) != samples(log_of(faulty) / "faults", ranks):
        found.append("samples")
    if json.loads((faulty / "outcome.json").read_text())["outcome"] != "finished":
        found.append("outcome")
    if left_over := [path.name for path in (faulty / "checkpoints").glob("*.part")]:
        found.append(f"left over: {left_over}")
    return found


def log_of(run: Path) -> Path:
    """Where the launcher keeps the logs of a run."""
    return run.with_name(f"{run.name}-log")


def secrets(home: Path) -> list[str]:
    """Files that hold the canary of the environment."""
    return [
        str(path)
        for path in home.rglob("*")
        if path.is_file() and CANARY.encode() in path.read_bytes()
    ]


def report(result: Result, step_seconds: float) -> Table:
    """A line per kind, and the figures of the whole."""
    fired = Counter(fault.kind for fault in result.faults if fault.name in result.fired)
    table = Table("fault", "planned", "happened")
    for kind, planned in sorted(Counter(fault.kind for fault in result.faults).items()):
        table.add_row(kind, str(planned), str(fired[kind]))
    history = result.history
    table.add_section()
    pauses = history.codes.count([])
    table.add_row("starts, and after a pause of the soak", "", f"{history.starts}, {pauses}")
    table.add_row("steps, and steps done again", "", f"{result.steps}, {result.lost}")
    table.add_row(
        "seconds: clean, under faults", "", f"{result.clean_seconds:.0f}, {history.seconds:.0f}"
    )
    table.add_row("effective training time", "", f"{result.clean_seconds / history.seconds:.1%}")
    per_fault = (history.seconds - result.clean_seconds) / max(1, len(result.fired))
    table.add_row(
        "seconds that a fault costs", "", f"{per_fault:.1f} ({per_fault / step_seconds:.0f} steps)"
    )
    table.add_row("bit-identical to the clean run", "", "no: " + ", ".join(result.differences)
                  if result.differences else "yes")  # fmt: skip
    table.add_row("files with a secret", "", str(len(result.secrets)))
    return table


def demo(home: Path, data: str, further: list[str]) -> RunConfig:
    """The demo's run, saved more often and watched more closely, as befits minutes instead of
    weeks.
    """
    from tests.compose import run_config

    overrides = [
        f"data.folder={data}",
        "checkpoint.every_tokens=50000",
        "checkpoint.retry_seconds=0.5",
        "health.hang_seconds=20",
        "health.max_starts=20",
        "health.spike_window_updates=32",
        "health.check_replicas_every_steps=10",
        "health.straggler_window_steps=8",
        f"run.dir={home}/demo",
    ]
    return run_config("demo", *overrides, *further)


def begin(home: Path, plan: dict[str, Any]) -> bool:
    """Whether a soak of the same plan and code was paused there; empties the folder of anything
    else.
    """
    path, text = home / PLAN, json.dumps(plan)
    if path.is_file() and path.read_text() == text:
        return True
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    path.write_text(text)
    return False


def main() -> int:
    """Run it; exit code 0 when nothing differs and everything happened."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--faults", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, default=Path("runs/soak"))
    parser.add_argument("--data", default="runs/data/demo")
    parser.add_argument("--seconds", type=int, help="pause after as many")
    parser.add_argument("overrides", nargs="*", help="of the demo's config")
    given = parser.parse_args()
    run = demo(given.home, given.data, given.overrides)
    steps = steps_of(run)
    faults = schedule(given.seed, given.faults, steps, 2)
    paused = begin(
        given.home,
        {
            "config": to_plain(asdict(run)),
            "faults": [fault.name for fault in faults],
            "code": code_version(),
        },
    )
    print(
        f"{len(faults)} faults over {steps} steps; logs in {given.home}{', going on' * paused}",
        flush=True,
    )
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    signal.alarm(given.seconds or 0)
    try:
        result = soak(run, faults, given.home)
    except KeyboardInterrupt:
        fired = sum(
            (given.home / "faulty-log" / "faults" / fault.name).exists() for fault in faults
        )
        print(f"paused after {fired} faults; the same command goes on")
        return INTERRUPTED
    signal.alarm(0)
    (given.home / PLAN).unlink()
    Console().print(report(result, result.clean_seconds / steps))
    missed = [fault.name for fault in faults if fault.name not in result.fired]
    if missed:
        print(f"did not happen: {', '.join(missed)}")
    return 1 if result.differences or result.secrets or missed else 0


if __name__ == "__main__":
    sys.exit(main())
