"""A run's record is the run: changed settings, branches and initial weights."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from tokenizers import Tokenizer, models

from core.errors import InputError
from core.files import sha256_of
from core.old_keys import read_record
from core.run import iter_checkpoints
from data.config import Stage
from data.stream.manifests import open_manifests, source_folder, tokenizer_path, write_manifest
from eval.hf.card import model_card
from model.checkpoint import STATE, CheckpointReader, read_state
from tests.corpus import BLOCK, make_corpus
from tests.small import config
from tests.test_fixtures import FIXTURES
from tests.train.world import curve, records, train
from train.config import RunConfig
from train.metrics.page import page
from train.record.changes import ABSENT, Change, check_changes, find_changes
from train.record.history import to_plain
from train.record.origin import vocabulary

MIDDLE = 20 * BLOCK  # the end of the first stage; the decay begins 32 blocks later
NO_VOCABULARY = Tokenizer(models.BPE())


def with_run(run: RunConfig, **values: Any) -> RunConfig:
    return replace(run, run=replace(run.run, **values))


def read_starts(path: Path) -> list[dict[str, Any]]:
    starts: list[dict[str, Any]] = read_record(path)["history"]
    return starts


def incidents(run: RunConfig) -> list[dict[str, Any]]:
    path = run.run.files.incidents
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def checkpoint_at(run: RunConfig, tokens: int) -> Path:
    (folder,) = (
        path
        for path in iter_checkpoints(run.run.files.checkpoints)
        if read_state(path)["tokens"] == tokens
    )
    return folder


def interrupted(root: Path, source: str, name: str) -> RunConfig:
    """A copy of a finished run as it was at MIDDLE."""
    shutil.copytree(root / source, root / name)
    run = config(root, name)
    run.run.files.outcome.unlink(missing_ok=True)
    for path in iter_checkpoints(run.run.files.checkpoints):
        if read_state(path)["tokens"] > MIDDLE:
            shutil.rmtree(path)
    return run


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("record")
    make_corpus(folder / "data")
    train(config(folder, "done"))
    return folder


def test_a_change_is_refused_and_names_what_would_accept_it(root: Path) -> None:
    run = interrupted(root, "done", "refused")
    before = run.run.files.config.read_bytes()
    other = with_run(replace(run, optim=replace(run.optim, lr=2e-3, weight_decay=0.5)), seed=7)
    with pytest.raises(InputError) as refused:
        train(other)
    text = str(refused.value)
    assert "run.seed 0 -> 7, optim.lr 0.01 -> 0.002, optim.weight_decay 0.1 -> 0.5" in text
    assert "'run.accept_changes=[run.seed,optim.lr,optim.weight_decay]'" in text
    some = with_run(other, accept_changes=["optim"])
    with pytest.raises(InputError, match=r"settings: run\.seed 0 -> 7: restore"):
        train(some)
    assert run.run.files.config.read_bytes() == before and not incidents(run)


def test_data_that_has_been_read_cannot_be_accepted_as_changed(root: Path) -> None:
    """So the error does not suggest it."""
    run = interrupted(root, "done", "read")
    past = [replace(run.data.stages[0], mixture={"prose": 1, "sums": 1}), *run.data.stages[1:]]
    for data, change in (
        (replace(run.data, seed=6), r"data\.seed 5 -> 6"),
        (replace(run.data, reset_state=False), r"data\.reset_state true -> false"),
        (replace(run.data, stages=past), r"data\.stages\.0\.mixture\.prose 3 -> 1"),
    ):
        for accept in ([], ["data"]):
            other = with_run(replace(run, data=data), accept_changes=accept)
            with pytest.raises(InputError, match=rf"another data plan: .*\({change}\)") as refused:
                train(other)
            assert "accept" not in str(refused.value)


def test_an_accepted_change_is_in_the_record(root: Path) -> None:
    run = interrupted(root, "done", "accepted")
    other = replace(run, optim=replace(run.optim, lr=2e-3), metrics=replace(run.metrics))
    other.metrics.console_seconds = 5.0
    train(with_run(other, accept_changes=["optim.lr"]))
    first, second = read_starts(run.run.files.config)
    assert first["tokens"] == 0 and first["versions"]["torch"] == torch.__version__
    assert second["tokens"] == MIDDLE and second["ranks"] == 1
    assert second["decisive"] == {"optim.lr": [0.01, 0.002]}
    assert second["operational"]["metrics.console_seconds"] == [60.0, 5.0]  # not refused
    (change,) = (entry for entry in incidents(run) if entry["incident"] == "changed settings")
    assert change["tokens"] == MIDDLE and change["changes"] == {"optim.lr": [0.01, 0.002]}
    assert OmegaConf.load(run.run.files.config).optim.lr == 0.002
    newest, *_, oldest = iter_checkpoints(run.run.files.checkpoints)
    assert read_state(newest)["config"]["optim"]["lr"] == 0.002
    # a card tells what its checkpoint was trained with
    card = model_card(run.run.folder, newest, run.model, NO_VOCABULARY)
    assert "| optim.lr, from 1,280 tokens on | 0.01 -> 0.002 |" in card
    assert "| peak and final rate | 0.002," in card
    card = model_card(run.run.folder, oldest, run.model, NO_VOCABULARY)
    assert "| peak and final rate | 0.01," in card and "optim.lr" not in card
    assert page([run.run.folder], root / "page.html").read_text().count("0.01 -&gt; 0.002") == 2


def test_a_card_leaves_out_changes_of_starts_that_saved_nothing(root: Path) -> None:
    run = interrupted(root, "done", "abandoned")
    history = read_record(run.run.files.config)["history"]
    lost = {**history[0], "tokens": MIDDLE, "decisive": {"optim.lr": [0.01, 5.0]}}
    first = {**history[0], "decisive": {"optim.lr": [7.0, 0.01]}}
    record = OmegaConf.load(run.run.files.config)
    record.history = [history[0], first, lost]
    OmegaConf.save(record, run.run.files.config)
    train(run)  # with the settings of the checkpoint
    newest = next(iter_checkpoints(run.run.files.checkpoints))
    assert len(read_record(run.run.files.config)["history"]) == 4
    assert "optim.lr" not in model_card(run.run.folder, newest, run.model, NO_VOCABULARY)


def test_a_damaged_record_is_one_line(root: Path) -> None:
    run = interrupted(root, "done", "damaged-record")
    for text, reason in (("a: [1\n", "cannot be read"), ("- 1\n", "not a run's record")):
        run.run.files.config.write_text(text)
        with pytest.raises(InputError, match=reason) as refused:
            train(run)
        assert "\n" not in str(refused.value)
    run.run.files.config.write_text("history:\n")
    train(run)
    assert len(read_record(run.run.files.config)["history"]) == 1


def test_a_finished_run_keeps_its_record(root: Path) -> None:
    run = config(root, "done")
    files = (run.run.files.config, run.run.files.metrics)
    before = [path.read_bytes() for path in files]
    train(replace(run, checkpoint=replace(run.checkpoint, keep_last=50)))
    with pytest.raises(InputError, match=r"optim\.clip_norm 0\.8 -> 0\.5"):
        train(replace(run, optim=replace(run.optim, clip_norm=0.5)))
    train(
        with_run(
            replace(run, optim=replace(run.optim, clip_norm=0.5)),
            accept_changes=["optim.clip_norm"],
        )
    )
    assert [path.read_bytes() for path in files] == before


def test_a_start_before_the_first_checkpoint_is_in_the_history(root: Path) -> None:
    run = interrupted(root, "done", "early")
    shutil.rmtree(run.run.files.checkpoints)
    train(replace(run, optim=replace(run.optim, lr=2e-3)))
    first, second = read_starts(run.run.files.config)
    assert first["tokens"] == second["tokens"] == 0 and "decisive" not in first
    assert second["decisive"] == {"optim.lr": [0.01, 0.002]}
    assert not [entry for entry in incidents(run) if entry["incident"] == "changed settings"]


def longer(run: RunConfig) -> RunConfig:
    """The run with a longer stable stage and a shorter decay to another rate."""
    stages = [replace(stage) for stage in run.data.stages]
    stages[1] = replace(stages[1], tokens=24 * BLOCK)
    return replace(
        run,
        data=replace(run.data, stages=stages),
        schedule=replace(run.schedule, decay_tokens=300, min_lr=1e-4),
    )


def test_a_branch_equals_the_longer_run(root: Path) -> None:
    """Losses, norms, rates, weights and moments, to the last digit."""
    done = config(root, "done")
    parent = checkpoint_at(done, MIDDLE)
    whole = longer(config(root, "whole"))
    train(whole)
    branch = with_run(longer(config(root, "branch")), branch_from=str(parent))
    train(branch)
    steps = records(root, "branch")
    assert steps[0]["step"] == read_state(parent)["step"] + 1
    assert steps[-1]["tokens"] == 56 * BLOCK
    assert torch.equal(curve(root, "branch"), curve(root, "whole", like="branch"))
    left, right = (
        CheckpointReader(next(iter_checkpoints(run.run.files.checkpoints)))
        for run in (branch, whole)
    )
    for kind, name in left.where:
        assert torch.equal(left.read_full(kind, name), right.read_full(kind, name))
    (start,) = read_starts(branch.run.files.config)
    assert start["branch_of"] == str(parent) and start["tokens"] == MIDDLE
    assert start["decisive"]["data.stages.1.tokens"] == [20 * BLOCK, 24 * BLOCK]
    assert [entry["incident"] for entry in incidents(branch)] == ["branch"]
    train(branch)  # the same command again: reused
    assert len(read_starts(branch.run.files.config)) == 1
    with pytest.raises(InputError, match=r"run\.branch_from .* -> null"):
        train(with_run(branch, branch_from=None))


def test_a_branch_goes_on_from_a_folder_of_a_run_with_other_later_sources(root: Path) -> None:
    source = interrupted(root, "done", "stable")
    branch = with_run(config(root, "mixture"), branch_from=str(source.run.folder))
    branch.data.stages[1] = replace(branch.data.stages[1], mixture={"prose": 1, "sums": 9})
    train(branch)
    steps = records(root, "mixture")
    tokens = sum(step["source_tokens"].get("sums", 0) for step in steps if step["stage"] == "long")
    assert tokens == 18 * BLOCK and steps[0]["tokens"] > MIDDLE


def test_a_branch_keeps_the_past_and_the_rest_of_the_recipe(root: Path) -> None:
    done = config(root, "done")
    parent = checkpoint_at(done, MIDDLE)
    branch = with_run(config(root, "never"), branch_from=str(parent))
    past = [Stage("short", MIDDLE, 16, {"prose": 1, "sums": 1}), *branch.data.stages[1:]]
    for other, reason in (
        (replace(branch, data=replace(branch.data, stages=past)), "has another data plan"),
        (replace(branch, optim=replace(branch.optim, lr=2e-2)), r"optim\.lr 0\.01 -> 0\.02"),
        (replace(branch, model=replace(branch.model, norm_eps=1e-4)), r"model: model\.norm_eps"),
        (with_run(branch, branch_from=str(root)), r"run\.branch_from: no checkpoint in"),
        (
            with_run(branch, branch_from=str(FIXTURES / "runs" / "zero1-dp2" / "hf")),
            "has no optimizer state",
        ),
    ):
        with pytest.raises(InputError, match=reason):
            train(other)
    assert not (root / "never" / "config.yaml").exists()
    with pytest.raises(ValueError, match="set one"):
        with_run(branch, init_from="x")


def test_a_branch_has_tokens_to_train_on_at_rates_as_planned(root: Path) -> None:
    done = config(root, "done")
    again = with_run(config(root, "again"), branch_from=str(done.run.folder))
    with pytest.raises(InputError, match=r"has all 3,328 tokens .* an earlier checkpoint"):
        train(again)
    with pytest.raises(InputError, match=r"\(data\.stages\.1\.tokens .* an earlier checkpoint"):
        train(with_run(longer(config(root, "again")), branch_from=str(done.run.folder)))
    more = [*again.data.stages, Stage("more", 8 * BLOCK, 32, {"prose": 1})]
    decayed = replace(again, data=replace(again.data, stages=more))
    with pytest.raises(InputError, match="stable stage: the decay starts at 2,728 tokens"):
        train(decayed)
    stable = with_run(config(root, "stable-end"), branch_from=str(checkpoint_at(done, 40 * BLOCK)))
    # the decay begins 8 tokens earlier
    train(replace(stable, schedule=replace(stable.schedule, decay_tokens=12 * BLOCK + 8)))
    early = with_run(again, branch_from=str(checkpoint_at(done, 1696)))
    with pytest.raises(InputError, match="stable stage: the decay starts at 328 tokens"):
        train(replace(early, schedule=replace(early.schedule, decay_tokens=3000)))
    assert not again.run.files.config.exists()
    train(with_run(decayed, accept_changes=["schedule.decay_tokens"]))
    assert records(root, "again")[-1]["tokens"] == 60 * BLOCK


def test_other_shards_are_another_data_plan(root: Path) -> None:
    run = interrupted(root, "done", "shards")
    shutil.copytree(root / "data", root / "other-data")
    other = replace(run, data=replace(run.data, folder=str(root / "other-data")))
    manifest = open_manifests(other.data)["sums"]
    manifest.splits["train"].reverse()
    write_manifest(source_folder(other.data, "sums"), manifest)
    with pytest.raises(InputError, match="has another data plan: its first 1,280 tokens"):
        train(other)


@pytest.mark.parametrize("kind", ["checkpoint", "run"])
def test_weights_come_from_a_checkpoint_or_a_run(root: Path, kind: str) -> None:
    done = config(root, "done")
    newest = next(iter_checkpoints(done.run.files.checkpoints))
    path = newest if kind == "checkpoint" else done.run.folder
    run = with_run(config(root, f"tuned-{kind}"), init_from=str(path))
    train(run)
    first = records(root, run.run.name)[0]
    assert first["step"] == 1 and first["loss"] < records(root, "done")[0]["loss"] - 1
    (start,) = read_starts(run.run.files.config)
    assert start["initial_weights"] == f"checkpoint {newest}, {52 * BLOCK:,} tokens"


@pytest.mark.parametrize("damage", ["cut", "missing"])
def test_damaged_exports_are_one_line(root: Path, tmp_path: Path, damage: str) -> None:
    shutil.copytree(FIXTURES / "runs" / "zero1-dp2" / "hf", tmp_path / "hf")
    path = next((tmp_path / "hf").glob("model-*.safetensors"))
    content = path.read_bytes()
    path.unlink()
    if damage == "cut":
        path.write_bytes(content[:500])
    run = with_run(config(root, f"from-{damage}"), init_from=str(tmp_path / "hf"))
    with pytest.raises(InputError, match=r"run\.init_from: .* download or export it again"):
        train(run)


def test_weights_of_another_vocabulary_are_refused(root: Path, capsys: Any) -> None:
    done = config(root, "done")
    shutil.copytree(root / "data", root / "words")
    other = with_run(config(root, "words-run"), init_from=str(done.run.folder))
    other = replace(other, data=replace(other.data, folder=str(root / "words")))
    path = tokenizer_path(other.data)
    changed = json.loads(path.read_text())
    vocab = changed["model"]["vocab"]
    vocab["word20"], vocab["word21"] = vocab["word21"], vocab["word20"]
    path.write_text(json.dumps(changed))
    rehash(other)
    with pytest.raises(InputError, match=r"run\.init_from: .* the same text would have other"):
        train(other)
    train(with_run(other, accept_changes=["data.tokenizer"]))
    assert f"initial weights: checkpoint {done.run.folder}" in capsys.readouterr().out


def rehash(run: RunConfig) -> None:
    """Make the manifests of a run name the tokenizer that is there."""
    for name in run.data.sources:
        folder = source_folder(run.data, name)
        raw = json.loads((folder / "manifest.json").read_text())
        raw["tokenizer_sha256"] = sha256_of(tokenizer_path(run.data))
        (folder / "manifest.json").write_text(json.dumps(raw))


def test_a_tokenizer_written_by_another_library_is_the_same(root: Path, tmp_path: Path) -> None:
    path = tokenizer_path(config(root, "done").data)
    again = tmp_path / "tokenizer.json"
    again.write_text(json.dumps({**json.loads(path.read_text()), "padding": {"pad_id": 3}}))
    assert vocabulary(path) == vocabulary(again)
    again.write_text("[]")
    with pytest.raises(InputError, match="not a valid tokenizer"):
        vocabulary(again)


def test_an_older_checkpoint_is_compared_by_config_yaml(tmp_path: Path) -> None:
    """It has no settings of its own, old keys, and the hash of its whole plan."""
    old = FIXTURES / "runs" / "zero1-dp2"
    shutil.copytree(old, tmp_path / "old")
    (checkpoint,) = iter_checkpoints(tmp_path / "old" / "checkpoints")
    assert "config" not in json.loads((checkpoint / STATE).read_text())
    run = config(tmp_path, "old")
    run = replace(run, data=replace(run.data, folder=str(FIXTURES / "corpus")))
    with pytest.raises(InputError, match=r"optim\.lr 0\.01 -> 0\.02"):
        train(replace(run, optim=replace(run.optim, lr=2e-2)))
    with pytest.raises(InputError, match=r"run\.init_from null -> 'x'"):
        train(with_run(run, init_from="x"))


def test_changes_of_settings_and_stages() -> None:
    now = to_plain(asdict(config(Path("root"), "run")))
    assert find_changes(now, now) == []
    older = json.loads(json.dumps(now))
    older["parallel"]["precision"] = older["compute"].pop("precision")  # before version 0.2
    del older["optim"]["z_loss"], older["run"]["branch_from"], older["metrics"]["tensorboard"]
    changes = find_changes(older, now)
    assert [str(change) for change in changes] == ["optim.z_loss not recorded -> 0.0"]
    assert check_changes(changes, [], is_branch=False) == []
    fewer = json.loads(json.dumps(now))
    removed = fewer["data"]["stages"].pop()
    changes = find_changes(now, fewer)
    assert Change("data.stages.2.tokens", removed["tokens"], ABSENT) in changes
    assert Change("data.stages.2.tokens", ABSENT, removed["tokens"]) in find_changes(fewer, now)
    with pytest.raises(InputError, match=r"'run\.accept_changes=\[data\.stages\]'"):
        check_changes(changes, [], is_branch=False)
    assert check_changes(changes, ["data.stages"], is_branch=False) == changes
    assert check_changes(changes, [], is_branch=True) == changes


def test_accepted_keys_are_checked_before_they_are_needed() -> None:
    run = config(Path("root"), "run")
    for key in ("optim.rate", "optim.*", ""):
        with pytest.raises(ValueError, match=f"names {re.escape(key)}, which is no setting"):
            replace(run, run=replace(run.run, accept_changes=[key]))
    old = replace(run, run=replace(run.run, accept_changes=["schedule.batch_end", "data"]))
    assert old.run.accept_changes == ["schedule.batch_end_sequences", "data"]


def test_a_model_never_changes() -> None:
    change = [Change("model.n_layer", 2, 3)]
    with pytest.raises(InputError, match="another model: model.n_layer 2 -> 3"):
        check_changes(change, ["model"], is_branch=True)
    operational = [Change("checkpoint.every_tokens", 1, 2), Change("parallel.zero_stage", 1, 2)]
    assert check_changes(operational, [], is_branch=False) == []
