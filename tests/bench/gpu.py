"""GPU benchmark: `python -m tests.bench.gpu`. Ceilings, then every operation, a layer and a rank's step of the 7B.

Each backend that is present is measured on the same random inputs, which rotate past the L2 cache; medians; ratios are
to `cuda`, ours. Results are checked against fp64 on a short problem before anything is timed. `--device cpu --small`
runs the same code on tiny sizes without a GPU, to see that it works; its times mean nothing.
"""

import argparse
import importlib.util
import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from model.config import ModelConfig, Recompute
from model.flops import parameter_count, train_flops_per_token
from model.kernels import BACKENDS, REFERENCE
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.interface import Kernels
from model.mamba import Block, FalconMamba
from tests.bench.timing import Row, median_seconds, show, with_ratios, write
from tests.compose import run_config
from tests.model.cases import Case, assert_equal, elsewhere

L2_BYTES = 128 * 2**20  # of inputs that rotate: more than an H100's or H200's 50 MiB


class Bench:
    """One device, its backends, and the rows measured so far."""

    def __init__(
        self, device: torch.device, config: ModelConfig, length: int, batches: list[int], budget: float
    ) -> None:
        self.device, self.config, self.length, self.batches, self.budget = device, config, length, batches, budget
        self.dtype = torch.bfloat16
        self.rows: list[Row] = []
        self.missing: dict[str, str] = {}
        self.backends: dict[str, Kernels] = {}
        for name, module, kernels in BACKENDS[device.type]:
            if (why := module.missing()) is None:
                self.backends[name.value] = kernels
            else:
                self.missing[name.value] = why
        if device.type == "cpu":
            self.backends["reference"] = REFERENCE

    def time(self, what: str, shape: str, who: str, call: Callable[[], Any]) -> float:
        """Measure and keep a row."""
        seconds, runs = median_seconds(call, self.device, self.budget, least=5)
        self.rows.append(Row(what, shape, who, seconds, runs))
        return seconds

    def ceilings(self, size: int, copied: int) -> None:
        """A square matrix product in bf16 and a copy."""
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        seconds = self.time("matrix product, bf16", f"{size}^3", "torch", lambda: left @ right)
        print(f"matrix product: {2 * size**3 / seconds / 1e12:.1f} TFLOP/s", flush=True)
        source = torch.empty(copied, device=self.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        seconds = self.time("copy", f"{copied / 2**30:.2f} GiB", "torch", lambda: target.copy_(source))
        print(f"copy: {2 * copied / seconds / 1e12:.3f} TB/s read and written", flush=True)

    def check(self) -> None:
        """Every backend against the formula in fp64 before its time means anything."""
        n = self.config.d_state
        for kernels in self.backends.values():
            there = elsewhere(kernels, self.device)
            assert_equal(there, Case(2, 100, 64, n), torch.float32, 1e-3)
            assert_equal(there, Case(1, 600, 64, n, resets=0.01, first=True), torch.bfloat16, 8e-3)  # several segments

    def scan_inputs(self, batch: int, seed: int) -> list[Tensor]:
        """Inputs as at initialisation: A = -(1..n), dt log-uniform."""
        c, generator = self.config, torch.Generator(self.device).manual_seed(seed)
        kwargs: dict[str, Any] = {"device": self.device, "generator": generator}
        u, z = (torch.randn(batch, self.length, c.d_inner, **kwargs).to(self.dtype) for _ in range(2))
        B, C = (torch.randn(batch, self.length, c.d_state, **kwargs).to(self.dtype) for _ in range(2))
        dt = torch.empty(batch, self.length, c.d_inner, device=self.device).uniform_(-6.9, -2.3, generator=generator)
        A = -torch.arange(1.0, c.d_state + 1, device=self.device).repeat(c.d_inner, 1)
        ones, zeros = (f(c.d_inner, device=self.device) for f in (torch.ones, torch.zeros))
        return [x.requires_grad_() for x in (u, dt.to(self.dtype), A, B, C, ones, z, zeros)]

    def rotation(self, make: Callable[[int], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Inputs that change from call to call, so that none is found in the cache."""
        first = make(0)
        copies = 1 + min(15, L2_BYTES // max(1, sum(x.nbytes for x in first)))
        held = [first] + [make(seed) for seed in range(1, copies)]
        turn = iter(range(10**9))
        return lambda: held[next(turn) % copies]

    def scans(self) -> None:
        """Scan forward, and forward with backward, per backend."""
        for batch in self.batches:
            inputs = self.rotation(lambda seed, batch=batch: self.scan_inputs(batch, seed))
            weight = torch.randn(batch, self.length, self.config.d_inner, device=self.device, dtype=self.dtype)
            shape = f"B {batch}, L {self.length}"
            for name, kernels in self.backends.items():
                scan = kernels.selective_scan

                def both(scan: Any = scan, inputs: Any = inputs, weight: Tensor = weight) -> Any:
                    held = inputs()
                    return torch.autograd.grad(scan(*held)[0], held, weight)

                with torch.no_grad():
                    self.time("scan, forward", shape, name, lambda scan=scan, inputs=inputs: scan(*inputs()))
                seconds = self.time("scan, forward and backward", shape, name, both)
                per_token = 1e6 * seconds / (batch * self.length) * self.config.n_layer
                print(
                    f"{name}, {shape}: scan {per_token:.2f} us per token over {self.config.n_layer} layers", flush=True
                )

    def jax_scans(self, python: str | None) -> None:
        """jax-linear-attention's scan in a process of its own, with an interpreter that has it."""
        if python is None:
            self.missing["jax-linear-attention"] = "name a Python 3.12 that has it with --jax-python; see jax_scan.py"
            return
        c = self.config
        sizes = {"length": self.length, "channels": c.d_inner, "states": c.d_state, "copies": 4, "runs": 30}
        command = [python, str(Path(__file__).with_name("jax_scan.py")), "--batches", *map(str, self.batches)]
        command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            self.missing["jax-linear-attention"] = f"its run failed: {result.stderr.strip().splitlines()[-1]}"
        for line in result.stdout.splitlines():
            row = json.loads(line)
            shape = f"B {row['batch']}, L {self.length}"
            for what, key in (("scan, forward", "forward"), ("scan, forward and backward", "both")):
                self.rows.append(Row(what, shape, "jax-linear-attention", row[key], row["runs"]))

    def norms(self) -> None:
        """RMSNorm of the residual stream and of dt, B and C, forward and backward, beside torch's."""
        c, parts = self.config, [self.config.dt_rank, self.config.d_state, self.config.d_state]
        x = torch.randn(self.length, c.d_model, device=self.device).requires_grad_()
        selected = torch.randn(self.length, sum(parts), device=self.device).to(self.dtype).requires_grad_()
        weight = torch.ones(c.d_model, device=self.device).requires_grad_()

        def whole(norm: Any) -> Any:
            out = norm(x, weight, 1e-5, None, self.dtype)
            return torch.autograd.grad(out, [x, weight], torch.ones_like(out))

        def split(norm: Any) -> Any:
            out = norm(selected, None, 1e-6, parts)
            return torch.autograd.grad(out, [selected], torch.ones_like(out))

        def torchs(x: Tensor, weight: Any, eps: float, parts: Any = None, dtype: Any = None) -> Tensor:
            pieces = [nn.functional.rms_norm(p, p.shape[-1:], weight, eps) for p in x.split(parts or x.shape[-1], -1)]
            return torch.cat(pieces, -1).to(dtype or x.dtype)

        for name, norm in [(name, kernels.rms_norm) for name, kernels in self.backends.items()] + [("torch", torchs)]:
            self.time("norm, forward and backward", f"{self.length} x {c.d_model}", name, lambda n=norm: whole(n))
            self.time("norms of dt, B and C", f"{self.length} x {sum(parts)}", name, lambda n=norm: split(n))

    def convolutions(self) -> None:
        """Convolution and SiLU, forward and backward together."""
        c = self.config
        for batch in self.batches:

            def make(seed: int, batch: int = batch) -> list[Tensor]:
                x = torch.randn(batch, self.length, c.d_inner, device=self.device).to(self.dtype)
                weight = torch.randn(c.d_inner, c.d_conv, device=self.device)
                return [t.requires_grad_() for t in (x, weight, torch.zeros(c.d_inner, device=self.device))]

            inputs = self.rotation(make)
            for name, kernels in self.backends.items():

                def both(conv: Any = kernels.causal_conv1d, inputs: Any = inputs) -> Any:
                    held = inputs()
                    out = conv(*held)
                    return torch.autograd.grad(out, held, torch.ones_like(out))

                self.time("conv and SiLU, forward and backward", f"B {batch}, L {self.length}", name, both)

    def loss(self) -> None:
        """Head and cross entropy, forward and backward: ours in chunks, and torch with all logits."""
        c = self.config
        hidden = torch.randn(self.length, c.d_model, device=self.device).requires_grad_()
        head = nn.Linear(c.d_model, c.vocab_size, bias=False, device=self.device)
        labels = torch.randint(0, c.vocab_size, (self.length,), device=self.device)

        def chunked(kernels: Kernels) -> Any:
            losses, _ = linear_cross_entropy(hidden, head.weight, labels, kernels.loss_rows)
            return losses.mean().backward()

        calls: dict[str, Any] = {name: lambda k=kernels: chunked(k) for name, kernels in self.backends.items()}
        calls["torch, all logits"] = lambda: nn.functional.cross_entropy(head(hidden).float(), labels).backward()
        if self.device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            liger = LigerFusedLinearCrossEntropyLoss()
            calls["Liger Kernel"] = lambda: liger(head.weight, hidden, labels).backward()
        else:
            self.missing["Liger Kernel"] = "on a GPU: pip install --no-deps liger-kernel==0.8.5"
        for name, call in calls.items():
            with torch.autocast(self.device.type, torch.bfloat16):
                self.time("head and loss, forward and backward", f"{self.length} tokens", name, call)

    def layers(self) -> None:
        """One whole block, forward and backward, micro-batch 1."""
        x = torch.randn(1, self.length, self.config.d_model, device=self.device).requires_grad_()
        for name, kernels in self.backends.items():
            with self.device:
                block = _filled(Block(self.config, kernels))

            def step(block: Block = block) -> Any:
                with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                    out = block(x, None)
                return out.square().mean().backward()

            self.time("one layer, forward and backward", f"B 1, L {self.length}", name, step)

    def embedding(self) -> None:
        """The lookup, forward and backward: with the head and loss, what a rank's step has besides its layers."""
        c = self.config
        table = nn.Embedding(c.vocab_size, c.d_model, device=self.device)
        tokens = torch.randint(0, c.vocab_size, (1, self.length), device=self.device)
        self.time(
            "embedding, forward and backward", f"{self.length} tokens", "torch", lambda: table(tokens).sum().backward()
        )

    def rank(self, n_layer: int) -> None:
        """One data-parallel rank's step of as many layers as fit, from n_layer on by halves."""
        for name, kernels in self.backends.items():
            layers = n_layer
            while layers:
                try:
                    self._rank(name, kernels, replace(self.config, n_layer=layers))
                    break
                except torch.cuda.OutOfMemoryError:
                    print(f"{name}: {layers} layers do not fit", flush=True)
                    layers //= 2
                    torch.cuda.empty_cache()

    def _rank(self, name: str, kernels: Kernels, config: ModelConfig) -> None:
        """Micro-batch 1, full recompute: embedding, layers, head, loss, and AdamW on a 256th of the parameters."""
        tokens = torch.randint(0, config.vocab_size, (1, self.length + 1), device=self.device)
        with self.device:
            model = _filled(FalconMamba(config, kernels))
        model.set_recompute(Recompute.full)
        own = torch.zeros(parameter_count(config) // 256 + 1, device=self.device, requires_grad=True)
        own.grad = torch.ones_like(own)
        adam = torch.optim.AdamW([own], lr=1e-4, fused=True)

        def step() -> None:
            with torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False):
                losses, _ = model(tokens[:, :-1], tokens[:, 1:])
            losses.mean().backward()
            adam.step()

        shape = f"{config.n_layer} layers, full recompute, L {self.length}"
        rate = self.length / self.time("one rank's step", shape, name, step)
        tflops = rate * train_flops_per_token(config) / 1e12
        print(f"{name}, {shape}: {rate:.0f} tokens/s, {tflops:.1f} model TFLOP/s", flush=True)


def _filled(module: nn.Module) -> nn.Module:
    """Small random parameters: times do not depend on them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.01, 0.01)
    return module


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="tiny sizes: to see that it runs")
    parser.add_argument("--layers", type=int, default=64, help="layers of the rank's step, halved until they fit")
    parser.add_argument("--jax-python", help="a Python that has jax-linear-attention, to time its scan beside ours")
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU; --device cpu --small runs the code without one")
    config = run_config("demo").model if arguments.small else run_config("7b").model
    length, batches = (64, [1, 2]) if arguments.small else (8192, [1, 2, 4])
    device = torch.device(arguments.device)
    bench = Bench(device, config, length, batches, budget=0.05 if arguments.small else 2.0)
    bench.ceilings(*((64, 2**16) if arguments.small else (8192, 2 * 2**30)))
    bench.check()
    bench.scans()
    bench.jax_scans(arguments.jax_python)
    bench.convolutions()
    bench.norms()
    bench.embedding()
    bench.loss()
    bench.layers()
    bench.rank(2 if arguments.small else arguments.layers)
    ours = "cuda" if arguments.device == "cuda" else "cpu"
    hardware = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU, tiny sizes: not a measurement"
    show(with_ratios(bench.rows, ours), hardware)
    for name, why in bench.missing.items():
        print(f"not measured: {name} ({why})")
    if not arguments.no_record:
        print(
            write(bench.rows, f"gpu-{hardware.lower().replace(' ', '-')}", hardware, bench.missing, {"length": length})
        )


if __name__ == "__main__":
    main()
