"""Jobs from command lines: one run, or the points of a sweep as named runs."""

from collections.abc import Iterable
from dataclasses import dataclass

from core.compose import compose_config, convert
from core.old_keys import given_keys
from core.overrides import config_dir_options, rewrite_overrides
from core.sweep import Sweep, read_sweep
from launch.config import SubmitConfig
from train.config import RunConfig

SCRIPTS = {  # by stage of a run, in order
    "prepare": "data/prepare.py",
    "train": "train/pretrain.py",
    "export": "eval/export.py",
    "eval": "eval/run.py",
}
SCHEMAS = (RunConfig, SubmitConfig)


@dataclass(frozen=True)
class Job:
    """One run: the arguments of its entry scripts, and the config that they compose."""

    arguments: list[str]
    config: RunConfig
    submit: SubmitConfig


def compose_job(overrides: Iterable[str], config_dir: str | None = None) -> Job:
    """Compose and check one run. Raises InputError and Hydra's errors."""
    overrides = rewrite_overrides(overrides, SCHEMAS)
    config = compose_config(overrides, config_dir=config_dir)
    given = given_keys(overrides)
    return Job(
        [*config_dir_options(config_dir), *overrides],
        convert(RunConfig, config, given),
        convert(SubmitConfig, config, given),
    )


def compose_sweep(
    overrides: list[str], name: str | None, config_dir: str | None = None
) -> tuple[Sweep, list[Job]]:
    """Compose and check one job per point of a sweep, each with its own folder."""
    sweep = read_sweep(overrides, SCHEMAS, name=name, config_dir=config_dir)
    return sweep, [compose_job(point, config_dir) for point in sweep.overrides.values()]
