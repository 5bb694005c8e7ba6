"""CPU benchmark: `make bench`. Ceilings first, then scan, convolution and a whole training step
beside their baselines.

Rivals, in the same process on one thread: transformers' loop and mambapy's parallel scan (both
through transformers' own mamba_selective_scan), our reference, and transformers'
FalconMambaForCausalLM for the whole step. B 1, D 512, N 16.
"""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Row, in_turn, median_seconds, show, write
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
    """Inputs as at initialisation: A = -(1..16), dt log-uniform in 0.001 to 0.1."""
    generator = torch.Generator().manual_seed(0)
    u, z = (torch.randn(1, length, CHANNELS, generator=generator) for _ in range(2))
    B, C = (torch.randn(1, length, STATES, generator=generator) for _ in range(2))
    dt = torch.empty(1, length, CHANNELS).uniform_(-6.9, -2.3, generator=generator)
    A = -torch.arange(1.0, STATES + 1).repeat(CHANNELS, 1)
    return [
        x.requires_grad_() for x in (u, dt, A, B, C, torch.ones(CHANNELS), z, torch.zeros(CHANNELS))
    ]


def transformers_scan(mambapy: bool) -> Callable[..., Tensor]:
    """transformers' scan without kernels: its loop, or mambapy's parallel scan."""
    from transformers.models.falcon_mamba.modeling_falcon_mamba import mamba_selective_scan

    def scan(
        u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
    ) -> Tensor:
        rows = [x.transpose(1, 2) for x in (u, dt, B, C, z)]
        y = mamba_selective_scan(
            rows[0],
            rows[1],
            A,
            rows[2],
            rows[3],
            D,
            rows[4],
            bias,
            delta_softplus=True,
            use_mambapy=mambapy,
        )
        return (y[0] if isinstance(y, tuple) else y).transpose(1, 2)

    return scan


def scans(lengths: list[int], missing: dict[str, str]) -> list[Row]:
    """Scan, forward and backward together, for every implementation."""
    who: dict[str, Callable[..., Tensor]] = {
        "ours": lambda *x: CPU.selective_scan(*x)[0],
        "reference": lambda *x: REFERENCE.selective_scan(*x)[0],
        "transformers": transformers_scan(mambapy=False),
    }
    if "mambapy" not in missing:
        who["mambapy"] = transformers_scan(mambapy=True)
    rows = []
    for length in lengths:
        inputs = scan_inputs(length)
        expected = who["reference"](*inputs).detach()
        weight = torch.randn_like(expected)
        calls = {}
        for name, scan in who.items():
            # the same problem
            torch.testing.assert_close(scan(*inputs).detach(), expected, rtol=1e-3, atol=1e-4)

            def both(
                scan: Callable[..., Tensor] = scan,
                inputs: list[Tensor] = inputs,
                weight: Tensor = weight,
            ) -> Any:
                return torch.autograd.grad(scan(*inputs), inputs, weight)

            calls[name] = both
        rows += in_turn("scan, forward and backward", f"L {length}", calls)
    return rows


def convolutions(lengths: list[int]) -> list[Row]:
    """Convolution and SiLU, forward and backward together."""
    rows = []
    for length in lengths:
        x = torch.randn(1, length, CHANNELS).requires_grad_()
        weight, bias = (
            torch.randn(CHANNELS, 4).requires_grad_(),
            torch.randn(CHANNELS).requires_grad_(),
        )
        calls = {}
        for name, kernels in (("ours", CPU), ("reference", REFERENCE)):

            def both(conv: Any = kernels.causal_conv1d, inputs: Any = (x, weight, bias)) -> Any:
                return torch.autograd.grad(conv(*inputs).sum(), inputs)

            calls[name] = both
        rows += in_turn("conv and SiLU, forward and backward", f"L {length}", calls)
    return rows


def rows_of_a_model(lengths: list[int], config: ModelConfig) -> list[Row]:
    """The block's norm, and head with loss, forward and backward together; torch's norm, and torch
    with all logits.
    """
    rows, cross_entropy = [], torch.nn.functional.cross_entropy
    for length in lengths:
        x, norm_weight = (
            torch.randn(length, config.d_model).requires_grad_(),
            torch.ones(config.d_model).requires_grad_(),
        )
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
            both = {who: (lambda call=call: call().backward()) for who, call in calls.items()}
            rows += in_turn(f"{what}, forward and backward", f"L {length}", both)
    return rows


def steps(lengths: list[int], config: ModelConfig) -> list[Row]:
    """Forward and backward of the whole demo model on the same weights and tokens."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    ours = {
        name: build_model(config, k, 0, DEVICE)
        for name, k in (("ours", CPU), ("reference", REFERENCE))
    }
    hf_model = FalconMambaForCausalLM(FalconMambaConfig(**hf_config(config, 11, "float32"))).train()
    names = dict(tensor_names(config.n_layer))
    hf_model.load_state_dict(
        {names[name]: to_hf(name, p.detach()) for name, p in ours["ours"].named_parameters()}
    )
    rows = []
    for length in lengths:
        ids = torch.randint(
            12, config.vocab_size, (1, length + 1), generator=torch.Generator().manual_seed(0)
        )
        inputs, targets = ids[:, :-1], ids[:, 1:]

        def theirs(inputs: Tensor = inputs, targets: Tensor = targets) -> Tensor:
            logits = hf_model(inputs, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

        losses = {
            name: (lambda m=m, i=inputs, t=targets: m(i, t)[0].mean()) for name, m in ours.items()
        }
        losses["transformers"] = theirs
        expected = losses["ours"]().item()
        for name, loss in losses.items():
            assert abs(loss().item() - expected) < 1e-3, name  # the same model and tokens
        calls = {name: (lambda loss=loss: loss().backward()) for name, loss in losses.items()}
        rows += in_turn("demo model, training step", f"L {length}", calls)
    return rows


def ceilings() -> list[Row]:
    """The machine's own limits: a matrix product and a copy."""
    left, right = torch.randn(1024, 1024), torch.randn(1024, 1024)
    source, target = torch.randn(2**26), torch.empty(2**26)
    rows = []
    for what, shape, call in (
        ("matrix product, fp32", "1024^3", lambda: left @ right),
        ("copy", "256 MiB", lambda: target.copy_(source)),
    ):
        seconds, runs = median_seconds(call, DEVICE, budget=1.0)
        rows.append(Row(what, shape, "torch", seconds, runs))
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
    rows += rows_of_a_model(arguments.lengths, run_config("demo").model)
    rows += steps(
        [length for length in arguments.lengths if length >= 256], run_config("demo").model
    )
    show(rows, f"one thread, {instruction_set()}")
    for name, fix in missing.items():
        print(f"not measured: {name} is missing ({fix})")
    if not arguments.no_record:
        text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        model = next(
            (
                line.split(":")[1].strip()
                for line in text.splitlines()
                if line.startswith("model name")
            ),
            "?",
        )
        print(
            write(
                rows,
                "cpu",
                f"one thread of {model}, {instruction_set()}",
                missing,
                {"channels": CHANNELS, "states": STATES},
            )
        )


if __name__ == "__main__":
    main()
