"""Configurations as the entry points get them, without a process."""

from hydra import compose, initialize_config_dir

from data.command import CONFIGS, convert
from train.config import RunConfig


def run_config(experiment: str, *overrides: str) -> RunConfig:
    """The typed config of an experiment with overrides."""
    with initialize_config_dir(CONFIGS, version_base="1.3"):
        return convert(RunConfig, compose("config", [f"+experiment={experiment}", *overrides]))
