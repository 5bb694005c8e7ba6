"""The plan's memory against what torch's allocator hands out while real steps run."""

import platform
import resource
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from model.config import ModelConfig, Recompute
from model.kernels import CPU
from model.parallel import build
from tests.bench.recompute import SEQ_LEN, SEQUENCES, demo, largest_sum, step
from train.config import RunConfig
from train.distributed import ranks
from train.engines import build_engine
from train.memory import keep_freed
from train.plan import needs

WIDE = {"d_model": 48, "n_layer": 6, "d_inner": 96, "dt_rank": 3, "vocab_size": 4096}  # the loss holds most
DEEP = {"d_model": 256, "n_layer": 3, "d_inner": 512, "dt_rank": 16, "vocab_size": 4096}  # one layer does


def planned(recompute: Recompute, shape: dict[str, int]) -> RunConfig:
    run = demo(recompute)
    model: ModelConfig = replace(run.model, **shape)
    return replace(run, model=model)


@pytest.mark.parametrize("recompute", list(Recompute))
@pytest.mark.parametrize("shape", [WIDE, DEEP], ids=["wide", "deep"])
def test_peak_memory_is_the_plans_within_five_percent(recompute: Recompute, shape: dict[str, int]) -> None:
    """Two steps of two micro-batches, by the engine without ZeRO, from an empty process's memory on."""
    run = planned(recompute, shape)
    with ranks("cpu", 1) as here, profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        model = build(run.model, CPU, 0, here.device, recompute=recompute)
        engine = build_engine(model, run.optim, run.parallel, here)
        for _ in range(2):
            step(model, engine, run.model.vocab_size)
    assert run.parallel.micro_batch_tokens == SEQUENCES * SEQ_LEN and torch.get_num_threads() == 1
    assert largest_sum(recorded) == pytest.approx(needs(run, 1).total, rel=0.05)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in its own way")
def test_what_tensors_free_is_kept() -> None:
    """Without it each of these 16 MiB takes new pages, 4,096 of them (or 8 huge ones), every time."""
    keep_freed()
    torch.zeros(2**22)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(2**22)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 100
