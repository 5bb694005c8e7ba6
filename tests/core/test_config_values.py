"""Every key of every command with wrong values: a valid config, or one line that names the key."""

import json
import random
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, is_dataclass, make_dataclass
from functools import cache
from math import inf, nan
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.compose import compose_config, convert
from core.config_errors import format_error
from core.errors import InputError
from core.ranges import Range, range_of
from core.records import parse_typed
from core.schema import ENTRY, check_values, config_keys, without_none
from data.config import BrowseConfig, PrepareConfig, VerifyConfig
from eval.config import EvaluationConfig
from launch import attempt
from launch.config import SubmitConfig
from launch.planning.dryrun_config import DryRunConfig
from model.config import ModelConfig
from tests.tiny import TINY

SCHEMAS = (
    DryRunConfig,  # with all sections of pretrain, doctor and plan
    SubmitConfig,
    EvaluationConfig,
    PrepareConfig,
    VerifyConfig,
    BrowseConfig,
)
NUMBERS = (-1, 0, -0.5, 1e400, nan, 10**30, -(10**30), 1e30)
OTHERS = (None, "", "text", True, [], [1], {}, {"a": 1}, "???", "${nowhere}")
SAMPLES_PER_KEY = 3
WHOLE = 4  # one key of so many is converted with all sections, which takes ten times as long


ROW = "{label: a, task: b, shots: 0, metrics: [c], floor: 0, floors: {d: 0.5}, by_size: true}"
SCORES = "{b: [1.0]}"


@cache
def composed() -> DictConfig:
    """The demo cut to one source, stage and row of a leaderboard: a quarter of the time."""
    others = ("code", "technical", "curated", "math")
    overrides = [
        "+experiment=demo",
        "browse.source=web",
        *(f"~data.sources.{name}" for name in others),
        "data.stages=[{name: a, tokens: 1000000, seq_len: 128, mixture: {web: 1}}]",
        f"leaderboard.suite={{name: a, max_length_tokens: 8, rows: [{ROW}], published: {SCORES}}}",
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
    assert ": nan" not in str(asdict(typed)), key
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


def numbers(kind: Any, key: str = "") -> Iterator[tuple[str, type, Range | None]]:
    """Every numeric key below a type, entries of lists and dicts included, with its range."""
    kind = without_none(kind)
    if is_dataclass(kind):
        for name, hint in get_type_hints(kind, include_extras=True).items():
            yield from numbers(hint, f"{key}.{name}" if key else name)
    elif get_origin(kind) in (list, dict):
        yield from numbers(get_args(kind)[-1], f"{key}.{ENTRY}")
    elif get_args(kind)[:1] in ((int,), (float,)) or kind in (int, float):
        yield key, (get_args(kind) or (kind,))[0], range_of(kind)


def numbers_by_schema() -> dict[str, tuple[type, type, Range | None]]:
    """Every numeric key, with the first schema that has it, its type and its range."""
    return {
        key: (schema, kind, limits)
        for schema in reversed(SCHEMAS)
        for key, kind, limits in numbers(schema)
    }


def test_every_number_declares_its_range() -> None:
    found = numbers_by_schema()
    assert [key for key, (_, _, limits) in found.items() if limits is None] == []
    assert len(found) > 100 and {"optim.lr", "data.stages.*.mixture.*"} < found.keys()
    keys = {key for schema in SCHEMAS for key in config_keys(schema)}
    assert {key.removesuffix(f".{ENTRY}").removesuffix(f".{ENTRY}") for key in found} <= keys


def test_a_number_outside_its_range_is_one_line_with_its_key() -> None:
    """The whole conversion refuses NaN, and its check all other values."""
    plain = OmegaConf.to_container(composed())
    for pattern, (schema, kind, limits) in numbers_by_schema().items():
        assert limits is not None
        key = filled(pattern)
        section = key.partition(".")[0]
        line = tried(only(schema, section), key, nan)
        assert line is not None and line.startswith(f"{key} is nan: set a "), (key, line)
        values: list[Any] = [limits.low - 1, -inf, 10**20, 10**400, "some", "", True, [1], {}]
        values += [] if limits.infinite else [inf]
        values += [limits.low] if limits.above else []
        values += [limits.high] if limits.below else [limits.high * 2]
        values += [1.5] if kind is int else []
        for value in values:
            with pytest.raises(InputError, match=f"^{re.escape(key)} is [^\n]*: set a [^\n]*$"):
                check_values(only(schema, section), with_value(plain, key, value))
        if limits.infinite:
            check_values(only(schema, section), with_value(plain, key, inf))


def with_value(plain: Any, key: str, value: Any) -> Any:
    """A copy of nested dicts and lists, along the key only, with a value at the key."""
    name, _, rest = key.partition(".")
    index = int(name) if isinstance(plain, list) else name
    copied = plain.copy()
    present = index < len(plain) if isinstance(index, int) else index in plain
    copied[index] = with_value(plain[index] if present else {}, rest, value) if rest else value
    return copied


@pytest.mark.parametrize(
    ("limits", "value", "problem"),
    [
        (Range(0, 1), "half", "is 'half': set a number from 0 to 1"),
        (Range(1), 0, "is 0: set a number of at least 1"),
        (Range(1), 1e30, "is 1e+30: set a number from 1 to 9007199254740992"),
        (Range(1), 10**400, "is beyond 1e300: set a number from 1 to 9007199254740992"),
        (Range(0, above=True, hint="1e9: none"), -1, "is -1: set a number above 0 (1e9: none)"),
        (Range(0, 1), nan, "is nan: set a number from 0 to 1"),
        (Range(0, 1, below=True), 1, "is 1: set a number of at least 0 and below 1"),
        (Range(0, above=True, infinite=True), 0, "is 0: set a number above 0, or inf"),
        (Range(0, above=True, infinite=True), inf, None),
        (Range(0, 2**63 - 1), 2**63 - 1, None),
    ],
)
def test_a_range_says_what_to_set(limits: Range, value: Any, problem: str | None) -> None:
    assert limits.problem(value) == problem


@pytest.mark.parametrize(
    "wrong",
    [{"norm_eps": nan}, {"d_state": 0}, {"d_model": 1.5}, {"dt_rank": "2"}, {"n_layer": True}],
)
def test_a_model_of_another_file_is_checked_too(wrong: dict[str, Any]) -> None:
    """As a config.json of transformers, or a checkpoint's record, may hold it."""
    values = asdict(TINY) | wrong
    key = next(iter(wrong))
    with pytest.raises(InputError, match=key):
        parse_typed(json.dumps(values), ModelConfig, "state.json")


@pytest.mark.parametrize("text", ["0", "-1", "x", "1.5", "nan", "1" + "0" * 20])
def test_an_argument_outside_its_range_is_refused(
    text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["launch/attempt.py", "end", "x", "--bad-nodes", "y", f"--crashes={text}"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit):
        attempt.main()
    assert "--crashes: is " in capsys.readouterr().err.splitlines()[-1]
