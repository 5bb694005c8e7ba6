"""Keys of earlier versions: accepted on command lines, in configs of one's own and in the
config.yaml of finished runs, with one warning.

To rename a key, add a line to RENAMED; CHANGELOG.md says since when.
"""

import logging
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

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
    "eval.suite": "leaderboard.suite",
    "eval.jobs": "leaderboard.jobs",
    "plan.node_gbytes": "plan.node_gbytes_per_second",
    "plan.network_gbytes": "plan.network_gbytes_per_second",
    "plan.storage_gbytes": "plan.storage_gbytes_per_second",
    "plan.host_gbytes": "plan.host_gbytes_per_second",
    "world": "dryrun.world_size",
}
REMOVED = (
    "eval.bench",  # it only sized a benchmark
    "plan.price_per_gpu_hour",
)
CHOICES = {  # of groups that had one choice, or have another name
    "optim=adamw": None,
    "schedule=wsd": None,
    "parallel=zero1": None,
    "checkpoint=local": None,
    "eval=default": None,
    "eval=leaderboard_v1": "suite=leaderboard_v1",
    "eval=leaderboard_v2": "suite=leaderboard_v2",
    **{f"{group}=default": None for group in ("browse", "health", "metrics", "plan", "slurm")},
    **{f"{group}=default": None for group in ("train", "verify")},
}
_warned: set[str] = set()


def renamed_overrides(words: Iterable[str]) -> list[str]:
    """Hydra's overrides with today's keys."""
    found: list[str] = []
    changes = []
    for word in words:
        if word in CHOICES:
            choice = CHOICES[word]
            changes.append(f"{word} is now {choice or 'the only choice'}")
            found += [choice] if choice else []
            continue
        match = re.match(r"(\+\+|\+|~)?([\w.]+)(.*)$", word, re.DOTALL)
        if match is None:
            found.append(word)
            continue
        prefix, key, rest = match.groups(default="")
        if key in REMOVED or key.startswith(tuple(f"{old}." for old in REMOVED)):
            changes.append(f"{key} has no effect any more")
        elif rest.startswith("={") and any(old.startswith(f"{key}.") for old in RENAMED):
            found.append(f"++{key}{rest}")  # its old keys are renamed when the config is composed
        elif (now := new_key(key)) != key:
            changes.append(f"{key} is now {now}")
            found.append(f"{prefix}{now}{rest}")
        else:
            found.append(word)
    warn("the command line", changes)
    return found


def rename_keys(config: DictConfig, where: str, given: Collection[str] = ()) -> None:
    """Move the values of old keys to today's, in place; keys that the command line gave win."""
    changes = []
    with open_dict(config):
        for old in sorted([*RENAMED, *REMOVED], key=len, reverse=True):
            section, _, name = old.rpartition(".")
            parent: Any = OmegaConf.select(config, section) if section else config
            if not isinstance(parent, DictConfig) or name not in parent:
                continue
            value: Any = parent._get_node(name)
            del parent[name]
            if old in REMOVED:
                changes.append(f"{old} has no effect any more")
                continue
            now = RENAMED[old]
            changes.append(f"{old} is now {now}")
            if now not in given:
                OmegaConf.update(config, now, value, merge=True)
    warn(where, changes)


def load_config(path: Path) -> DictConfig:
    """A run's config.yaml with today's keys."""
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    rename_keys(config, str(path))
    return config


def new_key(key: str) -> str:
    """Today's name of a key, or of the section above it."""
    above = key
    while above not in RENAMED:
        above, dot, _ = above.rpartition(".")
        if not dot:
            return key
    return RENAMED[above] + key.removeprefix(above)


def warn(where: str, changes: list[str]) -> None:
    """Name the first changes, once for each place."""
    if changes and where not in _warned:
        _warned.add(where)
        more = f", and {len(changes) - 3} more (CHANGELOG.md)" if len(changes) > 3 else ""
        logger.warning(f"{where} has old keys: {'; '.join(changes[:3])}{more}")
