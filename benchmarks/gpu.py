"""GPU benchmark: `python -m benchmarks.gpu`. Ceilings, then every operation, a layer and a rank's
step of the 7B.

Each backend that is present is measured on the same random inputs, which rotate past the L2 cache;
medians; ratios are to `cuda`, ours. Who is measured is checked on a short problem first, and not
timed when wrong. What is missing or fails is named with the reason, and everything else is
measured, printed and written all the same, also when it is stopped by a signal. `--device cpu
--small` runs the same code on tiny sizes without a GPU, to see that it works; its times mean
nothing.
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

# as the 7b has it, in small
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
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument(
        "--budget", type=float, default=2.0, help="seconds of a measurement, at least 5 runs of it"
    )
    parser.add_argument(
        "--layers", type=int, default=64, help="layers of the rank's step, halved until they fit"
    )
    parser.add_argument(
        "--jax-python", help="a Python that has jax-linear-attention, to time its scan beside ours"
    )
    parser.add_argument(
        "--sections",
        nargs="+",
        choices=SECTIONS,
        default=SECTIONS,
        help="what is measured, all of it",
    )
    parser.add_argument(
        "--no-reference",
        action="store_true",
        help="without plain torch, which takes minutes on a GPU",
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --device cpu --small runs the code without one")
    run = run_config("demo", *SMALL) if arguments.small else run_config("7b")
    length, batches = (64, [1, 2]) if arguments.small else (8192, [1, 2, 4])
    device = torch.device(arguments.device)
    bench = Bench(
        device, run, length, batches, *((0.0, 2) if arguments.small else (arguments.budget, 5))
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
    finally:  # also when somebody has had enough
        report(
            bench,
            hardware,
            None if arguments.no_record else file_name(hardware, arguments.sections),
        )


def measure(bench: Bench, arguments: argparse.Namespace) -> None:
    """The chosen sections; one that fails as a whole is named, and the others go on."""
    small = arguments.small
    sections: dict[str, Callable[[], None]] = {
        "ceilings": lambda: gpu_operations.ceilings(
            bench, *((64, 2**16) if small else (8192, 2 * 2**30))
        ),
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
    """What the record is called, before the date: some of the sections do not replace others of the
    same day.
    """
    words = [] if set(sections) == set(SECTIONS) else sections
    return "-".join(["gpu", *hardware.lower().split(), *words])


def report(bench: Bench, hardware: str, name: str | None) -> Path | None:
    """Print what was measured and what was not, and write both unless `name` is None."""
    print_table(add_ratios(bench.rows, "cuda" if bench.device.type == "cuda" else "cpu"), hardware)
    for who, why in bench.missing.items():
        print(f"not measured: {who} ({why})")
    if name is None:
        return None
    path = write_results(
        bench.rows, name, hardware, bench.missing, {"length": bench.length, "memory": bench.memory}
    )
    print(path)
    return path


def stop(*_: Any) -> None:
    """End as an interrupt does, once: `timeout` sends its signal twice, and the second would end
    the report.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise SystemExit(128 + signal.SIGTERM)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    main()
