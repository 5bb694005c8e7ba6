"""Keys of earlier versions are accepted with one warning, wherever they stand."""

import logging
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core import old_keys
from core.command import compose_config, convert
from core.old_keys import CHOICES, REMOVED, RENAMED, load_config, rename_keys, renamed_overrides
from eval.config import EvaluationConfig
from launch.planning.trial import DryRun
from train.config import RunConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(old_keys, "_warned", set())


def test_every_new_name_is_a_key_and_no_old_one_is() -> None:
    config = compose_config(["+experiment=demo"])
    gone = object()
    for old, new in RENAMED.items():
        assert OmegaConf.select(config, new, default=gone) is not gone, new
        assert OmegaConf.select(config, old, default=gone) is gone, old
    assert all(OmegaConf.select(config, old, default=gone) is gone for old in REMOVED)
    for choice in filter(None, CHOICES.values()):
        group, name = choice.split("=")
        assert (CONFIGS / group / f"{name}.yaml").is_file()


def test_a_command_line_with_old_keys(caplog: pytest.LogCaptureFixture) -> None:
    words = [
        "+experiment=demo",
        "parallel.precision=bf16",
        "eval.batch=3",
        "eval=leaderboard_v1",
        "eval.validation={batch: 4}",
        "eval={max_tokens: 5, prompt: hi}",
        "eval.bench.tokens=4",
        "optim=adamw",
        "world=6",
    ]
    with caplog.at_level(logging.WARNING):
        config = compose_config(words)
        run, evaluation = convert(RunConfig, config), convert(EvaluationConfig, config)
    assert run.compute.precision.value == "bf16" and run.validation.batch_sequences == 4
    assert evaluation.eval.batch_sequences == 3 and evaluation.eval.max_tokens == 5
    assert evaluation.generate.prompt == "hi"
    assert evaluation.leaderboard.suite is not None
    assert convert(DryRun, config).ranks == 6
    assert [record.message.split(" has old keys")[0] for record in caplog.records] == [
        "the command line",
        "the config",
    ]
    assert "parallel.precision is now compute.precision" in caplog.records[0].message


def test_todays_command_lines_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    words = ["+experiment=demo", "~data.sources.web", "eval.seq_len=8", "--cfg", "job", "-m"]
    words += ["compute.precision=fp32,bf16", "validation={tokens: 5}", "hydra.run.dir=x=y"]
    assert renamed_overrides(words) == words
    assert not caplog.records


def test_values_keep_their_text_and_their_prefix() -> None:
    assert renamed_overrides(["++parallel.recompute=a=b,c", "~eval.suite.published"]) == [
        "++compute.recompute=a=b,c",
        "~leaderboard.suite.published",
    ]


def test_a_file_with_old_keys_yields_to_the_command_line() -> None:
    for given, expected in (set(), 7), ({"eval.batch_sequences"}, 2):
        config = compose_config(["+experiment=demo", "eval.batch_sequences=2"])
        OmegaConf.set_struct(config, False)
        OmegaConf.update(config, "eval.batch", 7)
        rename_keys(config, "a file", given)
        assert config.eval.batch_sequences == expected and "batch" not in config.eval


def test_a_stored_config_is_named_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "parallel: {precision: bf16}\neval: {jobs: {suites: [v1]}, bench: {tokens: 3}}\n"
    )
    for _ in range(2):
        config = load_config(path)
    assert OmegaConf.to_container(config) == {
        "parallel": {},
        "compute": {"precision": "bf16"},
        "eval": {},
        "leaderboard": {"jobs": {"suites": ["v1"]}},
    }
    (record,) = caplog.records
    assert str(path) in record.message
