"""The model equals transformers' FalconMamba: logits, loss and every gradient, and the round trip
is bit-equal.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import FalconMambaConfig, FalconMambaForCausalLM

from model.config import ModelConfig, Recompute
from model.flops import matmul_parameters, parameter_count, parameter_shapes, train_flops_per_token
from model.hf import HfFolder, config_from_hf, from_hf, hf_config, save_hf, tensor_names, to_hf
from model.kernels import CPU, REFERENCE, Kernels
from model.mamba import FalconMamba
from model.parallel.build import build_model
from model.parameters import has_weight_decay
from tests.tiny import TINY, model_of


def hf_reference(config: ModelConfig) -> FalconMambaForCausalLM:
    """A random transformers model of the same shape, with weights of the size of a trained
    one's.
    """
    torch.manual_seed(7)
    hf_model = FalconMambaForCausalLM(
        FalconMambaConfig(**hf_config(config, eos=11, dtype="float32"))
    )
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.copy_(
                torch.randn_like(parameter)
                * (0.5 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5)
            )
    return hf_model.train()


def import_from(hf_model: FalconMambaForCausalLM, config: ModelConfig) -> FalconMamba:
    theirs = hf_model.state_dict()
    model = FalconMamba(config, REFERENCE)
    model.load_state_dict(
        {ours: from_hf(ours, theirs[name]) for ours, name in tensor_names(config.n_layer)}
    )
    return model


@pytest.mark.parametrize("length", [1, 7, 300])
def test_equals_transformers(length: int) -> None:
    hf_model = hf_reference(TINY)
    model = import_from(hf_model, TINY)
    tokens = torch.randint(0, TINY.vocab_size, (2, length + 1))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    logits = hf_model(inputs, use_cache=False).logits
    torch.testing.assert_close(
        model.logits(inputs), logits, rtol=1e-5, atol=1e-5 * logits.abs().max().item()
    )
    theirs = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    ours = model(inputs, targets)[0].mean()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    theirs.backward()
    ours.backward()
    gradients = dict(hf_model.named_parameters())
    for name, hf_name in tensor_names(TINY.n_layer):
        expected = from_hf(name, gradients[hf_name].grad)
        actual = model.get_parameter(name).grad
        error = (actual - expected).norm() / expected.norm().clamp(min=1e-12)
        assert error <= 1e-5, (name, float(error))


def test_round_trip_is_bit_equal() -> None:
    hf_model = hf_reference(TINY)
    model = import_from(hf_model, TINY)
    theirs = hf_model.state_dict()
    back = {
        name: to_hf(ours, model.get_parameter(ours).detach())
        for ours, name in tensor_names(TINY.n_layer)
    }
    assert list(back) == list(theirs)  # also the order, which decides how tensors fall into files
    assert all(torch.equal(back[name], theirs[name]) for name in back)
    assert config_from_hf(hf_config(TINY, eos=11, dtype="float32")) == TINY


def test_released_config_is_read() -> None:
    released = {
        "model_type": "falcon_mamba",
        "expand": 16,
        "hidden_size": 4096,
        "intermediate_size": 8192,
        "state_size": 16,
        "conv_kernel": 4,
        "num_hidden_layers": 64,
        "vocab_size": 65024,
        "layer_norm_epsilon": 1e-5,
        "time_step_rank": 256,
        "time_step_floor": 1e-4,
        "time_step_max": 0.1,
        "time_step_min": 1e-3,
        "tie_word_embeddings": False,
        "use_bias": False,
        "use_conv_bias": True,
        "initializer_range": 0.1,
    }
    assert parameter_count(config_from_hf(released)) == 7_272_665_088
    assert matmul_parameters(config_from_hf(released)) == 6_994_001_920
    assert train_flops_per_token(config_from_hf(released)) == 6 * 6_994_001_920
    with pytest.raises(ValueError, match="falcon_mamba"):
        config_from_hf({"model_type": "llama"})


def test_shapes_table_is_the_model() -> None:
    with torch.device("meta"):
        model = FalconMamba(TINY)
    assert [(name, tuple(p.shape)) for name, p in model.named_parameters()] == list(
        parameter_shapes(TINY).items()
    )
    assert set(parameter_shapes(TINY)) == {name for name, _ in tensor_names(TINY.n_layer)}


def test_initial_values_follow_the_table() -> None:
    model = model_of(TINY)
    mixer = model.layers[0].mixer
    dt = torch.nn.functional.softplus(mixer.dt_bias)
    assert TINY.dt_min * 0.99 <= dt.min() and dt.max() <= TINY.dt_max * 1.01
    assert torch.equal(mixer.A_log[3], torch.arange(1, TINY.d_state + 1).float().log())
    assert torch.equal(mixer.D, torch.ones_like(mixer.D))
    for weight, bound in (
        (mixer.in_proj.weight, TINY.d_model**-0.5),
        (mixer.dt_proj.weight, TINY.dt_rank**-0.5),
        (mixer.out_proj.weight, (TINY.d_inner * TINY.n_layer) ** -0.5),
        (mixer.conv_weight, TINY.d_conv**-0.5),
    ):
        assert 0.9 * bound < weight.abs().max() <= bound
    assert abs(model.embedding.weight.std().item() / TINY.embedding_std - 1) < 0.05
    other = build_model(TINY, REFERENCE, seed=1, device=torch.device("cpu"))
    assert not torch.equal(other.lm_head.weight, model.lm_head.weight)
    assert torch.equal(model_of(TINY).lm_head.weight, model.lm_head.weight)


def test_decay_rule_by_name() -> None:
    decayed = {
        name.rsplit("layers.0.", 1)[-1] for name in parameter_shapes(TINY) if has_weight_decay(name)
    }
    expected = {f"mixer.{name}.weight" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")}
    expected |= {"mixer.conv_weight", "embedding.weight", "lm_head.weight"}
    assert {name for name in decayed if not name.startswith("layers.")} == expected


@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=lambda kernels: kernels.name)
def test_recompute_changes_no_bit(kernels: Kernels) -> None:
    tokens = torch.randint(0, TINY.vocab_size, (2, 33))
    gradients = []
    for recompute in Recompute:
        model = build_model(TINY, kernels, 0, torch.device("cpu"), recompute=recompute)
        model(tokens[:, :-1], tokens[:, 1:])[0].mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert all(
        torch.equal(gradients[0][name], other[name]) for other in gradients[1:] for name in other
    )


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("kernels", [REFERENCE, CPU], ids=lambda kernels: kernels.name)
def test_chunks_equal_the_whole_sequence(kernels: Kernels, resets: bool) -> None:
    """Chunks of any lengths, also shorter than the convolution, with documents near their edges."""
    model = model_of(TINY, kernels=kernels)
    tokens = torch.randint(0, TINY.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    doc_starts = None
    if resets:
        doc_starts = torch.zeros(2, 40, dtype=torch.bool)
        doc_starts[0, [0, 9, 11]] = doc_starts[1, [10, 12, 38]] = True
    with torch.no_grad():
        whole = model.hidden(tokens, doc_starts)
        for sizes in ([40], [10, 1, 2, 27], [1] * 40, [3, 37]):
            state = None
            outputs = []
            start = 0
            for size in sizes:
                chunk = slice(start, start + size)
                h, state = model.forward_chunk(
                    tokens[:, chunk], state, None if doc_starts is None else doc_starts[:, chunk]
                )
                outputs.append(h)
                start += size
            torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-4, atol=1e-5)
    assert {tuple(layer.conv_state.shape) for layer in state} == {
        (2, TINY.d_conv - 1, TINY.d_inner)
    }


def test_gradients_pass_between_chunks() -> None:
    model = model_of(TINY).double()
    tokens = torch.randint(0, TINY.vocab_size, (2, 12), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(2, 12, TINY.d_model, dtype=torch.float64)
    expected = torch.autograd.grad(
        (model.hidden(tokens) * weight).sum(), list(model.parameters())[:-1]
    )
    first, state = model.forward_chunk(tokens[:, :5])
    second, _ = model.forward_chunk(tokens[:, 5:], state)
    actual = torch.autograd.grad(
        (torch.cat([first, second], 1) * weight).sum(), list(model.parameters())[:-1]
    )
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-12)


def test_a_model_is_saved_again_and_again_and_whole(tmp_path: Path) -> None:
    model = model_of(TINY, kernels=REFERENCE)
    for number in (1.0, 2.0):
        with torch.no_grad():
            model.final_norm.weight.fill_(number)
        save_hf(model, str(tmp_path / "saved"), 0)
        found = HfFolder(tmp_path / "saved")
        assert all(torch.equal(found.read_full(n), p.detach()) for n, p in model.named_parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved"]
    with pytest.raises(ValueError, match="eos is 999"):
        save_hf(model, tmp_path / "other", 999)
    plain = model_of(replace(TINY, mixer_norms=False), kernels=REFERENCE)
    with pytest.raises(ValueError):
        save_hf(plain, tmp_path / "other", 0)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:48])
    with pytest.raises(ValueError, match="tensor-parallel shard"):
        save_hf(model, tmp_path / "other", 0)
    assert not (tmp_path / "other").exists()
