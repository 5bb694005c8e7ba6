"""The runs of a sweep: a name, a folder and overrides for each point.

A sweep is in Hydra's syntax (`a=1,2 b=range(3)`) or a file in configs/sweep.
"""

import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from typing_extensions import TypedDict

from core.compose import compose_config
from core.errors import InputError
from core.files import make_folder, write_json
from core.old_keys import new_key
from core.overrides import rewrite_overrides
from core.quote import hydra_override
from core.records import read_if_present

SWEEP = "sweep.json"  # in a sweep's folder: the values of each run
SWEEP_FILE = re.compile(r"\+{0,2}sweep=(.*)")


@dataclass(frozen=True)
class Sweep:
    """A folder of runs and what differs between them, by a point's label."""

    folder: str
    points: dict[str, dict[str, str]]  # label -> key -> value
    overrides: dict[str, list[str]]  # label -> those of the point's run

    def write(self) -> None:
        """Add the points to sweep.json in the folder, which launch/collect.py reads."""
        path = Path(self.folder, SWEEP)
        make_folder(path.parent)
        write_json(path, {"points": read_points(path.parent) | self.points})


class SweepRecord(TypedDict):
    """Content of sweep.json."""

    points: dict[str, dict[str, str]]


def read_points(folder: Path) -> dict[str, dict[str, str]]:
    """Swept values by label of a point, from sweep.json; empty if there is none."""
    fix = "move it away and submit the sweep again"
    record = read_if_present(folder / SWEEP, SweepRecord, fix)
    return {} if record is None else record["points"]


def read_sweep(
    overrides: Iterable[str],
    schemas: Collection[type],
    *,
    name: str | None = None,
    config_dir: str | None = None,
) -> Sweep:
    """The points of a command line with several values. Raises InputError if it has none.

    A sweep is called `name`, or as its file, or after the run and the swept keys.
    """
    words = list(overrides)
    # folders keep the key names as given, which may be old ones
    given_names = {new_key(key): key for key in (word.split("=", 1)[0] for word in words)}
    words = rewrite_overrides(words, schemas, sweep=True)
    sweep_file = next((match[1] for word in words if (match := SWEEP_FILE.fullmatch(word))), None)
    parser = OverridesParser.create()
    fixed = [word for word in words if not parser.parse_override(word).is_sweep_override()]
    config = compose_config(fixed, config_dir=config_dir, schemas=schemas, hydra_config=True)
    words = [word for word in words if not SWEEP_FILE.fullmatch(word)]
    in_file = [f"{key}={value}" for key, value in (config.hydra.sweeper.params or {}).items()]
    given_names |= {new_key(key): key for key in (word.split("=", 1)[0] for word in in_file)}
    words += rewrite_overrides(in_file, schemas, sweep=True)
    parsed = [parser.parse_override(word) for word in words]
    swept = [each.get_key_element().lstrip("+") for each in parsed if each.is_sweep_override()]
    if not swept:
        raise InputError(
            "-m without a sweep: give a key several values (optim.clip_norm=0.5,1.0) or +sweep=NAME"
        )
    if name is None:
        keys = sorted(last_key(given_names.get(key, key)) for key in swept)
        name = sweep_file or "-".join([config.run.name, *keys])
    folder = f"{config.hydra.sweep.dir}/{name}"
    points: dict[str, dict[str, str]] = {}
    of_points: dict[str, list[str]] = {}
    for point in itertools.product(*(values_of(each) for each in parsed)):
        given = (word.lstrip("+").split("=", 1) for word in point if "=" in word)
        values = {key: value for key, value in given if key in swept}
        label = point_label(values, given_names)
        if label in points:
            raise InputError(
                f"two points of the sweep have the same folder {folder}/{label}; give them shorter "
                "values"
            )
        points[label] = values
        names = [
            hydra_override("run.name", f"{name}.{label}"),
            hydra_override("run.dir", f"{folder}/{label}"),
        ]
        of_points[label] = [*point, *names]
    return Sweep(folder, points, of_points)


def values_of(override: Override) -> list[str]:
    """The overrides of one value each that an override stands for."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    if not override.is_discrete_sweep():
        raise InputError(f"{override.input_line}: name the values of a sweep, as in KEY=1,2")
    key = override.get_key_element()
    return [f"{key}={value}" for value in override.sweep_string_iterator()]


def point_label(values: Mapping[str, str], given_names: Mapping[str, str]) -> str:
    """Folder name of a point, such as lr-0.001_decay_tokens-1e9."""
    text = "_".join(
        f"{last_key(given_names.get(key, key))}-{short_value(value)}"
        for key, value in values.items()
    )
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)


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
