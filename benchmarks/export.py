"""Benchmark of the 7B's export: `python -m benchmarks.export FOLDER`.

Writes a generated checkpoint of two ranks and exports its three files. Needs 44 GB of disk for some
minutes, prints sizes, peak memory and rate, and deletes FOLDER at the end.
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


def generated_values(name: str, start: int, stop: int) -> Tensor:
    """Values of elements [start, stop) of a flat shard, from their index."""
    return (torch.arange(start, stop) % 4093).float() * 1e-3


def write_checkpoint(folder: Path) -> None:
    """Write fp32 weights in flat shards of RANKS data-parallel ranks."""
    files = {}
    for rank in range(RANKS):
        shards = []
        entries = []
        for name, shape in parameter_shapes(run_config("7b").model).items():
            numel = torch.Size(shape).numel() // RANKS
            tensor_shard = TensorShard("param", name, shape, 0, 1, rank * numel, numel)
            shards.append(asdict(tensor_shard))
            entries.append(Entry(name, tensor_shard.key, torch.float32, (numel,)))
        stem = f"rank-{rank:05d}"
        write_files(folder, Layout([File(f"{stem}.safetensors", entries)]), generated_values, print)
        (folder / f"{stem}.json").write_text(json.dumps(shards))
        files |= {
            f"{stem}.{kind}": {"bytes": 0, "sha256": "0" * 64} for kind in ("json", "safetensors")
        }
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def peak_gib() -> float:
    """Peak resident memory of this process so far, mapped file pages included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(root: Path) -> None:
    """Write the checkpoint, measure the export and delete everything."""
    config = run_config("7b").model
    shapes = parameter_shapes(config)
    try:
        (root / "step").mkdir(parents=True)
        (root / "hf").mkdir()
        write_checkpoint(root / "step")
        before = peak_gib()
        reader = CheckpointReader(root / "step")
        entries = []
        for name, hf_name in tensor_names(config.n_layer):
            shape = to_hf(name, torch.empty(shapes[name], device="meta")).shape
            entries.append(Entry(name, hf_name, torch.bfloat16, tuple(shape)))
        layout = plan_files(iter(entries))
        start = time.perf_counter()
        write_files(
            root / "hf",
            layout,
            lambda name, begin, end: to_hf(name, reader.read_rows("param", name, begin, end)),
            print,
        )
        seconds = time.perf_counter() - start
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
