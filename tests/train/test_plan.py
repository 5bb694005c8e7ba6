"""The plan's memory against what torch's allocator hands out while real steps run."""

import platform
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig, Recompute
from model.kernels import CPU
from model.parallel import build
from tests.bench.recompute import SEQ_LEN, SEQUENCES, demo, largest_sum, step
from train.config import EngineKind, Precision, RunConfig
from train.cuda_on_cpu import cuda_on_cpu
from train.distributed import ranks
from train.engines import build_engine
from train.plan import needs, state_of_megatron

WIDE = {"d_model": 48, "n_layer": 6, "d_inner": 96, "dt_rank": 3, "vocab_size": 4096}  # the loss holds most
DEEP = {"d_model": 256, "n_layer": 3, "d_inner": 512, "dt_rank": 16, "vocab_size": 4096}  # one layer does


ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},  # without ZeRO
    "megatron": {"engine": EngineKind.megatron, "zero_stage": 1},
}


def planned(recompute: Recompute, shape: dict[str, int], engine: str) -> RunConfig:
    run = demo(recompute)
    model: ModelConfig = replace(run.model, **shape)
    return replace(run, model=model, parallel=replace(run.parallel, **ENGINES[engine]))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("shape", [WIDE, DEEP], ids=["wide", "deep"])
def test_peak_memory_is_the_plans_within_five_percent(recompute: Recompute, shape: dict[str, int], engine: str) -> None:
    """Two steps of two micro-batches, on one rank, from an empty process's memory on."""
    run = planned(recompute, shape, engine)
    shim = nullcontext if engine == "plain" else cuda_on_cpu
    with ranks("cpu", 1) as here, shim(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = build(run.model, CPU, 0, here.device, recompute=recompute)
        built = build_engine(model, run.optim, run.parallel, here)
        for _ in range(2):
            step(model, built, run.model.vocab_size)
    assert run.parallel.micro_batch_tokens == SEQUENCES * SEQ_LEN and torch.get_num_threads() == 1
    assert largest_sum(recorded) == pytest.approx(needs(run, 1).total, rel=0.05)


FAULTS_OF_TWENTY = """
import resource
import torch
from train.distributed import ranks

with ranks("cpu", 1):
    for _ in range(2):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.zeros(40 * 2**18)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
NAME, VERSION = platform.libc_ver()


@pytest.mark.skipif(NAME != "glibc" or [int(n) for n in VERSION.split(".")] < [2, 35], reason="not glibc 2.35 or later")
def test_what_tensors_free_is_kept() -> None:
    """Without it each of these 40 MiB takes new pages, 10,240 of them (or 20 huge ones), every time.

    The second twenty, in a process of its own: glibc looks for a little more than it then keeps, so the first few find
    no hole that is large enough, as do those in the heap of a process that ran other tests.
    """
    done = subprocess.run([sys.executable, "-c", FAULTS_OF_TWENTY], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100


def test_megatron_keeps_what_the_plan_says() -> None:
    """Weights in bf16 where products take them, gradients and what the optimizer holds; its padding is never held."""
    run = planned(Recompute.none, WIDE, "megatron")
    run = replace(run, parallel=replace(run.parallel, precision=Precision.bf16, bucket_elements=100_000))
    with ranks("cpu", 1) as here, cuda_on_cpu():
        built: Any = build_engine(build(run.model, CPU, 0, here.device), run.optim, run.parallel, here)
        buffers = built.ddp.buffers
        held = sum(tensor.nbytes for fragment in built._fragments() for tensor in fragment.tensors.values())
        held -= sum(4 * parameter.numel() for parameter in built.model.parameters() if parameter.dtype is torch.float32)
    assert {buffer.param_dtype for buffer in buffers} == {torch.bfloat16, torch.float32} and len(buffers[0].buckets) > 1
    parameters, gradients, optimizer = state_of_megatron(run, 1)
    assert sum(buffer.param_data.nbytes for buffer in buffers) == parameters
    assert sum(buffer.grad_data.nbytes for buffer in buffers) == gradients
    assert held < optimizer == pytest.approx(held, rel=0.01)
