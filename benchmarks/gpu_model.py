"""The GPU benchmark's layer and step of a rank, beside transformers' FalconMamba and a Llama's
layer.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import llama_config
from benchmarks.gpu_bench import Bench, agree
from launch.simulation.cuda_on_cpu import cuda_on_cpu
from launch.simulation.dry_run import fake_distributed
from model.flops import train_flops_per_token
from model.hf import hf_config, tensor_names, to_hf
from model.init import initialize
from model.kernels import REFERENCE, Kernels
from model.mamba import Block, FalconMamba
from model.parallel.build import build_meta_model, set_tp_attributes
from train.config import EngineKind, Precision, RunConfig
from train.costs.memory import GIB, estimate_memory
from train.engines.build import build_engine
from train.engines.protocol import Engine

SHORT = 64  # tokens of the problem that a rival's layer is checked on


def layers(bench: Bench) -> None:
    """One whole block, forward and backward, micro-batch 1."""
    calls: dict[str, Any] = {}
    for name, kernels in bench.backends.items():
        with bench.attempt(name, "layer"), bench.device:
            calls[name] = _filled(Block(bench.config, kernels))
    with bench.attempt("transformers' FalconMamba", "layer"):
        calls["transformers' FalconMamba"] = falcon_layer(bench)
    with bench.attempt("Llama", "layer"):
        llama, size = llama_layer(bench)
        calls[f"a Llama's layer of {size / 1e6:.0f}M parameters"] = llama
    for name, layer in calls.items():
        with bench.attempt(name, "layer"):
            x = torch.randn(
                1, bench.length, bench.config.d_model, device=bench.device
            ).requires_grad_()

            def step(layer: Any = layer, x: Tensor = x) -> Any:
                with torch.autocast(bench.device.type, torch.bfloat16, cache_enabled=False):
                    out = layer(x, None)
                return out.square().mean().backward()

            bench.time("one layer, forward and backward", f"B 1, L {bench.length}", name, step)


def falcon_layer(bench: Bench) -> Any:
    """transformers' layer, after it has given our output and gradients with our weights on a short
    problem in fp32.
    """
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    small = replace(bench.config, n_layer=1, vocab_size=16)
    ours = FalconMamba(small, REFERENCE)
    initialize(ours, small, 0, lambda name, full: full)
    theirs = FalconMambaForCausalLM(FalconMambaConfig(**hf_config(small, 11, "float32"))).train()
    names = dict(tensor_names(1))
    theirs.load_state_dict(
        {names[name]: to_hf(name, p.detach()) for name, p in ours.named_parameters()}
    )
    block, layer = ours.layers[0].to(bench.device), theirs.backbone.layers[0].to(bench.device)

    def call(x: Tensor, doc_starts: None) -> Tensor:
        out = layer(x)
        return out[0] if isinstance(out, tuple) else out

    x = torch.randn(1, SHORT, small.d_model, device=bench.device).requires_grad_()
    results = []
    for function, mixer in ((call, layer.mixer), (block, block.mixer)):
        out = function(x, None)
        wanted = [x, mixer.A_log, mixer.x_proj.weight, mixer.in_proj.weight]
        results.append(
            [out.detach(), *torch.autograd.grad(out, wanted, torch.sin(out.detach() * 100))]
        )
    agree(results[0], results[1], 1e-3)
    return call


def llama_layer(bench: Bench) -> tuple[Any, int]:
    """A layer of a Llama of the same width with torch's attention, its final norm with it; and its
    parameters.
    """
    from transformers import LlamaModel

    config = llama_config(replace(bench.config, vocab_size=16))
    config.num_hidden_layers, config._attn_implementation = 1, "sdpa"
    model = LlamaModel(config).to(bench.device)
    size = sum(parameter.numel() for parameter in model.layers.parameters())
    return lambda x, doc_starts: model(inputs_embeds=x, use_cache=False).last_hidden_state, size


def embedding(bench: Bench) -> None:
    """The lookup, forward and backward: with the head and loss, what a rank's step has besides its
    layers.
    """
    c = bench.config
    with bench.attempt("torch", "embedding"):
        table = nn.Embedding(c.vocab_size, c.d_model, device=bench.device)
        tokens = torch.randint(0, c.vocab_size, (1, bench.length), device=bench.device)
        what, shape = "embedding, forward and backward", f"{bench.length} tokens"
        bench.time(what, shape, "torch", lambda: table(tokens).sum().backward())


def rank(bench: Bench, n_layer: int) -> None:
    """A data-parallel rank's step of as many layers as fit, from n_layer on by halves."""
    bench.missing["transformers' FalconMamba: a rank's step"] = (
        "it has no engine that shards; its layer is measured"
    )
    for name, kernels in bench.backends.items():
        if kernels is REFERENCE and bench.device.type == "cuda":
            bench.missing["reference: a rank's step"] = "minutes; its layer is measured"
            continue
        left = n_layer
        while left:
            tried, left = left, 0
            with bench.attempt(name, f"a rank's step of {tried} layers"):
                try:
                    _rank(bench, name, kernels, tried)
                except torch.cuda.OutOfMemoryError:
                    print(f"{name}: {tried} layers do not fit", flush=True)
                    left = tried // 2


def _rank(bench: Bench, name: str, kernels: Kernels, n_layer: int) -> None:
    """The run's own engine on the last of all its ranks, in a world whose other ranks take part in
    nothing.

    Weights, gradients, this rank's part of the optimizer, recompute and update are the run's.
    Collectives pass nothing on and cost nothing.
    """
    run = replace(bench.run, model=replace(bench.config, n_layer=n_layer))
    world, p = run.cluster.nodes * run.cluster.ranks_per_node, run.parallel
    on_cpu = (
        cuda_on_cpu
        if (bench.device.type, p.engine) == ("cpu", EngineKind.megatron)
        else nullcontext
    )
    with fake_distributed(run, world) as ranks, on_cpu():
        model = build_meta_model(
            run.model, kernels, ranks.tp_size, p.sequence_parallel, run.compute.recompute
        )
        set_tp_attributes(_filled(model.to_empty(device=bench.device)), ranks.tp_size)
        engine = build_engine(
            model, run.optim, p, run.compute.precision, replace(ranks, device=bench.device)
        )
        step = _step(bench, run, model, engine)
        step()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        shape = (
            f"{n_layer} layers, 1 of {world} ranks, {p.engine.value}, "
            f"{run.compute.precision.value}, recompute {run.compute.recompute.value}, "
            f"{p.micro_batch_tokens} tokens"
        )
        rate = p.micro_batch_tokens / bench.time("a rank's step", shape, name, step)
    peak = torch.cuda.max_memory_allocated() / GIB if bench.device.type == "cuda" else None
    plan = estimate_memory(run, world).total / GIB
    bench.memory.append(
        {"who": name, "layers": n_layer, "ranks": world, "peak_gib": peak, "plan_gib": plan}
    )
    tflops = rate * train_flops_per_token(run.model) / 1e12
    print(f"{name}, {shape}: {rate:.0f} tokens/s, {tflops:.1f} model TFLOP/s", flush=True)
    measured = "not measured on a CPU" if peak is None else f"{peak:.1f} GiB"
    print(
        f"{name}, {shape}: largest memory allocated {measured}, planned {plan:.1f} GiB", flush=True
    )


def _step(bench: Bench, run: RunConfig, model: FalconMamba, engine: Engine) -> Callable[[], None]:
    shape = (run.parallel.micro_batch_tokens // bench.length, bench.length + 1)
    tokens = torch.randint(0, run.model.vocab_size, shape, device=bench.device)
    bf16 = run.compute.precision is Precision.bf16

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            losses, _ = model(tokens[:, :-1], tokens[:, 1:])
        engine.backward(losses.mean(), last=True)
        _, skipped = engine.clip_and_step(run.optim.lr)
        assert not skipped, "the gradient's norm is not finite"

    return step


def _filled(module: nn.Module) -> nn.Module:
    """Small random parameters: times do not depend on them."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.01, 0.01)
    return module
