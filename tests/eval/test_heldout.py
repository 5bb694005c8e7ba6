"""Validation during training, the leakage check, and leaderboard jobs."""

import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import InputError
from core.files import sha256_of
from data.config import DataConfig
from data.stream.manifests import (
    NARROW,
    open_manifests,
    read_manifest,
    source_folder,
    write_manifest,
)
from data.tokenizer import EOS
from eval.check_leakage import check_leakage, leaked_documents
from eval.config import EvaluationConfig, JobsConfig, Launcher, ValidationConfig
from eval.export import export
from eval.heldout import Validation, evaluate
from eval.leaderboard.jobs import SuiteJobs
from eval.model_source import find_checkpoint, load_model
from eval.run import combine_scores
from model.hf import load_hf_weights
from tests.commands import wait_until
from tests.eval.conftest import MODEL
from tests.tiny import model_of
from train.metrics.records import read_lines, read_scores
from train.metrics.scores import collect_command

SETTINGS = ValidationConfig(every_tokens=1000, tokens=321, seq_len=16, batch_sequences=3)


def test_validation_equals_evaluation(config: EvaluationConfig) -> None:
    """Full windows of the same tokens give the same scores; the losses of three ranks add up."""
    model = model_of(MODEL)
    manifests = open_manifests(config.data)
    results = Validation(config.data, manifests, SETTINGS).run(model)
    scores = dict(evaluate(model, config.data, manifests, seq_len=16, batch_size=1, max_tokens=320))
    assert set(results) == set(scores) == {"prose", "sums"}
    for name, score in scores.items():
        assert results[name]["loss"] == pytest.approx(score.loss, rel=1e-6)
        assert results[name]["bits_per_byte"] == pytest.approx(score.bits_per_byte, rel=1e-6)
    per_rank = [
        Validation(config.data, manifests, SETTINGS, rank=rank, world_size=3).run(model)
        for rank in range(3)
    ]
    for name in results:
        assert sum(result[name]["loss"] for result in per_rank) == pytest.approx(
            results[name]["loss"]
        )


def test_run_if_due(config: EvaluationConfig) -> None:
    validation = Validation(config.data, open_manifests(config.data), SETTINGS)
    model = model_of(MODEL)
    assert validation.run_if_due(0, 999, 4500, model) is None
    assert validation.run_if_due(1000, 1999, 4500, model) is None
    assert validation.run_if_due(900, 1000, 4500, model) is not None
    assert validation.run_if_due(1999, 4100, 4500, model) is not None
    assert validation.run_if_due(4100, 4500, 4500, model) is not None  # the end of the run
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert validation.run(model)["prose"]["loss"] == pytest.approx(math.log(288))


def prepend_document(config: DataConfig, source: str, split: str, document: list[int]) -> None:
    """Write a document in front of a source's split and update the manifest."""
    folder = source_folder(config, source)
    manifest = read_manifest(folder)
    file = manifest.splits[split][0]
    ids = np.concatenate(
        [np.array([*document, EOS], dtype=NARROW), np.fromfile(folder / file.name, NARROW)]
    )
    (folder / file.name).write_bytes(ids.tobytes())
    file.tokens, file.sha256 = len(ids), sha256_of(folder / file.name)
    write_manifest(folder, manifest)


def test_leaked_documents_are_found(
    config: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    import shutil

    shutil.copytree(config.data.folder, tmp_path / "data")
    data = replace(config.data, folder=str(tmp_path / "data"))
    ready = replace(config, data=data, validation=SETTINGS)
    monkeypatch.setattr("eval.check_leakage.READ_TOKENS", 100)  # blocks that split documents
    document = [20, 21, 22, 24, 199]
    same_length_and_sum = [20, 21, 22, 23, 200]
    prepend_document(data, "prose", "heldout", document)
    prepend_document(data, "sums", "train", same_length_and_sum)
    # the generated corpus contains short documents twice
    duplicates = list(leaked_documents(data, open_manifests(data), SETTINGS))
    assert all(heldout_source == source for heldout_source, source, _ in duplicates)
    prepend_document(data, "sums", "train", document)
    leaked = leaked_documents(data, open_manifests(data), SETTINGS)
    assert sorted(leaked) == sorted([*duplicates, ("prose", "sums", 1)])
    with pytest.raises(InputError, match="1 of prose in sums"):
        check_leakage(ready)
    manifest = open_manifests(data)["prose"]
    heldout = manifest.splits["heldout"][0]
    shutil.copy(source_folder(data, "prose") / heldout.name, source_folder(data, "prose") / "c.ds")
    manifest.splits["train"][0] = replace(heldout, name="c.ds")
    write_manifest(source_folder(data, "prose"), manifest)
    with pytest.raises(InputError, match="is also a training file of prose"):
        Validation(data, open_manifests(data), SETTINGS)


def test_initial_weights_load_from_an_export(config: EvaluationConfig) -> None:
    export(config)
    expected = load_model(find_checkpoint(config))
    model = model_of(MODEL, seed=9)
    load_hf_weights(model, config.run.files.hf)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name
    with pytest.raises(InputError, match=r"give model\.vocab_size=288"):
        load_hf_weights(model_of(replace(MODEL, vocab_size=300)), config.run.files.hf)


def test_suite_jobs_report_their_scores(
    config: EvaluationConfig, tasks: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A job runs on pinned files and writes its scores into metrics.jsonl; a resumed run neither
    starts a job nor reports scores again.
    """
    monkeypatch.setattr("eval.leaderboard.jobs.POLL_SECONDS", 0.0)
    folder = find_checkpoint(config)
    monkeypatch.setattr("eval.leaderboard.jobs.read_tokens", lambda step: 250)
    metrics = config.run.folder / "metrics.jsonl"
    # the run has trained past its checkpoint
    step = {"step": 3, "tokens": 300, "loss": 1.0, "grad_norm": 1.0, "skipped": False}
    metrics.write_text(json.dumps({**step, "stage": "only", "source_loss": {}}) + "\n")
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
    settings = JobsConfig(["leaderboard_v1"], 100, Launcher.local, [], overrides)
    record = {
        "run": {"name": "small", "seed": 0}, "data": {"folder": config.data.folder},
        "metrics": {"wandb_project": None, "tensorboard": False, "console_seconds": 1.0},
        "eval": {"jobs": {**asdict(settings), "launcher": "local"}},
    }  # fmt: skip
    (config.run.folder / "config.yaml").write_text(json.dumps(record))  # JSON is YAML
    jobs = SuiteJobs(config.run, settings, then=collect_command(config.run.folder))
    assert jobs.poll() == []
    pinned = config.run.folder / "scores" / "held" / folder.name
    file = next(folder.glob("*.safetensors"))
    assert (pinned / file.name).stat().st_ino == file.stat().st_ino
    log = config.run.folder / "scores" / f"leaderboard_v1-{folder.name}.log"
    wait_until(lambda: read_scores(metrics), log.read_text)
    records = read_scores(metrics)
    rows = records[0]["scores"]["leaderboard_v1"]
    assert records[0]["tokens"] == 250 and records[0]["step"] == 0
    assert 0 <= rows["choice"] == rows["average"] <= 100
    assert log.read_text().count("shots)") == 1
    assert [line["step"] for line in read_lines(metrics)] == [3]
    assert not pinned.exists()
    resumed = SuiteJobs(config.run, settings)
    resumed.mark_reported(records)
    assert resumed.poll() == [] and resumed.poll() == []


def test_slurm_gets_one_job_per_suite(
    config: EvaluationConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:/usr/bin:/bin")
    run = replace(config.run, dir=str(tmp_path / "run"))
    run.folder.mkdir()
    run.files.checkpoints.symlink_to(config.run.files.checkpoints)
    monkeypatch.setattr("eval.leaderboard.jobs.read_tokens", lambda step: 250)
    SuiteJobs(run, JobsConfig(["leaderboard_v2"], 100, Launcher.slurm, ["--gpus=1"], [])).poll()
    arguments = tmp_path / "arguments"
    wait_until(
        lambda: arguments.is_file() and "--wrap" in arguments.read_text(),
        lambda: "sbatch was not called",
    )
    words = arguments.read_text().splitlines()
    assert "--gpus=1" in words and words[-1].startswith("--wrap=")
    assert "suite=leaderboard_v2" in words[-1]


def test_a_source_without_held_out_text_has_no_score(
    config: EvaluationConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens are all ends of documents, which have no bytes, or -1 as the first space has."""
    model = model_of(MODEL)
    manifests = open_manifests(config.data)
    for lengths in (np.zeros(2**16, dtype=np.int64), np.full(2**16, -1)):
        monkeypatch.setattr("eval.heldout.byte_lengths", lambda *_, lengths=lengths: lengths)
        assert Validation(config.data, manifests, SETTINGS).run(model) == {}
        assert dict(evaluate(model, config.data, manifests, 16, 1, max_tokens=320)) == {}
    with pytest.raises(InputError, match="no source has held-out tokens"):
        combine_scores([])
