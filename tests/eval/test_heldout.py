"""Validation during training, the proof that its text is held out, and leaderboards as jobs of
their own.
"""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import InputError
from core.files import sha256_of
from core.run import Run
from data.config import DataConfig
from data.stream.manifests import (
    DTYPE,
    open_manifests,
    read_manifest,
    source_folder,
    write_manifest,
)
from data.tokenizer import EOS
from eval.check_leakage import prove, trained_documents
from eval.config import EvaluationConfig, Jobs, Launcher, ValidationConfig
from eval.export import export
from eval.heldout import Validation, evaluate
from eval.leaderboard.jobs import SuiteJobs
from eval.subject import find_checkpoint, load_model
from model.checkpoint import read_state
from tests.commands import until
from tests.eval.conftest import MODEL
from tests.tiny import model_of
from train.build import load_initial_weights
from train.metrics.records import read_lines, read_scores
from train.metrics.scores import collecting

SETTINGS = ValidationConfig(every_tokens=1000, tokens=321, seq_len=16, batch_sequences=3)


def test_it_equals_heldout_evaluation(config: EvaluationConfig) -> None:
    """The same tokens in whole windows give the same bits per byte; shares of ranks add up to
    them.
    """
    model = model_of(MODEL)
    manifests = open_manifests(config.data)
    results = Validation(config.data, manifests, SETTINGS).run(model)
    scores = dict(evaluate(model, config.data, manifests, seq_len=16, batch=1, max_tokens=320))
    assert set(results) == set(scores) == {"prose", "sums"}
    for name, score in scores.items():
        assert results[name]["loss"] == pytest.approx(score.loss, rel=1e-6)
        assert results[name]["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    shares = [
        Validation(config.data, manifests, SETTINGS, rank=rank, ranks=3).run(model)
        for rank in range(3)
    ]
    for name in results:
        assert sum(share[name]["loss"] for share in shares) == pytest.approx(results[name]["loss"])


def test_when_it_is_due(config: EvaluationConfig) -> None:
    validation = Validation(config.data, open_manifests(config.data), SETTINGS)
    model = model_of(MODEL)
    assert validation.after(0, 999, model) is None and validation.after(1000, 1999, model) is None
    assert (
        validation.after(900, 1000, model) is not None
        and validation.after(1999, 4100, model) is not None
    )
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert validation.run(model)["prose"]["loss"] == pytest.approx(math.log(288))


def insert(config: DataConfig, source: str, split: str, document: list[int]) -> None:
    """Put a document at the head of a source's split, and make the manifest true again."""
    folder = source_folder(config, source)
    manifest = read_manifest(folder)
    file = manifest.splits[split][0]
    ids = np.concatenate(
        [np.array([*document, EOS], dtype=DTYPE), np.fromfile(folder / file.name, DTYPE)]
    )
    (folder / file.name).write_bytes(ids.tobytes())
    file.tokens, file.sha256 = len(ids), sha256_of(folder / file.name)
    write_manifest(folder, manifest)


def test_what_is_held_out_is_not_trained_on(
    config: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    import shutil

    shutil.copytree(config.data.folder, tmp_path / "data")
    data = replace(config.data, folder=str(tmp_path / "data"))
    ready = replace(config, data=data, validation=SETTINGS)
    monkeypatch.setattr("eval.check_leakage.READ_TOKENS", 100)  # pieces that cut documents
    # equal length and sum, other tokens
    unlike, secret = ([20, 21, 22, 23, 200], [20, 21, 22, 24, 199])
    insert(data, "prose", "heldout", secret)
    insert(data, "sums", "train", unlike)
    # the made-up corpus has short documents twice
    by_chance = list(trained_documents(data, open_manifests(data), SETTINGS))
    assert all(owner == name for owner, name, _ in by_chance)
    insert(data, "sums", "train", secret)
    found = trained_documents(data, open_manifests(data), SETTINGS)
    assert sorted(found) == sorted([*by_chance, ("prose", "sums", 1)])
    with pytest.raises(InputError, match="1 of prose in sums"):
        prove(ready)
    manifest = open_manifests(data)["prose"]
    manifest.splits["train"][0] = manifest.splits["heldout"][0]
    write_manifest(source_folder(data, "prose"), manifest)
    with pytest.raises(InputError, match="is a training file of prose"):
        Validation(data, open_manifests(data), SETTINGS)


def test_a_run_can_load_initial_weights_an_exported_folder(
    config: EvaluationConfig, tmp_path: Path
) -> None:
    export(config)
    expected = load_model(config, find_checkpoint(config))
    run = Run("next", str(tmp_path), 0, str(config.run.files.hf))
    model = model_of(MODEL, seed=9)
    load_initial_weights(model, run, 0, 1)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    with pytest.raises(InputError, match=r"give model\.vocab_size=288"):
        load_initial_weights(model_of(replace(MODEL, vocab_size=300)), run, 0, 1)
    with pytest.raises(InputError, match="run.init_from"):
        load_initial_weights(model, replace(run, init_from=str(tmp_path)), 0, 1)


def test_suites_run_as_jobs_of_their_own(
    config: EvaluationConfig, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """On held files, with the scores in the run's records at its end; a resumed run starts and
    takes nothing twice.
    """
    monkeypatch.setattr("eval.leaderboard.jobs.LOOK_SECONDS", 0.0)
    folder = find_checkpoint(config)
    monkeypatch.setattr(
        "eval.leaderboard.jobs.read_state", lambda step: {**read_state(step), "tokens": 250}
    )
    metrics = config.run.folder / "metrics.jsonl"
    # the run is further than its checkpoint
    metrics.write_text('{"step": 3, "tokens": 300, "loss": 1.0}\n')
    row = (
        "[{label: choice, task: local_choice, shots: 0, metrics: ['acc,none'], floor: 0, floors: "
        "{}, by_size: true}]"
    )
    overrides = [
        f"leaderboard.suite.include={tasks}",
        f"leaderboard.suite.rows={row}",
        "~leaderboard.suite.published",
        "+leaderboard.suite.published={}",
        "leaderboard.batch_tokens=64",
    ]
    settings = Jobs(["leaderboard_v1"], 100, Launcher.local, [], overrides)
    record = {
        "run": {"name": "small", "seed": 0}, "data": {"folder": config.data.folder},
        "metrics": {"wandb_project": None, "tensorboard": False, "console_seconds": 1.0},
        "eval": {"jobs": {**asdict(settings), "launcher": "local"}},
    }  # fmt: skip
    (config.run.folder / "config.yaml").write_text(json.dumps(record))  # JSON is YAML
    jobs = SuiteJobs(config.run, settings, after=collecting(config.run.folder))
    assert jobs.poll() == []
    held = config.run.folder / "scores" / "held" / folder.name
    file = next(folder.glob("*.safetensors"))
    assert (held / file.name).stat().st_ino == file.stat().st_ino
    log = config.run.folder / "scores" / f"leaderboard_v1-{folder.name}.log"
    until(lambda: read_scores(metrics), log.read_text)
    found = read_scores(metrics)
    rows = found[0]["scores"]["leaderboard_v1"]
    assert (
        found[0]["tokens"] == 250
        and found[0]["step"] == 0
        and 0 <= rows["choice"] == rows["average"] <= 100
    )
    assert log.read_text().count("shots)") == 1 and [
        line["step"] for line in read_lines(metrics)
    ] == [3]
    assert not held.exists()
    again = SuiteJobs(config.run, settings)  # as a resumed run would
    again.mark_reported(found)
    assert again.poll() == [] and again.poll() == []


def test_slurm_gets_one_job_per_suite(
    config: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/asked\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    run = replace(config.run, dir=str(tmp_path / "run"))
    run.folder.mkdir()
    run.files.checkpoints.symlink_to(config.run.files.checkpoints)
    monkeypatch.setattr(
        "eval.leaderboard.jobs.read_state", lambda step: {**read_state(step), "tokens": 250}
    )
    SuiteJobs(run, Jobs(["leaderboard_v2"], 100, Launcher.slurm, ["--gpus=1"], [])).poll()
    asked = tmp_path / "asked"
    until(lambda: asked.is_file() and "--wrap" in asked.read_text(), lambda: "sbatch is not asked")
    words = asked.read_text().splitlines()
    assert (
        "--gpus=1" in words
        and "suite=leaderboard_v2" in words[-1]
        and words[-1].startswith("--wrap=")
    )
