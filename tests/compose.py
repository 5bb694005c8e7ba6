"""Configurations as the entry points get them, without a process."""

from typing import TypeVar

from hydra import compose, initialize_config_dir

from core.command import CONFIGS, convert
from train.config import RunConfig

Schema = TypeVar("Schema")


def typed(schema: type[Schema], experiment: str, *overrides: str) -> Schema:
    """The sections that a schema names of an experiment with overrides."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return convert(schema, compose("config", [f"+experiment={experiment}", *overrides]))


def run_config(experiment: str, *overrides: str) -> RunConfig:
    """The typed config of an experiment with overrides."""
    return typed(RunConfig, experiment, *overrides)
