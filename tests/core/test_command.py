"""Command lines: every key can be set, a mistake is one line, -m makes a run of each point."""

import shlex
from pathlib import Path

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.command import read_configs
from core.compose import compose_config, convert
from core.config_errors import format_error
from core.errors import InputError
from core.overrides import (
    config_dir_options,
    own_config_dir,
    parse_arguments,
    rewrite_overrides,
)
from core.schema import config_keys
from core.sweep import SWEEP
from data.config import PrepareConfig
from launch.jobs.sweep import compose_job, compose_sweep
from launch.planning.dryrun_config import DryRunConfig
from tests.commands import forked
from tests.compose import run_config
from train.config import RunConfig


def line_of(*overrides: str, config_dir: Path | None = None) -> str:
    """The one line that a command prints for these overrides."""
    with pytest.raises((InputError, HydraException, OmegaConfBaseException)) as raised:
        folder = None if config_dir is None else str(config_dir)
        config = compose_config(overrides, config_dir=folder, schemas=[RunConfig])
        convert(RunConfig, config)
    line = format_error(raised.value, config_keys(RunConfig))
    assert "\n" not in line
    return line


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of own configs: an experiment, a data set, and files that cannot be read."""
    folder = tmp_path_factory.mktemp("own configs")
    files = {
        "experiment/mine": b"# @package _global_\ndefaults: [demo]\nrun: {name: mine}\n",
        "experiment/headless": b"defaults: [demo, _self_]\noptim: {lr: 1}\n",
        "experiment/bom": b"\xef\xbb\xbf# @package _global_\ndefaults: [demo]\n",
        "data/syntax": b"folder: x\nseed: [1\n",
        "data/twice": b"folder: x\nseed: 0\nseed: 1\n",
        "data/tab": b"folder: x\n\tseed: 0\n",
        "data/latin": b"# caf\xe9\nfolder: x\n",
        "data/utf16": "folder: x\n".encode("utf-16"),
        "data/control": b"folder: \x07\n",
        "data/number": b"3\n",
        "data/tagged": b"folder: !!python/name:os.system\n",
        "data/itself": b"defaults: [itself]\n",
        "data/anchor": b"sources: &all [*all]\n",
        "data/unknown": b"defaults: [demo, _self_]\nfolders: x\n",
    }
    for name, content in files.items():
        path = folder / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    return folder


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("syntax", "syntax.yaml, line 3: "),
        ("twice", "twice.yaml, line 3: "),
        ("tab", "tab.yaml, line 2: "),
        ("latin", "latin.yaml is not UTF-8 "),
        ("utf16", "utf16.yaml is not UTF-8 "),
        ("control", "control.yaml is no config: "),
        ("number", "number.yaml is no config: "),
        ("tagged", "tagged.yaml, line 1: "),
        ("itself", "names itself"),
        ("anchor", "holds itself"),
        ("unknown", "the config has no key data.folders; did you mean data.folder?"),
        ("absent", "data has no absent; it has anchor, "),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_its_line(
    own: Path, name: str, expected: str
) -> None:
    assert expected in line_of("+experiment=demo", f"data={name}", config_dir=own)


@pytest.mark.parametrize("name", ["headless", "bom"])
def test_an_experiment_that_sets_nothing_is_refused(own: Path, name: str) -> None:
    expected = "a file in experiment/ sets nothing: its first line must be"
    assert expected in line_of(f"experiment={name}", config_dir=own)


def test_a_command_ends_with_one_line_and_code_2(own: Path) -> None:
    result = forked("data/mixture_report.py", "--config-dir", own, "experiment=demo", "data=twice")
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "twice.yaml, line 3" in result.stderr


def test_keys_that_the_files_leave_out_can_be_set() -> None:
    run = run_config(
        "demo",
        "data.sources.code.min_yield=0.1",
        "data.sources.web.replace_pii=true",
        "data.assets.evaluations.path=/e.jsonl",
        "data.stages.0.mixture.math=5",
        "data.stages[1].tokens=1e6",
        "data.sources.new={recipe: curated, input: x, licence: a, max_epochs: 1, tasks: 1}",
        "metrics.trackers=[mlflow]",
    )
    assert run.data.sources["code"].min_yield == 0.1 and run.data.sources["web"].replace_pii
    assert run.data.assets.evaluations.path == "/e.jsonl"
    assert run.data.stages[0].mixture == {"web": 20, "code": 70, "technical": 10, "math": 5}
    assert run.data.stages[1].tokens == 10**6
    assert run.data.sources["new"].text_key == "text" and run.metrics.trackers == ["mlflow"]


def test_keys_of_nothing_are_refused() -> None:
    for word, expected in (
        ("data.sources.web.textkey=a", "did you mean data.sources.web.text_key?"),
        ("data.sources.wbe.text_key=a", "data.sources.wbe.recipe has no value"),
        ("data.stages.first.tokens=1", "data.stages.0 is its first entry"),
        ("data.stages.9.tokens=1", "data.stages.9.tokens"),
        ("lr=1", "did you mean optim.lr?"),
        ("optim.tokens=1", "did you mean data.stages.*.tokens or validation.tokens?"),
        ("warmup_token=1", "did you mean schedule.warmup_tokens?"),
        ("data.stages=[3]", "data.stages[0]"),
    ):
        assert expected in line_of("+experiment=demo", word), word


@pytest.mark.parametrize(
    "text",
    ["/a=b", "/a,b", "/caf\u00e9", "/a[b", "/a{b}", "a(b)", "/it's", "a#b", 'a"b', "a\tb=", "x:{"],
)
def test_the_quoting_that_an_error_shows_works(text: str) -> None:
    line = line_of("+experiment=demo", f"data.folder={text}")
    shown = next(word for word in shlex.split(line) if word.startswith('data.folder="'))
    assert run_config("demo", shown.rstrip(",")).data.folder == text


def test_an_argument_without_a_value_is_named() -> None:
    assert "the argument run has no value" in line_of("+experiment=demo", "run.name=my", "run")
    assert "write KEY=VALUE" in line_of("+experiment=demo", "=3")


def test_an_experiment_needs_no_plus() -> None:
    assert rewrite_overrides(["experiment=demo", "sweep=lr"]) == ["+experiment=demo", "+sweep=lr"]
    assert rewrite_overrides(["+experiment=demo"]) == ["+experiment=demo"]
    assert convert(RunConfig, compose_config(["experiment=1b"])).run.name == "1b"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("run.name=", "run.name is empty"),
        ("run.name=a/b", "run.name is 'a/b'"),
        ("run.name=..", "run.name is '..'"),
        ("run.name=' '", "run.name is ' '"),
        ("run=null", "run is a section and takes no value"),
        ("run.accept_changes=optim.lr", "write run.accept_changes=[optim.lr]"),
        ('run.name="a\tb"', "run.name is 'a"),
        ("run.dir=", "run.dir is empty"),
        ("data.folder=", "data.folder is empty"),
        ("data.tokenizer.path=", "data.tokenizer.path is empty"),
        ("optim.lr=nan", "optim.lr is nan"),
        ("optim.clip_norm=inf", "optim.clip_norm is inf"),
        ("data.stages.0.mixture.web=inf", "data.stages.0.mixture.web is inf"),
        ("schedule.warmup_tokens=1e30", "schedule.warmup_tokens is 1e+30"),
        ("cluster.nodes=0", "cluster.nodes"),
        ("data.sources={../up: 3}", "data.sources"),
    ],
)
def test_values_without_a_meaning_are_refused(word: str, expected: str) -> None:
    assert expected in line_of("+experiment=demo", word)


def test_infinity_and_empty_texts_are_kept_where_they_mean_something() -> None:
    run = run_config("demo", "data.sources.web.max_epochs=inf", "health.spike_sigmas=inf")
    assert run.data.sources["web"].max_epochs == run.health.spike_sigmas == float("inf")
    job = compose_job(["experiment=demo", "slurm.env.EMPTY="])
    assert job.submit.slurm.env == {"EMPTY": ""}


def test_own_configs_reach_the_jobs(own: Path) -> None:
    job = compose_job(["experiment=mine"], str(own))
    assert job.config.run.name == "mine"
    assert job.arguments == ["--config-dir", str(own), "+experiment=mine"]
    arguments = parse_arguments(job.arguments)
    (config,) = read_configs(RunConfig, arguments)
    assert config == job.config
    sweep, jobs = compose_sweep(["experiment=mine", "optim.lr=1e-3,2e-3"], None, str(own))
    assert sweep.folder == "runs/sweeps/mine-lr"
    assert all(each.arguments[:2] == ["--config-dir", str(own)] for each in jobs)
    with pytest.raises(InputError, match="is not a folder"):
        parse_arguments(["--config-dir", str(own / "none"), "experiment=mine"])


def test_the_folder_of_own_configs_is_read_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Jobs that a run starts, such as leaderboards, take it from there as an absolute path."""
    for words in (["--config-dir", "mine"], ["--config-dir=mine"], ["-cd", "mine"]):
        monkeypatch.setattr("sys.argv", ["train/pretrain.py", *words, "+experiment=demo", "a=-1"])
        options = config_dir_options(own_config_dir())
        assert options == ["--config-dir", str(Path("mine").absolute())]
    monkeypatch.setattr("sys.argv", ["train/pretrain.py", "+experiment=demo"])
    assert config_dir_options(own_config_dir()) == []


def test_a_sweep_of_a_command_has_the_names_of_submit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["experiment=demo", f"hydra.sweep.dir={tmp_path}", "optim.lr=1e-3,2e-3"]
    words += ["~data.keep_exclusions", "data.sources.web.text_key=a,b"]
    configs = read_configs(RunConfig, parse_arguments(["-m", *words]))
    _, jobs = compose_sweep(words, None)
    assert configs == [job.config for job in jobs] and len(configs) == 4
    assert len({config.run.dir for config in configs}) == 4
    assert configs[0].run.name == "demo-lr-text_key.lr-0.001_text_key-a"
    assert (tmp_path / "demo-lr-text_key" / SWEEP).is_file()
    with pytest.raises(InputError, match="reads no run"):
        read_configs(PrepareConfig, parse_arguments(["-m", *words]))
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(InputError, match="launch/submit.py -m .*optim.lr=1e-3,2e-3 .*--local"):
        read_configs(RunConfig, parse_arguments(["-m", *words]))


def test_options_that_are_none_are_one_line() -> None:
    for words in (["--nope"], ["--cfg", "everything"], ["--config-path", "x"]):
        with pytest.raises(InputError) as raised:
            parse_arguments(words)
        assert "\n" not in str(raised.value)
    assert parse_arguments(["a=1", "-m", "b=2"]).overrides == ["a=1", "b=2"]


def test_every_required_key_has_a_value_in_the_files() -> None:
    config = compose_config(["experiment=demo"])
    absent = [
        key
        for key in config_keys(DryRunConfig)
        if "*" not in key and OmegaConf.select(config, key, default="absent") == "absent"
    ]
    for key in absent:
        assert rewrite_overrides([f"{key}=x"], [DryRunConfig]) == [f"++{key}=x"] or ".suite." in key
