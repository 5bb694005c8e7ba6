"""Scaling benchmark, `python -m benchmarks.scaling`: a step of the demo on one and two processes.

Weak scaling keeps the sequences per rank, strong scaling the global batch. Each process has one
thread. Layouts alternate in several rounds; ratios are medians over rounds of the ratio in a round,
because the machine may be shared. CPU time is reported too: it excludes the time that a rank waits
for other ranks or for a core.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.timing import Measurement, print_table, write_results
from model.kernels import CPU
from model.parallel.build import build_model
from tests.compose import run_config
from tests.distributed import run_ranks
from train.config import RunConfig
from train.costs.traffic import step_traffic
from train.distributed import context_ranks, init_distributed
from train.engines.build import build_engine

SEQ_LEN = 256
MICRO_BATCH = 8  # sequences
STEPS = 3  # timed, after a warm-up step
ONE_RANK = {"one rank, half the batch": MICRO_BATCH, "one rank": 2 * MICRO_BATCH}  # sequences
TWO_RANKS: dict[str, dict[str, Any]] = {
    "data 2, ZeRO-0": {"zero_stage": 0},
    "data 2, ZeRO-1": {},
    "data 2, ZeRO-2": {"zero_stage": 2},
    "data 2, ZeRO-3": {"zero_stage": 3},
    "tensor 2": {"tensor_parallel": 2},
    "tensor 2, sequence parallel": {"tensor_parallel": 2, "sequence_parallel": True},
    "context 2": {"context_parallel": 2},
}


def demo(layout: str) -> RunConfig:
    """The demo's config in a layout."""
    run = run_config("demo")
    return replace(run, parallel=replace(run.parallel, **TWO_RANKS.get(layout, {})))


def time_steps(folder: Path, layout: str, sequences: int) -> None:
    """Time steps of a global batch and write this rank's wall and CPU seconds per step."""
    run = demo(layout)
    p = run.parallel
    with init_distributed("cpu", p.tensor_parallel, p.context_parallel) as ranks:
        model = build_model(
            run.model,
            CPU,
            0,
            ranks.device,
            tp_rank=ranks.tp_rank,
            tp_size=ranks.tp_size,
            sequence_parallel=p.sequence_parallel,
        )
        if ranks.cp_size > 1:
            model.set_context(context_ranks())
        engine = build_engine(model, run.optim, p, run.compute.precision, ranks)
        micro_batches = sequences // ranks.dp_size // MICRO_BATCH
        generator = torch.Generator().manual_seed(ranks.dp_rank)
        shape = (MICRO_BATCH, SEQ_LEN // ranks.cp_size + 1)
        wall_seconds = []
        cpu_seconds = []
        for _ in range(1 + STEPS):
            ids = torch.randint(run.model.vocab_size, shape, generator=generator)
            dist.barrier()
            wall_start = time.perf_counter()
            cpu_start = time.process_time()
            for index in range(micro_batches):
                loss = model(ids[:, :-1], ids[:, 1:])[0].sum() / (sequences * SEQ_LEN)
                engine.backward(loss, last=index == micro_batches - 1)
            engine.clip_and_step(1e-3)
            dist.barrier()
            wall_seconds.append(time.perf_counter() - wall_start)
            cpu_seconds.append(time.process_time() - cpu_start)
    medians = [statistics.median(wall_seconds[1:]), statistics.median(cpu_seconds[1:])]
    (folder / f"{layout}-{os.environ['RANK']}.json").write_text(json.dumps(medians))


def run_round(folder: Path) -> dict[str, tuple[float, float]]:
    """Wall and CPU seconds per step of every layout, each of the slowest rank."""
    run_ranks(1, [(time_steps, (folder, name, sequences)) for name, sequences in ONE_RANK.items()])
    run_ranks(2, [(time_steps, (folder, name, 2 * MICRO_BATCH)) for name in TWO_RANKS])
    seconds = {}
    for name in [*ONE_RANK, *TWO_RANKS]:
        per_rank = [json.loads(path.read_text()) for path in folder.glob(f"{name}-[01].json")]
        wall, cpu = (max(values) for values in zip(*per_rank, strict=True))
        seconds[name] = wall, cpu
    return seconds


def estimate_sent_bytes(layout: str) -> float:
    """Estimated bytes that one of two ranks sends per step."""
    run = demo(layout)
    p = run.parallel
    sequences = MICRO_BATCH * p.tensor_parallel * p.context_parallel
    return sum(
        traffic.sent_bytes
        for traffic in step_traffic(run, 2, sequences, sequences // MICRO_BATCH, SEQ_LEN)
        if traffic.group != "world"
    )


def make_rows(rounds: list[dict[str, tuple[float, float]]]) -> list[Measurement]:
    """Times, and ratios to one rank with equal global batch (strong) or batch per rank (weak)."""
    rows = []
    for kind, index in (("wall", 0), ("processor", 1)):
        for what, base in (("strong", "one rank"), ("weak", "one rank, half the batch")):
            for name in (base, *TWO_RANKS):
                seconds = statistics.median(times[name][index] for times in rounds)
                ratio = statistics.median(
                    times[name][index] / times[base][index] for times in rounds
                )
                rows.append(
                    Measurement(
                        f"{what} scaling, {kind}",
                        f"{SEQ_LEN} tokens",
                        name,
                        seconds,
                        len(rounds),
                        ratio,
                    )
                )
    return rows


def main() -> None:
    """Measure, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds = []
    loads = []
    with tempfile.TemporaryDirectory() as folder:
        for index in range(arguments.rounds):
            loads.append(os.getloadavg()[0])
            rounds.append(run_round(Path(folder)))
            print(f"round {index + 1} of {arguments.rounds}, load {loads[-1]:.1f}", flush=True)
    rows = make_rows(rounds)
    print_table(
        rows,
        f"a step of 1.5M parameters on {os.cpu_count()} CPU cores; ratios are to one rank",
    )
    notes = {
        "sequences": {"one rank, half the batch": MICRO_BATCH, "others": 2 * MICRO_BATCH},
        "load": loads,
        "bytes_sent_by_a_rank": {name: estimate_sent_bytes(name) for name in TWO_RANKS},
    }
    if not arguments.no_record:
        print(
            write_results(
                rows, "scaling", f"{os.cpu_count()} CPU cores, one thread per process", {}, notes
            )
        )


if __name__ == "__main__":
    main()
