"""Writes the 7B's three files from a made-up checkpoint of two ranks: `python -m benchmarks.export
FOLDER`.

Takes 44 GB of disk for some minutes, prints sizes, peak memory and rate, and removes everything
again.
"""

import json
import resource
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoint import CheckpointReader, TensorShard
from model.flops import parameter_shapes
from model.hf import tensor_names, to_hf
from model.hf_writer import CHUNK, Entry, File, Layout, plan_files, write_files
from tests.compose import run_config

RANKS = 2


def made_up(name: str, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of a flat piece: their number inside it, folded."""
    return (torch.arange(start, stop) % 4093).float() * 1e-3


def write_checkpoint(folder: Path) -> None:
    """fp32 weights in flat pieces over RANKS data-parallel ranks."""
    files = {}
    for rank in range(RANKS):
        shards, entries = [], []
        for name, shape in parameter_shapes(run_config("7b").model).items():
            numel = torch.Size(shape).numel() // RANKS
            piece = TensorShard("param", name, shape, 0, 1, rank * numel, numel)
            shards.append(asdict(piece))
            entries.append(Entry(name, piece.key, torch.float32, (numel,)))
        stem = f"rank-{rank:05d}"
        write_files(folder, Layout([File(f"{stem}.safetensors", entries)]), made_up, print)
        (folder / f"{stem}.json").write_text(json.dumps(shards))
        files |= {f"{stem}.{kind}": {"bytes": 0, "sha256": ""} for kind in ("json", "safetensors")}
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def peak_gib() -> float:
    """Highest resident memory of this process so far, mapped pages of files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(root: Path) -> None:
    """Build, export, measure, remove."""
    config = run_config("7b").model
    shapes = parameter_shapes(config)
    try:
        (root / "step").mkdir(parents=True)
        (root / "hf").mkdir()
        write_checkpoint(root / "step")
        before = peak_gib()
        reader = CheckpointReader(root / "step")
        named = (
            (o, t, to_hf(o, torch.empty(shapes[o], device="meta")).shape)
            for o, t in tensor_names(config.n_layer)
        )
        layout = plan_files(
            Entry(ours, theirs, torch.bfloat16, tuple(shape)) for ours, theirs, shape in named
        )
        begun = time.perf_counter()
        write_files(
            root / "hf",
            layout,
            lambda n, start, stop: to_hf(n, reader.read_rows("param", n, start, stop)),
            print,
        )
        seconds = time.perf_counter() - begun
        sizes = [path.stat().st_size for path in sorted((root / "hf").iterdir())]
        print(f"sizes {sizes}, chunk {CHUNK * 4 / 2**20:.0f} MiB of fp32")
        print(
            f"peak {peak_gib():.2f} GiB ({before:.2f} before), {seconds:.0f} s, "
            f"{sum(sizes) / seconds / 1e6:.0f} MB/s"
        )
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
