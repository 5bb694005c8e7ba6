"""A step of the demo's model on one and on two processes of this machine: `python -m
benchmarks.scaling`.

Weak scaling: as many sequences per rank on two ranks as on one. Strong: as many in all. One thread
per process; layouts take turns in several rounds, and ratios are medians over rounds, each taken
within one, since the machine may be busy. Processor time is given besides: it does not count what a
rank waits, for others or for a core.
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

SEQ_LEN, MICRO_BATCH = 256, 8
STEPS = 3  # timed, after one that is not
ONE = {"one rank, half the batch": MICRO_BATCH, "one rank": 2 * MICRO_BATCH}  # sequences
TWO: dict[str, dict[str, Any]] = {
    "data 2, ZeRO-0": {"zero_stage": 0},
    "data 2, ZeRO-1": {},
    "data 2, ZeRO-2": {"zero_stage": 2},
    "data 2, ZeRO-3": {"zero_stage": 3},
    "tensor 2": {"tensor_parallel": 2},
    "tensor 2, sequence parallel": {"tensor_parallel": 2, "sequence_parallel": True},
    "context 2": {"context_parallel": 2},
}


def layout(name: str) -> RunConfig:
    """The demo in one of the layouts."""
    run = run_config("demo")
    return replace(run, parallel=replace(run.parallel, **TWO.get(name, {})))


def step_seconds(folder: Path, name: str, sequences: int) -> None:
    """Time steps of a global batch, and write this rank's wall and processor seconds per step."""
    run = layout(name)
    p = run.parallel
    with init_distributed("cpu", p.tensor_parallel, p.context_parallel) as ranks:
        cut = {
            "tp_rank": ranks.tp_rank,
            "tp_size": ranks.tp_size,
            "sequence_parallel": p.sequence_parallel,
        }
        model = build_model(run.model, CPU, 0, ranks.device, **cut)
        if ranks.cp_size > 1:
            model.set_context(context_ranks())
        engine = build_engine(model, run.optim, p, run.compute.precision, ranks)
        micro_batches = sequences // ranks.dp_size // MICRO_BATCH
        generator = torch.Generator().manual_seed(ranks.dp_rank)
        shape = (MICRO_BATCH, SEQ_LEN // ranks.cp_size + 1)
        wall, processor = [], []
        for _ in range(1 + STEPS):
            ids = torch.randint(run.model.vocab_size, shape, generator=generator)
            dist.barrier()
            start, busy = time.perf_counter(), time.process_time()
            for index in range(micro_batches):
                loss = model(ids[:, :-1], ids[:, 1:])[0].sum() / (sequences * SEQ_LEN)
                engine.backward(loss, last=index == micro_batches - 1)
            engine.clip_and_step(1e-3)
            dist.barrier()
            wall.append(time.perf_counter() - start)
            processor.append(time.process_time() - busy)
    text = json.dumps([statistics.median(wall[1:]), statistics.median(processor[1:])])
    (folder / f"{name}-{os.environ['RANK']}.json").write_text(text)


def one_round(folder: Path) -> dict[str, tuple[float, float]]:
    """Seconds per step of every layout: wall, and processor of the busiest rank."""
    run_ranks(1, [(step_seconds, (folder, name, sequences)) for name, sequences in ONE.items()])
    run_ranks(2, [(step_seconds, (folder, name, 2 * MICRO_BATCH)) for name in TWO])
    found = {}
    for name in [*ONE, *TWO]:
        times = [json.loads(path.read_text()) for path in folder.glob(f"{name}-[01].json")]
        wall, processor = (max(values) for values in zip(*times, strict=True))
        found[name] = wall, processor
    return found


def sent(name: str) -> float:
    """Bytes that a rank of two sends in the step, by the formula."""
    run = layout(name)
    p = run.parallel
    sequences = MICRO_BATCH * p.tensor_parallel * p.context_parallel
    return sum(
        x.sent_bytes
        for x in step_traffic(run, 2, sequences, sequences // MICRO_BATCH, SEQ_LEN)
        if x.group != "world"
    )


def rows_of(rounds: list[dict[str, tuple[float, float]]]) -> list[Measurement]:
    """Times, and ratios to one rank of the same work: in all (strong), and per rank (weak)."""
    rows = []
    for kind, which in (("wall", 0), ("processor", 1)):
        for what, base in (("strong", "one rank"), ("weak", "one rank, half the batch")):
            for name in (base, *TWO):
                seconds = statistics.median(times[name][which] for times in rounds)
                ratio = statistics.median(
                    times[name][which] / times[base][which] for times in rounds
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
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rounds, loads = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            loads.append(os.getloadavg()[0])
            rounds.append(one_round(Path(folder)))
            print(f"round {number + 1} of {arguments.rounds}, load {loads[-1]:.1f}", flush=True)
    rows = rows_of(rounds)
    print_table(
        rows,
        f"a step of 1.5M parameters on {os.cpu_count()} processors; the last column is against "
        "one rank",
    )
    notes = {
        "sequences": {"one rank, half the batch": MICRO_BATCH, "others": 2 * MICRO_BATCH},
        "load": loads,
        "bytes_sent_by_a_rank": {name: sent(name) for name in TWO},
    }
    if not arguments.no_record:
        print(
            write_results(
                rows, "scaling", f"{os.cpu_count()} processors, one thread a process", {}, notes
            )
        )


if __name__ == "__main__":
    main()
