"""Compare the settings of a start with those that its checkpoint was trained with.

A setting is decisive if it changes the mathematics of a run: model, optimizer, schedule, seeds,
data order, precision, and the decisions of `health`. Any other (ranks, console, paths, saves) gives
the same run, and a change of it is only recorded.
"""

import dataclasses
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, get_type_hints

from omegaconf import OmegaConf

from core.errors import InputError
from core.old_keys import format_value, rename_keys
from core.schema import covers
from train.config import RunConfig

DATA_ORDER = ("data.seed", "data.block_tokens", "data.reset_state", "data.stages")
SOURCES_OF_WEIGHTS = ("run.init_from", "run.branch_from")
DECISIVE = (
    "run.seed",
    *SOURCES_OF_WEIGHTS,
    "model",
    *DATA_ORDER,
    "optim",
    "schedule",
    "compute.precision",
    "health.max_skipped_updates",
    "health.spike_window_updates",
    "health.spike_sigmas",
    "health.spike_patience_updates",
    "health.max_rollbacks",
)
# what a branch is for: its future, of which the checkpoint has read nothing
FREE_IN_A_BRANCH = (
    "data.stages",
    "schedule.decay_tokens",
    "schedule.decay_shape",
    "schedule.min_lr",
)
IGNORED = ("run.accept_changes", "run.checkpoint", "code", "history")
ABSENT = "absent"  # of an entry in only one of two lists of stages
NOT_RECORDED = "not recorded"
MAX_LISTED = 12  # changes that an error lists


@dataclass(frozen=True)
class Change:
    """A setting with another value than before."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        before, now = (
            value if value in (ABSENT, NOT_RECORDED) else format_value(value)
            for value in (self.before, self.now)
        )
        return f"{self.key} {before} -> {now}"


def find_changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """Return the settings that differ between two recorded configs, in the order of `now`.

    Old keys of `before` are translated. A setting that its version did not have counts with its
    default; without one it is NOT_RECORDED if it is decisive, and left out otherwise.
    """
    config = OmegaConf.create(before)
    rename_keys(config, "the record of the checkpoint")
    old = dict(flatten(OmegaConf.to_container(config)))
    defaults = dict(schema_defaults(RunConfig))
    has_stages = any(covers(("data.stages",), key) for key in old)
    changes = []
    for key, value in flatten(now):
        if key in old:
            previous = old.pop(key)
        elif has_stages and covers(("data.stages",), key):
            previous = ABSENT
        else:
            previous = defaults.get(key, NOT_RECORDED if covers(DECISIVE, key) else value)
        if previous != value and not covers(IGNORED, key):
            changes.append(Change(key, previous, value))
    # other keys that are gone are settings of another version
    gone = [(key, value) for key, value in old.items() if covers(("data.stages",), key)]
    return changes + [Change(key, value, ABSENT) for key, value in gone]


def flatten(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values; entries of a list of tables are numbered."""
    if isinstance(value, list) and value and all(isinstance(entry, dict) for entry in value):
        value = {str(index): entry for index, entry in enumerate(value)}
    if isinstance(value, dict) and (value or not key):
        for name, entry in value.items():
            yield from flatten(entry, f"{key}.{name}" if key else str(name))
    else:
        yield key, value


def schema_defaults(schema: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys of a config dataclass that have a default value, and the value."""
    hints = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        key, kind = f"{prefix}{field.name}", hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from schema_defaults(kind, f"{key}.")  # type: ignore[arg-type]
        elif field.default is not dataclasses.MISSING:
            yield key, field.default.value if isinstance(field.default, Enum) else field.default
        elif field.default_factory is not dataclasses.MISSING:
            yield key, field.default_factory()


def check_changes(
    changes: list[Change], accept: Collection[str], *, is_branch: bool
) -> list[Change]:
    """Return the decisive changes that may be made.

    Raises InputError with a list of the others. The shape of a model can never change.
    """
    decisive = [
        change
        for change in changes
        if covers(DECISIVE, change.key) and change.before != NOT_RECORDED
    ]
    if model := [change for change in decisive if covers(("model",), change.key)]:
        raise InputError(
            f"the checkpoint is of another model: {join(model)}: restore these values, or choose "
            "another run.name"
        )
    free = FREE_IN_A_BRANCH if is_branch else ()
    refused = [
        change
        for change in decisive
        if not covers(accept, change.key) and not covers(free, change.key)
    ]
    if refused:
        keys = ",".join(dict.fromkeys([*accept, *map(acceptable_key, refused)]))
        raise InputError(
            f"the checkpoint was trained with other settings: {join(refused)}: restore these "
            f"values, choose another run.name, or accept the changes: 'run.accept_changes=[{keys}]'"
        )
    return decisive


def acceptable_key(change: Change) -> str:
    """The key that accepts a change: all stages together, since they are one list."""
    return "data.stages" if covers(("data.stages",), change.key) else change.key


def join(changes: list[Change]) -> str:
    """List changes in one line."""
    more = f", and {len(changes) - MAX_LISTED} more" if len(changes) > MAX_LISTED else ""
    return ", ".join(map(str, changes[:MAX_LISTED])) + more
