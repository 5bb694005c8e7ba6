"""Checks of launch/doctor.py: each is a function of the run's config and returns a finding."""

import importlib.metadata
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.errors import InputError
from core.files import ROOT
from model.flops import parameter_count
from train.config import Device, EngineKind, RunConfig
from train.costs.memory import GIB, check_memory

STATE_BYTES = 12  # of a checkpoint per parameter: fp32 weights and two moments


@dataclass(frozen=True)
class Finding:
    """What a check found: ok, a note that stops nothing, or bad, with the fix."""

    state: str
    text: str
    fix: str = ""


def python(config: RunConfig) -> Finding:
    """The interpreter, and whether packages are those of a checkout's constraints.txt."""
    constraints, interpreter = ROOT / "constraints.txt", sys.version.split()[0]
    if not constraints.is_file():
        return Finding("ok", f"{interpreter}; a wheel brings no pins to compare packages with")
    pinned = dict(re.findall(r"^([\w.\-]+)==(\S+)", constraints.read_text(encoding="utf-8"), re.M))
    wrong = []
    for name, version in pinned.items():
        try:
            have = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra; what is needed and absent fails its own check
        if have.split("+")[0] != version.split("+")[0]:
            wrong.append(f"{name} {have} instead of {version}")
    text = f"{interpreter}, {len(pinned)} pins"
    if wrong:
        return Finding(
            "note",
            f"{text}; {', '.join(wrong)}",
            "make install brings the versions that are tested together",
        )
    return Finding("ok", text)


def torch_and_driver(config: RunConfig) -> Finding:
    """torch, its CUDA, the driver, the GPUs."""
    import torch

    text = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        count = torch.cuda.device_count()
        text += f", CUDA {torch.version.cuda}, {count} x {', '.join(sorted(names))}"
        if config.cluster.device is Device.cuda and count < config.cluster.ranks_per_node:
            return Finding(
                "bad",
                text,
                f"set cluster.ranks_per_node={count}, or find the missing GPUs in nvidia-smi -L",
            )
        return Finding("ok", text)
    if config.cluster.device is Device.cuda:
        has_driver = shutil.which("nvidia-smi") is not None
        fix = (
            "install the torch build for your driver's CUDA"
            if has_driver
            else "install NVIDIA's driver"
        )
        return Finding(
            "bad", f"{text}, no GPU", f"{fix}, or set cluster.device=cpu parallel.engine=deepspeed"
        )
    if config.parallel.engine is EngineKind.megatron:
        return Finding(
            "bad", f"{text}, no GPU for parallel.engine=megatron", "set parallel.engine=deepspeed"
        )
    return Finding("ok", f"{text}, no GPU")


def kernels(config: RunConfig) -> Finding:
    """Compare the run's backend with the fp64 reference: values and gradients of a small scan."""
    import torch

    from model.kernels import REFERENCE, MissingBackend, load

    device = device_of(config)
    try:
        chosen = load(config.compute.kernels, device)
    except MissingBackend as error:
        return Finding("bad", str(error), "set compute.kernels=auto, or install what is missing")
    generator = torch.Generator().manual_seed(0)
    b, l, d, n = 2, 33, 16, 8
    shapes = {
        "u": (b, l, d),
        "dt": (b, l, d),
        "A": (d, n),
        "B": (b, l, n),
        "C": (b, l, n),
        "D": (d,),
        "z": (b, l, d),
    }
    drawn = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    drawn |= {
        "A": -torch.rand(d, n, generator=generator) - 0.1,
        "dt_bias": torch.randn(d, generator=generator),
    }
    doc_starts = (torch.rand(b, l, generator=generator) < 0.1).to(device)
    results = []
    for kernel, dtype in ((chosen, torch.float32), (REFERENCE, torch.float64)):
        inputs = {
            name: value.to(device, dtype, copy=True).requires_grad_()
            for name, value in drawn.items()
        }
        y, _ = kernel.selective_scan(*[*inputs.values(), doc_starts])
        y.square().sum().backward()
        results.append(
            [
                y.detach().double(),
                *(value.grad.double() for value in inputs.values() if value.grad is not None),
            ]
        )
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    text = f"{chosen.name} on {device}, relative error {max(errors):.1e}"
    if not max(errors) < 1e-4:
        return Finding(
            "bad",
            text,
            "set compute.kernels=reference, remove the compiled kernels' cache, and report it",
        )
    if chosen.name == "reference":
        return Finding(
            "note",
            text,
            "install g++ for the CPU kernels"
            if device == "cpu"
            else "make install brings cuda-core",
        )
    return Finding("ok", text)


def collectives(config: RunConfig) -> Finding:
    """An all-reduce over every rank of this machine by the library that the run would use."""
    device = device_of(config)
    backend = "nccl" if device == "cuda" else "gloo"
    ranks = config.cluster.ranks_per_node
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    begun = time.monotonic()
    command = [sys.executable, "-c", ALL_REDUCE, backend, str(ranks), str(port)]
    peers = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        errors = [peer.communicate(timeout=180)[1] for peer in peers]
    except subprocess.TimeoutExpired:
        errors = ["no answer within 180 s"]
    finally:
        for peer in peers:
            peer.kill()
    text = f"{backend}, {ranks} ranks, {time.monotonic() - begun:.0f} s with their start"
    failed = [error for peer, error in zip(peers, errors, strict=False) if peer.returncode]
    if failed or len(errors) < len(peers):
        last = (
            [line for line in (failed or errors)[0].splitlines() if line.strip()] or ["it died"]
        )[-1]
        variables = (
            "NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        )
        return Finding("bad", f"{text}: {last}", f"look at the network's interfaces: {variables}")
    return Finding("ok", text)


ALL_REDUCE = """
import sys, datetime, torch, torch.distributed as dist
backend, ranks, port, rank = sys.argv[1], *map(int, sys.argv[2:])
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks,
                        timeout=datetime.timedelta(seconds=90))
x = torch.full((1 << 20,), float(rank + 1), device=device)
dist.all_reduce(x)
assert (x == ranks * (ranks + 1) / 2).all(), "the sum is wrong"
dist.destroy_process_group()
"""


def memory(config: RunConfig) -> Finding:
    """Whether the run's ranks fit the device, by train/costs/memory.py."""
    import psutil
    import torch

    device, cluster = device_of(config), config.cluster
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
            str(error).split(". Run")[0],
            "python launch/plan.py shows what is needed, and of what",
        )
    return Finding("ok", f"{available / GIB:.1f} GiB on the {device}")


def disk(config: RunConfig) -> Finding:
    """Check room for the kept checkpoints and one in flight; test write, fsync and rename there."""
    place = config.run.folder
    while not place.exists():
        place = place.parent
    need = STATE_BYTES * parameter_count(config.model) * (config.checkpoint.keep_last + 1)
    free = shutil.disk_usage(place).free
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(dir=place, prefix=".doctor-") as folder:
        path = Path(folder, "written.part")
        with path.open("wb") as file:
            file.write(os.urandom(16 << 20))
            file.flush()
            os.fsync(file.fileno())
        path.rename(path.with_suffix(""))
        speed = 16 / (time.monotonic() - begun)
    text = (
        f"{place.resolve()}: {free / GIB:.0f} GiB free, {need / GIB:.2g} needed; 16 MiB durable "
        f"at {speed:.0f} MiB/s"
    )
    if free < need:
        return Finding(
            "bad", text, "make room, choose another run.dir, or lower checkpoint.keep_last"
        )
    return Finding("ok", text)


def data(config: RunConfig) -> Finding:
    """Tokenizer and manifest of each source; python data/verify.py reads the shards."""
    from data.stream.manifests import open_manifests

    try:
        manifests = open_manifests(config.data)
    except InputError as error:
        return Finding("bad", str(error), "python data/prepare.py with the same overrides")
    tokens = sum(
        shard.tokens for manifest in manifests.values() for shard in manifest.splits["train"]
    )
    return Finding("ok", f"{len(manifests)} sources, {tokens:,} tokens in {config.data.folder}")


def wandb(config: RunConfig) -> Finding:
    """Whether metrics would go online."""
    if config.metrics.wandb_project is None:
        return Finding("ok", "off (metrics.wandb_project=null)")
    if not os.environ.get("WANDB_API_KEY"):
        fix = "export WANDB_API_KEY, or `wandb sync` the run's folder later"
        return Finding("note", "no WANDB_API_KEY: offline into the run's folder", fix)
    host = re.sub(
        r"^\w+://([^/:]+).*", r"\1", os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    )
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError as error:
        return Finding(
            "note",
            f"{host} does not answer ({error}); runs go on offline",
            "see the network or WANDB_BASE_URL",
        )
    return Finding("ok", f"{host} answers")


def slurm(config: RunConfig) -> Finding:
    """Whether there is a controller, and whether it has as many nodes as the run asks for."""
    if shutil.which("sinfo") is None:
        return Finding("ok", "not here: python launch/submit.py --local runs without it")
    result = subprocess.run(
        ["sinfo", "-h", "-o", "%D %t"], capture_output=True, text=True, timeout=60
    )
    if result.returncode:
        why = ([*result.stderr.strip().splitlines(), "no answer"])[0]
        return Finding("note", f"sinfo: {why}", "ask for the controller, or see SLURM_CONF")
    states = [line.split() for line in result.stdout.splitlines()]
    up = sum(
        int(count) for count, state in states if not re.match(r"down|drain|fail|drng|unk", state)
    )
    text = f"{up} of {sum(int(count) for count, _ in states)} nodes are up"
    if up < config.cluster.nodes:
        return Finding(
            "bad",
            f"{text}, the run asks for {config.cluster.nodes}",
            "lower cluster.nodes, or wait for them",
        )
    return Finding("ok", text)


def device_of(config: RunConfig) -> str:
    """The device that a rank would get here."""
    import torch

    return (
        "cuda" if config.cluster.device is not Device.cpu and torch.cuda.is_available() else "cpu"
    )


CHECKS: dict[str, Callable[[RunConfig], Finding]] = {
    "Python": python,
    "torch, driver": torch_and_driver,
    "kernels": kernels,
    "collectives": collectives,
    "memory": memory,
    "disk": disk,
    "data": data,
    "W&B": wandb,
    "Slurm": slurm,
}
