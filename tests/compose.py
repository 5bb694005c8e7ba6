"""Configurations as the entry points get them, without a process."""

from dataclasses import replace
from typing import Any, TypeVar

from core.command import compose_config, convert
from train.config import RunConfig

Schema = TypeVar("Schema")


def typed(schema: type[Schema], experiment: str, *overrides: str) -> Schema:
    """The sections that a schema names of an experiment with overrides."""
    return convert(schema, compose_config([f"+experiment={experiment}", *overrides]))


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
