"""Checks of a data set's settings that read no document."""

from pathlib import Path

from data import recipes, tokenizer
from data.config import DataConfig
from data.pipeline import fingerprints
from data.stream.mixture import check_expected_plan


def check_settings(config: DataConfig) -> None:
    """Raise InputError for recipes, tasks, a tokenizer or stages that cannot be prepared."""
    for name, source in config.sources.items():
        recipes.check_known(source.recipe)
        fingerprints.check_num_tasks(Path(config.folder), name, source.tasks)
    if config.tokenizer.path is not None:
        tokenizer.load_for_training(config.tokenizer)
    check_expected_plan(config)
