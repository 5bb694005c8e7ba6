"""Jobs from command lines: one run, or the points of a sweep as named runs.

A sweep is in Hydra's syntax (`a=1,2 b=range(3)`) or a file in configs/sweep.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from core.command import compose_config, convert_checked
from core.errors import InputError
from core.old_keys import given_keys, new_key, renamed_overrides
from launch.config import SubmitConfig
from train.config import RunConfig

SCRIPTS = {  # by stage of a run, in order
    "prepare": "data/prepare.py",
    "train": "train/pretrain.py",
    "export": "eval/export.py",
    "eval": "eval/run.py",
}
SWEEP = "sweep.json"  # in a sweep's folder: the values of each run


@dataclass(frozen=True)
class Job:
    """One run: the overrides of its entry scripts, and the config that they compose."""

    overrides: list[str]
    config: RunConfig
    submit: SubmitConfig


@dataclass(frozen=True)
class Sweep:
    """A folder of runs and the values that differ between them."""

    folder: str
    points: dict[str, dict[str, str]]  # label -> key -> value


def compose_job(overrides: list[str]) -> Job:
    """Compose and check one run. Raises InputError and Hydra's errors."""
    overrides = renamed_overrides(overrides)
    config = compose_config(overrides)
    given = given_keys(overrides)
    return Job(
        overrides,
        convert_checked(RunConfig, config, given),
        convert_checked(SubmitConfig, config, given),
    )


def short_value(value: str) -> str:
    """Short form of a value for folder names: 1e9 for Hydra's 1000000000.0, if it is exact."""
    try:
        short = f"{float(value):g}"
        return re.sub(r"e\+?(-?)0*", r"e\1", short) if float(short) == float(value) else value
    except ValueError:
        return value


def last_key(key: str) -> str:
    """A key without its sections."""
    return key.rsplit(".", 1)[-1]


def compose_sweep(overrides: list[str], name: str | None) -> tuple[Sweep, list[Job]]:
    """Compose and check one job per point of a sweep, each with its own folder."""
    sweep_file = next(
        (
            override.removeprefix("+sweep=")
            for override in overrides
            if override.startswith("+sweep=")
        ),
        None,
    )
    fixed = [
        override for override in overrides if override.startswith("+sweep=") or "," not in override
    ]
    config = compose_config(fixed, hydra_config=True)
    overrides = [override for override in overrides if not override.startswith("+sweep=")]
    overrides += [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    # folders keep the key names as given, which may be old ones
    given_names = {
        new_key(key): key for key in (override.split("=", 1)[0] for override in overrides)
    }
    parsed = OverridesParser.create().parse_overrides(renamed_overrides(overrides))
    swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    if not swept:
        raise InputError(
            "-m without a sweep: give a key several values (optim.clip_norm=0.5,1.0) or +sweep=NAME"
        )
    if not (name or sweep_file):
        keys = sorted(last_key(given_names.get(key, key)) for key in swept)
        name = "-".join([config.run.name, *keys])
    name = name or sweep_file
    folder = f"{config.hydra.sweep.dir}/{name}"
    points: dict[str, dict[str, str]] = {}
    jobs = []
    for point in BasicSweeper.split_arguments(parsed, None)[0]:
        values = dict(
            override.split("=", 1) for override in point if override.split("=", 1)[0] in swept
        )
        label = point_label(values, given_names)
        if label in points:
            raise InputError(
                f"two points of the sweep have the same folder {folder}/{label}; give them shorter "
                "values"
            )
        points[label] = values
        run = [f"run.name='{name}.{label}'", f"run.dir='{folder}/{label}'"]
        jobs.append(compose_job([*point, *run]))
    return Sweep(folder, points), jobs


def point_label(values: Mapping[str, str], given_names: Mapping[str, str]) -> str:
    """Folder name of a point, such as lr-0.001_decay_tokens-1e9."""
    text = "_".join(
        f"{last_key(given_names.get(key, key))}-{short_value(value)}"
        for key, value in values.items()
    )
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
