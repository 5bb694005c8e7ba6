"""Checks of a machine by launch/doctor.py: functions from a run's config to a finding."""

import importlib.metadata
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from core.credentials import has_wandb_key, wandb_host
from core.files import ROOT
from train.config import Device, EngineKind, RunConfig
from train.costs.memory import GIB

DEMO_GIB = 2.0  # memory of its two ranks; its disk space is less


@dataclass(frozen=True)
class Finding:
    """Result of a check, with a fix unless the state is ok."""

    state: str  # ok, note (the run can start) or bad
    text: str
    fix: str = ""


def python(config: RunConfig) -> Finding:
    """Compare installed packages with constraints.txt."""
    constraints = ROOT / "constraints.txt"
    interpreter = sys.version.split()[0]
    if not constraints.is_file():
        return Finding(
            "ok", f"{interpreter}; a wheel has no constraints.txt to compare packages with"
        )
    pinned = dict(re.findall(r"^([\w.\-]+)==(\S+)", constraints.read_text(encoding="utf-8"), re.M))
    different = []
    for name, version in pinned.items():
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue  # of an extra; the checks that need it fail
        if installed.split("+")[0] != version.split("+")[0]:
            different.append(f"{name} {installed} instead of {version}")
    text = f"{interpreter}, {len(pinned)} pinned packages"
    if different:
        return Finding(
            "note",
            f"{text}; {', '.join(different)}",
            "make install installs the tested versions",
        )
    return Finding("ok", text)


def torch_and_driver(config: RunConfig) -> Finding:
    """Check torch, CUDA, the driver and the number of GPUs."""
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
        fix = "install NVIDIA's driver"
        if shutil.which("nvidia-smi") is not None:
            fix = "install the torch build for your driver's CUDA"
        return Finding(
            "bad", f"{text}, no GPU", f"{fix}, or set cluster.device=cpu parallel.engine=deepspeed"
        )
    if config.parallel.engine is EngineKind.megatron:
        return Finding(
            "bad", f"{text}, no GPU for parallel.engine=megatron", "set parallel.engine=deepspeed"
        )
    return Finding("ok", f"{text}, no GPU")


def kernels(config: RunConfig) -> Finding:
    """Compare the run's kernels with the fp64 reference: output and gradients of a small scan."""
    import torch

    from model.kernels import REFERENCE, MissingBackend, load

    device = run_device(config)
    try:
        backend = load(config.compute.kernels, device)
    except MissingBackend as error:
        return Finding("bad", str(error), "set compute.kernels=auto, or install what is missing")
    generator = torch.Generator().manual_seed(0)
    b, l = 2, 33  # batch, length
    d, n = 16, 8  # d_inner, d_state
    shapes = {
        "u": (b, l, d),
        "dt": (b, l, d),
        "A": (d, n),
        "B": (b, l, n),
        "C": (b, l, n),
        "D": (d,),
        "z": (b, l, d),
    }
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    values |= {
        "A": -torch.rand(d, n, generator=generator) - 0.1,
        "dt_bias": torch.randn(d, generator=generator),
    }
    doc_starts = (torch.rand(b, l, generator=generator) < 0.1).to(device)
    results = []
    for kernel, dtype in ((backend, torch.float32), (REFERENCE, torch.float64)):
        inputs = {
            name: value.to(device, dtype, copy=True).requires_grad_()
            for name, value in values.items()
        }
        y, _ = kernel.selective_scan(**inputs, doc_starts=doc_starts)
        y.square().sum().backward()
        results.append(
            [
                y.detach().double(),
                *(value.grad.double() for value in inputs.values() if value.grad is not None),
            ]
        )
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(*results, strict=True)]
    text = f"{backend.name} on {device}, relative error {max(errors):.1e}"
    if not max(errors) < 1e-4:
        return Finding(
            "bad",
            text,
            "set compute.kernels=reference, delete the cache of compiled kernels, and report a bug",
        )
    if backend.name == "reference":
        return Finding(
            "note",
            text,
            "install g++ for the CPU kernels"
            if device == "cpu"
            else "make install installs cuda-core",
        )
    return Finding("ok", text)


def compiler(config: RunConfig) -> Finding:
    """Check that the C++ kernels can be compiled."""
    from model.kernels import cpu_library

    try:
        words = cpu_library.compiler()
    except RuntimeError as error:
        return Finding(
            "note",
            str(error),
            "apt-get install g++: runs on CPUs are three times as slow without",
        )
    return Finding("ok", shlex.join(words))


def memory_and_disk(config: RunConfig) -> Finding:
    """Compare free memory and free disk space with what the demo takes."""
    import psutil

    memory = psutil.virtual_memory().available / GIB
    folder = Path.cwd()
    disk = shutil.disk_usage(folder).free / GIB
    text = f"{memory:.1f} GiB of memory and {disk:.0f} GiB in {folder} are free"
    if memory < DEMO_GIB or disk < DEMO_GIB:
        return Finding("note", text, f"the demo takes {DEMO_GIB:g} GiB of memory: free some")
    return Finding("ok", text)


def collectives(config: RunConfig) -> Finding:
    """Run an all-reduce over the ranks of this machine with the run's backend."""
    device = run_device(config)
    backend = "nccl" if device == "cuda" else "gloo"
    ranks = config.cluster.ranks_per_node
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    started_at = time.monotonic()
    command = [sys.executable, "-c", ALL_REDUCE, backend, str(ranks), str(port)]
    processes = [
        subprocess.Popen([*command, str(rank)], stderr=subprocess.PIPE, text=True)
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=180)[1] for process in processes]
    except subprocess.TimeoutExpired:
        errors = ["no answer within 180 s"]
    finally:
        for process in processes:
            process.kill()
    text = f"{backend}, {ranks} ranks, {time.monotonic() - started_at:.0f} s including start"
    failed = [
        error for process, error in zip(processes, errors, strict=False) if process.returncode
    ]
    if failed or len(errors) < len(processes):
        lines = [line for line in (failed or errors)[0].splitlines() if line.strip()]
        reason = lines[-1] if lines else "killed without a message"
        variables = (
            "NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME" if backend == "nccl" else "GLOO_SOCKET_IFNAME"
        )
        return Finding("bad", f"{text}: {reason}", f"check the network interfaces: {variables}")
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


def wandb(config: RunConfig) -> Finding:
    """Check whether metrics reach W&B."""
    if config.metrics.wandb_project is None:
        return Finding("ok", "off (metrics.wandb_project=null)")
    if not has_wandb_key():
        fix = "export WANDB_API_KEY or run `wandb login`, or `wandb sync` the run's folder later"
        return Finding("note", "no key for W&B: metrics stay offline in the run's folder", fix)
    host = wandb_host()
    try:
        socket.create_connection((host, 443), timeout=5).close()
    except OSError as error:
        return Finding(
            "note",
            f"{host} does not answer ({error}); runs log offline",
            "check the network or WANDB_BASE_URL",
        )
    return Finding("ok", f"{host} answers")


def slurm(config: RunConfig) -> Finding:
    """Check that Slurm's controller answers and has enough nodes for the run."""
    if shutil.which("sinfo") is None:
        return Finding("ok", "not installed; python launch/submit.py --local runs without it")
    result = subprocess.run(
        ["sinfo", "-h", "-o", "%D %t"], capture_output=True, text=True, timeout=60
    )
    if result.returncode:
        reason = ([*result.stderr.strip().splitlines(), "no answer"])[0]
        return Finding("note", f"sinfo: {reason}", "check the controller and SLURM_CONF")
    states = [line.split() for line in result.stdout.splitlines()]
    up = sum(
        int(count) for count, state in states if not re.match(r"down|drain|fail|drng|unk", state)
    )
    text = f"{up} of {sum(int(count) for count, _ in states)} nodes are up"
    if up < config.cluster.nodes:
        return Finding(
            "bad",
            f"{text}, the run needs {config.cluster.nodes}",
            "lower cluster.nodes, or wait for more nodes",
        )
    return Finding("ok", text)


def usable_ranks() -> int:
    """Ranks that an all-reduce of this machine takes: one per GPU, or two processes."""
    import torch

    return torch.cuda.device_count() or 2


def run_device(config: RunConfig) -> str:
    """Device type that a rank uses on this machine."""
    import torch

    return (
        "cuda" if config.cluster.device is not Device.cpu and torch.cuda.is_available() else "cpu"
    )


MACHINE_CHECKS: dict[str, Callable[[RunConfig], Finding]] = {
    "Python": python,
    "torch, driver": torch_and_driver,
    "kernels": kernels,
    "collectives": collectives,
    "W&B": wandb,
    "Slurm": slurm,
}
# in place of a run's own checks
HOST_CHECKS: dict[str, Callable[[RunConfig], Finding]] = {
    "compiler": compiler,
    "memory, disk": memory_and_disk,
}
