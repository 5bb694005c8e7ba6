"""Short runs in many layouts have equal losses, norms, gradients and weights, resumed or not."""

import json
import os
import resource
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import optimizer as optimizers

from benchmarks.recompute import step
from core.errors import InputError
from core.files import sha256_of
from core.run import Run, iter_checkpoints
from launch.simulation.cuda_on_cpu import cuda_on_cpu
from model.checkpoint import CheckpointReader, verify_checkpoint
from model.config import Backend, Recompute
from model.flops import parameter_shapes
from model.kernels import CPU, REFERENCE
from model.parallel.build import build_model
from model.sharding import unshard
from tests.compose import laid_out, run_config
from tests.small import config
from tests.tiny import TINY
from tests.train.world import curve, final_checkpoint, records, train, with_zero_stage
from train.config import CheckpointConfig, EngineKind, Optim, Precision
from train.distributed import init_distributed
from train.engines.build import build_engine


@pytest.fixture(scope="module")
def root(world: Path) -> Path:
    return world


def assert_same_weights(left: CheckpointReader, right: CheckpointReader, tolerance: float) -> None:
    for name in parameter_shapes(TINY):
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            a, b = left.read_full(kind, name), right.read_full(kind, name)
            assert (
                torch.equal(a, b)
                if tolerance == 0
                else (a - b).norm() <= tolerance * b.norm() + 1e-9
            ), (kind, name)


def test_runs_cover_what_they_claim(root: Path) -> None:
    steps = records(root, "dp1")
    assert {1, 2, 3, 8} <= {step["batch"] for step in steps}
    assert {step["seq_len"] for step in steps} == {16, 32}
    assert {step["stage"] for step in steps} == {"short", "long", "decay"}
    assert (
        min(step["grad_norm"] for step in steps) > 0.1
        and max(step["grad_norm"] for step in steps) > 0.8
    )
    assert steps[-1]["tokens"] == 52 * 64 and steps[0]["loss"] - steps[-1]["loss"] > 1
    assert set(steps[-1]["source_loss"]) == {"prose", "sums"} and not any(
        step["skipped"] for step in steps
    )


@pytest.mark.fault(
    "a checkpoint for another layout of ranks", "weights and moments are the same, bit for bit"
)
@pytest.mark.parametrize(
    ("source", "other"),
    [
        ("tp2", "tp2-as-dp2"),
        ("dp1", "dp1-as-tp2"),
        ("dp2", "dp2-as-dp1"),
        ("zero0-to-zero3", "zero3-as-zero0"),
        ("zero3-to-zero2", "zero2-as-zero3"),
        ("dp1-to-tp2", "sequence-as-dp2"),
        ("megatron", "megatron-as-zero3"),
        ("zero0-to-zero3", "zero3-as-megatron"),
    ],
)
def test_any_layout_loads_any_other_exactly(
    root: Path, source: str, other: str, measured: Any
) -> None:
    assert_same_weights(final_checkpoint(root, source), final_checkpoint(root, other), 0)
    files = [
        {path.name for path in final_checkpoint(root, name).folder.glob("rank-*")}
        for name in (source, other)
    ]
    same_world_size = ("tp2", "dp1-to-tp2", "zero0-to-zero3", "zero3-to-zero2", "megatron")
    assert files[0] != files[1] or source in same_world_size
    measured("equal")


@pytest.mark.parametrize("other", ["dp2", "tp2", "cp2", "megatron", "megatron-cp2"])
def test_two_ranks_equal_one(root: Path, other: str) -> None:
    torch.testing.assert_close(curve(root, other), curve(root, "dp1"), rtol=3e-5, atol=0)
    assert_same_weights(final_checkpoint(root, other), final_checkpoint(root, "dp1"), 1e-3)


def test_compiled_blocks_under_megatron_are_the_same_run() -> None:
    """With recompute; one graph serves all blocks, with hooks and gathers outside of it."""
    weights = []
    for compiled in (False, True):
        with init_distributed("cpu", 1) as ranks, cuda_on_cpu():
            model = build_model(TINY, CPU, 0, ranks.device, recompute=Recompute.full)
            if compiled:
                torch._dynamo.reset()
                torch._dynamo.utils.counters.clear()
                model.compile_blocks()
            parallel = replace(
                run_config("demo").parallel, engine=EngineKind.megatron, bucket_elements=3000
            )
            built = build_engine(
                model,
                Optim(1e-2, 0.9, 0.95, 1e-8, 0.1, clip_norm=0.8, z_loss=0.0),
                parallel,
                Precision.fp32,
                ranks,
            )
            torch.manual_seed(0)
            for _ in range(2):
                step(model, built, TINY.vocab_size)
            built.ddp.start_param_sync(force_sync=True)  # else gathered during the next forward
            weights.append([parameter.detach().clone() for parameter in model.parameters()])
    for plain, other in zip(*weights, strict=True):
        torch.testing.assert_close(other, plain, rtol=1e-5, atol=1e-7)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_megatron_uses_torchs_adamw_even_if_another_is_installed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(optimizers, "USING_PYTORCH_OPTIMIZER", False)
    monkeypatch.setattr(optimizers, "Adam", None)
    parallel = replace(run_config("demo").parallel, engine=EngineKind.megatron)
    with init_distributed("cpu", 1) as ranks, cuda_on_cpu():
        built: Any = build_engine(
            build_model(TINY, CPU, 0, ranks.device),
            run_config("demo").optim,
            parallel,
            Precision.fp32,
            ranks,
        )
    assert type(built.zero.optimizer) is torch.optim.AdamW


@pytest.mark.parametrize(("world_size", "fits"), [(1, True), (1024, False)])
def test_the_open_file_limit_is_raised_or_refused(
    world_size: int, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {resource.RLIMIT_NOFILE: (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(resource, "setrlimit", limits.__setitem__)
    monkeypatch.setenv("WORLD_SIZE", str(world_size))
    with (
        nullcontext() if fits else pytest.raises(InputError, match="8,392 open files"),
        init_distributed("cpu", 1),
    ):
        assert limits[resource.RLIMIT_NOFILE] == (4096, 4096)
    assert limits[resource.RLIMIT_NOFILE][0] == (4096 if fits else 1024)


def test_reference_kernels_are_not_compiled(root: Path) -> None:
    run = config(root, "compiled-reference")
    with pytest.raises(InputError, match="compute.compile=false"):
        train(laid_out(run, compile=True, kernels=Backend.reference))


def test_tensor_parallel_gradients_equal_one_rank(root: Path) -> None:
    """Per parameter, since a missing all-reduce in the backward leaves the loss equal."""
    full = torch.load(root / "gradients-tp1-0.pt", weights_only=True)
    shards = [torch.load(root / f"gradients-tp2-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert torch.equal(shards[0]["loss"], shards[1]["loss"])
    torch.testing.assert_close(shards[0].pop("loss"), full.pop("loss"))
    for name, expected in full.items():
        actual = unshard(name, [shard[name] for shard in shards])
        assert (actual - expected).norm() <= 1e-5 * expected.norm(), name


def test_resumed_equals_uninterrupted_bit_for_bit(root: Path) -> None:
    resumed = records(root, "dp2-resumed")
    assert (
        resumed[0]["step"] > 1
        and resumed[0]["stage"] == "short"
        and resumed[0]["batch"] < resumed[-1]["batch"]
    )
    assert torch.equal(curve(root, "dp2-resumed"), curve(root, "dp2", like="dp2-resumed"))
    assert_same_weights(final_checkpoint(root, "dp2-resumed"), final_checkpoint(root, "dp2"), 0)


RESUMED_IN_ANOTHER_LAYOUT = [
    "dp1-to-tp2",
    "tp2-to-dp1",
    "dp2-to-zero0",
    "zero0-to-zero3",
    "zero3-to-zero2",
    "dp2-to-megatron",
    "megatron-to-zero2",
]


@pytest.mark.parametrize("name", RESUMED_IN_ANOTHER_LAYOUT)
def test_another_layout_or_engine_resumes_from_a_checkpoint(root: Path, name: str) -> None:
    torch.testing.assert_close(curve(root, name), curve(root, "dp1", like=name), rtol=3e-5, atol=0)
    assert_same_weights(final_checkpoint(root, name), final_checkpoint(root, "dp1"), 1e-3)


def test_bf16_follows_fp32(root: Path) -> None:
    """Matmuls in bf16, everything else in fp32: the same curve to the precision of bf16."""
    run = config(root, "bf16")
    run.compute.precision = Precision.bf16
    train(run)
    bf16, fp32 = curve(root, "bf16")[:, 0], curve(root, "dp1")[:, 0]
    assert not torch.equal(bf16, fp32)
    torch.testing.assert_close(bf16, fp32, rtol=1e-2, atol=0)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_gradient_that_is_not_finite_changes_nothing(root: Path, stage: int) -> None:
    """A skipped update leaves weights and moments bit for bit, and the next update the same."""
    tokens = torch.randint(0, TINY.vocab_size, (3, 17), generator=torch.Generator().manual_seed(1))
    parallel = with_zero_stage(config(root, "step"), stage).parallel
    results = []
    spike = 3.0  # a finite gradient that the loop skips
    for factors in ([1.0, 1.0], [1.0, float("nan"), spike, float("inf"), 1.0]):
        with init_distributed("cpu", 1) as ranks:
            model = build_model(TINY, REFERENCE, 0, ranks.device)
            step_engine = build_engine(
                model, Optim(1e-3, 0.9, 0.95, 1e-8, 0.1, 1.0, 0.0), parallel, Precision.fp32, ranks
            )
            for factor in factors:
                before = {shard.key: tensor.clone() for shard, tensor in step_engine.state_shards()}
                step_engine.backward(
                    model(tokens[:, :-1], tokens[:, 1:])[0].mean() * factor, last=True
                )
                norm, skipped = float("inf"), True
                if factor == spike:
                    step_engine.skip_step()
                else:
                    norm, skipped = step_engine.clip_and_step(1e-3)
                after = {shard.key: tensor.clone() for shard, tensor in step_engine.state_shards()}
                same = all(torch.equal(before[key], after[key]) for key in before)
                assert skipped == same == (factor != 1.0)
                assert (norm < 100) == (factor == 1.0)
            results.append(after)
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_retention_keeps_the_newest_good_ones(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "dp2" / "checkpoints", tmp_path / "kept" / "checkpoints")
    first, second = list(iter_checkpoints(tmp_path / "kept" / "checkpoints"))[:2]
    damage_checkpoint(first, "flip")
    (tmp_path / "kept" / "checkpoints" / "step-backup").mkdir()  # not written by the run
    run = replace(
        config(root, "dp1"),
        run=Run("kept", str(tmp_path / "kept"), 0),
        checkpoint=CheckpointConfig(10**9, 1, None, False, 0.0, 3),
    )
    train(run)
    left = list(iter_checkpoints(tmp_path / "kept" / "checkpoints"))
    assert len(left) == 1 and verify_checkpoint(left[0]) is None and left[0].name > second.name


def test_a_finished_run_is_not_changed(root: Path) -> None:
    before = (root / "dp1" / "metrics.jsonl").read_bytes()
    train(config(root, "dp1"))
    assert (root / "dp1" / "metrics.jsonl").read_bytes() == before


def test_a_run_of_another_config_is_refused(root: Path) -> None:
    other = config(root, "dp1")
    other.data.seed += 1
    with pytest.raises(InputError, match=r"another data plan: .*\(data\.seed 5 -> 6\)"):
        train(other)
    other = replace(config(root, "dp1"), model=replace(TINY, norm_eps=1e-4))
    with pytest.raises(InputError, match="another model"):
        train(other)


def test_checkpoints_hold_no_pickle_and_verify(root: Path) -> None:
    for folder in iter_checkpoints(root / "tp2" / "checkpoints"):
        assert verify_checkpoint(folder) is None
        assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    assert not list((root / "tp2" / "checkpoints").glob("*.part"))


@pytest.mark.parametrize(
    "damage", ["flip", "truncate", "remove", "manifest", "empty", "escape", "format"]
)
def test_a_damaged_checkpoint_is_skipped(
    root: Path, damage: str, tmp_path: Path, capsys: Any
) -> None:
    shutil.copytree(root / "dp2" / "checkpoints", tmp_path / "damaged" / "checkpoints")
    best, second = list(iter_checkpoints(tmp_path / "damaged" / "checkpoints"))[:2]
    damage_checkpoint(best, damage)
    run = replace(config(root, "dp1"), run=Run("damaged", str(tmp_path / "damaged"), 0))
    train(run)
    assert f"skipped {best.name}" in capsys.readouterr().out
    assert list(best.parent.glob(f"{best.name}.damaged-*"))
    steps = records(tmp_path, "damaged")
    assert steps[0]["step"] == int(second.name.removeprefix("step-")) + 1
    torch.testing.assert_close(
        steps[-1]["loss"], records(root, "dp2")[-1]["loss"], rtol=3e-5, atol=0
    )


def damage_checkpoint(folder: Path, damage: str) -> None:
    weights = folder / "rank-00001.safetensors"
    data = bytearray(weights.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 1
        weights.write_bytes(data)
    elif damage == "truncate":
        weights.write_bytes(data[:-4])
    elif damage == "remove":
        weights.unlink()
    elif damage == "manifest":
        (folder / "manifest.json").write_text("{")
    elif damage == "empty":
        (folder / "manifest.json").write_text('{"files": {}}')
    elif damage == "format":
        state = json.loads((folder / "state.json").read_text()) | {"format": 99}
        (folder / "state.json").write_text(json.dumps(state))
        manifest = json.loads((folder / "manifest.json").read_text())
        size, digest = (folder / "state.json").stat().st_size, sha256_of(folder / "state.json")
        manifest["files"]["state.json"] = {"bytes": size, "sha256": digest}
        (folder / "manifest.json").write_text(json.dumps(manifest))
    elif damage == "escape":
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["../../../metrics.jsonl"] = {"bytes": 1, "sha256": "0" * 64}
        (folder / "manifest.json").write_text(json.dumps(manifest))


def test_training_without_a_launcher_leaves_no_variables_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With them transformers, in the same process, would wait for other ranks."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    before = dict(os.environ)
    with init_distributed("cpu", 1):
        assert os.environ["LOCAL_RANK"] == "0"
    assert dict(os.environ) == before
    monkeypatch.setenv("LOCAL_RANK", "0")
    with init_distributed("cpu", 1):
        pass
    assert os.environ["LOCAL_RANK"] == "0"
