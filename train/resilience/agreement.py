"""Agreement of ranks: what all ranks must share is compared before the first step, at every start.

Ranks that differ in a setting, the code, a library or their kernels would train together without an
error: collectives add up whatever they are given. So each rank states its facts, name -> value.
Cost: a hash of 32 bytes per rank; values are sent only where hashes differ.
"""

import hashlib
import json
import os
import socket
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from core.files import ROOT, sha256_of
from core.run import MANIFEST
from core.schema import covers
from train.config import RunConfig
from train.distributed import broadcast_text, gather_hashes, raise_on_all_ranks
from train.record.changes import flatten
from train.record.history import to_plain, versions

# ranks may find the same shards elsewhere: their manifests are compared instead
MAY_DIFFER = ("data.folder",)
SOURCE_FOLDERS = ("core", "data", "eval", "model", "train")
SOURCE_SUFFIXES = (".py", ".cpp", ".cu", ".h")
# variables that change how torch and the libraries below it calculate
VARIABLES = ("NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "CUBLAS_WORKSPACE_CONFIG")
MAX_KEYS = 3  # that a message names
SAME_START = "start every rank with the same command, code and environment"


def start_facts(config: RunConfig, device: str) -> dict[str, str]:
    """What ranks must share before they build anything: settings, code, libraries, arithmetic."""
    settings = flatten(to_plain(asdict(config)))
    facts = {key: json.dumps(value) for key, value in settings if not covers(MAY_DIFFER, key)}
    facts["the code's hash"] = sources_hash()
    facts |= versions()
    facts["device"] = device
    facts["dtypes"] = (
        f"{torch.get_default_dtype()}, matmuls {torch.get_float32_matmul_precision()}, "
        f"tf32 {torch.backends.cuda.matmul.allow_tf32} {torch.backends.cudnn.allow_tf32}"
    )
    facts |= {name: os.environ.get(name, "not set") for name in VARIABLES}
    if device == "cpu":  # beside GPUs, processors of several kinds are normal
        facts["instruction set"] = torch.backends.cpu.get_cpu_capability()
    return facts


def check_same_checkpoint(folder: Path) -> None:
    """Raise InputError, on every rank, if a rank sees another checkpoint under this path, or none.

    Only the first rank hashes its files. A collective.
    """
    try:
        seen = sha256_of(folder / MANIFEST)
    except OSError as error:
        seen = f"unreadable ({error.strerror})"
    check_agreement(
        {"the checkpoint's manifest": seen}, f"mount the same {folder.parent} on every node"
    )


def sources_hash() -> str:
    """SHA-256 of the names and contents of all our sources, in 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for folder in SOURCE_FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in SOURCE_SUFFIXES:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{path.relative_to(ROOT)} {content}\n".encode())
    return digest.hexdigest()[:16]


def check_agreement(facts: Mapping[str, str], fix: str = SAME_START) -> None:
    """Raise InputError, on every rank, if a rank has other facts than most ranks.

    The message names rank, host, key and both values, and ends with `fix`. A collective.
    """
    hashes = gather_hashes(json.dumps(facts, sort_keys=True))
    counts = Counter(hashes)
    if len(counts) == 1:
        return
    # of equally many, those of the lower ranks
    reference = hashes.index(max(counts, key=counts.__getitem__))
    stated = {"host": socket.gethostname(), "facts": facts}
    theirs: dict[str, Any] = json.loads(broadcast_text(json.dumps(stated), source=reference))
    error = None
    if hashes[dist.get_rank()] != hashes[reference]:
        error = describe_difference(facts, theirs["facts"], reference, theirs["host"])
        if (more := len(hashes) - counts[hashes[reference]] - 1) > 0:
            error += f"; {more} other ranks differ too"
        error += f": {fix}"
    raise_on_all_ranks(error)


def describe_difference(
    facts: Mapping[str, str], theirs: Mapping[str, str], reference: int, host: str
) -> str:
    """How this rank's facts differ from those of rank `reference` on `host`."""
    keys = [key for key in sorted({*facts, *theirs}) if facts.get(key) != theirs.get(key)]
    pairs = [
        f"{key} {facts.get(key, 'missing')} instead of {theirs.get(key, 'missing')}"
        for key in keys[:MAX_KEYS]
    ]
    more = f" and {len(keys) - MAX_KEYS} more" if len(keys) > MAX_KEYS else ""
    return (
        f"rank {dist.get_rank()} on {socket.gethostname()} differs from rank {reference} on "
        f"{host}: {', '.join(pairs)}{more}"
    )
