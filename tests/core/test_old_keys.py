"""Keys of earlier versions are accepted with one warning in command lines and files."""

import logging
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from core import old_keys
from core.compose import compose_config, convert
from core.config_errors import format_error
from core.old_keys import (
    REMOVED,
    REMOVED_GROUPS,
    RENAMED,
    given_keys,
    load_config,
    rename_keys,
    renamed_overrides,
)
from eval.config import EvaluationConfig
from launch.planning.dryrun_config import DryRunConfig
from train.config import RunConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


@pytest.fixture(autouse=True)
def no_warnings_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(old_keys, "_warned", set())


def test_new_names_are_keys_and_old_names_are_not() -> None:
    config = compose_config(["+experiment=demo", "suite=leaderboard_v1"])
    absent = object()
    for old, new in RENAMED.items():
        assert OmegaConf.select(config, new, default=absent) is not absent, new
        assert OmegaConf.select(config, old, default=absent) is absent, old
    assert all(OmegaConf.select(config, old, default=absent) is absent for old in REMOVED)
    assert not any((CONFIGS / group).exists() for group in REMOVED_GROUPS)


def test_a_command_line_with_old_keys(caplog: pytest.LogCaptureFixture) -> None:
    overrides = [
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
        config = compose_config(overrides)
        run = convert(RunConfig, config)
        evaluation = convert(EvaluationConfig, config)
    assert run.compute.precision.value == "bf16" and run.validation.batch_sequences == 4
    assert evaluation.eval.batch_sequences == 3 and evaluation.eval.max_tokens == 5
    assert evaluation.generate.prompt == "hi"
    assert evaluation.leaderboard.suite is not None
    assert convert(DryRunConfig, config).ranks == 6
    (record,) = caplog.records
    assert record.message.startswith("the command line has old keys: parallel.precision is now ")


def test_current_command_lines_are_unchanged(caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["+experiment=demo", "~data.sources.web", "eval.seq_len=8", "--cfg", "job", "-m"]
    overrides += ["compute.precision=fp32,bf16", "validation={tokens: 5}", "hydra.run.dir=x=y"]
    overrides += [
        "schedule={batch_end_sequences: 5}",
        "schedule={min_lr:1},{min_lr:2}",
        "eval={bad",
    ]
    assert renamed_overrides(overrides) == overrides
    assert not caplog.records


def test_values_and_prefixes_are_kept() -> None:
    given = ["++parallel.recompute=a=b,c", "~eval.suite.published", "eval=leaderboard_v1"]
    assert renamed_overrides([*given, "eval=leaderboard_v1,leaderboard_v2"]) == [
        "++compute.recompute=a=b,c",
        "~leaderboard.suite.published",
        "suite=leaderboard_v1",
        "suite=leaderboard_v1,leaderboard_v2",
    ]


def test_a_key_that_was_renamed_twice_is_accepted() -> None:
    assert renamed_overrides(["eval.jobs.sbatch=[a]"]) == ["leaderboard.jobs.sbatch_options=[a]"]
    config = OmegaConf.create({"eval": {"jobs": {"suites": ["v1"], "sbatch": ["a"]}}})
    rename_keys(config, "a file")
    assert config == {
        "eval": {},
        "leaderboard": {"jobs": {"suites": ["v1"], "sbatch_options": ["a"]}},
    }


def test_a_table_of_old_keys_becomes_one_override_per_value() -> None:
    table = (
        "eval={batch: 3, prompt: 'a, b', sampling: {seed: 1}, keep_fp32: [D], bench: {tokens: 1}}"
    )
    assert renamed_overrides([table, "plan={host_gbytes: null}"]) == [
        "eval.batch_sequences=3",
        "generate.prompt='a, b'",
        "generate.sampling.seed=1",
        "export.keep_fp32=['D']",
        "plan.host_gbytes_per_second=null",
    ]


def test_a_removed_group_is_named() -> None:
    message = "In 'x': Could not override 'optim'. No match in the defaults list."
    assert "remove 'override /optim'" in format_error(HydraException(message))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (7, 4096, 100)),
        (["eval.batch_sequences=2"], (2, 4096, 100)),
        (["validation.tokens=5"], (7, 5, 100)),
        (["validation={tokens: 5}"], (7, 5, 100)),
        (["eval.validation={tokens: 5, batch: 6}"], (7, 5, 6)),
    ],
)
def test_the_command_line_overrides_old_keys_of_a_file(
    overrides: list[str], expected: tuple[int, ...]
) -> None:
    overrides = renamed_overrides(overrides)
    config = compose_config(["+experiment=demo", *overrides])
    OmegaConf.set_struct(config, False)
    old = {"eval": {"batch": 7, "validation": {"tokens": 4096, "batch": 100}}}
    config = OmegaConf.merge(config, old)
    assert isinstance(config, DictConfig)
    rename_keys(config, "a file", given_keys(overrides))
    validation = config.validation
    values = (config.eval.batch_sequences, validation.tokens, validation.batch_sequences)
    assert values == expected
    assert set(config.eval) == {"seq_len", "batch_sequences", "max_tokens"}


def test_a_stored_config_is_warned_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
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
