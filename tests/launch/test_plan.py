"""The plan's arithmetic against known numbers, and against what a model really keeps in memory."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from launch.devices import GPUS
from launch.estimate import PlannedRun, layouts, reliability, roofline_seconds, traffic_between_ranks
from model.config import ModelConfig, Recompute
from model.flops import train_traffic
from model.kernels import CPU
from model.parallel import build
from tests.compose import run_config, typed
from tests.tiny import TINY
from train.config import EngineKind, Precision
from train.plan import GIB, kept_by_a_layer, needs

ROOT = Path(__file__).resolve().parents[2]
H100 = next(gpu for gpu in GPUS if gpu.name.startswith("H100"))


@pytest.fixture(scope="module")
def run() -> PlannedRun:
    return typed(PlannedRun, "7b", "cluster=h100_32n", "parallel.engine=deepspeed")


def test_traffic_by_hand(run: PlannedRun) -> None:
    """Per layer of the 7B in bf16: convolution 80 KiB, scan 176 KiB and 64 KiB of its states."""
    traffic = train_traffic(run.model)
    assert traffic.scan == 64 * (176 + 64) * 1024
    assert traffic.rows == 64 * (80 * 1024 + 4096 * (16 + 18))
    assert traffic.specials == 64 * 8192 * (3 * 16 + 10)


def test_roofline_is_the_sum_of_its_limits(run: PlannedRun) -> None:
    plain = replace(run, parallel=replace(run.parallel, recompute=Recompute.none))
    products = 6 * 6_994_001_920 / 989.5e12
    exponentials = 64 * 8192 * 58 / (132 * 16 * 1.98e9)
    rest = 64 * (80 * 1024 + 4096 * 34) / 3.35e12
    assert roofline_seconds(plain, H100) == pytest.approx(products + exponentials + rest)
    assert roofline_seconds(run, H100) == pytest.approx(4 / 3 * roofline_seconds(plain, H100))


def test_communication_by_hand(run: PlannedRun) -> None:
    sent = traffic_between_ranks(run, 256)
    assert sent["gradients"] == sent["weights"] == pytest.approx(4 * 7_272_665_088 * 255 / 256)
    assert sent["tensor parallel"] == sent["context parallel"] == 0
    megatron = replace(run, parallel=replace(run.parallel, engine=EngineKind.megatron))
    sent = traffic_between_ranks(megatron, 256)  # scattered once; bf16 weights, fp32 small ones
    assert sent["gradients"] == pytest.approx(4 * 7_272_665_088 * 255 / 256)
    assert sent["weights"] == pytest.approx(2 * 7_272_665_088 * 255 / 256, rel=2e-3)
    cut = replace(run, parallel=replace(run.parallel, tensor_parallel=2, context_parallel=2))
    sent = traffic_between_ranks(cut, 256)
    # x_proj three times, since full recompute takes its sum again; embedding, loss
    token = 64 * 2 * (3 * 288 + 2 * 4096) + 4 * 4096 + 12 + 2 * 4096
    assert sent["tensor parallel"] == pytest.approx(32 * 4096 * token)
    assert sent["context parallel"] == pytest.approx(4 * 32 * 64 * 4096 * (17 * 4 + 3 * 2))  # gathered twice


def test_memory_by_stage(run: PlannedRun) -> None:
    """What is whole on every rank in bytes per parameter, and what is cut: by hand, for 256 replicas."""
    n, got = 7_272_665_088, {}
    for stage in range(4):
        need = needs(replace(run, parallel=replace(run.parallel, zero_stage=stage)), 256)
        got[stage] = (need.parameters / n, need.gradients / n, need.optimizer / n)
        assert need.activations == needs(run, 256).activations
    assert got[0] == (4, 4, 8) and got[1] == pytest.approx((4, 4, 12 / 256))
    assert got[2] == pytest.approx((4, 4 / 256, 12 / 256)) and got[3] == pytest.approx((4 / 256, 4 / 256, 12 / 256))


def test_memory_of_the_7b(run: PlannedRun) -> None:
    """bf16 matrices with fp32 masters, the rest fp32: norms, convolution, dt's bias, A_log and D. It fits with room."""
    small = 64 * (4096 + 5 * 8192 + 8192 + 16 * 8192 + 8192) + 4096
    need = needs(replace(run, parallel=replace(run.parallel, engine=EngineKind.megatron)), 256)
    assert need == needs(run_config("7b"), 256) and need.total < 60 * GIB
    assert need.parameters == pytest.approx(2 * (7_272_665_088 + small), rel=1e-6)
    assert need.gradients == pytest.approx(4 * 7_272_665_088, rel=1e-6)
    assert need.optimizer == pytest.approx((12 * 7_272_665_088 - 4 * small) / 256, rel=1e-4)


def test_saving_pauses_by_young(run: PlannedRun) -> None:
    expected = reliability(run, 256, days=60)
    assert expected.failures == pytest.approx(32 * 60 * 6.5 / 1000)
    blocking = 12 * 7_272_665_088 / 256 / 20e9
    assert expected.interval_minutes == pytest.approx((2 * blocking * 86400 / (32 * 6.5e-3)) ** 0.5 / 60)


def test_layouts_say_why_they_fall(run: PlannedRun) -> None:
    found = layouts(run, 256, H100)
    runs = [layout for layout in found if layout.why_not is None]
    assert found[: len(runs)] == runs and len(found) == 7 * 4 * 4 * 3
    assert [layout.tokens_per_second for layout in runs] == sorted((x.tokens_per_second for x in runs), reverse=True)
    assert all(layout.memory_gib <= 80 for layout in runs)
    shape = {"tensor_parallel": 1, "context_parallel": 1, "zero_stage": 1, "recompute": "none"}
    alone = next(x for x in found if asdict(x) | shape == asdict(x))
    assert alone.why_not == f"needs {alone.memory_gib:.0f} of 80 GiB"
    three = layouts(run, 3, H100)
    assert any(x.why_not == "2 x 1 does not divide 3 ranks" for x in three)


@pytest.mark.parametrize("recompute", list(Recompute))
def test_what_a_layer_keeps_is_measured(run: PlannedRun, recompute: Recompute) -> None:
    """Bytes of all tensors saved for the backward, parameters aside, within 5 % of the formula."""
    shape = {"d_model": 64, "n_layer": 12, "d_inner": 128, "d_state": 16, "dt_rank": 8}
    config: ModelConfig = replace(TINY, **shape)
    model = build(config, CPU, 0, torch.device("cpu"), recompute=recompute)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in own and x.numel() > config.d_inner * config.d_state:  # A is not kept per token
            held[storage.data_ptr()] = storage
        return x

    tokens = torch.randint(0, config.vocab_size, (2, 256))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model.hidden(tokens)
    parallel = replace(run.parallel, recompute=recompute, precision=Precision.fp32)
    expected = 512 * config.n_layer * kept_by_a_layer(replace(run, model=config_for(run, config), parallel=parallel))[0]
    measured = sum(storage.nbytes() for storage in held.values()) - hidden.nbytes  # the final norm keeps its input
    assert measured == pytest.approx(expected, rel=0.05)


def config_for(run: PlannedRun, config: ModelConfig) -> ModelConfig:
    """The shape with a vocabulary that the run's tokenizer fits."""
    return replace(config, vocab_size=run.model.vocab_size)


def test_the_command_writes_json(tmp_path: Path) -> None:
    command = [sys.executable, "launch/plan.py", "+experiment=7b", "cluster=h100_32n", f"run.dir={tmp_path}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert plan["parameters"] == 7_272_665_088 and plan["sources"]["web"]["tokens"] > 4e12
    assert plan["layouts"][0]["why_not"] is None and "B200" in plan["roofline_tokens_per_second"]
