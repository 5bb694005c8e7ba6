"""Where a start takes its weights from: its own checkpoint, a parent's, or initial weights."""

import json
import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from core.errors import InputError
from core.files import sha256_of
from core.old_keys import read_record
from core.run import RunFiles
from core.schema import covers
from data.stream.manifests import tokenizer_path
from data.stream.mixture import Plan
from eval.hf.exported import check_if_export
from model.checkpoint import CheckpointReader, read_model, read_state
from model.find_checkpoint import resolve_checkpoint
from model.flops import parameter_shapes
from model.hf import config_differences, load_hf_weights
from model.mamba import FalconMamba
from model.sharding import shard
from train.checkpoint.manager import CheckpointManager, TrainState, read_train_state
from train.config import RunConfig
from train.distributed import Ranks, broadcast_text, errors_on_all_ranks, raise_on_all_ranks
from train.engines.protocol import Engine
from train.record.changes import (
    DATA_ORDER,
    SOURCES_OF_WEIGHTS,
    Change,
    check_changes,
    find_changes,
    join,
)

logger = logging.getLogger(__name__)
# keys of run.accept_changes: weights of another vocabulary, a branch from inside a decay
VOCABULARY = "data.tokenizer"
DECAY = "schedule.decay_tokens"


@dataclass(frozen=True)
class Origin:
    """A verified checkpoint that a start continues, and how its settings differ."""

    checkpoint: Path
    is_branch: bool  # a checkpoint of another run
    changes: list[Change]  # of the first rank; empty on other ranks
    accepted: list[Change]  # those of them that change the mathematics


def find_origin(
    config: RunConfig,
    record: dict[str, Any],
    plan: Plan,
    checkpoints: CheckpointManager,
    ranks: Ranks,
) -> Origin | None:
    """Find the checkpoint to continue; compare it with the plan and `record`, the present settings.

    The run's newest valid checkpoint, else run.branch_from; None for a new run. Raises InputError,
    on every rank, for another past or a change that run.accept_changes does not name.
    """
    folder = checkpoints.find_latest()
    is_branch = folder is None and config.run.branch_from is not None
    if is_branch:
        path = Path(str(config.run.branch_from))
        folder, is_hf = resolve_on_first(path, "run.branch_from", ranks)
        if is_hf:
            raise InputError(
                f"run.branch_from: {folder} has no optimizer state: name a checkpoint, or set "
                "run.init_from to load its weights"
            )
        if folder.parent.resolve() == checkpoints.folder.resolve():
            raise InputError("run.branch_from is this run's own: choose another run.name")
    if folder is None:
        return None
    origin = Origin(folder, is_branch, [], [])
    with errors_on_all_ranks():
        if ranks.is_first:
            origin = compare(origin, config.run.accept_changes, record, plan)
    return origin


def compare(origin: Origin, accept: Collection[str], record: dict[str, Any], plan: Plan) -> Origin:
    """Return the origin with the settings that differ; InputError for a difference not accepted."""
    state = read_train_state(origin.checkpoint)
    try:
        before = trained_with(origin.checkpoint, state)
        changes = find_changes(before, record)
        if origin.is_branch:  # where its weights came from is said apart
            changes = [change for change in changes if not covers(SOURCES_OF_WEIGHTS, change.key)]
        check_data(state, plan, changes, is_branch=origin.is_branch)
        accepted = check_changes(changes, accept, is_branch=origin.is_branch)
        if origin.is_branch and not covers(accept, DECAY):
            check_rates(state.tokens, before, record)
    except InputError as error:
        raise InputError(f"{origin.checkpoint}: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{origin.checkpoint}: state.json has no record of a start ({type(error).__name__}: "
            f"{error}): move it away to load the one before"
        ) from error
    return replace(origin, changes=changes, accepted=accepted)


def trained_with(checkpoint: Path, state: TrainState) -> dict[str, Any]:
    """Settings that a checkpoint was trained with.

    Older checkpoints have only the model's; the others are in the run's config.yaml, if there is
    one.
    """
    config = state.config
    for section in ("run", "data", "optim", "schedule"):
        if config and not isinstance(config.get(section), dict):
            raise InputError(f"state.json has no record of a start: config has no {section}")
    if not config:
        config = read_record(RunFiles(checkpoint.parent.parent).config)
        if not config:
            logger.warning(f"{checkpoint} has no record of its settings, only of its model's")
    return {**config, "model": state.model}


def check_data(state: TrainState, plan: Plan, changes: list[Change], *, is_branch: bool) -> None:
    """Raise InputError unless a checkpoint's tokens are the plan's first, and a branch has more."""
    if state.tokens > plan.tokens:
        raise InputError(
            f"the checkpoint has {state.tokens:,} tokens, more than the {plan.tokens:,} of the "
            "stages: make a stage longer"
        )
    earlier = ", or name an earlier checkpoint in run.branch_from" if is_branch else ""
    if state.plan not in (plan.hash_at(state.tokens), plan.old_hash):
        of_data = join([change for change in changes if covers(DATA_ORDER, change.key)])
        raise InputError(
            f"the checkpoint has another data plan: its first {state.tokens:,} tokens had other "
            f"shards, sources or stages{f' ({of_data})' if of_data else ''}: restore "
            f"them, or choose another run.name{earlier}"
        )
    if state.tokens < plan.tokens:
        stage = plan.stage_at(state.tokens)
        if (state.tokens - stage.first_token) % stage.seq_len:
            raise InputError(
                f"no step of the plan ends at its {state.tokens:,} tokens: sequences of stage "
                f"{stage.name} have {stage.seq_len:,}"
            )
    if is_branch and state.tokens == plan.tokens:
        raise InputError(
            f"the checkpoint has all {plan.tokens:,} tokens of the stages: make a stage longer"
            f"{earlier}"
        )


def check_rates(tokens: int, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise InputError if a branch's decay would change rates that its checkpoint was trained at.

    A checkpoint without a record of its schedule passes, and one in the first blocks of a decay:
    stages are rounded down to whole blocks, so that a decay as long as a stage begins before it.
    """
    recorded = [decay_of(record) for record in (before, now) if "schedule" in record]
    start = min(start for start, *_ in recorded)
    data = now["data"]
    rounding = data["block_tokens"] * len(data["stages"])
    if recorded[0] != recorded[-1] and tokens > start + rounding:
        raise InputError(
            f"the checkpoint is not of the stable stage: the decay starts at {start:,} tokens in "
            "one of the two schedules, so its rates were others. Name an earlier checkpoint in "
            f"run.branch_from, or accept that: 'run.accept_changes=[{DECAY}]'"
        )


def decay_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Return the token at which the decay of a recorded config starts, and all that shapes it."""
    block, schedule = record["data"]["block_tokens"], record["schedule"]
    total = sum(stage["tokens"] // block * block for stage in record["data"]["stages"])
    shape = [schedule[key] for key in ("decay_tokens", "decay_shape", "min_lr")]
    return total - schedule["decay_tokens"], *shape


def resume(
    checkpoints: CheckpointManager, origin: Origin, engine: Engine, new: TrainState
) -> TrainState:
    """Load a checkpoint into the engine; return its position, with the record of `new`."""
    state = checkpoints.load(origin.checkpoint, engine)
    state.model, state.config, state.tokenizer = new.model, new.config, new.tokenizer
    if origin.is_branch:
        state.unwritten = []
    return state


def resolve_on_first(path: Path, key: str, ranks: Ranks) -> tuple[Path, bool]:
    """Resolve a path on the first rank, for every rank, and say if it is a transformers folder.

    Any other path is resolved to a verified checkpoint. Raises InputError on every rank.
    """
    is_hf, folder, error = False, path, None
    if ranks.is_first:
        is_hf = (path / "config.json").is_file()
        try:
            folder = path if is_hf else resolve_checkpoint(path)
        except (OSError, ValueError) as failed:
            error = f"{key}: {failed}"
    raise_on_all_ranks(error)
    kind, _, text = broadcast_text(f"{'hf' if is_hf else 'checkpoint'}:{folder}").partition(":")
    return Path(text), kind == "hf"


def load_initial_weights(model: FalconMamba, config: RunConfig, ranks: Ranks) -> str | None:
    """Load the weights that run.init_from names; return what was loaded, or None if it is not set.

    Raises InputError, on every rank, if they have another shape or another vocabulary than the
    data, unless run.accept_changes names data.tokenizer.
    """
    if config.run.init_from is None:
        return None
    folder, is_hf = resolve_on_first(Path(config.run.init_from), "run.init_from", ranks)
    error = None
    try:
        if ranks.is_first and is_hf:
            check_if_export(folder)
        if ranks.is_first and not covers(config.run.accept_changes, VOCABULARY):
            check_vocabulary(folder, is_hf, tokenizer_path(config.data))
        if is_hf:
            load_hf_weights(model, folder, ranks.tp_rank, ranks.tp_size)
        else:
            load_checkpoint_weights(model, folder, ranks.tp_rank, ranks.tp_size)
    except InputError as failed:
        error = f"run.init_from: {failed}"
    raise_on_all_ranks(error)
    if is_hf:
        return f"transformers folder {folder}"
    return f"checkpoint {folder}, {read_state(folder)['tokens']:,} tokens"


@torch.no_grad()
def load_checkpoint_weights(model: FalconMamba, folder: Path, tp_rank: int, tp_size: int) -> None:
    """Load the weights of a verified checkpoint; InputError if its model has another shape."""
    saved = read_model(folder)
    if overrides := config_differences(saved, model.config):
        raise InputError(f"{folder} has another shape: give {' '.join(overrides)}")
    reader = CheckpointReader(folder)
    reader.require(parameter_shapes(model.config), ("param",))
    for name, parameter in model.named_parameters():
        parameter.copy_(shard(name, reader.read_full("param", name), tp_rank, tp_size))


def check_vocabulary(folder: Path, is_hf: bool, expected: Path) -> None:
    """Raise InputError unless weights were trained with the tokenizer at `expected`."""
    accept = f"'run.accept_changes=[{VOCABULARY}]' loads them all the same"
    if is_hf:
        path = folder / expected.name
        if not path.is_file():
            raise InputError(
                f"{folder} has no {path.name} to compare with {expected}: put that of the weights "
                f"there; {accept}"
            )
        if sha256_of(path) == sha256_of(expected) or vocabulary(path) == vocabulary(expected):
            return
        reason = f"{path} differs from {expected}"
    else:
        saved = read_state(folder).get("tokenizer")
        if saved == sha256_of(expected):
            return
        reason = f"{folder} was trained with tokenizer.json of sha256 {saved}, not {expected}"
        if not saved:
            reason = f"{folder}, of an older version, has no record of its vocabulary"
            accept = f"export it with eval/export.py and name the export; {accept}"
    raise InputError(
        f"{reason}: the same text would have other token ids. Set data.tokenizer.path to the "
        f"weights' tokenizer.json and prepare the data again; {accept}"
    )


def vocabulary(path: Path) -> Any:
    """All of a tokenizer.json that decides the ids of a text; libraries write it in several ways.

    Raises InputError if the file is no tokenizer.json.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        model = raw["model"]
        merges = [
            pair.split(" ", 1) if isinstance(pair, str) else pair
            for pair in model.get("merges", ())
        ]
        added = [(token["id"], token["content"]) for token in raw.get("added_tokens", ())]
        rules = [raw.get(key) for key in ("normalizer", "pre_tokenizer")]
        return model["vocab"], merges, sorted(added), rules
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a valid tokenizer.json ({error})") from error
