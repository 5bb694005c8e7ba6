"""First contact with a GPU: versions, every kernel against fp64, threads, large indices, a whole
tiny model.

    python -m benchmarks.gpu_day.smoke                # on a GPU, about a minute
    python -m benchmarks.gpu_day.smoke --small        # under compute-sanitizer
    python -m benchmarks.gpu_day.smoke --device cpu   # tries the script, with CPU kernels

Each part is named with its seconds, and a part that fails costs no other, unless the device is lost
to this process.
"""

import argparse
import importlib.metadata
import shutil
import sys
import sysconfig
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import Recompute
from model.kernels import CPU, CUDA, REFERENCE, cuda, cuda_library
from tests.model.cases import CASES, Case, assert_equal, on_device
from tests.tiny import TINY, model_of

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "numpy",
    "jax",
    "megatron-core",
    "deepspeed",
)
SOURCES = ("scan_forward.cu", "scan_backward.cu", "conv.cu", "rows.cu")


class Smoke:
    """The parts, on one device."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = torch.device(device), small
        self.gpu = device == "cuda"
        self.kernels = CUDA if self.gpu else CPU
        self.failed: list[str] = []

    def part(self, name: str, run: Callable[[], Any]) -> None:
        """Run a part and say how it went; after a fault of the device nothing that follows means
        anything.
        """
        begun = time.monotonic()
        try:
            said = run()
            if self.gpu:
                torch.cuda.synchronize()
            print(f"ok   {name} {time.monotonic() - begun:.1f}s {said or ''}", flush=True)
        except Exception as error:
            self.failed.append(name)
            print(f"FAIL {name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
            print("".join(traceback.format_tb(error.__traceback__)[-3:]), flush=True)
            if "CUDA error" in str(error) or "CUDAError" in type(error).__name__:
                sys.exit("the device is lost to this process: what follows would mean nothing")

    def versions(self) -> dict[str, Any]:
        """What is installed, and what the GPU is."""
        have: dict[str, Any] = {}
        for package in PACKAGES:
            try:
                have[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                have[package] = None
        have["Python.h"] = Path(sysconfig.get_paths()["include"], "Python.h").exists()
        have["gcc"] = shutil.which("gcc")
        if self.gpu:
            properties = torch.cuda.get_device_properties(0)
            have |= {
                "gpu": torch.cuda.get_device_name(),
                "capability": torch.cuda.get_device_capability(),
                "processors": properties.multi_processor_count,
                "shared memory": properties.shared_memory_per_block_optin,
                "missing": cuda.unavailable_reason(),
                "nccl": torch.cuda.nccl.version(),
            }
        return have

    def compiling(self) -> list[str]:
        """Every CUDA source for this GPU."""
        found = []
        for source in SOURCES:
            begun = time.monotonic()
            cuda_library._compile_cached(
                source, 1, "sm_{}{}".format(*torch.cuda.get_device_capability())
            )
            found.append(f"{source} {time.monotonic() - begun:.1f}s")
        return found

    def cases(self) -> None:
        """The cases of the kernels' tests, in fp32 and bf16."""
        there = on_device(self.kernels, self.device)
        for case in CASES[:4] if self.small else CASES:
            assert_equal(there, case, torch.float32, 1e-4)
            assert_equal(there, case, torch.bfloat16, 8e-3)

    def segments(self) -> None:
        """A sequence that several blocks share."""
        case = Case(1, 600 if self.small else 800, 64, 16, resets=0.01, has_state=True)
        assert_equal(on_device(self.kernels, self.device), case, torch.float32, 1e-4)

    def thread(self) -> None:
        """A forward and a backward in a thread that is not the first."""
        errors: list[Exception] = []

        def run() -> None:
            try:
                assert_equal(on_device(self.kernels, self.device), CASES[1], torch.float32, 1e-4)
            except Exception as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]

    def model(self) -> str:
        """A whole tiny model by autocast and with recompute: its gradients beside the
        reference's.
        """
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 96, (3, 301), generator=generator).to(self.device)
        doc_starts = (torch.rand(3, 300, generator=generator) < 0.02).to(self.device)
        found = []
        for kernels in (self.kernels, REFERENCE):
            model = model_of(TINY, kernels=kernels, device=self.device.type)
            if kernels is self.kernels:
                model.set_recompute(Recompute.full)
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                loss = model(tokens[:, :-1], tokens[:, 1:], doc_starts)[0].mean()
            loss.backward()
            found.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        worst = max(relative(x, y) for x, y in zip(*found, strict=True))
        assert worst < 5e-2, worst
        return f"worst relative difference {worst:.1e}"

    def large(self) -> list[str]:
        """More than 2^31 elements: two halves of a scan are the whole, with gradients; convolution,
        norm, loss.
        """
        length, channels = (300_000, 8192) if self.gpu else (600, 128)
        half = length // 2 // 16 * 16

        def make(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=torch.bfloat16) * scale

        k = self.kernels
        u, z = make(1, length, channels), make(1, length, channels)
        dt = make(1, length, channels, scale=0.5) - 4
        B, C = make(1, length, 16), make(1, length, 16)
        A = -torch.arange(1.0, 17, device=self.device).repeat(channels, 1)
        D, bias = (
            torch.ones(channels, device=self.device),
            torch.zeros(channels, device=self.device),
        )
        with torch.no_grad():
            y, last = k.selective_scan(u, dt, A, B, C, D, z, bias)
            _, middle = k.selective_scan(
                u[:, :half], dt[:, :half], A, B[:, :half], C[:, :half], D, z[:, :half], bias
            )
            rest = (u[:, half:], dt[:, half:], A, B[:, half:], C[:, half:], D, z[:, half:], bias)
            y2, last2 = k.selective_scan(*rest, state=middle)
            errors = [relative(y[:, -99:], y2[:, -99:]), relative(last, last2)]
            out = k.causal_conv1d(u, torch.randn(channels, 4, device=self.device), bias)
            assert torch.isfinite(out[:, -5:]).all()
            norm = k.rms_norm(u, None, 1e-5)
            errors.append(relative(norm[:, -9:], REFERENCE.rms_norm(u[:, -9:], None, 1e-5)))
            del y, y2, out, norm
        held = [x.requires_grad_() for x in (u, dt)]
        y, _ = k.selective_scan(*held, A, B, C, D, z, bias)
        whole, _ = torch.autograd.grad(y, held, z)
        del y
        tail = [x[:, half:].detach().requires_grad_() for x in (u, dt)]
        y, _ = k.selective_scan(
            *tail, A, B[:, half:], C[:, half:], D, z[:, half:], bias, state=middle
        )
        part, _ = torch.autograd.grad(y, tail, z[:, half:])
        errors.append(relative(whole[:, -99:], part[:, -99:]))
        del y, whole, part, held, tail
        rows, vocabulary = (40_000, 65_024) if self.gpu else (40, 99)
        logits, labels = (
            make(rows, vocabulary),
            torch.randint(0, vocabulary, (rows,), device=self.device),
        )
        statistics = k.loss.loss_statistics(logits, labels)
        errors.append(
            relative(statistics[:, -9:], REFERENCE.loss.loss_statistics(logits[-9:], labels[-9:]))
        )
        assert max(errors) < 2e-2, errors
        return [f"{error:.1e}" for error in errors]


def relative(x: Tensor, y: Tensor) -> float:
    """Norm of a difference in units of the second's norm."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def main() -> int:
    """Every part; the exit code is 1 when one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="fewer cases, and none that is large")
    given = parser.parse_args()
    smoke = Smoke(given.device, given.small)
    smoke.part("versions", smoke.versions)
    if smoke.gpu:
        smoke.part("compiling all sources", smoke.compiling)
    smoke.part("fp32 and bf16 cases", smoke.cases)
    smoke.part("several segments", smoke.segments)
    smoke.part("a thread of its own", smoke.thread)
    smoke.part("a whole tiny model", smoke.model)
    if not given.small:
        smoke.part("more than 2^31 elements", smoke.large)
    print("FAILED: " + ", ".join(smoke.failed) if smoke.failed else "all right", flush=True)
    return bool(smoke.failed)


if __name__ == "__main__":
    sys.exit(main())
