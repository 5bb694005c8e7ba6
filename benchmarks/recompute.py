"""Benchmark of activation recompute, `python -m benchmarks.recompute`: peak memory and step time.

Trains the demo's model on one rank without ZeRO, with two micro-batches of 8 x 256. Memory is the
peak of torch's allocator from process start to the end of the second step, beside the estimate of
train/costs. Time is CPU time; the settings alternate on one model, so that their ratios hold on a
shared machine. Ends with the estimates for one of 256 ranks of the 7B.
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

SEQUENCES = 8
SEQ_LEN = 256
MICRO_BATCHES = 2
MIB = 2**20


def demo(recompute: Recompute) -> RunConfig:
    """The demo's config with a recompute setting."""
    run = run_config("demo")
    tokens = SEQUENCES * SEQ_LEN
    parallel = replace(run.parallel, zero_stage=0, micro_batch_tokens=tokens)
    compute = replace(run.compute, recompute=recompute, precision=Precision.fp32)
    return replace(run, parallel=parallel, compute=compute)


def step(model: FalconMamba, engine: Engine, vocab_size: int) -> None:
    """Forward, backward and update on random tokens, with accumulated gradients."""
    for index in range(MICRO_BATCHES):
        ids = torch.randint(vocab_size, (SEQUENCES, SEQ_LEN + 1))
        loss = model(ids[:, :-1], ids[:, 1:])[0].mean() / MICRO_BATCHES
        engine.backward(loss, last=index == MICRO_BATCHES - 1)
    engine.clip_and_step(1e-3)


def print_peak_bytes(recompute: Recompute) -> None:
    """Print the peak bytes of torch's allocator in this process."""
    run = demo(recompute)
    # fake process group, because the profiler misses memory that gloo's threads free
    with (
        fake_distributed(run, 1) as ranks,
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        model = build_model(run.model, CPU, 0, ranks.device, recompute=recompute)
        engine = build_engine(model, run.optim, run.parallel, run.compute.precision, ranks)
        for _ in range(2):
            step(model, engine, run.model.vocab_size)
    print(peak_allocated(profiler))


def peak_allocated(profiler: profile) -> int:
    """Peak bytes of the allocator, of memory allocated during the profile."""
    assert profiler.profiler is not None
    allocated = peak = 0
    events = (
        event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"
    )
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


def measure_peak_bytes(recompute: Recompute) -> int:
    """Run print_peak_bytes in a new process and return its figure."""
    command = [sys.executable, "-m", "benchmarks.recompute", "--peak", recompute.value]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(result.stdout.splitlines()[-1])


def seconds_per_step(rounds: int) -> dict[Recompute, list[float]]:
    """CPU seconds of a step per recompute setting, one per round."""
    run = demo(Recompute.none)
    seconds: dict[Recompute, list[float]] = {recompute: [] for recompute in Recompute}
    with init_distributed("cpu", 1) as ranks:
        model = build_model(run.model, CPU, 0, ranks.device)
        engine = build_engine(model, run.optim, run.parallel, run.compute.precision, ranks)
        step(model, engine, run.model.vocab_size)
        for index in range(rounds):
            for recompute in list(Recompute)[:: 1 if index % 2 else -1]:
                model.set_recompute(recompute)
                start = time.process_time()
                step(model, engine, run.model.vocab_size)
                seconds[recompute].append(time.process_time() - start)
    return seconds


def estimate_7b(recompute: Recompute) -> dict[str, float]:
    """Estimated GiB of one of 256 ranks of the 7B, by kind."""
    run = run_config("7b")
    run = replace(run, compute=replace(run.compute, recompute=recompute))
    estimate = estimate_memory(run, 256)
    sizes = {**asdict(estimate), "total": estimate.total}
    return {name: round(size / GIB, 2) for name, size in sizes.items()}


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--no-record", action="store_true", help="print only")
    parser.add_argument("--peak", type=Recompute, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.peak is not None:
        print_peak_bytes(arguments.peak)
        return
    times = seconds_per_step(arguments.rounds)
    memory = {}
    rows = []
    shape = f"{SEQUENCES} x {SEQ_LEN}"
    for recompute in Recompute:
        peak = measure_peak_bytes(recompute)
        estimate = estimate_memory(demo(recompute), 1)
        memory[recompute.value] = {
            "peak": peak,
            "plan": estimate.total,
            "plan_by_kind": asdict(estimate),
        }
        print(
            f"recompute {recompute.value}: peak {peak / MIB:.1f} MiB, estimated "
            f"{estimate.total / MIB:.1f} MiB ({estimate.total / peak - 1:+.1%}), activations "
            f"{estimate.activations / MIB:.1f} MiB",
            flush=True,
        )
        ratio = statistics.median(
            a / b for a, b in zip(times[recompute], times[Recompute.none], strict=True)
        )
        seconds = statistics.median(times[recompute])
        rows.append(
            Measurement(
                "training step",
                shape,
                f"recompute {recompute.value}",
                seconds,
                arguments.rounds,
                ratio,
            )
        )
    count = parameter_count(run_config("demo").model)
    print_table(
        rows,
        f"CPU time of a step, {count:,} parameters, one thread; ratios are to recompute none",
    )
    estimates_7b = {recompute.value: estimate_7b(recompute) for recompute in Recompute}
    for name, gib in estimates_7b.items():
        print(
            f"7b on 256 ranks, recompute {name}: {gib['total']:.1f} GiB per rank, activations "
            f"{gib['activations']:.1f} GiB"
        )
    if not arguments.no_record:
        notes = {"memory_bytes": memory, "gib_of_a_rank_of_7b_by_formula": estimates_7b}
        print(write_results(rows, "recompute", "one thread", {}, notes))


if __name__ == "__main__":
    main()
