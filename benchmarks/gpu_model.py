"""Layer and rank's step of the GPU benchmark, beside transformers' FalconMamba and Llama layers."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.baselines import llama_config
from benchmarks.gpu_bench import Bench, assert_close
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

CHECK_TOKENS = 64  # of the check of transformers' layer


def layers(bench: Bench) -> None:
    """Time a block forward and backward, micro-batch 1."""
    calls: dict[str, Any] = {}
    for name, kernels in bench.backends.items():
        with bench.attempt(name, "layer"), bench.device:
            calls[name] = _randomize(Block(bench.config, kernels))
    with bench.attempt("transformers' FalconMamba", "layer"):
        calls["transformers' FalconMamba"] = hf_falcon_mamba_layer(bench)
    with bench.attempt("Llama", "layer"):
        llama, num_parameters = llama_layer(bench)
        calls[f"a Llama's layer of {num_parameters / 1e6:.0f}M parameters"] = llama
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


def hf_falcon_mamba_layer(bench: Bench) -> Any:
    """transformers' layer, checked in fp32: equal outputs and gradients with our weights."""
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    config = replace(bench.config, n_layer=1, vocab_size=16)
    model = FalconMamba(config, REFERENCE)
    initialize(model, config, 0, lambda name, full: full)
    hf_model = FalconMambaForCausalLM(FalconMambaConfig(**hf_config(config, 11, "float32"))).train()
    names = dict(tensor_names(1))
    hf_model.load_state_dict(
        {names[name]: to_hf(name, p.detach()) for name, p in model.named_parameters()}
    )
    block = model.layers[0].to(bench.device)
    hf_layer = hf_model.backbone.layers[0].to(bench.device)

    def call(x: Tensor, doc_starts: None) -> Tensor:
        out = hf_layer(x)
        return out[0] if isinstance(out, tuple) else out

    x = torch.randn(1, CHECK_TOKENS, config.d_model, device=bench.device).requires_grad_()
    results = []
    for function, mixer in ((call, hf_layer.mixer), (block, block.mixer)):
        out = function(x, None)
        inputs = [x, mixer.A_log, mixer.x_proj.weight, mixer.in_proj.weight]
        grads = torch.autograd.grad(out, inputs, torch.sin(out.detach() * 100))
        results.append([out.detach(), *grads])
    assert_close(results[0], results[1], 1e-3)
    return call


def llama_layer(bench: Bench) -> tuple[Any, int]:
    """A Llama layer of the same width with torch's attention and the final norm; its parameters."""
    from transformers import LlamaModel

    config = llama_config(replace(bench.config, vocab_size=16))
    config.num_hidden_layers = 1
    config._attn_implementation = "sdpa"
    model = LlamaModel(config).to(bench.device)
    num_parameters = sum(parameter.numel() for parameter in model.layers.parameters())

    def call(x: Tensor, doc_starts: None) -> Tensor:
        output: Tensor = model(inputs_embeds=x, use_cache=False).last_hidden_state
        return output

    return call, num_parameters


def embedding(bench: Bench) -> None:
    """Time the embedding, forward and backward."""
    c = bench.config
    with bench.attempt("torch", "embedding"):
        table = nn.Embedding(c.vocab_size, c.d_model, device=bench.device)
        tokens = torch.randint(0, c.vocab_size, (1, bench.length), device=bench.device)
        what, shape = "embedding, forward and backward", f"{bench.length} tokens"
        bench.time(what, shape, "torch", lambda: table(tokens).sum().backward())


def rank(bench: Bench, n_layer: int) -> None:
    """Time a data-parallel rank's step; halves n_layer until the model fits in memory."""
    bench.missing["transformers' FalconMamba: a rank's step"] = (
        "it has no sharded engine; its layer is measured"
    )
    for name, kernels in bench.backends.items():
        if kernels is REFERENCE and bench.device.type == "cuda":
            bench.missing["reference: a rank's step"] = "minutes; its layer is measured"
            continue
        layers = n_layer
        fits = False
        while layers and not fits:
            fits = True
            with bench.attempt(name, f"a rank's step of {layers} layers"):
                try:
                    _time_rank(bench, name, kernels, layers)
                except torch.cuda.OutOfMemoryError:
                    print(f"{name}: {layers} layers do not fit in memory", flush=True)
                    fits = False
            layers //= 2


def _time_rank(bench: Bench, name: str, kernels: Kernels, n_layer: int) -> None:
    """Time a step of the last rank with the run's engine and a fake process group.

    Weights, gradients, this rank's optimizer shard, recompute and update are the run's. Collectives
    transfer nothing and take no time.
    """
    run = replace(bench.run, model=replace(bench.config, n_layer=n_layer))
    world_size = run.cluster.nodes * run.cluster.ranks_per_node
    p = run.parallel
    on_cpu = (
        cuda_on_cpu
        if (bench.device.type, p.engine) == ("cpu", EngineKind.megatron)
        else nullcontext
    )
    with fake_distributed(run, world_size) as ranks, on_cpu():
        model = build_meta_model(
            run.model, kernels, ranks.tp_size, p.sequence_parallel, run.compute.recompute
        )
        set_tp_attributes(_randomize(model.to_empty(device=bench.device)), ranks.tp_size)
        engine = build_engine(
            model, run.optim, p, run.compute.precision, replace(ranks, device=bench.device)
        )
        step = _step(bench, run, model, engine)
        step()
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        shape = (
            f"{n_layer} layers, 1 of {world_size} ranks, {p.engine.value}, "
            f"{run.compute.precision.value}, recompute {run.compute.recompute.value}, "
            f"{p.micro_batch_tokens} tokens"
        )
        rate = p.micro_batch_tokens / bench.time("a rank's step", shape, name, step)
    peak = torch.cuda.max_memory_allocated() / GIB if bench.device.type == "cuda" else None
    estimated = estimate_memory(run, world_size).total / GIB
    bench.memory.append(
        {
            "who": name,
            "layers": n_layer,
            "ranks": world_size,
            "peak_gib": peak,
            "plan_gib": estimated,
        }
    )
    tflops = rate * train_flops_per_token(run.model) / 1e12
    print(f"{name}, {shape}: {rate:.0f} tokens/s, {tflops:.1f} model TFLOP/s", flush=True)
    measured = "not measured on a CPU" if peak is None else f"{peak:.1f} GiB"
    print(f"{name}, {shape}: peak memory {measured}, estimated {estimated:.1f} GiB", flush=True)


def _step(bench: Bench, run: RunConfig, model: FalconMamba, engine: Engine) -> Callable[[], None]:
    shape = (run.parallel.micro_batch_tokens // bench.length, bench.length + 1)
    tokens = torch.randint(0, run.model.vocab_size, shape, device=bench.device)
    bf16 = run.compute.precision is Precision.bf16

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            losses, _ = model(tokens[:, :-1], tokens[:, 1:])
        engine.backward(losses.mean(), last=True)
        _, skipped = engine.clip_and_step(run.optim.lr)
        assert not skipped, "the gradient norm is not finite"

    return step


def _randomize(module: nn.Module) -> nn.Module:
    """Set small random parameters in place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(-0.01, 0.01)
    return module
