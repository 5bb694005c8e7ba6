"""Smoke test on a GPU: versions, kernels against fp64, threads, large indices, a tiny model.

    python -m benchmarks.gpu_day.smoke                # on a GPU, about a minute
    python -m benchmarks.gpu_day.smoke --small        # under compute-sanitizer
    python -m benchmarks.gpu_day.smoke --device cpu   # tries the script with CPU kernels

Prints each check with its seconds. A failed check does not stop the others, except after a CUDA
error, which makes the device unusable for this process.
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


class SmokeTest:
    """The checks on one device."""

    def __init__(self, device: str, small: bool) -> None:
        self.device = torch.device(device)
        self.small = small
        self.gpu = device == "cuda"
        self.kernels = CUDA if self.gpu else CPU
        self.failed: list[str] = []

    def check(self, name: str, run: Callable[[], Any]) -> None:
        """Run a check and print its result; exits after a CUDA error."""
        start = time.monotonic()
        try:
            details = run()
            if self.gpu:
                torch.cuda.synchronize()
            print(f"ok   {name} {time.monotonic() - start:.1f}s {details or ''}", flush=True)
        except Exception as error:
            self.failed.append(name)
            print(f"FAIL {name}: {type(error).__name__}: {str(error)[:600]}", flush=True)
            print("".join(traceback.format_tb(error.__traceback__)[-3:]), flush=True)
            if "CUDA error" in str(error) or "CUDAError" in type(error).__name__:
                sys.exit(
                    "CUDA error: the device is unusable for this process, skipping other checks"
                )

    def versions(self) -> dict[str, Any]:
        """Versions of packages, and properties of the GPU."""
        versions: dict[str, Any] = {}
        for package in PACKAGES:
            try:
                versions[package] = importlib.metadata.version(package)
            except importlib.metadata.PackageNotFoundError:
                versions[package] = None
        versions["Python.h"] = Path(sysconfig.get_paths()["include"], "Python.h").exists()
        versions["gcc"] = shutil.which("gcc")
        if self.gpu:
            properties = torch.cuda.get_device_properties(0)
            versions |= {
                "gpu": torch.cuda.get_device_name(),
                "capability": torch.cuda.get_device_capability(),
                "processors": properties.multi_processor_count,
                "shared memory": properties.shared_memory_per_block_optin,
                "missing": cuda.unavailable_reason(),
                "nccl": torch.cuda.nccl.version(),
            }
        return versions

    def compile_sources(self) -> list[str]:
        """Compile every CUDA source for this GPU."""
        seconds = []
        for source in SOURCES:
            start = time.monotonic()
            cuda_library._compile_cached(
                source, 1, "sm_{}{}".format(*torch.cuda.get_device_capability())
            )
            seconds.append(f"{source} {time.monotonic() - start:.1f}s")
        return seconds

    def cases(self) -> None:
        """Run the cases of the kernel tests in fp32 and bf16."""
        kernels = on_device(self.kernels, self.device)
        for case in CASES[:4] if self.small else CASES:
            assert_equal(kernels, case, torch.float32, 1e-4)
            assert_equal(kernels, case, torch.bfloat16, 8e-3)

    def segments(self) -> None:
        """Scan a sequence that is split over several thread blocks."""
        case = Case(1, 600 if self.small else 800, 64, 16, resets=0.01, has_state=True)
        assert_equal(on_device(self.kernels, self.device), case, torch.float32, 1e-4)

    def thread(self) -> None:
        """Run forward and backward outside the main thread."""
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
        """Compare a tiny model's gradients, with autocast and recompute, with the reference's."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, 96, (3, 301), generator=generator).to(self.device)
        doc_starts = (torch.rand(3, 300, generator=generator) < 0.02).to(self.device)
        results = []
        for kernels in (self.kernels, REFERENCE):
            model = model_of(TINY, kernels=kernels, device=self.device.type)
            if kernels is self.kernels:
                model.set_recompute(Recompute.full)
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                loss = model(tokens[:, :-1], tokens[:, 1:], doc_starts)[0].mean()
            loss.backward()
            results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
        worst = max(relative_error(x, y) for x, y in zip(*results, strict=True))
        assert worst < 5e-2, worst
        return f"worst relative difference {worst:.1e}"

    def large(self) -> list[str]:
        """Run kernels on more than 2^31 elements; a scan in two halves equals one scan."""
        length, channels = (300_000, 8192) if self.gpu else (600, 128)
        half = length // 2 // 16 * 16

        def make(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, device=self.device, dtype=torch.bfloat16) * scale

        k = self.kernels
        u, z = make(1, length, channels), make(1, length, channels)
        dt = make(1, length, channels, scale=0.5) - 4
        B, C = make(1, length, 16), make(1, length, 16)
        A = -torch.arange(1.0, 17, device=self.device).repeat(channels, 1)
        D = torch.ones(channels, device=self.device)
        bias = torch.zeros(channels, device=self.device)
        with torch.no_grad():
            y, state = k.selective_scan(u, dt, A, B, C, D, z, bias)
            _, half_state = k.selective_scan(
                u[:, :half], dt[:, :half], A, B[:, :half], C[:, :half], D, z[:, :half], bias
            )
            second_half = (
                u[:, half:],
                dt[:, half:],
                A,
                B[:, half:],
                C[:, half:],
                D,
                z[:, half:],
                bias,
            )
            y2, state2 = k.selective_scan(*second_half, state=half_state)
            errors = [relative_error(y[:, -99:], y2[:, -99:]), relative_error(state, state2)]
            out = k.causal_conv1d(u, torch.randn(channels, 4, device=self.device), bias)
            assert torch.isfinite(out[:, -5:]).all()
            norm = k.rms_norm(u, None, 1e-5)
            errors.append(relative_error(norm[:, -9:], REFERENCE.rms_norm(u[:, -9:], None, 1e-5)))
            del y, y2, out, norm
        inputs = [x.requires_grad_() for x in (u, dt)]
        y, _ = k.selective_scan(*inputs, A, B, C, D, z, bias)
        grad, _ = torch.autograd.grad(y, inputs, z)
        del y
        tail = [x[:, half:].detach().requires_grad_() for x in (u, dt)]
        y, _ = k.selective_scan(
            *tail, A, B[:, half:], C[:, half:], D, z[:, half:], bias, state=half_state
        )
        half_grad, _ = torch.autograd.grad(y, tail, z[:, half:])
        errors.append(relative_error(grad[:, -99:], half_grad[:, -99:]))
        del y, grad, half_grad, inputs, tail
        rows, vocab_size = (40_000, 65_024) if self.gpu else (40, 99)
        logits = make(rows, vocab_size)
        labels = torch.randint(0, vocab_size, (rows,), device=self.device)
        statistics = k.loss.loss_statistics(logits, labels)
        errors.append(
            relative_error(
                statistics[:, -9:], REFERENCE.loss.loss_statistics(logits[-9:], labels[-9:])
            )
        )
        assert max(errors) < 2e-2, errors
        return [f"{error:.1e}" for error in errors]


def relative_error(x: Tensor, y: Tensor) -> float:
    """Norm of x - y divided by the norm of y."""
    return float((x.double() - y.double()).norm() / y.double().norm())


def main() -> int:
    """Run all checks; returns exit code 1 if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="fewer cases, no large ones")
    arguments = parser.parse_args()
    smoke = SmokeTest(arguments.device, arguments.small)
    smoke.check("versions", smoke.versions)
    if smoke.gpu:
        smoke.check("compiling all sources", smoke.compile_sources)
    smoke.check("fp32 and bf16 cases", smoke.cases)
    smoke.check("several segments", smoke.segments)
    smoke.check("outside the main thread", smoke.thread)
    smoke.check("a tiny model", smoke.model)
    if not arguments.small:
        smoke.check("more than 2^31 elements", smoke.large)
    print("FAILED: " + ", ".join(smoke.failed) if smoke.failed else "all right", flush=True)
    return bool(smoke.failed)


if __name__ == "__main__":
    sys.exit(main())
