"""Checks of a run by launch/doctor.py and launch/submit.py: memory, folders, data and weights."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from core.errors import InputError
from core.files import check_folder
from core.run import iter_committed_checkpoints
from launch.planning.checks import Finding, run_device
from model.flops import parameter_count
from train.config import RunConfig
from train.costs.memory import GIB, check_memory

# whether another local file system is exported to the nodes cannot be seen from here
LOCAL_FILE_SYSTEMS = ("tmpfs", "ramfs", "overlay", "ext2", "ext3", "ext4", "xfs", "btrfs", "zfs")
CHECKPOINT_BYTES = 12  # per parameter: fp32 weights and two moments


def memory(config: RunConfig) -> Finding:
    """Check that the run's ranks fit the device's memory (train/costs/memory.py)."""
    import psutil
    import torch

    device = run_device(config)
    cluster = config.cluster
    if device == "cuda":
        available = torch.cuda.get_device_properties(0).total_memory
    else:
        available = psutil.virtual_memory().available
    try:
        check_memory(
            config,
            cluster.nodes * cluster.ranks_per_node,
            cluster.ranks_per_node,
            device,
            available,
        )
    except InputError as error:
        return Finding(
            "bad",
            str(error).split(": run ")[0],
            "python launch/plan.py shows the memory by purpose",
        )
    return Finding("ok", f"{available / GIB:.1f} GiB on the {device}")


def disk(config: RunConfig) -> Finding:
    """Check free space for the kept checkpoints and one in flight; test write and fsync."""
    existing = first_existing(config.run.folder)
    required = CHECKPOINT_BYTES * parameter_count(config.model) * (config.checkpoint.keep_last + 1)
    free = shutil.disk_usage(existing).free
    started_at = time.monotonic()
    with tempfile.TemporaryDirectory(dir=existing, prefix=".doctor-") as folder:
        path = Path(folder, "written.part")
        with path.open("wb") as file:
            file.write(os.urandom(16 << 20))
            file.flush()
            os.fsync(file.fileno())
        speed = 16 / (time.monotonic() - started_at)
    text = (
        f"{existing.resolve()}: {free / GIB:.0f} GiB free, {required / GIB:.2g} GiB needed; "
        f"{speed:.0f} MiB/s with fsync"
    )
    if free < required:
        return Finding(
            "bad", text, "free disk space, set another run.dir, or lower checkpoint.keep_last"
        )
    return Finding("ok", text)


def file_system(config: RunConfig) -> Finding:
    """Check that the folders of run and data are shared by the nodes, and hold links and renames.

    Writes nothing but a probe, in the first folder above the run's that exists.
    """
    import psutil

    folder = first_existing(config.run.folder)
    try:
        check_folder(folder, "run.dir", links=True)
    except (InputError, OSError) as error:
        return Finding("bad", str(error), "set another run.dir")
    types = {Path(disk.mountpoint): disk.fstype for disk in psutil.disk_partitions(all=True)}
    local = {}
    for key, path in (("run.dir", config.run.folder), ("data.folder", Path(config.data.folder))):
        place = first_existing(path).resolve()
        kind = next((types[each] for each in (place, *place.parents) if each in types), "")
        if kind in LOCAL_FILE_SYSTEMS:
            local[key] = f"{key} {path} is on {kind}, of this machine only"
    if config.cluster.nodes == 1 or not local:
        return Finding("ok", f"{folder.resolve()}: hard links and renames")
    fix = f"set {' and '.join(local)} to folders that all {config.cluster.nodes} nodes share"
    in_memory = any("tmpfs" in text or "ramfs" in text for text in local.values())
    return Finding("bad" if in_memory else "note", "; ".join(local.values()), fix)


def first_existing(folder: Path) -> Path:
    """The folder, or the nearest above it that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def data(config: RunConfig) -> Finding:
    """Check tokenizer, manifests and plan; python data/verify.py also reads the shards."""
    from data.stream.manifests import open_manifests
    from data.stream.mixture import Plan

    try:
        manifests = open_manifests(config.data)
        tokens = {name: manifest.tokens("train") for name, manifest in manifests.items()}
        Plan(config.data, tokens, dict.fromkeys(tokens, ""))
    except InputError as error:
        return Finding(
            "bad",
            str(error).split(": run `")[0],
            "run `python data/prepare.py` with the same overrides, or submit with --stages "
            "prepare,train",
        )
    total = sum(tokens.values())
    return Finding("ok", f"{len(manifests)} sources, {total:,} tokens in {config.data.folder}")


def weights(config: RunConfig) -> Finding:
    """Check that the weights of run.init_from are there and have the model's shape; reads none."""
    if config.run.init_from is None:
        return Finding("ok", "random: run.init_from is not set")
    if next(iter_committed_checkpoints(config.run.files.checkpoints), None) is not None:
        return Finding("ok", "of the run's own checkpoints, which count from its second start on")
    from model.find_checkpoint import list_checkpoints
    from model.hf import open_hf_folder

    folder = Path(config.run.init_from)
    try:
        if (folder / "config.json").is_file():
            open_hf_folder(folder, config.model)
        else:
            list_checkpoints(folder)
    except OSError as error:
        text = f"run.init_from: {error}"
        return Finding("note", text, "they must be there when the run starts")
    except InputError as error:
        return Finding("bad", f"run.init_from: {error}", "a run has the model of its weights")
    return Finding("ok", str(folder))


def preparation(config: RunConfig) -> None:
    """Raise InputError for settings with which python data/prepare.py would end at once."""
    from data.pipeline.settings import check_settings

    check_settings(config.data)


RUN_CHECKS: dict[str, Callable[[RunConfig], Finding]] = {
    "memory": memory,
    "disk": disk,
    "file system": file_system,
    "data": data,
    "weights": weights,
}
