"""GPU benchmark, `python -m benchmarks.gpu`: limits, operations, a layer, a rank's step of the 7B.

Measures every available backend on the same random inputs, which rotate to miss the L2 cache. Times
are medians; ratios are to `cuda`, our backend. Every implementation is first checked on a small
problem and is not timed if it is wrong. Missing or failed measurements are listed with the reason;
the others are printed and written, also after a signal. `--device cpu --small` tries the code on
tiny sizes without a GPU; its times mean nothing.
"""

import argparse
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_model, gpu_operations
from benchmarks.gpu_bench import Bench
from benchmarks.timing import add_ratios, print_table, write_results
from tests.compose import run_config

# the 7b's settings on the demo's model
SMALL = (
    "parallel.engine=megatron",
    "compute.precision=bf16",
    "compute.recompute=full",
    "parallel.micro_batch_tokens=256",
)


SECTIONS = (
    "ceilings",
    "check",
    "scan",
    "jax",
    "convolution",
    "norms",
    "embedding",
    "loss",
    "layer",
    "rank",
)


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes, to try the benchmark")
    parser.add_argument(
        "--budget", type=float, default=2.0, help="seconds per measurement; at least 5 runs"
    )
    parser.add_argument(
        "--layers",
        type=int,
        default=64,
        help="layers of the rank's step, halved until they fit in memory",
    )
    parser.add_argument("--jax-python", help="Python with jax-linear-attention, to time its scan")
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        help="sections to measure; default: all",
    )
    parser.add_argument(
        "--no-reference",
        action="store_true",
        help="skip the reference in plain torch, which takes minutes on a GPU",
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU found; --device cpu --small tries the code without one")
    run = run_config("demo", *SMALL) if arguments.small else run_config("7b")
    bench = Bench(
        torch.device(arguments.device),
        run,
        length=64 if arguments.small else 8192,
        batch_sizes=[1, 2] if arguments.small else [1, 2, 4],
        budget=0.0 if arguments.small else arguments.budget,
        min_runs=2 if arguments.small else 5,
    )
    hardware = (
        torch.cuda.get_device_name()
        if arguments.device == "cuda"
        else "CPU, tiny sizes: not a measurement"
    )
    if arguments.no_reference:
        bench.backends.pop("reference")
    try:
        measure(bench, arguments)
    finally:  # also after Ctrl-C or SIGTERM
        report(
            bench,
            hardware,
            None if arguments.no_record else file_name(hardware, arguments.sections),
        )


def measure(bench: Bench, arguments: argparse.Namespace) -> None:
    """Measure the chosen sections; a section that fails does not stop the others."""
    small = arguments.small
    matmul_size, copy_bytes = (64, 2**16) if small else (8192, 2 * 2**30)
    sections: dict[str, Callable[[], None]] = {
        "ceilings": lambda: gpu_operations.ceilings(bench, matmul_size, copy_bytes),
        "check": lambda: gpu_operations.check(bench),
        "scan": lambda: gpu_operations.scans(bench),
        "jax": lambda: gpu_operations.jax_scans(bench, arguments.jax_python),
        "convolution": lambda: gpu_operations.convolutions(bench),
        "norms": lambda: gpu_operations.norms(bench),
        "embedding": lambda: gpu_model.embedding(bench),
        "loss": lambda: gpu_operations.loss(bench),
        "layer": lambda: gpu_model.layers(bench),
        "rank": lambda: gpu_model.rank(bench, 2 if small else arguments.layers),
    }
    assert tuple(sections) == SECTIONS
    for name in arguments.sections:
        start = time.monotonic()
        with bench.attempt("all", name):
            sections[name]()
        print(f"# {name}: {time.monotonic() - start:.0f} s", flush=True)


def file_name(hardware: str, sections: Sequence[str]) -> str:
    """Name of the results, before the date; contains the sections if not all were measured."""
    words = [] if set(sections) == set(SECTIONS) else sections
    return "-".join(["gpu", *hardware.lower().split(), *words])


def report(bench: Bench, hardware: str, name: str | None) -> Path | None:
    """Print the results and what is missing; write them unless `name` is None."""
    print_table(add_ratios(bench.rows, "cuda" if bench.device.type == "cuda" else "cpu"), hardware)
    for what, reason in bench.missing.items():
        print(f"not measured: {what} ({reason})")
    if name is None:
        return None
    path = write_results(
        bench.rows, name, hardware, bench.missing, {"length": bench.length, "memory": bench.memory}
    )
    print(path)
    return path


def handle_sigterm(*_: Any) -> None:
    """Exit after the report; ignores further signals, because `timeout` sends SIGTERM twice."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, handle_sigterm)
    main()
