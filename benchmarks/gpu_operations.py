"""The GPU benchmark's operations: ceilings, scan, convolution, norms, head and loss, beside their
baselines.
"""

import importlib.util
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_bench import Bench, agree
from benchmarks.timing import CALLS, Measurement
from model.kernels import REFERENCE
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.interface import Kernels
from tests.model.cases import Case, assert_equal, on_device

CHECKED = 256  # tokens of the problems that baselines are checked on


def ceilings(bench: Bench, size: int, copied: int) -> None:
    """A square matrix product in bf16 and a copy."""
    with bench.attempt("torch", "matrix product"):
        left, right = (
            torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2)
        )
        seconds = bench.time("matrix product, bf16", f"{size}^3", "torch", lambda: left @ right)
        print(f"matrix product: {2 * size**3 / seconds / 1e12:.1f} TFLOP/s", flush=True)
    with bench.attempt("torch", "copy"):
        source = torch.empty(copied, device=bench.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        seconds = bench.time(
            "copy", f"{copied / 2**30:.2f} GiB", "torch", lambda: target.copy_(source)
        )
        print(f"copy: {2 * copied / seconds / 1e12:.3f} TB/s read and written", flush=True)


def check(bench: Bench) -> None:
    """Every backend against the formula in fp64 before its time means anything; one that is wrong
    is not timed.
    """
    n = bench.config.d_state
    for name, kernels in list(bench.backends.items()):
        there = on_device(kernels, bench.device)
        right = False
        with bench.attempt(name, "all, wrong or failing"):
            assert_equal(there, Case(2, 100, 64, n), torch.float32, 1e-3)
            # several segments
            assert_equal(
                there, Case(1, 600, 64, n, resets=0.01, has_state=True), torch.bfloat16, 8e-3
            )
            right = True
        if not right:
            del bench.backends[name]


def scan_inputs(bench: Bench, batch: int, seed: int) -> list[Tensor]:
    """Inputs as at initialisation: A = -(1..n), dt log-uniform."""
    c, generator = bench.config, torch.Generator(bench.device).manual_seed(seed)
    kwargs: dict[str, Any] = {"device": bench.device, "generator": generator}
    u, z = (torch.randn(batch, bench.length, c.d_inner, **kwargs).to(bench.dtype) for _ in range(2))
    B, C = (torch.randn(batch, bench.length, c.d_state, **kwargs).to(bench.dtype) for _ in range(2))
    dt = torch.empty(batch, bench.length, c.d_inner, device=bench.device).uniform_(
        -6.9, -2.3, generator=generator
    )
    A = -torch.arange(1.0, c.d_state + 1, device=bench.device).repeat(c.d_inner, 1)
    ones, zeros = (f(c.d_inner, device=bench.device) for f in (torch.ones, torch.zeros))
    return [x.requires_grad_() for x in (u, dt.to(bench.dtype), A, B, C, ones, z, zeros)]


def scans(bench: Bench) -> None:
    """Scan forward, and forward with backward, per backend."""
    for batch in bench.batches:
        shape = f"B {batch}, L {bench.length}"
        for name, kernels in bench.backends.items():
            with bench.attempt(name, f"scan, {shape}"):
                _scan(bench, name, kernels, batch, shape)


def _scan(bench: Bench, name: str, kernels: Kernels, batch: int, shape: str) -> None:
    inputs, scan = (
        bench.rotation(lambda seed: scan_inputs(bench, batch, seed)),
        kernels.selective_scan,
    )
    weight = torch.randn(
        batch, bench.length, bench.config.d_inner, device=bench.device, dtype=bench.dtype
    )

    def both() -> Any:
        held = inputs()
        return torch.autograd.grad(scan(*held)[0], held, weight)

    with torch.no_grad():
        bench.time("scan, forward", shape, name, lambda: scan(*inputs()))
    seconds = bench.time("scan, forward and backward", shape, name, both)
    layers = bench.config.n_layer
    per_token = 1e6 * seconds / (batch * bench.length) * layers
    print(f"{name}, {shape}: scan {per_token:.2f} us per token over {layers} layers", flush=True)


def jax_scans(bench: Bench, python: str | None) -> None:
    """jax-linear-attention's scan in a process of its own, with an interpreter that has it."""
    who = "jax-linear-attention"
    if python is None:
        bench.missing[who] = "name a Python 3.12 that has it with --jax-python; see jax_scan.py"
        return
    c = bench.config
    sizes = {
        "length": bench.length,
        "channels": c.d_inner,
        "states": c.d_state,
        "copies": 4,
        "runs": 30,
    }
    sizes |= {"calls": CALLS, "checked": CHECKED}
    command = [
        python,
        str(Path(__file__).with_name("jax_scan.py")),
        "--batches",
        *map(str, bench.batches),
    ]
    command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    with bench.attempt(who, "scan"), tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            try:
                # a batch each, as it comes: it stays when this is stopped
                for line in process.stdout or ():
                    row = json.loads(line)
                    shape = f"B {row['batch']}, L {bench.length}"
                    for what, key in (
                        ("scan, forward", "forward"),
                        ("scan, forward and backward", "both"),
                    ):
                        bench.rows.append(Measurement(what, shape, who, row[key], row["runs"]))
            except BaseException:
                process.kill()
                raise
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(
                f"its run failed: {(errors.read().strip().splitlines() or ['without a word'])[-1]}"
            )


def convolutions(bench: Bench) -> None:
    """Convolution and SiLU, forward and backward together."""
    c = bench.config
    for batch in bench.batches:

        def make(seed: int, batch: int = batch) -> list[Tensor]:
            x = torch.randn(batch, bench.length, c.d_inner, device=bench.device).to(bench.dtype)
            weight = torch.randn(c.d_inner, c.d_conv, device=bench.device)
            return [
                t.requires_grad_() for t in (x, weight, torch.zeros(c.d_inner, device=bench.device))
            ]

        for name, kernels in bench.backends.items():
            with bench.attempt(name, f"convolution, B {batch}"):
                inputs = bench.rotation(make)

                def both(conv: Any = kernels.causal_conv1d, inputs: Any = inputs) -> Any:
                    held = inputs()
                    out = conv(*held)
                    return torch.autograd.grad(out, held, torch.ones_like(out))

                bench.time(
                    "conv and SiLU, forward and backward",
                    f"B {batch}, L {bench.length}",
                    name,
                    both,
                )


def _torchs_norm(
    x: Tensor, weight: Any, eps: float, parts: Any = None, dtype: Any = None
) -> Tensor:
    pieces = [
        nn.functional.rms_norm(p, p.shape[-1:], weight, eps)
        for p in x.split(parts or x.shape[-1], -1)
    ]
    return torch.cat(pieces, -1).to(dtype or x.dtype)


def norms(bench: Bench) -> None:
    """RMSNorm of the residual stream and of dt, B and C, forward and backward, beside torch's."""
    c, parts = bench.config, [bench.config.dt_rank, bench.config.d_state, bench.config.d_state]
    weight = torch.ones(c.d_model, device=bench.device).requires_grad_()

    def rows(width: int, dtype: torch.dtype) -> Any:
        return bench.rotation(
            lambda _: [torch.randn(bench.length, width, device=bench.device).to(dtype)]
        )

    def whole(norm: Any, x: Tensor) -> Any:
        out = norm(x.requires_grad_(), weight, 1e-5, None, bench.dtype)
        return torch.autograd.grad(out, [x, weight], torch.ones_like(out))

    def split(norm: Any, x: Tensor) -> Any:
        out = norm(x.requires_grad_(), None, 1e-6, parts)
        return torch.autograd.grad(out, [x], torch.ones_like(out))

    norms_of = {name: kernels.rms_norm for name, kernels in bench.backends.items()} | {
        "torch": _torchs_norm
    }
    for name, norm in norms_of.items():
        with bench.attempt(name, "norms"):
            if name == "torch":  # backends are checked already
                x = torch.randn(CHECKED, c.d_model, device=bench.device)
                agree([norm(x, weight, 1e-5)], [REFERENCE.rms_norm(x, weight, 1e-5)], 1e-5)
            stream, selected = rows(c.d_model, torch.float32), rows(sum(parts), bench.dtype)
            shape = f"{bench.length} x {c.d_model}"
            bench.time(
                "norm, forward and backward", shape, name, lambda n=norm, x=stream: whole(n, *x())
            )
            shape = f"{bench.length} x {sum(parts)}"
            bench.time(
                "norms of dt, B and C", shape, name, lambda n=norm, x=selected: split(n, *x())
            )


def loss(bench: Bench) -> None:
    """Head and cross entropy, forward and backward: ours in chunks, torch with all logits, Liger's
    fused one.
    """
    c, where = bench.config, bench.device
    hidden = torch.randn(bench.length, c.d_model, device=where).requires_grad_()
    head = nn.Linear(c.d_model, c.vocab_size, bias=False, device=where).weight
    labels = torch.randint(0, c.vocab_size, (bench.length,), device=where)

    def plain(hidden: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy((hidden @ head.t()).float(), labels)

    calls: dict[str, Any] = {
        name: lambda h, l, k=kernels: linear_cross_entropy(h, head, l, k.loss)[0].mean()
        for name, kernels in bench.backends.items()
    }
    calls["torch, all logits"] = plain
    calls["Liger Kernel"] = None
    few = hidden[:CHECKED].detach().requires_grad_()
    exact = plain(few, labels[:CHECKED])
    expected = [exact, *torch.autograd.grad(exact, [few, head])]
    for name, call in calls.items():
        with (
            bench.attempt(name, "head and loss"),
            torch.autocast(where.type, torch.bfloat16, cache_enabled=False),
        ):
            call = call or _liger(head)
            result = call(few, labels[:CHECKED])
            agree([result, *torch.autograd.grad(result, [few, head])], expected, 2e-2)
            what = "head and loss, forward and backward"
            shape = f"{bench.length} tokens"
            bench.time(
                what,
                shape,
                name,
                lambda f=call: torch.autograd.grad(f(hidden, labels), [hidden, head]),
            )


def _liger(head: Tensor) -> Any:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("pip install --no-deps liger-kernel==0.8.5")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, labels: fused(head, hidden, labels)
