"""Operations of the GPU benchmark, beside baselines: limits, scan, convolution, norms, loss."""

import importlib.util
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_bench import Bench, assert_close
from benchmarks.timing import CALLS, Measurement
from model.kernels import REFERENCE
from model.kernels.cross_entropy import linear_cross_entropy
from model.kernels.interface import Kernels
from tests.model.cases import Case, assert_equal, on_device

CHECK_TOKENS = 256  # of the checks of baselines


def ceilings(bench: Bench, size: int, copy_bytes: int) -> None:
    """Time a square matrix product in bf16 and a copy: the limits of the GPU."""
    with bench.attempt("torch", "matrix product"):
        left, right = (
            torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2)
        )
        seconds = bench.time("matrix product, bf16", f"{size}^3", "torch", lambda: left @ right)
        print(f"matrix product: {2 * size**3 / seconds / 1e12:.1f} TFLOP/s", flush=True)
    with bench.attempt("torch", "copy"):
        source = torch.empty(copy_bytes, device=bench.device, dtype=torch.uint8)
        target = torch.empty_like(source)
        seconds = bench.time(
            "copy", f"{copy_bytes / 2**30:.2f} GiB", "torch", lambda: target.copy_(source)
        )
        print(f"copy: {2 * copy_bytes / seconds / 1e12:.3f} TB/s read and written", flush=True)


def check(bench: Bench) -> None:
    """Check every backend against the formula in fp64; remove those that are wrong."""
    d_state = bench.config.d_state
    for name, kernels in list(bench.backends.items()):
        moved = on_device(kernels, bench.device)
        is_correct = False
        with bench.attempt(name, "all, wrong or failing"):
            assert_equal(moved, Case(2, 100, 64, d_state), torch.float32, 1e-3)
            segments = Case(1, 600, 64, d_state, resets=0.01, has_state=True)
            assert_equal(moved, segments, torch.bfloat16, 8e-3)
            is_correct = True
        if not is_correct:
            del bench.backends[name]


def scan_inputs(bench: Bench, batch: int, seed: int) -> list[Tensor]:
    """Random inputs with the values of initialisation: A = -(1..n), dt log-uniform."""
    c = bench.config
    generator = torch.Generator(bench.device).manual_seed(seed)
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
    """Time scan forward, and forward with backward, per backend."""
    for batch in bench.batch_sizes:
        shape = f"B {batch}, L {bench.length}"
        for name, kernels in bench.backends.items():
            with bench.attempt(name, f"scan, {shape}"):
                _time_scan(bench, name, kernels, batch, shape)


def _time_scan(bench: Bench, name: str, kernels: Kernels, batch: int, shape: str) -> None:
    next_inputs = bench.rotation(lambda seed: scan_inputs(bench, batch, seed))
    scan = kernels.selective_scan
    weight = torch.randn(
        batch, bench.length, bench.config.d_inner, device=bench.device, dtype=bench.dtype
    )

    def forward_backward() -> Any:
        inputs = next_inputs()
        return torch.autograd.grad(scan(*inputs)[0], inputs, weight)

    with torch.no_grad():
        bench.time("scan, forward", shape, name, lambda: scan(*next_inputs()))
    seconds = bench.time("scan, forward and backward", shape, name, forward_backward)
    layers = bench.config.n_layer
    per_token = 1e6 * seconds / (batch * bench.length) * layers
    print(f"{name}, {shape}: scan {per_token:.2f} us per token over {layers} layers", flush=True)


def jax_scans(bench: Bench, python: str | None) -> None:
    """Time jax-linear-attention's scan in a process of the Python that has it."""
    who = "jax-linear-attention"
    if python is None:
        bench.missing[who] = "give a Python 3.12 that has it with --jax-python; see jax_scan.py"
        return
    c = bench.config
    sizes = {
        "length": bench.length,
        "channels": c.d_inner,
        "states": c.d_state,
        "copies": 4,
        "runs": 30,
    }
    sizes |= {"calls": CALLS, "checked": CHECK_TOKENS}
    command = [
        python,
        str(Path(__file__).with_name("jax_scan.py")),
        "--batches",
        *map(str, bench.batch_sizes),
    ]
    command += [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    with bench.attempt(who, "scan"), tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            try:
                # a line per batch size; append each now, to keep it after a signal
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
            lines = errors.read().strip().splitlines() or ["no message"]
            raise RuntimeError(f"jax_scan.py failed: {lines[-1]}")


def convolutions(bench: Bench) -> None:
    """Time convolution and SiLU, forward and backward together."""
    c = bench.config
    for batch in bench.batch_sizes:

        def make(seed: int, batch: int = batch) -> list[Tensor]:
            x = torch.randn(batch, bench.length, c.d_inner, device=bench.device).to(bench.dtype)
            weight = torch.randn(c.d_inner, c.d_conv, device=bench.device)
            return [
                t.requires_grad_() for t in (x, weight, torch.zeros(c.d_inner, device=bench.device))
            ]

        for name, kernels in bench.backends.items():
            with bench.attempt(name, f"convolution, B {batch}"):
                next_inputs = bench.rotation(make)

                def forward_backward(
                    conv: Any = kernels.causal_conv1d, next_inputs: Any = next_inputs
                ) -> Any:
                    inputs = next_inputs()
                    out = conv(*inputs)
                    return torch.autograd.grad(out, inputs, torch.ones_like(out))

                bench.time(
                    "conv and SiLU, forward and backward",
                    f"B {batch}, L {bench.length}",
                    name,
                    forward_backward,
                )


def _torch_norm(
    x: Tensor, weight: Any, eps: float, widths: Any = None, dtype: Any = None
) -> Tensor:
    normed = [
        nn.functional.rms_norm(part, part.shape[-1:], weight, eps)
        for part in x.split(widths or x.shape[-1], -1)
    ]
    return torch.cat(normed, -1).to(dtype or x.dtype)


def norms(bench: Bench) -> None:
    """Time RMSNorm of the residual stream and of dt, B and C, forward and backward."""
    c = bench.config
    widths = [c.dt_rank, c.d_state, c.d_state]
    weight = torch.ones(c.d_model, device=bench.device).requires_grad_()

    def inputs(width: int, dtype: torch.dtype) -> Any:
        return bench.rotation(
            lambda _: [torch.randn(bench.length, width, device=bench.device).to(dtype)]
        )

    def time_block_norm(norm: Any, x: Tensor) -> Any:
        out = norm(x.requires_grad_(), weight, 1e-5, None, bench.dtype)
        return torch.autograd.grad(out, [x, weight], torch.ones_like(out))

    def time_split_norm(norm: Any, x: Tensor) -> Any:
        out = norm(x.requires_grad_(), None, 1e-6, widths)
        return torch.autograd.grad(out, [x], torch.ones_like(out))

    norms_of = {name: kernels.rms_norm for name, kernels in bench.backends.items()} | {
        "torch": _torch_norm
    }
    for name, norm in norms_of.items():
        with bench.attempt(name, "norms"):
            if name == "torch":  # `check` covers the backends
                x = torch.randn(CHECK_TOKENS, c.d_model, device=bench.device)
                assert_close([norm(x, weight, 1e-5)], [REFERENCE.rms_norm(x, weight, 1e-5)], 1e-5)
            residual = inputs(c.d_model, torch.float32)
            dt_b_c = inputs(sum(widths), bench.dtype)
            shape = f"{bench.length} x {c.d_model}"
            bench.time(
                "norm, forward and backward",
                shape,
                name,
                lambda n=norm, x=residual: time_block_norm(n, *x()),
            )
            shape = f"{bench.length} x {sum(widths)}"
            bench.time(
                "norms of dt, B and C",
                shape,
                name,
                lambda n=norm, x=dt_b_c: time_split_norm(n, *x()),
            )


def loss(bench: Bench) -> None:
    """Time head and cross entropy, forward and backward, beside torch with all logits and Liger."""
    c = bench.config
    device = bench.device
    hidden = torch.randn(bench.length, c.d_model, device=device).requires_grad_()
    head = nn.Linear(c.d_model, c.vocab_size, bias=False, device=device).weight
    labels = torch.randint(0, c.vocab_size, (bench.length,), device=device)

    def torch_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy((hidden @ head.t()).float(), labels)

    calls: dict[str, Any] = {
        name: lambda h, l, k=kernels: linear_cross_entropy(h, head, l, k.loss)[0].mean()
        for name, kernels in bench.backends.items()
    }
    calls["torch, all logits"] = torch_loss
    calls["Liger Kernel"] = None
    check_hidden = hidden[:CHECK_TOKENS].detach().requires_grad_()
    check_labels = labels[:CHECK_TOKENS]
    exact = torch_loss(check_hidden, check_labels)
    expected = [exact, *torch.autograd.grad(exact, [check_hidden, head])]
    for name, call in calls.items():
        with (
            bench.attempt(name, "head and loss"),
            torch.autocast(device.type, torch.bfloat16, cache_enabled=False),
        ):
            call = call or _liger_loss(head)
            result = call(check_hidden, check_labels)
            grads = torch.autograd.grad(result, [check_hidden, head])
            assert_close([result, *grads], expected, 2e-2)
            what = "head and loss, forward and backward"
            shape = f"{bench.length} tokens"
            bench.time(
                what,
                shape,
                name,
                lambda f=call: torch.autograd.grad(f(hidden, labels), [hidden, head]),
            )


def _liger_loss(head: Tensor) -> Any:
    if importlib.util.find_spec("liger_kernel") is None:
        raise ModuleNotFoundError("pip install --no-deps liger-kernel==0.8.5")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    fused = LigerFusedLinearCrossEntropyLoss()
    return lambda hidden, labels: fused(head, hidden, labels)
