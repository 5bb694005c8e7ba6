"""Every key of every command with wrong values: a valid config, or one line that names the key."""

import random
from copy import deepcopy
from dataclasses import asdict, make_dataclass
from functools import cache
from typing import get_type_hints

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.compose import compose_config, convert
from core.config_errors import format_error
from core.errors import InputError
from core.schema import ENTRY, config_keys, leaves
from data.config import BrowseConfig, PrepareConfig, VerifyConfig
from eval.config import EvaluationConfig
from launch.config import SubmitConfig
from launch.planning.dryrun_config import DryRunConfig

SCHEMAS = (
    DryRunConfig,  # with all sections of pretrain, doctor and plan
    SubmitConfig,
    EvaluationConfig,
    PrepareConfig,
    VerifyConfig,
    BrowseConfig,
)
NUMBERS = (-1, 0, -0.5, 1e400, float("nan"), 10**30, -(10**30), 1e30)
OTHERS = (None, "", "text", True, [], [1], {}, {"a": 1}, "???", "${nowhere}")
SAMPLES_PER_KEY = 3
WHOLE = 4  # one key of so many is converted with all sections, which takes ten times as long


ROW = "{label: a, task: b, shots: 0, metrics: [c], floor: 0, floors: {d: 0.5}, by_size: true}"


@cache
def composed() -> DictConfig:
    """The demo cut to one source, stage and row of a leaderboard: a quarter of the time."""
    others = ("code", "technical", "curated", "math")
    overrides = [
        "+experiment=demo",
        "browse.source=web",
        *(f"~data.sources.{name}" for name in others),
        "data.stages=[{name: a, tokens: 1e6, seq_len: 128, mixture: {web: 1}}]",
        f"leaderboard.suite={{name: a, max_length_tokens: 8, rows: [{ROW}], published: {{}}}}",
        "+leaderboard.suite.include=null",
        "+leaderboard.suite.limit_documents=null",
    ]
    return compose_config(overrides)


def filled(key: str) -> str:
    """The key of an existing entry."""
    config = composed()
    parts: list[str] = []
    for part in key.split("."):
        if part == ENTRY:
            node = OmegaConf.select(config, ".".join(parts))
            part = "0" if OmegaConf.is_list(node) else str(next(iter(node)))
        parts.append(part)
    return ".".join(parts)


def tried(schema: type, key: str, value: object) -> str | None:
    """The error's line of a config with this value; None where it is valid.

    Every other exception is a failure of the test.
    """
    config = deepcopy(composed())
    OmegaConf.set_struct(config, False)
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(config, parent)
    if parent.rpartition(".")[2] == "assets" or node is None:
        OmegaConf.update(config, parent, {}, force_add=True)
        node = OmegaConf.select(config, parent)
    try:
        node[int(name) if OmegaConf.is_list(node) else name] = value
        typed = convert(schema, config)
    except (InputError, HydraException, OmegaConfBaseException) as error:
        return format_error(error, config_keys(schema))
    for leaf, number in leaves(asdict(typed)):
        assert not isinstance(number, float) or number == number, leaf
    return None


def keys_by_schema() -> dict[str, type]:
    """Every key, with the first schema that has it."""
    return {filled(key): schema for schema in reversed(SCHEMAS) for key in config_keys(schema)}


@cache
def only(schema: type, section: str) -> type:
    """The schema with one of its sections."""
    return make_dataclass(section, [(section, get_type_hints(schema)[section])])


def test_any_value_is_valid_or_one_line_names_its_key() -> None:
    chosen = random.Random(0)
    for number, (key, schema) in enumerate(keys_by_schema().items()):
        if number % WHOLE:
            schema = only(schema, key.partition(".")[0])
        for value in chosen.sample(NUMBERS + OTHERS, SAMPLES_PER_KEY):
            line = tried(schema, key, value)
            if line is not None:
                assert "\n" not in line, (key, value, line)
                assert key.rpartition(".")[2] in line, (key, value, line)
