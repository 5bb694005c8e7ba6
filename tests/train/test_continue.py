"""Weights of others are continued: what a user gives, the rates, and what is forgotten."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from core.errors import InputError
from data.config import PrepareConfig
from data.stream.manifests import open_manifests, tokenizer_path
from eval.heldout import evaluate
from model.hf import hf_config
from model.mamba import FalconMamba
from tests.compose import laid_out, run_config, typed
from tests.corpus import BLOCK, make_corpus
from tests.distributed import run_ranks
from tests.small import config
from tests.tiny import TINY
from tests.train.world import records, train, with_megatron, with_zero_stage
from train.config import RunConfig
from train.metrics.forgetting import forgetting_rows, forgetting_table
from train.metrics.page import page
from train.metrics.records import cut_off, read_initial
from train.run_context import _show_forgetting
from train.schedule import Schedule

GIVEN = ("run.init_from=released", "data.sources.new.input=texts")
EPS = 1e-5  # of the mixer's norms of Falcon3-Mamba


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, and random weights of transformers with the norms of Falcon3-Mamba."""
    folder = tmp_path_factory.mktemp("continue")
    data = make_corpus(folder / "data")
    torch.manual_seed(3)
    raw = {**hf_config(TINY, 11, "float32"), "mixer_rms_eps": EPS}
    FalconMambaForCausalLM(FalconMambaConfig(**raw)).save_pretrained(folder / "released")
    shutil.copy(tokenizer_path(data), folder / "released")
    return folder


def continued(root: Path, name: str) -> RunConfig:
    """Prose is the old text, sums are the new."""
    run = config(root, name)
    sources = {**run.data.sources, "prose": replace(run.data.sources["prose"], old=True)}
    return replace(
        run,
        run=replace(run.run, init_from=str(root / "released")),
        model=replace(TINY, mixer_norm_eps=EPS),
        data=replace(run.data, sources=sources),
    )


def test_old_and_new_text_are_scored_before_during_and_after(root: Path, capsys: Any) -> None:
    run = continued(root, "continued")
    train(run)
    initial = read_initial(run.run.files.metrics)
    manifests = open_manifests(run.data)
    settings = {"seq_len": 32, "batch_size": 4, "max_tokens": 192}
    weights = FalconMamba.from_pretrained(root / "released")
    for name, score in evaluate(weights, run.data, manifests, **settings):
        assert initial[name]["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-5)
    steps = records(root, "continued")
    assert "validation" in steps[-1], "the end of a run is validated"
    rows = {row[0]: row[1:] for row in forgetting_rows(recorded(run), initial, steps)}
    assert list(rows) == ["sums", "prose"], "new text first"
    for name, (kind, before, best, last, change) in rows.items():
        assert kind == ("old" if name == "prose" else "new")
        assert float(best) <= float(last) < float(before)
        final = steps[-1]["validation"][name]["bits_per_byte"]
        assert float(change) == pytest.approx(final - initial[name]["bits_per_byte"], abs=1e-4)
    html = page([run.run.folder], root / "report.html").read_text()
    assert "<td>prose</td><td>old</td>" in html and f"<td>{rows['sums'][-1]}</td>" in html
    _show_forgetting(run.run.folder)
    out = capsys.readouterr().out
    assert "held-out at step 0, 0 tokens" in out
    assert rows["prose"][-1] in out


def recorded(run: RunConfig) -> dict[str, Any]:
    return {"data": {"sources": {name: vars(s) for name, s in run.data.sources.items()}}}


def test_a_start_from_nothing_scores_the_weights_again(root: Path) -> None:
    """Killed before its first checkpoint; then the weights were exchanged."""
    run = continued(root, "again")
    run.run.folder.mkdir()
    stale = {"step": 0, "tokens": 0, "initial_validation": {"prose": {"loss": 9.0}}}
    run.run.files.metrics.write_text(json.dumps(stale) + "\n")
    stages = [replace(run.data.stages[0], tokens=BLOCK)]
    schedule = replace(run.schedule, warmup_tokens=0, decay_tokens=0)
    train(replace(run, data=replace(run.data, stages=stages), schedule=schedule))
    lines = run.run.files.metrics.read_text().splitlines()
    assert [line for line in lines if "initial_validation" in line] == lines[:1]
    initial = read_initial(run.run.files.metrics)
    assert initial["prose"]["loss"] != 9.0
    cut_off(run.run.files.metrics, 16)
    assert read_initial(run.run.files.metrics) == initial, "a resume keeps them"


def test_random_weights_have_no_table(root: Path) -> None:
    (root / "empty").mkdir()
    assert forgetting_table(root / "empty") is None
    damaged = root / "damaged" / "metrics.jsonl"
    damaged.parent.mkdir()
    damaged.write_text('{"step": 0, "tokens": 0, "initial_validation": {"prose": 3}}\n')
    assert read_initial(damaged) == {}


def test_unmeasured_values_are_dashes() -> None:
    """Not finite, and records of earlier versions without bits per byte."""
    initial: Any = {"a": {"loss": 1.0, "bits_per_byte": None}, "b": {"loss": 1.0}}
    (first, second) = forgetting_rows({}, initial, [{"validation": {"a": {"loss": 2.0}}}, {}])
    assert first == ("a", "new", "-", "-", "-", "-") and second[0] == "b"


def test_norms_of_another_model_are_named(root: Path) -> None:
    run = replace(continued(root, "refused"), model=TINY)
    with pytest.raises(InputError, match=r"another shape: give model\.mixer_norm_eps=1e-05$"):
        train(run)


@pytest.mark.parametrize(("experiment", "share"), [("continue", 75), ("decay", 50)])
def test_a_user_gives_weights_text_and_a_length(experiment: str, share: float) -> None:
    run = run_config(experiment, *GIVEN, "data.stages.0.tokens=1e9")
    (stage,) = run.data.stages
    old = {name for name, source in run.data.sources.items() if source.old}
    assert set(stage.mixture) - old == {"new"} and stage.mixture["new"] == share
    assert sum(stage.mixture.values()) == 100
    assert run.model == run_config("7b").model
    assert run.data.tokenizer.path == "released/tokenizer.json"
    assert typed(PrepareConfig, experiment, *GIVEN).data.tokenizer.path == run.data.tokenizer.path
    assert run.validation.every_tokens == 50_000_000
    last = run_config(experiment, *GIVEN, "optim.lr=2.56e-4").schedule.min_lr
    assert last == pytest.approx(1e-6)


@pytest.mark.parametrize("schema", [RunConfig, PrepareConfig])
def test_what_is_missing_is_one_line(schema: type[Any]) -> None:
    with pytest.raises(InputError) as refused:
        typed(schema, "continue")
    overrides = "run.init_from=VALUE data.sources.new.input=VALUE"
    assert str(refused.value) == f"the experiment leaves values to you: add {overrides}"
    with pytest.raises(InputError, match=r"add run\.init_from=VALUE$"):
        typed(schema, "decay", GIVEN[1])


def schedule_of(run: RunConfig) -> Schedule:
    return Schedule(run.schedule, run.optim.lr, run.data)


def test_the_decay_has_the_published_shape_at_any_length() -> None:
    published = run_config("7b")
    length = published.schedule.decay_tokens
    for tokens in (1_000_000_000, 10_000_000_000):
        run = run_config("decay", *GIVEN, f"data.stages.0.tokens={tokens}")
        ours, theirs = schedule_of(run), schedule_of(published)
        # at the temperature of the published batch
        factor = math.sqrt(run.schedule.batch_end_sequences / 2048)
        for part in (0.1, 0.5, 1.0):
            position = int(part * ours.total)
            rate = theirs.lr(theirs.total - length + int(part * length), 2048)
            assert ours.lr(position, 512) == pytest.approx(rate * factor, rel=1e-3)
    assert ours.lr(ours.total // 100, 512) < ours.lr(ours.total // 50, 512), "a warmup"


def test_the_continued_rate_warms_up_stays_and_decays() -> None:
    run = run_config("continue", *GIVEN)
    schedule = schedule_of(run)
    rates = [schedule.at(part * schedule.total // 1000).lr for part in (1, 20, 500, 890, 950, 999)]
    assert rates[0] < rates[1] == rates[2] == rates[3] == run.optim.lr > rates[4] > rates[5]
    assert rates[5] == pytest.approx(run.optim.lr / 256, rel=0.1)


def test_held_out_text_below_a_window_is_said(root: Path, capsys: Any) -> None:
    run = continued(root, "windows")
    short = replace(run, validation=replace(run.validation, seq_len=100_000))
    stages = [replace(run.data.stages[0], tokens=BLOCK)]
    schedule = replace(run.schedule, warmup_tokens=0, decay_tokens=0)
    train(replace(short, data=replace(run.data, stages=stages), schedule=schedule))
    assert "validation leaves out prose: its 201 held-out tokens" in capsys.readouterr().out
    assert read_initial(run.run.files.metrics) == {}


def test_every_engine_scores_the_same_weights(root: Path) -> None:
    """ZeRO 3 and megatron-core gather and copy weights before the first step."""
    short = continued(root, "engine")
    stages = [replace(short.data.stages[0], tokens=2 * BLOCK)]
    short = replace(
        short,
        data=replace(short.data, stages=stages),
        schedule=replace(short.schedule, warmup_tokens=0, decay_tokens=0),
    )
    names = ("zero1", "zero3", "megatron", "tp2", "cp2")
    runs = {
        name: replace(short, run=replace(short.run, name=name, dir=str(root / name)))
        for name in names
    }
    runs["zero3"] = with_zero_stage(runs["zero3"], 3)
    runs["megatron"] = with_megatron(runs["megatron"])
    runs["tp2"] = laid_out(runs["tp2"], tensor_parallel=2)
    runs["cp2"] = laid_out(runs["cp2"], context_parallel=2)
    run_ranks(2, [(train, (run,)) for run in runs.values()])
    expected = read_initial(runs["zero1"].run.files.metrics)
    for run in runs.values():
        initial = read_initial(run.run.files.metrics)
        for name, score in expected.items():
            assert initial[name]["loss"] == pytest.approx(score["loss"], rel=1e-5), run.run.name
