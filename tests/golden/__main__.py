"""Golden losses: `step loss grad_norm` of short runs, which a refactoring must not change.

    python -m tests.golden            # run and compare; exit code 1 if one differs
    python -m tests.golden --write    # run and write, for a change meant to change losses

The digits depend on the instruction set. The process chooses AVX2 for torch and our kernels if the
processor has it, and for MKL the code path common to all x86 processors. The first line of a file
names the machine that wrote it; on other machines, figures are compared to within RELATIVE.
"""

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from model.kernels.cpu_library import instruction_set

# torch does not check the processor: it would run AVX2 where it is not available
TORCH = "default" if instruction_set() == "portable" else "avx2"
# libraries read these when they are loaded, so the process replaces itself by one that has them
ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": TORCH,
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "OMP_NUM_THREADS": "1",
}
if __name__ == "__main__" and any(
    os.environ.get(name) != value for name, value in ENVIRONMENT.items()
):
    os.execve(
        sys.executable,
        [sys.executable, "-m", "tests.golden", *sys.argv[1:]],
        {**os.environ, **ENVIRONMENT},
    )

import torch

from tests.distributed import run_ranks
from tests.golden.runs import INSTRUCTIONS, runs, train_on_one_instruction_set
from train.config import RunConfig

FOLDER = Path(__file__).resolve().parent
RELATIVE = 2e-4  # tolerance with another instruction set or torch version


def lines_of(run: RunConfig) -> list[str]:
    """`step loss grad_norm` of the records of a run, with all digits."""
    records = [
        json.loads(line) for line in (run.run.folder / "metrics.jsonl").read_text().splitlines()
    ]
    return [f"{record['step']} {record['loss']!r} {record['grad_norm']!r}" for record in records]


def machine() -> str:
    """Processor, instruction set and torch version, which determine the last digits."""
    vendor = "unknown"
    if (info := Path("/proc/cpuinfo")).is_file():
        vendors = [
            line.split(":")[1].strip()
            for line in info.read_text().splitlines()
            if line.startswith("vendor_id")
        ]
        vendor = vendors[0] if vendors else vendor
    return f"# {platform.machine()} {vendor} {INSTRUCTIONS} torch {torch.__version__.split('+')[0]}"


def read(name: str) -> tuple[str, list[str]]:
    """First line of a golden file, which names the machine, and the other lines."""
    head, *golden = (FOLDER / f"{name}.txt").read_text().splitlines()
    return head, golden


def differences(name: str, lines: list[str]) -> list[str]:
    """Lines that differ from the golden file of a run."""
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
        if not all(is_close(float(a), float(b)) for a, b in zip(old, new, strict=True))
    ]


def is_close(old: float, new: float) -> bool:
    """Whether a figure is within RELATIVE of the golden one; False for NaN."""
    return abs(old - new) <= RELATIVE * abs(old)


def report(names: Iterable[str]) -> str:
    """Summary line of a comparison without differences."""
    heads = sorted({read(name)[0] for name in names})
    results = [
        "equal to the last digit"
        if head == machine()
        else f"within {RELATIVE} of those of {head[2:]}"
        for head in heads
    ]
    return f"all golden losses are {' or '.join(results)}"


def main(write: bool) -> int:
    """Run all golden runs; returns the exit code."""
    different = []
    with tempfile.TemporaryDirectory() as folder:
        golden_runs = runs(Path(folder))
        for size in (1, 2):
            jobs = [
                (train_on_one_instruction_set, (run,))
                for ranks, run in golden_runs.values()
                if ranks == size
            ]
            run_ranks(size, jobs)
        for name, (_, run) in golden_runs.items():
            lines = lines_of(run)
            if write:
                (FOLDER / f"{name}.txt").write_text("\n".join([machine(), *lines]) + "\n")
            else:
                different += differences(name, lines)
            print(f"{name}: {len(lines)} steps", flush=True)
    print(
        "\n".join(different) if different else "written" if write else report(golden_runs),
        flush=True,
    )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main("--write" in sys.argv[1:]))
