"""What recomputing activations saves and costs: `python -m benchmarks.recompute`, peak memory and
time of a step.

The demo's model, one rank without ZeRO, two micro-batches of 8 x 256. Memory is the peak of what
torch's allocator has handed out, from an empty process to the end of the second step, beside the
plan's formula. Time is the processor's, the choices taking turns on one model, so that their ratios
hold on a shared machine. The formula's figures for the 7B on one of 256 ranks follow.
"""

import argparse
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, replace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.timing import Measurement, print_table, write_results
from launch.simulation.dry_run import fake_distributed
from model.config import Recompute
from model.flops import parameter_count
from model.kernels import CPU
from model.mamba import FalconMamba
from model.parallel.build import build_model
from tests.compose import run_config
from train.config import Precision, RunConfig
from train.costs.memory import GIB, estimate_memory
from train.distributed import init_distributed
from train.engines.build import build_engine
from train.engines.protocol import Engine

SEQUENCES, SEQ_LEN, MICRO_BATCHES = 8, 256, 2
MIB = 2**20


def demo(recompute: Recompute) -> RunConfig:
    """The demo with one choice of recompute."""
    run = run_config("demo")
    tokens = SEQUENCES * SEQ_LEN
    parallel = replace(run.parallel, zero_stage=0, micro_batch_tokens=tokens)
    compute = replace(run.compute, recompute=recompute, precision=Precision.fp32)
    return replace(run, parallel=parallel, compute=compute)


def step(model: FalconMamba, engine: Engine, vocab_size: int) -> None:
    """Forward, backward and update on made-up tokens, in micro-batches whose gradients add up."""
    for index in range(MICRO_BATCHES):
        ids = torch.randint(vocab_size, (SEQUENCES, SEQ_LEN + 1))
        engine.backward(
            model(ids[:, :-1], ids[:, 1:])[0].mean() / MICRO_BATCHES,
            last=index == MICRO_BATCHES - 1,
        )
    engine.clip_and_step(1e-3)


def measure_peak(recompute: Recompute) -> None:
    """Print the largest sum of bytes that torch's allocator held at once in this process."""
    run = demo(recompute)
    # in a world that is not there: what gloo's threads free, the profiler does not see
    with (
        fake_distributed(run, 1) as ranks,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded,
    ):
        model = build_model(run.model, CPU, 0, ranks.device, recompute=recompute)
        engine = build_engine(model, run.optim, run.parallel, run.compute.precision, ranks)
        for _ in range(2):
            step(model, engine, run.model.vocab_size)
    print(largest_sum(recorded))


def largest_sum(recorded: profile) -> int:
    """The most bytes that the allocator held at once while it was profiled, of what it handed out
    meanwhile.
    """
    assert recorded.profiler is not None
    held = peak = 0
    events = (
        event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_bytes(recompute: Recompute) -> int:
    """measure_peak in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.recompute", "--peak", recompute.value]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def seconds_per_step(rounds: int) -> dict[Recompute, list[float]]:
    """Processor seconds of a step, round by round."""
    run = demo(Recompute.none)
    found: dict[Recompute, list[float]] = {choice: [] for choice in Recompute}
    with init_distributed("cpu", 1) as ranks:
        model = build_model(run.model, CPU, 0, ranks.device)
        engine = build_engine(model, run.optim, run.parallel, run.compute.precision, ranks)
        step(model, engine, run.model.vocab_size)
        for number in range(rounds):
            for choice in list(Recompute)[:: 1 if number % 2 else -1]:
                model.set_recompute(choice)
                start = time.process_time()
                step(model, engine, run.model.vocab_size)
                found[choice].append(time.process_time() - start)
    return found


def of_7b(recompute: Recompute) -> dict[str, float]:
    """GiB of one of 256 ranks by the formula."""
    run = run_config("7b")
    need = estimate_memory(replace(run, compute=replace(run.compute, recompute=recompute)), 256)
    return {
        name: round(size / GIB, 2) for name, size in {**asdict(need), "total": need.total}.items()
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--peak", type=Recompute, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak is not None:
        measure_peak(arguments.peak)
        return
    times = seconds_per_step(arguments.rounds)
    memory, rows = {}, []
    shape = f"{SEQUENCES} x {SEQ_LEN}"
    for choice in Recompute:
        measured, planned = peak_bytes(choice), estimate_memory(demo(choice), 1)
        memory[choice.value] = {
            "peak": measured,
            "plan": planned.total,
            "plan_by_kind": asdict(planned),
        }
        print(
            f"recompute {choice.value}: peak {measured / MIB:.1f} MiB, the plan says "
            f"{planned.total / MIB:.1f} ({planned.total / measured - 1:+.1%}), of them "
            f"activations {planned.activations / MIB:.1f}",
            flush=True,
        )
        ratio = statistics.median(
            a / b for a, b in zip(times[choice], times[Recompute.none], strict=True)
        )
        seconds = statistics.median(times[choice])
        rows.append(
            Measurement(
                "training step",
                shape,
                f"recompute {choice.value}",
                seconds,
                arguments.rounds,
                ratio,
            )
        )
    count = parameter_count(run_config("demo").model)
    print_table(
        rows,
        f"processor time of a step, {count:,} parameters, one thread; the last column is against "
        "none",
    )
    large = {choice.value: of_7b(choice) for choice in Recompute}
    for name, need in large.items():
        print(
            f"7b on 256 ranks, recompute {name}: {need['total']:.1f} GiB, activations "
            f"{need['activations']:.1f}"
        )
    if not arguments.no_record:
        notes = {"memory_bytes": memory, "gib_of_a_rank_of_7b_by_formula": large}
        print(write_results(rows, "recompute", "one thread", {}, notes))


if __name__ == "__main__":
    main()
