"""Write safetensors files in transformers' layout, a few rows at a time.

File layout as in `save_pretrained`: tensors fill files in the order of the state dict, and a file
is closed before it would exceed max_bytes of tensors. Within a file, tensors are sorted by element
size, largest first, then by name, after a JSON header padded to 8 bytes. Sizes equal those of
tiiuae/falcon-mamba-7b.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.files import write_bytes

MAX_FILE_BYTES = 5_000_000_000
INDEX = "model.safetensors.index.json"
TYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
CHUNK = 1 << 24  # elements read and converted at a time: 64 MiB of fp32


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: our name, transformers' name, dtype and shape on disk."""

    name: str
    hf_name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class File:
    """One safetensors file: its name, and its tensors in their order on disk."""

    name: str
    entries: list[Entry]

    @property
    def header(self) -> bytes:
        """Header length, JSON and padding."""
        table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for entry in self.entries:
            table[entry.hf_name] = {
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
        """Bytes of the file."""
        return len(self.header) + sum(entry.size for entry in self.entries)


@dataclass(frozen=True)
class Layout:
    """All weight files of a model, and an index if there are several."""

    files: list[File]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files) + len(self.index or b"")

    @property
    def index(self) -> bytes | None:
        """Content of the index file; None for a single weight file."""
        if len(self.files) == 1:
            return None
        total = sum(entry.size for file in self.files for entry in file.entries)
        weight_map = {entry.hf_name: file.name for file in self.files for entry in file.entries}
        return json_bytes({"metadata": {"total_size": total}, "weight_map": weight_map})


def json_bytes(value: dict[str, Any]) -> bytes:
    """Serialise as transformers does: indented by two, sorted keys, final newline."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()


def plan_files(entries: Iterator[Entry], max_bytes: int = MAX_FILE_BYTES) -> Layout:
    """Assign tensors to files; `entries` are in the order of transformers' state dict."""
    groups: list[list[Entry]] = [[]]
    group_bytes = 0
    for entry in entries:
        if groups[-1] and group_bytes + entry.size > max_bytes:
            groups.append([])
            group_bytes = 0
        groups[-1].append(entry)
        group_bytes += entry.size
    if len(groups) == 1:
        names = ["model.safetensors"]
    else:
        names = [
            f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
            for number in range(len(groups))
        ]
    ordered = [
        sorted(group, key=lambda entry: (-entry.dtype.itemsize, entry.hf_name)) for group in groups
    ]
    return Layout([File(name, group) for name, group in zip(names, ordered, strict=True)])


def write_files(
    folder: Path,
    layout: Layout,
    read_rows: Callable[[str, int, int], Tensor],
    log: Callable[[str], None],
) -> dict[str, str]:
    """Write all weight files; returns their SHA-256 by name, made of the bytes on their way.

    `read_rows(name, start, stop)` returns fp32 rows, `log` takes a line.
    """
    hashes: dict[str, str] = {}
    for file in layout.files:
        log(f"{file.name}: {len(file.entries)} tensors, {file.size:,} bytes")
        digest = hashlib.sha256()
        with (folder / file.name).open("xb") as out:
            for data in _file_bytes(file, read_rows):
                digest.update(data)
                out.write(data)
        assert (folder / file.name).stat().st_size == file.size, file.name
        hashes[file.name] = digest.hexdigest()
    if layout.index is not None:
        write_bytes(folder / INDEX, layout.index)
    return hashes


def _file_bytes(file: File, read_rows: Callable[[str, int, int], Tensor]) -> Iterator[Any]:
    """Yield a file's bytes, a few rows at a time."""
    yield file.header
    for entry in file.entries:
        yield from _tensor_bytes(entry, read_rows)


def _tensor_bytes(entry: Entry, read_rows: Callable[[str, int, int], Tensor]) -> Iterator[Any]:
    """Yield a tensor's bytes, a few rows at a time."""
    step = max(1, CHUNK // prod(entry.shape[1:]))
    for start in range(0, entry.shape[0], step):
        rows = read_rows(entry.name, start, min(start + step, entry.shape[0]))
        yield rows.to(entry.dtype).contiguous().flatten().view(torch.uint8).numpy()
