"""Golden losses: `step loss grad_norm` of short runs, which a change of structure must not change.

    python -m tests.golden            # run them and compare, exit code 1 where one differs
    python -m tests.golden --write    # run and write: only with a change meant to change losses

A run has the same digits on one instruction set: the process chooses AVX2 for torch and for our
kernels, where the processor has it, and for MKL the path that all x86 processors share. On another
machine (a file's first line says which one wrote it) the figures agree to RELATIVE.
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from model.kernels.cpu_library import instruction_set

# torch believes what it is told: it would run AVX2 on a processor without it
TORCH = "default" if instruction_set() == "portable" else "avx2"
# read by the libraries when they are loaded, so this process is replaced by one that has them from
# its start
FIXED = {
    "ATEN_CPU_CAPABILITY": TORCH,
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": "1",
}
if __name__ == "__main__" and any(os.environ.get(name) != value for name, value in FIXED.items()):
    os.execve(
        sys.executable,
        [sys.executable, "-m", "tests.golden", *sys.argv[1:]],
        {**os.environ, **FIXED},
    )

import torch

from tests.distributed import run_ranks
from tests.golden.runs import INSTRUCTIONS, runs, train_on_one_instruction_set
from train.config import RunConfig

HERE = Path(__file__).resolve().parent
RELATIVE = 2e-4  # of a figure, on another instruction set or with another torch


def lines_of(run: RunConfig) -> list[str]:
    """`step loss grad_norm` of a run's records, every digit of them."""
    records = [
        json.loads(line) for line in (run.run.folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [f"{record['step']} {record['loss']!r} {record['grad_norm']!r}" for record in records]


def machine() -> str:
    """What decides the last digits: processor, instruction set, torch."""
    vendor = "unknown"
    if (info := Path("/proc/cpuinfo")).is_file():
        found = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("vendor_id")
        ]
        vendor = found[0] if found else vendor
    return f"# {platform.machine()} {vendor} {INSTRUCTIONS} torch {torch.__version__.split('+')[0]}"


def read(name: str) -> tuple[str, list[str]]:
    """Which machine wrote a golden file, and its lines."""
    head, *golden = (HERE / f"{name}.txt").read_text().splitlines()
    return head, golden


def differences(name: str, lines: list[str]) -> list[str]:
    """How a run differs from its golden file; nothing when it does not."""
    head, golden = read(name)
    if head == machine():
        return [
            f"{name}: {new} instead of {old}"
            for old, new in zip(golden, lines, strict=True)
            if old != new
        ]
    pairs = [(old.split(), new.split()) for old, new in zip(golden, lines, strict=True)]
    return [
        f"{name} (another machine): {' '.join(new)} instead of {' '.join(old)}"
        for old, new in pairs
        if not all(near(float(a), float(b)) for a, b in zip(old, new, strict=True))
    ]


def near(old: float, new: float) -> bool:
    """Whether a figure is within RELATIVE of the golden one; NaN is near nothing."""
    return abs(old - new) <= RELATIVE * abs(old)


def report(names: Iterable[str]) -> str:
    """How golden losses were found to agree, which depends on the machine that wrote them."""
    heads = sorted({read(name)[0] for name in names})
    found = [
        "equal to the last digit"
        if head == machine()
        else f"within {RELATIVE} of those of {head[2:]}"
        for head in heads
    ]
    return f"all golden losses are {' or '.join(found)}"


def main(write: bool) -> int:
    """Run everything; returns the exit code."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        wanted = runs(Path(folder))
        for size in (1, 2):
            jobs = [
                (train_on_one_instruction_set, (run,))
                for ranks, run in wanted.values()
                if ranks == size
            ]
            run_ranks(size, jobs)
        for name, (_, run) in wanted.items():
            lines = lines_of(run)
            if write:
                (HERE / f"{name}.txt").write_text("\n".join([machine(), *lines]) + "\n")
            else:
                wrong += differences(name, lines)
            print(f"{name}: {len(lines)} steps", flush=True)
    print("\n".join(wrong) if wrong else "written" if write else report(wanted), flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
