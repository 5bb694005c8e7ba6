"""Training steps of transformers' FalconMamba, alone and with our kernels, side by side on a CPU.

One thread, the demo's model, transformers' own path without its optional packages: what a user has
who installs nothing else. A step is a forward with labels, a backward and AdamW. Prints the factor
last. Both must give the same loss, or it ends with an error.
"""

import argparse
import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import print_table, time_interleaved, write_results
from data.tokenizer import EOS
from model.flops import parameter_count
from model.hf import accelerate, hf_config
from tests.compose import run_config

SEQUENCES, SEQ_LEN = 16, 256
ALONE, ACCELERATED, WITH_LOSS = "transformers", "accelerate", "accelerate, loss=True"


def training_step(model: Any, ids: Tensor) -> Callable[[], float]:
    """A function that makes a step and returns its loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model.train()

    def step() -> float:
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def build_steps(sequences: int, seq_len: int) -> dict[str, Callable[[], float]]:
    """Steps of the same weights and ids by name."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()  # a model warns that the fused kernels are absent
    config = run_config("demo").model
    torch.manual_seed(0)
    ids = torch.randint(config.vocab_size, (sequences, seq_len))
    alone = FalconMambaForCausalLM(FalconMambaConfig(**hf_config(config, EOS, "float32")))
    models = {
        ALONE: alone,
        ACCELERATED: accelerate(copy.deepcopy(alone)),
        WITH_LOSS: accelerate(copy.deepcopy(alone), loss=True),
    }
    return {name: training_step(model, ids) for name, model in models.items()}


def main() -> None:
    """Compare, print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=SEQUENCES)
    parser.add_argument("--seq-len", type=int, default=SEQ_LEN)
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps = build_steps(arguments.sequences, arguments.seq_len)
    shape = f"{arguments.sequences} x {arguments.seq_len}"
    print(f"one step of {shape} each, then {arguments.rounds} rounds of all", flush=True)
    losses = {name: step() for name, step in steps.items()}
    if not all(math.isclose(loss, losses[ALONE], rel_tol=1e-5) for loss in losses.values()):
        raise SystemExit(f"the losses differ: {losses}")
    rows = time_interleaved(
        "training step", shape, dict(steps), ours=ACCELERATED, rounds=arguments.rounds
    )
    count = parameter_count(run_config("demo").model)
    print_table(rows, f"Seconds of a step, {count:,} parameters, fp32, one thread")
    if not arguments.no_record:
        print(write_results(rows, "transformers", "one thread", {}, {"first_losses": losses}))
    factor = next(row.ratio for row in rows if row.who == ALONE)
    print(f"accelerate: {factor:.1f} times")


if __name__ == "__main__":
    main()
