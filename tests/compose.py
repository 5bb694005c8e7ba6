"""Configurations as the entry points get them, without a process."""

from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar

from omegaconf import DictConfig

from core.compose import compose_config, convert
from train.config import RunConfig

Schema = TypeVar("Schema")


def typed(schema: type[Schema], experiment: str, *overrides: str) -> Schema:
    """The sections that a schema names of an experiment with overrides."""
    if overrides:
        config = compose_config([f"+experiment={experiment}", *overrides], schemas=[schema])
        return convert(schema, config)
    return convert(schema, deepcopy(_composed(experiment)))


def laid_out(run: RunConfig, **changes: Any) -> RunConfig:
    """The run with other values in the sections `parallel` and `compute`."""
    parallel = {name: v for name, v in changes.items() if name in vars(run.parallel)}
    compute = {name: v for name, v in changes.items() if name not in parallel}
    return replace(
        run, parallel=replace(run.parallel, **parallel), compute=replace(run.compute, **compute)
    )


def run_config(experiment: str, *overrides: str) -> RunConfig:
    """The typed config of an experiment with overrides."""
    return typed(RunConfig, experiment, *overrides)


def demo() -> RunConfig:
    """The demo's typed config, a copy of one that is made once in a process: tests ask for it by
    the hundred, and making it takes a quarter of a second.
    """
    return deepcopy(_demo())


@cache
def _demo() -> RunConfig:
    return run_config("demo")


@cache  # most of the time of a typed config; what comes from the environment is read later
def _composed(experiment: str) -> DictConfig:
    return compose_config([f"+experiment={experiment}"])
