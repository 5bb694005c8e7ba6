"""Config keys of earlier versions, renamed with one warning.

They are accepted on command lines, in a user's own configs and in the config.yaml of finished runs.
To rename a key, add a line to RENAMED and to CHANGELOG.md. Interpolations of old keys, and
`override /GROUP` of a removed group, are errors.
"""

import logging
import os
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from core.errors import InputError
from core.files import open_regular
from core.records import DamagedRecord, check_typed
from core.run import RunRecord
from core.schema import covers

logger = logging.getLogger(__name__)

RENAMED = {
    "parallel.precision": "compute.precision",
    "parallel.recompute": "compute.recompute",
    "parallel.kernels": "compute.kernels",
    "parallel.compile": "compute.compile",
    "schedule.batch_start": "schedule.batch_start_sequences",
    "schedule.batch_end": "schedule.batch_end_sequences",
    "health.max_skipped": "health.max_skipped_updates",
    "health.spike_window": "health.spike_window_updates",
    "health.spike_patience": "health.spike_patience_updates",
    "health.max_rewinds": "health.max_rollbacks",
    "health.check_replicas_steps": "health.check_replicas_every_steps",
    "health.straggler_steps": "health.straggler_window_steps",
    "train.profile.after": "train.profile.after_steps",
    "eval.validation.batch": "validation.batch_sequences",
    "eval.validation": "validation",
    "eval.batch": "eval.batch_sequences",
    "eval.prompt": "generate.prompt",
    "eval.new_tokens": "generate.new_tokens",
    "eval.sampling": "generate.sampling",
    "eval.dtype": "export.dtype",
    "eval.keep_fp32": "export.keep_fp32",
    "eval.hub": "export.hub",
    "eval.checkpoint": "run.checkpoint",
    "eval.suite.max_length": "leaderboard.suite.max_length_tokens",
    "eval.suite.limit": "leaderboard.suite.limit_documents",
    "eval.suite": "leaderboard.suite",
    "eval.jobs": "leaderboard.jobs",
    "plan.node_gbytes": "plan.node_gbytes_per_second",
    "plan.network_gbytes": "plan.network_gbytes_per_second",
    "plan.storage_gbytes": "plan.storage_gbytes_per_second",
    "plan.host_gbytes": "plan.host_gbytes_per_second",
    "world": "dryrun.world_size",
    "slurm.options": "slurm.sbatch_options",
    "slurm.restarts": "slurm.max_restarts",
    "slurm.crashes": "slurm.max_crashes",
    "slurm.strikes": "slurm.max_strikes",
    "slurm.bad_nodes": "slurm.bad_nodes_file",
    "leaderboard.jobs.sbatch": "leaderboard.jobs.sbatch_options",
}
REMOVED = ("eval.bench", "plan.price_per_gpu_hour")
# config groups that are now sections of config.yaml, with the only choice that they had
REMOVED_GROUPS = {
    "checkpoint": "local",
    "eval": "default",
    "optim": "adamw",
    "parallel": "zero1",
    "schedule": "wsd",
    **dict.fromkeys(("browse", "health", "metrics", "plan", "slurm", "train", "verify"), "default"),
}
OVERRIDE = re.compile(r"(\+\+|\+|~)?([\w.]+)(?:=(.*))?$", re.DOTALL)
SUITE_NAMES = re.compile(r"leaderboard_\w+(,leaderboard_\w+)*")
MAX_REASON = 200  # characters of a parser's message
_warned: set[str] = set()


def renamed_overrides(overrides: Iterable[str]) -> list[str]:
    """Rename old keys in Hydra overrides."""
    renamed: list[str] = []
    changes: list[str] = []
    for override in overrides:
        match = OVERRIDE.match(override)
        if match is None:
            renamed.append(override)
            continue
        prefix, key, value = match.groups()
        if value is not None and value == REMOVED_GROUPS.get(key):
            changes.append(f"{override} no longer has an effect")
        elif key == "eval" and SUITE_NAMES.fullmatch(value or ""):
            changes.append(f"{override} is now suite={value}")
            renamed.append(f"suite={value}")
        elif is_removed(key):
            changes.append(f"{key} no longer has an effect")
        else:
            renamed += _renamed(override, prefix or "", key, value, changes)
    warn_once("the command line", changes)
    return renamed


def _renamed(
    override: str, prefix: str, key: str, value: str | None, changes: list[str]
) -> Iterator[str]:
    """One override with its current key; a table with old keys becomes one override per value."""
    leaves = (
        list(flatten(key, parse_table(override))) if value is not None and value[:1] == "{" else []
    )
    if any(
        is_removed(old) or new_key(old) != f"{new_key(key)}{old[len(key) :]}" for old, _ in leaves
    ):
        for old, leaf in leaves:
            if is_removed(old):
                changes.append(f"{old} no longer has an effect")
                continue
            if (new := new_key(old)) != old:
                changes.append(f"{old} is now {new}")
            yield f"{prefix}{new}={format_value(leaf)}"
        return
    if (new := new_key(key)) != key:
        changes.append(f"{key} is now {new}")
    yield f"{prefix}{new}" if value is None else f"{prefix}{new}={value}"


def given_keys(overrides: Iterable[str]) -> set[str]:
    """The keys that a command line sets, including those inside tables."""
    keys = set()
    for override in overrides:
        match = OVERRIDE.match(override)
        if match is not None and match[3] is not None and match[1] != "~":
            table = parse_table(override) if match[3][:1] == "{" else None
            keys |= {key for key, _ in flatten(match[2], table)}
    return keys


def parse_table(override: str) -> Any:
    """The value of an override that is a table; None if Hydra cannot parse it or it is a sweep."""
    try:
        (parsed,) = OverridesParser.create().parse_overrides([override])
    except HydraException:  # composing the config raises it again
        return None
    return None if parsed.is_sweep_override() else parsed.value()


def flatten(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the full keys and values below a key; an empty table counts as a value."""
    if isinstance(value, dict) and value:
        for name, entry in value.items():
            yield from flatten(f"{key}.{name}", entry)
    else:
        yield key, value


def format_value(value: Any) -> str:
    """A value in Hydra's grammar."""
    if isinstance(value, dict):
        return (
            "{" + ",".join(f"{name}:{format_value(entry)}" for name, entry in value.items()) + "}"
        )
    if isinstance(value, list):
        return "[" + ",".join(map(format_value, value)) + "]"
    if isinstance(value, str):
        return QuotedString(value, Quote.single).with_quotes()
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def rename_keys(config: DictConfig, source: str, given: Collection[str] = ()) -> None:
    """Move the values of old keys to the current keys, in place; keys in `given` keep theirs."""
    changes = []
    with open_dict(config):
        for old in sorted([*RENAMED, *REMOVED], key=len, reverse=True):
            section, _, name = old.rpartition(".")
            parent: Any = OmegaConf.select(config, section) if section else config
            if not isinstance(parent, DictConfig) or name not in parent:
                continue
            node: Any = parent._get_node(name)
            del parent[name]
            if old in REMOVED:
                changes.append(f"{old} no longer has an effect")
                continue
            changes.append(f"{old} is now {RENAMED[old]}")
            value = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
            for name, leaf in flatten(RENAMED[old], value):
                new = new_key(name)  # a key of a moved section may be renamed too
                if not covers(given, new):
                    OmegaConf.update(config, new, leaf, force_add=True)
    warn_once(source, changes)


def load_config(path: Path) -> DictConfig:
    """Load a run's config.yaml with current keys. Raises InputError if it is damaged."""
    try:
        with open(path, encoding="utf-8", opener=open_regular) as file:
            config = OmegaConf.load(file)
        if not isinstance(config, DictConfig):
            raise ValueError("it is not a run's record")
        rename_keys(config, str(path))
    # ValueError: of text, numbers and dates; RecursionError: of nesting without end
    except (YAMLError, OSError, ValueError, RecursionError, OmegaConfBaseException) as error:
        reason = " ".join(str(error).split())[:MAX_REASON]
        raise InputError(f"{path} cannot be read ({reason}): restore it or move it away") from error
    return config


def read_record(path: Path) -> dict[str, Any]:
    """Read a run's config.yaml with current keys; empty if there is none.

    Raises InputError if it is damaged.
    """
    if not os.path.lexists(path):
        return {}
    record: Any = OmegaConf.to_container(load_config(path))
    try:
        return dict(check_typed(record, RunRecord, str(path), extra="allow"))
    except DamagedRecord as error:
        raise InputError(f"{error}: restore it or move it away") from error


def is_removed(key: str) -> bool:
    """Whether a key or a section that contains it was removed."""
    return covers(REMOVED, key)


def new_key(key: str) -> str:
    """Current name of a key, by its own old name or that of a section that contains it."""
    section = key
    while section not in RENAMED:
        section, dot, _ = section.rpartition(".")
        if not dot:
            return key
    return new_key(RENAMED[section] + key.removeprefix(section))  # it may have changed twice


def warn_once(source: str, changes: list[str]) -> None:
    """Log the first three changes, once per source."""
    if changes and source not in _warned:
        _warned.add(source)
        more = f", and {len(changes) - 3} more (CHANGELOG.md)" if len(changes) > 3 else ""
        logger.warning(f"{source} has old keys: {'; '.join(changes[:3])}{more}")
