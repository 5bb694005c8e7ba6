"""The plan's arithmetic against known numbers, and against what a model really keeps in memory."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from core.errors import InputError
from launch.plan import SHOWN, plan
from launch.planning.devices import GPUS
from launch.planning.estimate import (
    PlannedRun,
    phases,
    reliability,
    roofline_seconds,
    step_time,
    traffic_between_ranks,
)
from launch.planning.layouts import Layout, layout_of, layouts, worth_showing
from model.config import ModelConfig, Recompute
from model.flops import train_memory_traffic
from model.kernels import CPU
from model.parallel.build import build_model
from tests.commands import python
from tests.compose import laid_out, run_config, typed
from tests.tiny import TINY
from train.config import Device, EngineKind, Precision
from train.costs.memory import GIB, check_memory, estimate_memory, layer_activation_bytes
from train.schedule import Schedule

H100 = next(gpu for gpu in GPUS if gpu.name.startswith("H100"))


@pytest.fixture(scope="module")
def run() -> PlannedRun:
    return typed(PlannedRun, "7b", "cluster=h100_32n", "parallel.engine=deepspeed")


@pytest.fixture(scope="module")
def megatron() -> PlannedRun:
    return typed(PlannedRun, "7b")


def test_traffic_by_hand(run: PlannedRun) -> None:
    """Per layer of the 7B in bf16: convolution 80 KiB, scan 176 KiB and 64 KiB of its states."""
    traffic = train_memory_traffic(run.model)
    assert traffic.scan == 64 * (176 + 64) * 1024
    assert traffic.convolutions == 64 * 80 * 1024 and traffic.residual == 64 * 4096 * (16 + 18)
    assert traffic.special_functions == 64 * 8192 * (3 * 16 + 10)


def test_roofline_is_the_sum_of_its_limits(run: PlannedRun) -> None:
    plain = laid_out(run, recompute=Recompute.none)
    products = 6 * 6_994_001_920 / 989.5e12
    exponentials = 64 * 8192 * 58 / (132 * 16 * 1.98e9)
    rest = 64 * (80 * 1024 + 4096 * 34) / 3.35e12
    assert roofline_seconds(plain, H100) == pytest.approx(products + exponentials + rest)
    assert roofline_seconds(run, H100) == pytest.approx(4 / 3 * roofline_seconds(plain, H100))
    # four ranks do the residual's rows
    cut = replace(plain, parallel=replace(plain.parallel, tensor_parallel=4))
    again = 3 * 64 * 4096 * 34 / 3.35e12
    assert roofline_seconds(cut, H100) == pytest.approx(roofline_seconds(plain, H100) + again)
    cut = replace(cut, parallel=replace(cut.parallel, sequence_parallel=True))  # each a quarter
    assert roofline_seconds(cut, H100) == pytest.approx(roofline_seconds(plain, H100))


def test_communication_by_hand(run: PlannedRun) -> None:
    sent = traffic_between_ranks(run, 256, 2048, 8192)
    assert sent["gradients"] == sent["weights"] == pytest.approx(4 * 7_272_665_088 * 255 / 256)
    assert sent["tensor parallel"] == sent["context parallel"] == 0
    megatron = replace(run, parallel=replace(run.parallel, engine=EngineKind.megatron))
    # scattered once; bf16 weights, fp32 small ones
    sent = traffic_between_ranks(megatron, 256, 2048, 8192)
    assert sent["gradients"] == pytest.approx(4 * 7_272_665_088 * 255 / 256)
    assert sent["weights"] == pytest.approx(2 * 7_272_665_088 * 255 / 256, rel=2e-3)
    cut = replace(run, parallel=replace(run.parallel, tensor_parallel=2, context_parallel=2))
    sent = traffic_between_ranks(cut, 256, 2048, 8192)
    # x_proj three times, since full recompute takes its sum again; embedding, loss
    token = 64 * 2 * (3 * 288 + 2 * 4096) + 4 * 4096 + 12 + 2 * 4096
    assert sent["tensor parallel"] == pytest.approx(32 * 4096 * token)
    # gathered twice
    assert sent["context parallel"] == pytest.approx(4 * 32 * 64 * 4096 * (17 * 4 + 3 * 2))


def test_memory_by_stage(run: PlannedRun) -> None:
    """What is whole on every rank in bytes per parameter, and what is cut: by hand, for 256
    replicas.
    """
    n, got = 7_272_665_088, {}
    for stage in range(4):
        need = estimate_memory(replace(run, parallel=replace(run.parallel, zero_stage=stage)), 256)
        got[stage] = (need.parameters / n, need.gradients / n, need.optimizer / n)
        assert need.activations == estimate_memory(run, 256).activations
    assert got[0] == (4, 4, 8) and got[1] == pytest.approx((4, 4, 12 / 256))
    assert got[2] == pytest.approx((4, 4 / 256, 12 / 256)) and got[3] == pytest.approx(
        (4 / 256, 4 / 256, 12 / 256)
    )


def test_memory_of_the_7b(run: PlannedRun) -> None:
    """bf16 matrices with fp32 masters, the rest fp32: norms, convolution, dt's bias, A_log and D.
    It fits with room.
    """
    small = 64 * (4096 + 5 * 8192 + 8192 + 16 * 8192 + 8192) + 4096
    need = estimate_memory(
        replace(run, parallel=replace(run.parallel, engine=EngineKind.megatron)), 256
    )
    assert need == estimate_memory(run_config("7b"), 256) and need.total < 60 * GIB
    assert need.parameters == pytest.approx(2 * (7_272_665_088 + small), rel=1e-6)
    assert need.gradients == pytest.approx(4 * 7_272_665_088, rel=1e-6)
    assert need.optimizer == pytest.approx((12 * 7_272_665_088 - 4 * small) / 256, rel=1e-4)


def test_phases_are_the_steps_of_the_schedule() -> None:
    """A schedule walked step by step: how many have the growing batch, which crosses a stage, and
    how many have not.
    """
    run = typed(PlannedRun, "1b", "schedule.ramp_tokens=30_000_000_000")
    schedule, walked, tokens = (
        Schedule(run.schedule, run.optim.lr, run.data),
        dict.fromkeys((phase.name for phase in phases(run)), 0),
        0,
    )
    while tokens < schedule.total:
        step_schedule = schedule.at(tokens)
        walked[step_schedule.stage + ", ramp" * (tokens < run.schedule.ramp_tokens)] += 1
        tokens += step_schedule.tokens
    assert sum(phase.tokens for phase in phases(run)) == schedule.total
    assert (
        sum(name.endswith("ramp") for name in walked) == 2
        and len(walked) == len(run.data.stages) + 1
    )
    for phase in phases(run):
        # sequences are whole there
        assert phase.steps == pytest.approx(walked[phase.name], rel=5e-3), phase.name


def test_a_step_of_any_context_sends_the_same(megatron: PlannedRun) -> None:
    """29.0 GB of gradients and 14.5 GB of weights, which weigh four times as much at 2k as at
    8k.
    """
    long, short = (step_time(megatron, 256, H100, 2048, seq_len) for seq_len in (8192, 2048))
    assert long.computing == pytest.approx(65536 * 6 * 6_994_001_920 / (989.5e12 * 0.4) * 4 / 3)
    assert short.computing == pytest.approx(long.computing / 4)
    assert (
        short.may_hide
        == long.may_hide
        == pytest.approx((4 + 2) * 7_272_665_088 * 255 / 256 / 50e9, rel=2e-3)
    )
    assert short.exposed == long.exposed == 0
    # half of the ranks have no sequence, and wait for the others
    ramp = step_time(megatron, 256, H100, 128, 2048)
    assert ramp.computing == short.computing / 8


def test_what_may_hide(megatron: PlannedRun) -> None:
    """Sums inside layers never do; gradients and weights do where the engine sends them beside
    computing.
    """
    found = {}
    for engine, stage in (
        (EngineKind.megatron, 1),
        *((EngineKind.deepspeed, stage) for stage in range(4)),
    ):
        parallel = replace(megatron.parallel, engine=engine, zero_stage=stage, tensor_parallel=2)
        time = step_time(replace(megatron, parallel=parallel), 256, H100, 2048, 8192)
        inside = (
            traffic_between_ranks(replace(megatron, parallel=parallel), 256, 2048, 8192)[
                "tensor parallel"
            ]
            / 450e9
        )
        found[engine.name, stage] = time.exposed / inside
        assert time.total == time.computing + time.may_hide + time.exposed
    assert found["megatron", 1] == pytest.approx(1) and found["deepspeed", 3] == pytest.approx(1)
    assert found["deepspeed", 1] > 1.1 and found["deepspeed", 0] > 1.1 * found["deepspeed", 1]


def test_one_figure_of_days(megatron: PlannedRun) -> None:
    """Summary, stages, GPU hours and the layout's rate say the same; a fifth of it is sent, not the
    9 % of a step at 8k.
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


def test_saves_are_by_young(run: PlannedRun, megatron: PlannedRun) -> None:
    """megatron-core's weights, 2 bytes each, are gathered before a save: most of what it stops
    training for.
    """
    expected = reliability(run, 256, days=60)
    assert expected.failures == pytest.approx(32 * 60 * 6.5 / 1000)
    blocking = 12 * 7_272_665_088 / 256 / 20e9
    assert expected.blocking_seconds == pytest.approx(blocking)
    assert expected.best_minutes == pytest.approx(
        (2 * blocking * 86400 / (32 * 6.5e-3)) ** 0.5 / 60
    )
    gathering = reliability(megatron, 256, days=60).blocking_seconds - blocking
    assert gathering == pytest.approx(2 * 7_272_665_088 * 255 / 256 / 50e9, rel=2e-3)


def test_the_pause_of_the_7b_is_near_the_best(megatron: PlannedRun) -> None:
    def saved(tokens: int) -> PlannedRun:
        return replace(megatron, checkpoint=replace(megatron.checkpoint, every_tokens=tokens))

    current = reliability(megatron, 256, days=46)
    assert current.best_lost < current.lost < 1.2 * current.best_lost and current.lost < 0.002
    seldom, often = (
        reliability(saved(tokens), 256, days=46) for tokens in (30_000_000_000, 30_000_000)
    )
    assert seldom.interval_minutes == pytest.approx(46 * 1440 * 30 / 5800, rel=1e-3)
    assert seldom.lost == pytest.approx(
        seldom.interval_minutes * 60 / 2 * 32 * 6.5e-3 / 86400, rel=1e-2
    )
    assert often.lost == pytest.approx(
        often.blocking_seconds / (often.interval_minutes * 60), rel=1e-2
    )
    assert min(seldom.lost, often.lost) > 5 * current.lost


SELECTIVE = {"tensor_parallel": 1, "context_parallel": 1, "zero_stage": 1, "recompute": "selective"}


@pytest.fixture(scope="module")
def found(run: PlannedRun) -> list[Layout]:
    return layouts(run, 256, H100)


def test_layouts_say_why_they_fall(run: PlannedRun, found: list[Layout]) -> None:
    runs = [layout for layout in found if layout.unsupported_reason is None]
    assert found[: len(runs)] == runs and len(found) == 7 * 4 * 3 * (2 + 2 * 3)
    assert [layout.tokens_per_second for layout in runs] == sorted(
        (x.tokens_per_second for x in runs), reverse=True
    )
    assert all(layout.memory_gib <= 79 - 5 for layout in runs)
    alone = next(x for x in found if asdict(x) | SELECTIVE == asdict(x))
    assert (
        alone.lacks == "memory"
        and alone.unsupported_reason == f"needs {alone.memory_gib:.1f} of 79 GiB less 5 of headroom"
    )
    three = layouts(run, 3, H100)
    assert any(
        x.lacks == "ranks" and x.unsupported_reason == "2 x 1 does not divide 3 ranks"
        for x in three
    )


def test_what_7b_says_of_the_fastest(megatron: PlannedRun) -> None:
    """configs/experiment/7b.yaml, README.md and docs/design/parallelism.md quote these."""
    fastest = layouts(megatron, 256, H100)[0]
    own = layout_of(megatron, megatron.parallel, megatron.compute.recompute, 256, H100)
    assert (fastest.tensor_parallel, fastest.sequence_parallel, fastest.recompute) == (
        2,
        True,
        "none",
    )
    assert fastest.tokens_per_second / own.tokens_per_second == pytest.approx(1.36, abs=0.005)
    assert fastest.tokens_per_second_hidden / own.tokens_per_second_hidden == pytest.approx(
        1.26, abs=0.005
    )
    parallel = replace(megatron.parallel, tensor_parallel=2, sequence_parallel=True)
    slow = replace(megatron, plan=replace(megatron.plan, mfu=0.314))
    equal = layout_of(slow, parallel, Recompute.none, 256, H100).tokens_per_second_hidden
    assert equal == pytest.approx(own.tokens_per_second_hidden, rel=0.005)


def test_headroom_is_one_value_for_all(megatron: PlannedRun) -> None:
    """A layout that needs all but a little of the memory is refused by plan and start alike, on a
    GPU.
    """
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
            return layout_of(
                config, config.parallel, config.compute.recompute, 256, H100
            ).lacks is None, False
        return layout_of(
            config, config.parallel, config.compute.recompute, 256, H100
        ).lacks is None, True

    assert (
        fits(1.5) == (True, True)
        and fits(2.5) == (False, False)
        and fits(2.5, "cpu") == (True, True)
    )
    assert typed(PlannedRun, "1b").cluster.headroom_gib == megatron.cluster.headroom_gib > 0


def test_larger_micro_batches_are_tried_where_they_send_less(found: list[Layout]) -> None:
    sizes: dict[int, dict[int, Layout]] = {}
    for layout in found:
        if (layout.tensor_parallel, layout.context_parallel, layout.recompute) == (1, 1, "full"):
            sizes.setdefault(layout.zero_stage, {})[layout.micro_batch_tokens] = layout
    assert [sorted(sizes[stage]) for stage in range(4)] == [[8192]] * 2 + [[8192, 16384, 32768]] * 2
    for stage in (2, 3):
        assert sizes[stage][16384].tokens_per_second > 1.1 * sizes[stage][8192].tokens_per_second
        assert sizes[stage][16384].memory_gib > sizes[stage][8192].memory_gib + 5


def test_the_runs_own_layout_and_the_fallen_are_shown(megatron: PlannedRun) -> None:
    found = layouts(megatron, 256, H100)
    own = layout_of(megatron, megatron.parallel, megatron.compute.recompute, 256, H100)
    rows = worth_showing(found, own, fastest=3)
    assert [place for place, _ in rows[:3]] == [1, 2, 3] and [
        layout for _, layout in rows[:3]
    ] == found[:3]
    assert rows[3] == (found.index(own) + 1, own)
    fallen = [layout for place, layout in rows if place is None]
    assert (
        {layout.recompute for layout in fallen}
        == {"none", "selective"}
        == {x.recompute for x in found if x.lacks}
    )
    assert worth_showing(found, found[1], fastest=3)[:3] == rows[:3]  # once, in its place
    three = layouts(megatron, 3, H100)
    kinds = [
        layout.lacks for place, layout in worth_showing(three, three[0], fastest=1) if place is None
    ]
    assert set(kinds) == {x.lacks for x in three} - {None} and kinds.count("ranks") == 1
    lost = layout_of(megatron, megatron.parallel, Recompute.none, 256, H100)
    assert (None, lost) in worth_showing(found, lost, fastest=3)


@pytest.mark.parametrize("recompute", list(Recompute))
def test_what_a_layer_keeps_is_measured(run: PlannedRun, recompute: Recompute) -> None:
    """Bytes of all tensors saved for the backward, parameters aside, within 5 % of the formula."""
    shape = {"d_model": 64, "n_layer": 12, "d_inner": 128, "d_state": 16, "dt_rank": 8}
    config: ModelConfig = replace(TINY, **shape)
    model = build_model(config, CPU, 0, torch.device("cpu"), recompute=recompute)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    held: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        # A is not kept per token
        if storage.data_ptr() not in own and x.numel() > config.d_inner * config.d_state:
            held[storage.data_ptr()] = storage
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
    # the final norm keeps its input
    measured = sum(storage.nbytes() for storage in held.values()) - hidden.nbytes
    assert measured == pytest.approx(expected, rel=0.05)


def config_for(run: PlannedRun, config: ModelConfig) -> ModelConfig:
    """The shape with a vocabulary that the run's tokenizer fits."""
    return replace(config, vocab_size=run.model.vocab_size)


def test_the_command_writes_json(tmp_path: Path) -> None:
    words = ("launch/plan.py", "+experiment=7b", "cluster=h100_32n", f"run.dir={tmp_path}")
    result = python(*words)
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["parameters"] == 7_272_665_088
    first, *_, last = written["stages"]  # 128 sequences on 256 ranks, then eight on each
    assert (first["groups_without"], last["groups_without"], last["most_sequences"]) == (128, 0, 8)
    assert (
        written["layouts"][0]["unsupported_reason"] is None
        and "B200" in written["roofline_tokens_per_second"]
    )
    assert result.stdout.count("this run's") == 1 and "of headroom" in result.stdout
    assert (
        len(written["layouts_shown"]) > SHOWN
        and f"{written['days']['total']:.1f} (" in result.stdout
    )
