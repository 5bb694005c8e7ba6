"""Safetensors files computed from shapes alone, then written in pieces: no tensor is ever whole in
memory.

The layout is transformers' own (`save_pretrained`): tensors fill files in the order of its state
dict, a file is closed before it would hold more than max_bytes of tensors; inside a file tensors
stand by size of their type, widest first, then by name, behind a header of JSON padded to 8 bytes.
Verified against the sizes of tiiuae/falcon-mamba-7b.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MAX_FILE_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
CHUNK = 1 << 24  # elements that are read and converted at once: 64 MiB of fp32


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: our name and theirs, type and shape on disk."""

    ours: str
    theirs: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Size on disk."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class File:
    """One safetensors file: its name and its tensors in the order they are written."""

    name: str
    entries: list[Entry]

    @property
    def header(self) -> bytes:
        """Length, JSON and padding that precede the tensors."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self.entries:
            table[entry.theirs] = {
                "dtype": TYPES[entry.dtype],
                "shape": list(entry.shape),
                "data_offsets": [offset, offset + entry.size],
            }
            offset += entry.size
        text = json.dumps(table, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    @property
    def size(self) -> int:
        """Size of the whole file."""
        return len(self.header) + sum(entry.size for entry in self.entries)


@dataclass(frozen=True)
class Layout:
    """All weight files of a model, and its index when there are several."""

    files: list[File]

    @property
    def size(self) -> int:
        """Size of everything that is written."""
        return sum(file.size for file in self.files) + len(self.index or b"")

    @property
    def index(self) -> bytes | None:
        """The file that says which tensor lies where; None for a single file."""
        if len(self.files) == 1:
            return None
        total = sum(entry.size for file in self.files for entry in file.entries)
        places = {entry.theirs: file.name for file in self.files for entry in file.entries}
        return json_bytes({"metadata": {"total_size": total}, "weight_map": places})


def json_bytes(value: dict[str, Any]) -> bytes:
    """JSON as transformers writes it: two spaces, sorted keys, a newline at the end."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def plan(entries: Iterator[Entry], max_bytes: int = MAX_FILE_BYTES) -> Layout:
    """Which tensor goes into which file; entries come in the order of transformers' state dict."""
    groups: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        if groups[-1] and held + entry.size > max_bytes:
            groups.append([])
            held = 0
        groups[-1].append(entry)
        held += entry.size
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [
            f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            for number in range(len(groups))
        ]
    ordered = [
        sorted(group, key=lambda entry: (-entry.dtype.itemsize, entry.theirs)) for group in groups
    ]
    return Layout([File(name, group) for name, group in zip(names, ordered, strict=True)])


def write(
    folder: Path,
    layout: Layout,
    rows: Callable[[str, int, int], Tensor],
    say: Callable[[str], None],
) -> None:
    """Write every file; `rows(name, start, stop)` gives rows in fp32, `say` logs each file."""
    for file in layout.files:
        say(f"{file.name}: {len(file.entries)} tensors, {file.size:,} bytes")
        with (folder / file.name).open("xb") as out:
            out.write(file.header)
            for entry in file.entries:
                for part in _parts(entry, rows):
                    out.write(part)
        assert (folder / file.name).stat().st_size == file.size, file.name
    if layout.index is not None:
        (folder / INDEX).write_bytes(layout.index)


def _parts(entry: Entry, rows: Callable[[str, int, int], Tensor]) -> Iterator[Any]:
    """The bytes of a tensor, a few rows at a time."""
    step = max(1, CHUNK // prod(entry.shape[1:]))
    for start in range(0, entry.shape[0], step):
        part = (
            rows(entry.ours, start, min(start + step, entry.shape[0])).to(entry.dtype).contiguous()
        )
        yield part.flatten().view(torch.uint8).numpy()
