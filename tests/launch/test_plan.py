"""The plan against figures computed by hand, and its memory formula against a real model."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from core.errors import InputError
from launch.plan import MAX_LAYOUTS_SHOWN, gpu_table, plan, step_time_table, summary_table
from launch.planning.estimate import (
    PlannedRun,
    bytes_sent_per_step,
    reliability,
    roofline_seconds,
    schedule_phases,
    step_time,
)
from launch.planning.layouts import Layout, enumerate_layouts, evaluate_layout, select_layouts
from model.config import ModelConfig, Recompute
from model.flops import train_memory_traffic
from model.kernels import CPU
from model.parallel.build import build_model
from tests.commands import python
from tests.compose import laid_out, run_config, typed
from tests.tiny import TINY
from train.config import Device, EngineKind, Precision
from train.costs.gpus import GPUS
from train.costs.memory import GIB, check_memory, estimate_memory, layer_activation_bytes
from train.schedule import Schedule

H100 = next(gpu for gpu in GPUS if gpu.name.startswith("H100"))


@pytest.fixture(scope="module")
def run() -> PlannedRun:
    return typed(PlannedRun, "7b", "cluster=h100_32n", "parallel.engine=deepspeed")


@pytest.fixture(scope="module")
def megatron() -> PlannedRun:
    return typed(PlannedRun, "7b")


def test_memory_traffic_per_token(run: PlannedRun) -> None:
    """Per layer of the 7B in bf16: convolution 80 KiB, scan 176 KiB and 64 KiB of its states."""
    traffic = train_memory_traffic(run.model)
    assert traffic.scan == 64 * (176 + 64) * 1024
    assert traffic.convolutions == 64 * 80 * 1024 and traffic.residual == 64 * 4096 * (16 + 18)
    assert traffic.special_functions == 64 * 8192 * (3 * 16 + 10)


def test_roofline_is_the_sum_of_its_limits(run: PlannedRun) -> None:
    plain = laid_out(run, recompute=Recompute.none)
    matmuls = 6 * 6_994_001_920 / 989.5e12
    exponentials = 64 * 8192 * 58 / (132 * 16 * 1.98e9)
    elementwise = 64 * (80 * 1024 + 4096 * 34) / 3.35e12
    assert roofline_seconds(plain, H100) == pytest.approx(matmuls + exponentials + elementwise)
    assert roofline_seconds(run, H100) == pytest.approx(4 / 3 * roofline_seconds(plain, H100))
    # each of the four ranks computes the whole residual
    tp4 = replace(plain, parallel=replace(plain.parallel, tensor_parallel=4))
    replicated = 3 * 64 * 4096 * 34 / 3.35e12
    assert roofline_seconds(tp4, H100) == pytest.approx(roofline_seconds(plain, H100) + replicated)
    # with sequence parallelism each rank computes a quarter
    tp4 = replace(tp4, parallel=replace(tp4.parallel, sequence_parallel=True))
    assert roofline_seconds(tp4, H100) == pytest.approx(roofline_seconds(plain, H100))


def test_bytes_sent_per_step(run: PlannedRun) -> None:
    sent = bytes_sent_per_step(run, 256, 2048, 8192)
    assert sent["gradients"] == sent["weights"] == pytest.approx(4 * 7_272_665_088 * 255 / 256)
    assert sent["tensor parallel"] == sent["context parallel"] == 0
    megatron = replace(run, parallel=replace(run.parallel, engine=EngineKind.megatron))
    # gradients are scattered once; matrices are bf16, other weights fp32
    sent = bytes_sent_per_step(megatron, 256, 2048, 8192)
    assert sent["gradients"] == pytest.approx(4 * 7_272_665_088 * 255 / 256)
    assert sent["weights"] == pytest.approx(2 * 7_272_665_088 * 255 / 256, rel=2e-3)
    tp2_cp2 = replace(run, parallel=replace(run.parallel, tensor_parallel=2, context_parallel=2))
    sent = bytes_sent_per_step(tp2_cp2, 256, 2048, 8192)
    # x_proj three times, since full recompute repeats its all-reduce; embedding, loss
    token = 64 * 2 * (3 * 288 + 2 * 4096) + 4 * 4096 + 12 + 2 * 4096
    assert sent["tensor parallel"] == pytest.approx(32 * 4096 * token)
    # the states are gathered twice
    assert sent["context parallel"] == pytest.approx(4 * 32 * 64 * 4096 * (17 * 4 + 3 * 2))


def test_memory_by_zero_stage(run: PlannedRun) -> None:
    """Bytes per parameter on each of 256 replicas."""
    n = 7_272_665_088
    got = {}
    for stage in range(4):
        need = estimate_memory(replace(run, parallel=replace(run.parallel, zero_stage=stage)), 256)
        got[stage] = (need.parameters / n, need.gradients / n, need.optimizer / n)
        assert need.activations == estimate_memory(run, 256).activations
    assert got[0] == (4, 4, 8) and got[1] == pytest.approx((4, 4, 12 / 256))
    assert got[2] == pytest.approx((4, 4 / 256, 12 / 256)) and got[3] == pytest.approx(
        (4 / 256, 4 / 256, 12 / 256)
    )


def test_memory_of_the_7b(run: PlannedRun) -> None:
    """Matrices are bf16 with fp32 masters; norms, convolution, dt's bias, A_log and D are fp32."""
    small = 64 * (4096 + 5 * 8192 + 8192 + 16 * 8192 + 8192) + 4096
    need = estimate_memory(
        replace(run, parallel=replace(run.parallel, engine=EngineKind.megatron)), 256
    )
    assert need == estimate_memory(run_config("7b"), 256) and need.total < 60 * GIB
    assert need.parameters == pytest.approx(2 * (7_272_665_088 + small), rel=1e-6)
    assert need.gradients == pytest.approx(4 * 7_272_665_088, rel=1e-6)
    assert need.optimizer == pytest.approx((12 * 7_272_665_088 - 4 * small) / 256, rel=1e-4)


def test_phases_equal_the_schedule_step_by_step() -> None:
    """Counts the steps of a schedule whose ramp crosses a stage."""
    run = typed(PlannedRun, "1b", "schedule.ramp_tokens=30_000_000_000")
    schedule = Schedule(run.schedule, run.optim.lr, run.data)
    steps = dict.fromkeys((phase.name for phase in schedule_phases(run)), 0)
    tokens = 0
    while tokens < schedule.total:
        step_schedule = schedule.at(tokens)
        steps[step_schedule.stage + ", ramp" * (tokens < run.schedule.ramp_tokens)] += 1
        tokens += step_schedule.tokens
    assert sum(phase.tokens for phase in schedule_phases(run)) == schedule.total
    assert sum(name.endswith("ramp") for name in steps) == 2
    assert len(steps) == len(run.data.stages) + 1
    for phase in schedule_phases(run):
        # the schedule rounds a batch to whole sequences
        assert phase.steps == pytest.approx(steps[phase.name], rel=5e-3), phase.name


def test_step_time_by_context_length(megatron: PlannedRun) -> None:
    """Compute is proportional to the context; the 29.0 GB of gradients and 14.5 GB of weights
    sent do not depend on it.
    """
    long, short = (step_time(megatron, 256, H100, 2048, seq_len) for seq_len in (8192, 2048))
    assert long.compute == pytest.approx(65536 * 6 * 6_994_001_920 / (989.5e12 * 0.4) * 4 / 3)
    assert short.compute == pytest.approx(long.compute / 4)
    assert (
        short.overlappable
        == long.overlappable
        == pytest.approx((4 + 2) * 7_272_665_088 * 255 / 256 / 50e9, rel=2e-3)
    )
    assert short.exposed == long.exposed == 0
    # half of the ranks have no sequence and wait for the others
    ramp = step_time(megatron, 256, H100, 128, 2048)
    assert ramp.compute == short.compute / 8


def test_overlappable_communication(megatron: PlannedRun) -> None:
    """Only gradients and weights overlap, and only where the engine implements it."""
    exposed = {}
    for engine, stage in (
        (EngineKind.megatron, 1),
        *((EngineKind.deepspeed, stage) for stage in range(4)),
    ):
        parallel = replace(megatron.parallel, engine=engine, zero_stage=stage, tensor_parallel=2)
        time = step_time(replace(megatron, parallel=parallel), 256, H100, 2048, 8192)
        in_layers = (
            bytes_sent_per_step(replace(megatron, parallel=parallel), 256, 2048, 8192)[
                "tensor parallel"
            ]
            / 450e9
        )
        exposed[engine.name, stage] = time.exposed / in_layers
        assert time.total == time.compute + time.overlappable + time.exposed
    assert exposed["megatron", 1] == pytest.approx(1)
    assert exposed["deepspeed", 3] == pytest.approx(1)
    assert exposed["deepspeed", 1] > 1.1
    assert exposed["deepspeed", 0] > 1.1 * exposed["deepspeed", 1]


def test_days_are_consistent(megatron: PlannedRun) -> None:
    """Phases, GPU hours and the layout's throughput agree. Communication takes a fifth of the run,
    not the 9 % of a step at 8k.
    """
    result = plan(megatron)
    days = result["days"]["total"]
    assert days == pytest.approx(sum(phase["days"] for phase in result["phases"]))
    assert days == pytest.approx(
        megatron.tokens / 256 / result["layout"]["tokens_per_second"] / 86400
    )
    assert result["tokens_per_second"] == result["layout"]["tokens_per_second"]
    assert result["gpu_hours"] == pytest.approx(days * 24 * 256)
    assert result["days"]["computing"] == pytest.approx(37.1, abs=0.3)
    assert result["days"]["may_hide"] / days == pytest.approx(0.196, abs=0.01)


def test_best_save_interval_is_youngs(run: PlannedRun) -> None:
    expected = reliability(run, 256, days=60)
    assert expected.failures == pytest.approx(32 * 60 * 6.5 / 1000)
    blocking = 12 * 7_272_665_088 / 256 / 20e9
    assert expected.blocking_seconds == pytest.approx(blocking)
    assert expected.best_minutes == pytest.approx(
        (2 * blocking * 86400 / (32 * 6.5e-3)) ** 0.5 / 60
    )


def test_saves_of_the_7b_cost_little(megatron: PlannedRun) -> None:
    def saving_every(tokens: int) -> PlannedRun:
        return replace(megatron, checkpoint=replace(megatron.checkpoint, every_tokens=tokens))

    current = reliability(megatron, 256, days=46)
    assert current.best_lost < current.lost < 0.001
    rare, frequent = (
        reliability(saving_every(tokens), 256, days=46) for tokens in (30_000_000_000, 3_000_000)
    )
    assert rare.interval_minutes == pytest.approx(46 * 1440 * 30 / 5800, rel=1e-3)
    assert rare.lost == pytest.approx(
        rare.interval_minutes * 60 / 2 * 32 * 6.5e-3 / 86400, rel=1e-2
    )
    assert frequent.lost == pytest.approx(
        frequent.blocking_seconds / (frequent.interval_minutes * 60), rel=1e-2
    )
    assert min(rare.lost, frequent.lost) > 5 * current.lost


SELECTIVE = {"tensor_parallel": 1, "context_parallel": 1, "zero_stage": 1, "recompute": "selective"}


@pytest.fixture(scope="module")
def layouts(run: PlannedRun) -> list[Layout]:
    return enumerate_layouts(run, 256, H100)


def test_layouts_are_sorted_and_have_reasons(run: PlannedRun, layouts: list[Layout]) -> None:
    runnable = [layout for layout in layouts if layout.unsupported_reason is None]
    assert layouts[: len(runnable)] == runnable and len(layouts) == 7 * 4 * 3 * (2 + 2 * 3)
    assert [layout.tokens_per_second for layout in runnable] == sorted(
        (x.tokens_per_second for x in runnable), reverse=True
    )
    assert all(layout.memory_gib <= 79 - 5 for layout in runnable)
    selective = next(x for x in layouts if asdict(x) | SELECTIVE == asdict(x))
    assert selective.lacks == "memory"
    reason = f"needs {selective.memory_gib:.1f} of 79 GiB less 5 of headroom"
    assert selective.unsupported_reason == reason
    three = enumerate_layouts(run, 3, H100)
    assert any(
        x.lacks == "ranks" and x.unsupported_reason == "2 x 1 does not divide 3 ranks"
        for x in three
    )


def test_fastest_layout_of_the_7b(megatron: PlannedRun) -> None:
    """configs/experiment/7b.yaml and docs/design/parallelism.md quote these figures."""
    fastest = enumerate_layouts(megatron, 256, H100)[0]
    configured = evaluate_layout(megatron, megatron.parallel, megatron.compute.recompute, 256, H100)
    assert (fastest.tensor_parallel, fastest.sequence_parallel, fastest.recompute) == (
        2,
        True,
        "none",
    )
    assert fastest.tokens_per_second / configured.tokens_per_second == pytest.approx(
        1.36, abs=0.005
    )
    assert fastest.tokens_per_second_hidden / configured.tokens_per_second_hidden == pytest.approx(
        1.26, abs=0.005
    )
    parallel = replace(megatron.parallel, tensor_parallel=2, sequence_parallel=True)
    slow = replace(megatron, plan=replace(megatron.plan, mfu=0.314))
    equal = evaluate_layout(slow, parallel, Recompute.none, 256, H100).tokens_per_second_hidden
    assert equal == pytest.approx(configured.tokens_per_second_hidden, rel=0.005)


def test_headroom_is_one_value_for_all(megatron: PlannedRun) -> None:
    """Plan and start of a run refuse a layout that needs part of the headroom, on a GPU only."""
    full = laid_out(megatron, recompute=Recompute.selective)
    memory = estimate_memory(full, 256).total

    def fits(headroom: float, device: str = "cuda") -> tuple[bool, bool]:
        cluster = replace(
            full.cluster, memory_gib=memory / GIB + 2, headroom_gib=headroom, device=Device(device)
        )
        config = replace(full, cluster=cluster)
        try:
            check_memory(config, 256, 1, device, memory + 2 * GIB)
        except InputError as error:
            assert f"less {headroom:g} of headroom" in str(error)
            return evaluate_layout(
                config, config.parallel, config.compute.recompute, 256, H100
            ).lacks is None, False
        return evaluate_layout(
            config, config.parallel, config.compute.recompute, 256, H100
        ).lacks is None, True

    assert (
        fits(1.5) == (True, True)
        and fits(2.5) == (False, False)
        and fits(2.5, "cpu") == (True, True)
    )
    assert typed(PlannedRun, "1b").cluster.headroom_gib == megatron.cluster.headroom_gib > 0


def test_larger_micro_batches_are_tried_where_they_send_less(layouts: list[Layout]) -> None:
    sizes: dict[int, dict[int, Layout]] = {}
    for layout in layouts:
        if (layout.tensor_parallel, layout.context_parallel, layout.recompute) == (1, 1, "full"):
            sizes.setdefault(layout.zero_stage, {})[layout.micro_batch_tokens] = layout
    assert [sorted(sizes[stage]) for stage in range(4)] == [[8192]] * 2 + [[8192, 16384, 32768]] * 2
    for stage in (2, 3):
        assert sizes[stage][16384].tokens_per_second > 1.1 * sizes[stage][8192].tokens_per_second
        assert sizes[stage][16384].memory_gib > sizes[stage][8192].memory_gib + 5


def test_selected_layouts(megatron: PlannedRun) -> None:
    layouts = enumerate_layouts(megatron, 256, H100)
    configured = evaluate_layout(megatron, megatron.parallel, megatron.compute.recompute, 256, H100)
    rows = select_layouts(layouts, configured, fastest=3)
    assert rows[:3] == list(enumerate(layouts[:3], 1))
    assert rows[3] == (layouts.index(configured) + 1, configured)
    failing = [layout for position, layout in rows if position is None]
    assert (
        {layout.recompute for layout in failing}
        == {"none", "selective"}
        == {x.recompute for x in layouts if x.lacks}
    )
    # a configured layout among the fastest is shown once
    assert select_layouts(layouts, layouts[1], fastest=3)[:3] == rows[:3]
    three_ranks = enumerate_layouts(megatron, 3, H100)
    kinds = [
        layout.lacks
        for position, layout in select_layouts(three_ranks, three_ranks[0], fastest=1)
        if position is None
    ]
    assert set(kinds) == {x.lacks for x in three_ranks} - {None} and kinds.count("ranks") == 1
    unrunnable = evaluate_layout(megatron, megatron.parallel, Recompute.none, 256, H100)
    assert (None, unrunnable) in select_layouts(layouts, unrunnable, fastest=3)


@pytest.mark.parametrize("recompute", list(Recompute))
def test_activation_memory_of_a_layer(run: PlannedRun, recompute: Recompute) -> None:
    """Bytes saved for the backward, without parameters, are within 5 % of the formula."""
    shape = {"d_model": 64, "n_layer": 12, "d_inner": 128, "d_state": 16, "dt_rank": 8}
    config: ModelConfig = replace(TINY, **shape)
    model = build_model(config, CPU, 0, torch.device("cpu"), recompute=recompute)
    parameter_ptrs = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        # A is not saved per token
        if storage.data_ptr() not in parameter_ptrs and x.numel() > config.d_inner * config.d_state:
            saved[storage.data_ptr()] = storage
        return x

    tokens = torch.randint(0, config.vocab_size, (2, 256))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        hidden = model.hidden(tokens)
    run = laid_out(run, recompute=recompute, precision=Precision.fp32)
    expected = (
        512
        * config.n_layer
        * layer_activation_bytes(replace(run, model=config_for(run, config)))[0]
    )
    # the final norm saves its input
    measured = sum(storage.nbytes() for storage in saved.values()) - hidden.nbytes
    assert measured == pytest.approx(expected, rel=0.05)


def config_for(run: PlannedRun, config: ModelConfig) -> ModelConfig:
    """The config with the run's vocabulary size, which the tokenizer needs."""
    return replace(config, vocab_size=run.model.vocab_size)


EDGES = {  # both ends of the range of each assumption
    "plan.mfu": (1e-6, 1),
    "plan.node_gbytes_per_second": (1e-6, 1e6),
    "plan.network_gbytes_per_second": (1e-6, 1e6),
    "plan.storage_gbytes_per_second": (1e-6, 1e6),
    "plan.host_gbytes_per_second": (1e-6, 1e6),
    "plan.failures_per_1000_node_days": (0, 1e6),
    "cluster.peak_tflops": (1e-6, 1e6),
    "checkpoint.every_tokens": (1, 2**53),
}


@pytest.mark.parametrize("end", [0, 1])
def test_a_plan_at_the_edges_of_its_assumptions_has_finite_figures(end: int) -> None:
    edges = [f"{key}={ends[end]}" for key, ends in EDGES.items()]
    run = typed(PlannedRun, "demo", *edges, "checkpoint.keep_every_tokens=null")
    result = json.loads(json.dumps(plan(run)), parse_constant=pytest.fail)
    assert result["days"]["total"] > 0 and result["tokens_per_second"] > 0
    for table in (summary_table(run, result), step_time_table(result), gpu_table(run, result)):
        assert table.row_count


def test_a_plan_for_fewer_ranks_than_a_group_is_refused() -> None:
    with pytest.raises(InputError, match="needs 4 ranks, and cluster.nodes x ranks_per_node is 1"):
        plan(typed(PlannedRun, "demo", "parallel.tensor_parallel=4", "cluster.ranks_per_node=1"))


def test_the_command_writes_json(tmp_path: Path) -> None:
    command = ("launch/plan.py", "+experiment=7b", "cluster=h100_32n", f"run.dir={tmp_path}")
    result = python(*command)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["parameters"] == 7_272_665_088
    first, *_, last = written["stages"]  # 128 sequences on 256 ranks, then 8 per rank
    assert (first["groups_without"], last["groups_without"], last["most_sequences"]) == (128, 0, 8)
    assert (
        written["layouts"][0]["unsupported_reason"] is None
        and "B200" in written["roofline_tokens_per_second"]
    )
    assert result.stdout.count("this run's") == 1 and "of headroom" in result.stdout
    assert (
        len(written["layouts_shown"]) > MAX_LAYOUTS_SHOWN
        and f"{written['days']['total']:.1f} (" in result.stdout
    )
