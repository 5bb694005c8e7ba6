"""Points of a sweep as named runs, from Hydra's syntax (`a=1,2 b=range(3)`) or configs/sweep."""

import re
from dataclasses import dataclass

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser

from core.command import compose_config, convert_checked
from core.errors import InputError
from core.old_keys import given_keys, new_key, renamed_overrides
from launch.config import SubmitConfig
from train.config import RunConfig

SCRIPTS = {  # of the stages of a run
    "prepare": "data/prepare.py",
    "train": "train/pretrain.py",
    "export": "eval/export.py",
    "eval": "eval/run.py",
}
SWEEP = "sweep.json"  # in a sweep's folder: what tells its runs apart


@dataclass(frozen=True)
class Job:
    """One run: what its entry scripts are given, and what that means."""

    overrides: list[str]
    config: RunConfig
    submit: SubmitConfig


@dataclass(frozen=True)
class Sweep:
    """A named folder of runs and the values that tell them apart."""

    folder: str
    points: dict[str, dict[str, str]]  # label -> key -> value


def job(overrides: list[str]) -> Job:
    """Compose and check one run on this machine; InputError and Hydra's errors name the mistake."""
    overrides = renamed_overrides(overrides)
    composed, given = compose_config(overrides), given_keys(overrides)
    return Job(
        overrides,
        convert_checked(RunConfig, composed, given),
        convert_checked(SubmitConfig, composed, given),
    )


def short(value: str) -> str:
    """Short form of a value for folder names: 1e9, not Hydra's 1000000000.0, if it is exact."""
    try:
        brief = f"{float(value):g}"
        return re.sub(r"e\+?(-?)0*", r"e\1", brief) if float(brief) == float(value) else value
    except ValueError:
        return value


def last_part(key: str) -> str:
    """A key without its sections."""
    return key.rsplit(".", 1)[-1]


def sweep(overrides: list[str], name: str | None) -> tuple[Sweep, list[Job]]:
    """One job per point, each in a folder of its own; all are checked before any is returned."""
    base = [word for word in overrides if word.startswith("+sweep=") or "," not in word]
    whole = compose_config(base, hydra_config=True)
    named = whole.hydra.sweeper.params or {}
    choice = next(
        (word.removeprefix("+sweep=") for word in overrides if word.startswith("+sweep=")), None
    )
    overrides = [word for word in overrides if not word.startswith("+sweep=")]
    overrides += [f"{key}={value}" for key, value in named.items()]
    # the folders of a sweep keep the names of the keys as they were given
    as_given = {new_key(key): key for key in (word.split("=", 1)[0] for word in overrides)}
    parsed = OverridesParser.create().parse_overrides(renamed_overrides(overrides))
    swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
    if not swept:
        raise InputError(
            "-m without a sweep: give a key several values (optim.clip_norm=0.5,1.0) or +sweep=NAME"
        )
    name = (
        name
        or choice
        or "-".join([whole.run.name, *sorted(last_part(as_given.get(key, key)) for key in swept)])
    )
    folder = f"{whole.hydra.sweep.dir}/{name}"
    points: dict[str, dict[str, str]] = {}
    jobs = []
    for words in BasicSweeper.split_arguments(parsed, None)[0]:
        values = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in swept)
        text = "_".join(
            f"{last_part(as_given.get(key, key))}-{short(value)}" for key, value in values.items()
        )
        label = re.sub(r"[^A-Za-z0-9_.-]+", "-", text)
        if label in points:
            raise InputError(
                f"two points of the sweep would share the folder {folder}/{label}; give them "
                "shorter values"
            )
        points[label] = values
        jobs.append(job([*words, f"run.name='{name}.{label}'", f"run.dir='{folder}/{label}'"]))
    return Sweep(folder, points), jobs
