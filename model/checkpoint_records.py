"""Schemas of a checkpoint's JSON files; core/records.py checks every value against them."""

from dataclasses import dataclass, field, make_dataclass
from typing import Annotated, Any

from pydantic import Field

from core.ranges import Finite, Whole
from core.records import Sha256

FORMAT = 1
# plain names: nothing outside the folder can be named
FileName = Annotated[str, Field(pattern=r"^(state\.json|rank-[0-9]{5,9}\.(json|safetensors))$")]


@dataclass(frozen=True)
class FileRecord:
    """Size and hash of a file of a checkpoint."""

    bytes: Whole
    sha256: Sha256


@dataclass(frozen=True)
class ManifestRecord:
    """manifest.json: every other file of a checkpoint."""

    files: dict[FileName, FileRecord]


# `health` of state.json: the state of the spike detector, by its names in files
# (train/resilience/health.py); older checkpoints have no keys
SpikeState = make_dataclass(
    "SpikeState",
    [
        ("window", list[Finite], field(default_factory=list)),
        ("stage", str, ""),
        ("skipped", Whole, 0),
        ("spikes", Whole, 0),
        ("since", Whole | None, None),
        ("rewinds", Whole, 0),
        ("calm", Whole, 0),
    ],
    frozen=True,
)


@dataclass(frozen=True)
class StateRecord:
    """state.json: the fields of train's TrainState, and the format."""

    format: Annotated[int, Field(ge=FORMAT, le=FORMAT)]
    tokens: Whole
    step: Whole
    updates: Whole
    plan: str
    model: dict[str, bool | Whole | Finite]
    # absent in older checkpoints
    health: dict[str, Any] = field(default_factory=dict)  # a SpikeState
    config: dict[str, Any] = field(default_factory=dict)
    tokenizer: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    unwritten: list[str] = field(default_factory=list)  # lines of metrics.jsonl
