"""CPU benchmark, `make bench`: machine limits, then scan, convolution and a training step.

The baselines run in the same process on one thread: transformers' loop and mambapy's parallel scan
(both through transformers' mamba_selective_scan), our reference, and transformers'
FalconMambaForCausalLM for the training step. B 1, D 512, N 16.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import (
    Measurement,
    median_seconds,
    print_table,
    time_interleaved,
    write_results,
)
from model.config import ModelConfig
from model.hf import hf_config, tensor_names, to_hf
from model.kernels import CPU, REFERENCE
from model.kernels.cpu_library import instruction_set
from model.kernels.cross_entropy import linear_cross_entropy
from model.parallel.build import build_model
from tests.compose import run_config

CHANNELS, STATES = 512, 16
DEVICE = torch.device("cpu")


def scan_inputs(length: int) -> list[Tensor]:
    """Random inputs as at initialisation: A = -(1..16), dt log-uniform in 0.001 to 0.1."""
    generator = torch.Generator().manual_seed(0)
    u, z = (torch.randn(1, length, CHANNELS, generator=generator) for _ in range(2))
    B, C = (torch.randn(1, length, STATES, generator=generator) for _ in range(2))
    dt = torch.empty(1, length, CHANNELS).uniform_(-6.9, -2.3, generator=generator)
    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    return [
        x.requires_grad_() for x in (u, dt, A, B, C, torch.ones(CHANNELS), z, torch.zeros(CHANNELS))
    ]


def transformers_scan(mambapy: bool) -> Callable[..., Tensor]:
    """transformers' scan without fused kernels: its loop, or mambapy's parallel scan."""
    from transformers.models.falcon_mamba.modeling_falcon_mamba import mamba_selective_scan

    def scan(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
    ) -> Tensor:
        y = mamba_selective_scan(
            u.transpose(1, 2),
            dt.transpose(1, 2),
            A,
            B.transpose(1, 2),
            C.transpose(1, 2),
            D,
            z.transpose(1, 2),
            bias,
            delta_softplus=True,
            use_mambapy=mambapy,
        )
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)

    return scan


def scans(lengths: list[int], missing: dict[str, str]) -> list[Measurement]:
    """Time scan forward and backward together for every implementation."""
    implementations: dict[str, Callable[..., Tensor]] = {
        "ours": lambda *x: CPU.selective_scan(*x)[0],
        "reference": lambda *x: REFERENCE.selective_scan(*x)[0],
        "transformers": transformers_scan(mambapy=False),
    }
    if "mambapy" not in missing:
        implementations["mambapy"] = transformers_scan(mambapy=True)
    rows = []
    for length in lengths:
        inputs = scan_inputs(length)
        expected = implementations["reference"](*inputs).detach()
        weight = torch.randn_like(expected)
        calls = {}
        for name, scan in implementations.items():
            # check the result first
            torch.testing.assert_close(scan(*inputs).detach(), expected, rtol=1e-3, atol=1e-4)

            def forward_backward(
                scan: Callable[..., Tensor] = scan,
                inputs: list[Tensor] = inputs,
                weight: Tensor = weight,
            ) -> Any:
                return torch.autograd.grad(scan(*inputs), inputs, weight)

            calls[name] = forward_backward
        rows += time_interleaved("scan, forward and backward", f"L {length}", calls)
    return rows


def convolutions(lengths: list[int]) -> list[Measurement]:
    """Time convolution and SiLU, forward and backward together."""
    rows = []
    for length in lengths:
        x = torch.randn(1, length, CHANNELS).requires_grad_()
        weight = torch.randn(CHANNELS, 4).requires_grad_()
        bias = torch.randn(CHANNELS).requires_grad_()
        calls = {}
        for name, kernels in (("ours", CPU), ("reference", REFERENCE)):

            def forward_backward(
                conv: Any = kernels.causal_conv1d, inputs: Any = (x, weight, bias)
            ) -> Any:
                return torch.autograd.grad(conv(*inputs).sum(), inputs)

            calls[name] = forward_backward
        rows += time_interleaved("conv and SiLU, forward and backward", f"L {length}", calls)
    return rows


def norms_and_losses(lengths: list[int], config: ModelConfig) -> list[Measurement]:
    """Time norm, and head with loss, forward and backward; beside torch, which keeps all logits."""
    rows = []
    cross_entropy = torch.nn.functional.cross_entropy
    for length in lengths:
        x = torch.randn(length, config.d_model).requires_grad_()
        norm_weight = torch.ones(config.d_model).requires_grad_()
        head = torch.randn(config.vocab_size, config.d_model).requires_grad_()
        labels = torch.randint(
            0, config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)
        )
        norms: dict[str, Callable[[], Tensor]] = {
            "torch": lambda x=x, w=norm_weight: torch.nn.functional.rms_norm(
                x, x.shape[-1:], w, 1e-5
            ).sum()
        }
        losses: dict[str, Callable[[], Tensor]] = {
            "torch": lambda x=x, h=head, y=labels: cross_entropy(x @ h.t(), y)
        }
        for name, k in (("ours", CPU), ("reference", REFERENCE)):
            norms[name] = lambda k=k, x=x, w=norm_weight: k.rms_norm(x, w, 1e-5).sum()
            losses[name] = lambda k=k, x=x, h=head, y=labels: linear_cross_entropy(x, h, y, k.loss)[
                0
            ].mean()
        for what, calls in (("norm", norms), ("head and loss", losses)):
            steps = {who: (lambda call=call: call().backward()) for who, call in calls.items()}
            rows += time_interleaved(f"{what}, forward and backward", f"L {length}", steps)
    return rows


def training_steps(lengths: list[int], config: ModelConfig) -> list[Measurement]:
    """Time forward and backward of the demo model, with equal weights and tokens."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    models = {
        name: build_model(config, kernels, 0, DEVICE)
        for name, kernels in (("ours", CPU), ("reference", REFERENCE))
    }
    hf_model = FalconMambaForCausalLM(FalconMambaConfig(**hf_config(config, 11, "float32"))).train()
    names = dict(tensor_names(config.n_layer))
    hf_model.load_state_dict(
        {names[name]: to_hf(name, p.detach()) for name, p in models["ours"].named_parameters()}
    )
    rows = []
    for length in lengths:
        ids = torch.randint(
            12, config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0)
        )
        inputs, targets = ids[:, :-1], ids[:, 1:]

        def hf_loss(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            logits = hf_model(inputs, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        losses = {
            name: (lambda m=m, i=inputs, t=targets: m(i, t)[0].mean()) for name, m in models.items()
        }
        losses["transformers"] = hf_loss
        expected = losses["ours"]().item()
        for name, loss in losses.items():
            assert abs(loss().item() - expected) < 1e-3, name  # check the loss first
        calls = {name: (lambda loss=loss: loss().backward()) for name, loss in losses.items()}
        rows += time_interleaved("demo model, training step", f"L {length}", calls)
    return rows


def ceilings() -> list[Measurement]:
    """Time a matrix product and a copy: the limits of this machine."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source, target = torch.randn(2**26), torch.empty(2**26)
    rows = []
    for what, shape, call in (
        ("matrix product, fp32", "1024^3", lambda: left @ right),
        ("copy", "256 MiB", lambda: target.copy_(source)),
    ):
        seconds, runs = median_seconds(call, DEVICE, budget=1.0)
        rows.append(Measurement(what, shape, "torch", seconds, runs))
    return rows


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--no-record", action="store_true", help="print only")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    missing = (
        {}
        if importlib.util.find_spec("mambapy")
        else {"mambapy": "pip install --no-deps mambapy==1.2.0"}
    )
    rows = ceilings() + scans(arguments.lengths, missing) + convolutions(arguments.lengths)
    rows += norms_and_losses(arguments.lengths, run_config("demo").model)
    rows += training_steps(
        [length for length in arguments.lengths if length >= 256], run_config("demo").model
    )
    print_table(rows, f"one thread, {instruction_set()}")
    for name, fix in missing.items():
        print(f"not measured: {name} is not installed ({fix})")
    if not arguments.no_record:
        hardware = f"one thread of {cpu_model()}, {instruction_set()}"
        sizes = {"channels": CHANNELS, "states": STATES}
        print(write_results(rows, "cpu", hardware, missing, sizes))


def cpu_model() -> str:
    """Model name in /proc/cpuinfo, "?" if unknown."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "?")


if __name__ == "__main__":
    main()
