"""launch/dryrun.py: the width of the 7B on up to 256 ranks, and layouts that cannot run."""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.planning.dryrun_config import DryRunConfig
from launch.planning.estimate import planned_gpu
from launch.planning.layouts import evaluate_layout
from tests.commands import Result, forked
from tests.compose import typed


def run(folder: Path, *overrides: str) -> Result:
    return forked("launch/dryrun.py", "+experiment=7b", f"run.dir={folder}", *overrides)


DEEPSPEED = "parallel.engine=deepspeed"
SEQUENCE_PARALLEL = ("parallel.sequence_parallel=true", "compute.recompute=selective")
# collectives between replicas; megatron-core's optimizer group is all ranks
COLLECTIVES = {
    "zero1": {("replicas", "all_reduce"), ("replicas", "all_gather")},
    "zero3": {
        ("replicas", "all_reduce"),
        ("replicas", "all_gather"),
        ("replicas", "reduce_scatter"),
    },
    "megatron": {
        ("replicas", "reduce_scatter"),
        ("replicas", "all_gather"),
        ("optimizer", "all_reduce"),
    },
}
ENGINES = {
    "zero1": (DEEPSPEED,),
    "zero3": (DEEPSPEED, "parallel.zero_stage=3"),
    "megatron": ("parallel.engine=megatron",),
}
LAYOUTS = [
    *(
        (engine, *layout)
        for engine in ("zero1", "megatron")
        for layout in ((1, 256, ()), (8, 32, ()), (8, 32, SEQUENCE_PARALLEL))
    ),
    ("zero3", 1, 32, ()),
    ("zero3", 8, 32, ()),
]


@pytest.fixture(scope="module")
def dry_runs(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[list[tuple[Path, Future[Result]]]]:
    """The dry run of each layout, two at a time."""
    runs = []
    with ThreadPoolExecutor(2) as pool:
        for engine, tensor, replicas, extra in LAYOUTS:
            folder = tmp_path_factory.mktemp("layout")
            layout = (*ENGINES[engine], f"parallel.tensor_parallel={tensor}", *extra)
            size = ("model.n_layer=4", "parallel.bucket_elements=30_000_000")
            overrides = (f"dryrun.world_size={tensor * replicas}", *size, *layout)
            runs.append((folder, pool.submit(run, folder, *overrides)))
        yield runs


@pytest.mark.parametrize(
    ("number", "engine", "tensor", "replicas", "extra"),
    [(number, *layout) for number, layout in enumerate(LAYOUTS)],
)
def test_a_step_at_full_width(
    dry_runs: list[tuple[Path, Future[Result]]],
    number: int,
    engine: str,
    tensor: int,
    replicas: int,
    extra: tuple[str, ...],
) -> None:
    """With four of the 64 layers."""
    folder, future = dry_runs[number]
    result = future.result()
    assert result.returncode == 0, result.stderr
    assert "differs" not in result.stdout and "equal to the formula" in result.stdout
    report = json.loads((folder / "dryrun.json").read_text())
    assert report["replicas"] == replicas
    steps = {
        (row["group"], row["operation"]): row
        for row in report["collectives"]
        if row["when"] == "step"
    }
    between = {
        ("tensor", kind)
        for kind in ("all_reduce", "all_gather", "reduce_scatter")[: 3 if extra else tensor > 1]
    }
    assert set(steps) == COLLECTIVES[engine] | between | {("world", "all_reduce")}
    for kind, row in steps.items():
        minimum = (
            row["formula"] / 2
            if (engine, *kind) == ("zero3", "replicas", "all_gather")
            else row["formula"]
        )
        assert minimum <= row["bytes"] <= row["formula"] and row["calls"], kind
    assert report["step"]["micro_batches_of_the_rank"] == 2048 / replicas
    shards = report["shards"]
    assert (
        shards["optimizer_of_the_rank"]["engine"] == shards["optimizer_of_the_rank"]["formula"] > 0
    )
    assert shards["optimizer_part"] * replicas == shards["weights"] + shards["optimizer_padding"]
    if engine == "megatron":  # one collective per bucket
        assert (
            steps["replicas", "all_gather"]["calls"]
            == steps["replicas", "reduce_scatter"]["calls"]
            > 1
        )
    assert (
        shards["weights_of_a_rank"] == shards["optimizer_part" if engine == "zero3" else "weights"]
    )
    weights = shards["bytes"]["parameters"] / shards["weights_of_a_rank"]
    assert weights == pytest.approx(2 if engine == "megatron" else 4, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "reason", "suggestion"),
    [
        (
            ("parallel.tensor_parallel=3",),
            "3 does not divide model.d_inner 8192",
            "parallel.tensor_parallel=4",
        ),
        (
            ("parallel.tensor_parallel=4", "model.vocab_size=65026"),
            "not divide model.vocab_size",
            "tensor_parallel=2",
        ),
        (
            ("parallel.context_parallel=3",),
            "cannot split the 2048 tokens",
            "parallel.context_parallel=4",
        ),
        (
            ("parallel.sequence_parallel=true",),
            "set parallel.tensor_parallel",
            "parallel.sequence_parallel=false",
        ),
        (
            ("parallel.sequence_parallel=true", "parallel.tensor_parallel=3"),
            "does not divide",
            "tensor_parallel=4",
        ),
        (
            ("parallel.micro_batch_tokens=4096",),
            "is below the longest sequence",
            "parallel.micro_batch_tokens=8192",
        ),
    ],
)
def test_an_invalid_layout_is_refused_with_a_valid_one(
    overrides: tuple[str, ...], reason: str, suggestion: str
) -> None:
    with pytest.raises(ValueError, match=reason) as refusal:
        typed(DryRunConfig, "7b", "dryrun.world_size=256", *overrides)
    suggested = str(refusal.value).split("nearest layout that runs on 256 ranks: ")[1].split(",")[0]
    assert suggested.endswith(suggestion)
    key = suggested.split("=")[0]
    others = [override for override in overrides if override.split("=")[0] != key]
    fixed = typed(DryRunConfig, "7b", "dryrun.world_size=256", *others, suggested)
    layout = evaluate_layout(
        fixed, fixed.parallel, fixed.compute.recompute, 256, planned_gpu(fixed)
    )
    assert layout.unsupported_reason is None


@pytest.mark.parametrize(
    ("overrides", "reason", "suggestion"),
    [
        (
            ("dryrun.world_size=12", "parallel.tensor_parallel=8"),
            "8 x 1 does not divide 12 ranks",
            "parallel.tensor_parallel=4",
        ),
        (
            ("dryrun.world_size=256", "compute.recompute=none"),
            "of 79 GiB less 5 of headroom",
            "compute.recompute=full",
        ),
        (
            ("dryrun.world_size=256", "compute.recompute=selective"),
            "of 79 GiB less 5 of headroom",
            "compute.recompute=full",
        ),
        (
            ("dryrun.world_size=4096",),
            "2048 sequences for 4096 groups of ranks",
            "parallel.tensor_parallel=2",
        ),
        (
            ("dryrun.world_size=256", DEEPSPEED, "parallel.zero_stage=0"),
            "of 79 GiB less 5 of headroom",
            "parallel.tensor_parallel=2",
        ),
        (("dryrun.world_size=1", "cluster.memory_gib=2"), "of 2 GiB", "no layout runs on 1 ranks"),
    ],
)
def test_a_layout_that_cannot_run_is_refused_in_one_line(
    tmp_path: Path, overrides: tuple[str, ...], reason: str, suggestion: str
) -> None:
    result = run(tmp_path, *overrides)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert reason in result.stderr and suggestion in result.stderr and not list(tmp_path.iterdir())


def test_errors_other_than_the_layout_suggest_no_layout() -> None:
    with pytest.raises(ValueError, match="tokens: lower it or make a stage longer$"):
        typed(DryRunConfig, "7b", "dryrun.world_size=256", "schedule.decay_tokens=1e15")
    with pytest.raises(ValueError, match="^dryrun.world_size is 0: set a whole number from 1"):
        typed(DryRunConfig, "7b", "dryrun.world_size=0")
