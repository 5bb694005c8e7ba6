"""`make soak`: run the demo under seeded faults of all kinds and compare it with a clean run.

The clean run gets the NaN, infinite and spiking losses too, since they change losses by design.
All other faults must have no effect: weights, moments, and the loss and gradient norm of every step
are bit-identical. Ctrl-C, SIGTERM or --seconds pauses the soak; the same command continues it.
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

from core.run import Run, iter_checkpoints
from model.checkpoint import CheckpointReader, newest_valid, read_state
from tests.injector import NUMERIC, Fault, samples
from tests.start_faults import ON_FIRST_RANK
from tests.supervisor import CANARY, History, supervise
from train.config import RunConfig
from train.metrics.records import read_lines
from train.record.history import code_version, to_plain
from train.resilience.incidents import INTERRUPTED
from train.schedule import Schedule

PLAN = "plan.json"  # of a soak in progress
# (kind, weight): those that wait for the watchdog take the most time
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
    ("slow disk", 2),
    ("storage hangs", 1),
    ("interpreter stuck", 1),
    ("SIGHUP", 2),
    ("SIGQUIT", 2),
    ("SIGUSR2", 2),
    ("SIGINT", 2),
    ("update differs", 2),
    ("incident disk full", 2),
    ("outcome disk full", 2),
    ("lock disk full", 2),
    ("ranks differ", 3),
    ("kernel cache torn", 1),
    ("records damaged", 2),
    ("noise in logs", 2),
    ("stray files", 2),
)
LENGTH = {"slow": 20, "log disk full": 5, "nan": 1, "inf": 1, "spike": 1}


@dataclass
class Result:
    """Result of a soak."""

    folder: Path
    faults: list[Fault]
    fired: set[str]
    history: History
    clean_seconds: float
    effective: tuple[float, float]  # processor time share of useful steps: clean, under faults
    steps: int
    repeated: int  # steps that were repeated
    differences: list[str]  # from the clean run
    secrets: list[str]  # files that contain the canary


def schedule(
    seed: int, count: int, steps: int, ranks: int, kinds: tuple[tuple[str, int], ...] = KINDS
) -> list[Fault]:
    """`count` random faults; every kind occurs at least once if `count` allows."""
    rng = random.Random(seed)
    names = [kind for kind, _ in kinds] + rng.choices(
        *zip(*kinds, strict=True), k=max(0, count - len(kinds))
    )
    faults = []
    for kind in names[:count]:
        rank = (
            0
            if kind in (*ON_FIRST_RANK, "log disk full", "second job", "checkpoint damaged")
            else rng.randrange(ranks)
        )
        first = steps // 3 if kind == "spike" else 1  # after its window has filled
        detail = LENGTH.get(kind, rng.randrange(10_000))
        faults.append(Fault(kind, rank, rng.randrange(first, steps - steps // 10), detail))
    return sorted(faults, key=lambda fault: fault.step)


def steps_of(run: RunConfig) -> int:
    """Number of steps of a run."""
    plan = Schedule(run.schedule, run.optim.lr, run.data)
    tokens = 0
    steps = 0
    while tokens < plan.total:
        tokens += plan.at(tokens).tokens
        steps += 1
    return steps


def soak(
    run: RunConfig, faults: list[Fault], root: Path, ranks: int = 2, clean: History | None = None
) -> Result:
    """Run under faults and compare with a clean run, which is run first unless `clean` is given."""
    name = f"faulty-{len(list(root.glob('faulty*-log')))}"
    if clean is None:
        name = "faulty"
        clean = supervise(
            in_folder(run, root / "clean"),
            ranks,
            [f for f in faults if f.kind in NUMERIC],
            root / "clean-log",
        )
    log = root / f"{name}-log"
    history = supervise(in_folder(run, root / name), ranks, faults, log)
    started_steps = (log / "faults" / "steps").read_text().split()
    fired = {
        fault.name
        for fault in faults
        if (log / "faults" / fault.name).exists() or fault.kind in NUMERIC
    }
    return Result(
        root / name,
        faults,
        fired,
        history,
        clean.seconds,
        (effective_time(root / "clean-log", ranks), effective_time(log, ranks)),
        len(set(started_steps)),
        len(started_steps) - len(set(started_steps)),
        differences(root / "clean", root / name, ranks),
        files_with_secrets(root),
    )


def in_folder(run: RunConfig, folder: Path) -> RunConfig:
    """The config with another run folder."""
    return replace(run, run=Run(folder.name, str(folder), run.run.seed))


def differences(clean: Path, faulty: Path, ranks: int) -> list[str]:
    """Differences of the faulty run from the clean run; empty if there are none."""
    names = []
    folders = [newest_valid(iter_checkpoints(run / "checkpoints"))[0] for run in (clean, faulty)]
    if None in folders:
        return ["a run has no checkpoint that verifies"]
    left, right = (CheckpointReader(folder) for folder in folders if folder is not None)
    for kind, name in left.where:
        if not torch.equal(
            left.read_full(kind, name).view(torch.int32),
            right.read_full(kind, name).view(torch.int32),
        ):
            names.append(f"{kind} {name}")
    # with the config, which has the names of the runs
    states = [{**read_state(reader.folder), "config": None} for reader in (left, right)]
    if states[0] != states[1]:
        names.append("state")
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
        names.append("metrics.jsonl")
    if samples(log_dir(clean) / "faults", ranks) != samples(log_dir(faulty) / "faults", ranks):
        names.append("samples")
    if json.loads((faulty / "outcome.json").read_text())["outcome"] != "finished":
        names.append("outcome")
    parts = (faulty / "checkpoints").glob("*.part")
    if left_over := [path.name for path in parts if path.is_dir()]:  # files are strays of ours
        names.append(f"left over: {left_over}")
    return names


def effective_time(log: Path, ranks: int) -> float:
    """Share of all processor seconds of all starts that were spent in steps, each counted once.

    Useful and other work take turns within the same processes, so a shared machine that slows both
    does not change the share. Imports, which a fork has already, are not in it.
    """
    useful = total = 0.0
    for rank in range(ranks):
        last_of_process: dict[str, float] = {}
        seconds_of_step: dict[str, float] = {}
        for line in (log / "faults" / f"seconds-{rank}").read_text().splitlines():
            pid, seconds, step, *of_step = line.split()
            last_of_process[pid] = float(seconds)
            if of_step:  # a step that was repeated counts its last time
                seconds_of_step[step] = float(of_step[0])
        useful += sum(seconds_of_step.values())
        total += sum(last_of_process.values())
    return useful / total


def log_dir(run: Path) -> Path:
    """Folder of the logs of a run."""
    return run.with_name(f"{run.name}-log")


def files_with_secrets(root: Path) -> list[str]:
    """Files that contain the canary of the environment."""
    return [
        str(path)
        for path in root.rglob("*")
        if path.is_file() and CANARY.encode() in path.read_bytes()
    ]


def report(result: Result, step_seconds: float) -> Table:
    """Table of the faults by kind and of totals."""
    fired = Counter(fault.kind for fault in result.faults if fault.name in result.fired)
    table = Table("fault", "planned", "fired")
    for kind, planned in sorted(Counter(fault.kind for fault in result.faults).items()):
        table.add_row(kind, str(planned), str(fired[kind]))
    history = result.history
    table.add_section()
    pauses = history.codes.count([])
    table.add_row("starts, of these after a pause of the soak", "", f"{history.starts}, {pauses}")
    table.add_row("steps, repeated steps", "", f"{result.steps}, {result.repeated}")
    table.add_row(
        "seconds: clean, under faults", "", f"{result.clean_seconds:.0f}, {history.seconds:.0f}"
    )
    clean, faulty = result.effective
    table.add_row(
        "processor time in useful steps: clean, under faults", "", f"{clean:.1%}, {faulty:.1%}"
    )
    table.add_row("effective training time, of processor time", "", f"{faulty / clean:.1%}")
    per_fault = (history.seconds - result.clean_seconds) / max(1, len(result.fired))
    table.add_row(
        "seconds per fault", "", f"{per_fault:.1f} ({per_fault / step_seconds:.0f} steps)"
    )
    table.add_row("bit-identical to the clean run", "", "no: " + ", ".join(result.differences)
                  if result.differences else "yes")  # fmt: skip
    table.add_row("files with secrets", "", str(len(result.secrets)))
    return table


def demo(root: Path, data: str, extra_overrides: list[str]) -> RunConfig:
    """Config of the demo with frequent checkpoints and checks, for a run of minutes."""
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
        f"run.dir={root}/demo",
    ]
    return run_config("demo", *overrides, *extra_overrides)


def prepare_folder(root: Path, plan: dict[str, Any]) -> bool:
    """Return whether a soak with the same plan and code was paused in the folder.

    If not, the folder is emptied.
    """
    path = root / PLAN
    text = json.dumps(plan)
    if path.is_file() and path.read_text() == text:
        return True
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    path.write_text(text)
    return False


def main() -> int:
    """Run the command; returns 0 if nothing differs and every fault fired."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--faults", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--home", type=Path, default=Path("runs/soak"))
    parser.add_argument("--data", default="runs/data/demo")
    parser.add_argument("--seconds", type=int, help="pause after this time")
    parser.add_argument("overrides", nargs="*", help="overrides of the demo's config")
    args = parser.parse_args()
    run = demo(args.home, args.data, args.overrides)
    steps = steps_of(run)
    faults = schedule(args.seed, args.faults, steps, 2)
    paused = prepare_folder(
        args.home,
        {
            "config": to_plain(asdict(run)),
            "faults": [fault.name for fault in faults],
            "code": code_version(),
        },
    )
    print(
        f"{len(faults)} faults over {steps} steps; logs in {args.home}{', continuing' * paused}",
        flush=True,
    )
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    signal.alarm(args.seconds or 0)
    try:
        result = soak(run, faults, args.home)
    except KeyboardInterrupt:
        fired = sum((args.home / "faulty-log" / "faults" / fault.name).exists() for fault in faults)
        print(f"paused after {fired} faults; run the same command to continue")
        return INTERRUPTED
    signal.alarm(0)
    (args.home / PLAN).unlink()
    Console().print(report(result, result.clean_seconds / steps))
    not_fired = [fault.name for fault in faults if fault.name not in result.fired]
    if not_fired:
        print(f"faults that did not fire: {', '.join(not_fired)}")
    return 1 if result.differences or result.secrets or not_fired else 0


if __name__ == "__main__":
    sys.exit(main())
