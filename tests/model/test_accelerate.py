"""Our kernels in transformers' FalconMamba, against transformers alone."""

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from core.errors import InputError
from model import hf_accelerate
from model.hf import accelerate
from model.kernels.reference import rms_norm

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 5,
    "intermediate_size": 48, "time_step_rank": 3, "conv_kernel": 4, "pad_token_id": 0,
}  # fmt: skip
LINEARS = ("in_proj", "x_proj", "dt_proj", "out_proj")


def build(**options: Any) -> Any:
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = transformers.FalconMambaForCausalLM(
        transformers.FalconMambaConfig(**SIZES, **options)
    )  # fmt: skip
    with torch.no_grad():  # transformers begins with zeros and ones here
        for name, parameter in model.named_parameters():
            if name.endswith(("conv1d.bias", "norm.weight", "norm_f.weight", ".D")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def model() -> Any:
    return build().train()


@pytest.fixture(autouse=True)
def our_kernels_run(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the scans of our kernels, so that a test cannot compare transformers with itself."""
    calls: list[int] = []
    kernels_of = hf_accelerate.kernels_of

    def counted(device: str) -> Any:
        calls.append(1)
        return kernels_of(device)

    monkeypatch.setattr(hf_accelerate, "kernels_of", counted)
    yield calls


def ids(rows: int = 2, length: int = 33) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (rows, length), generator=torch.manual_seed(1))


def gradients(model: Any, **inputs: Any) -> tuple[Any, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    output = model(**inputs)
    output.loss.backward()
    return output, {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }


def farthest(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest distance of a tensor relative to its norm."""
    assert gradients.keys() == expected.keys()
    return max(
        float((gradients[name].double() - tensor.double()).norm() / tensor.double().norm())
        for name, tensor in expected.items()
    )


def left_padding(tokens: Tensor) -> Tensor:
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    return mask


@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_fp32_logits_and_gradients_are_those_of_transformers(
    model: Any, loss: bool, padded: bool, our_kernels_run: list[int]
) -> None:
    tokens = ids()
    mask = left_padding(tokens) if padded else None
    labels = tokens if mask is None else tokens.masked_fill(mask == 0, -100)
    inputs = {"input_ids": tokens, "attention_mask": mask, "labels": labels}
    expected, expected_gradients = gradients(model, **inputs)
    assert not our_kernels_run
    accelerate(model, loss=loss)
    output, found = gradients(model, **inputs)
    assert our_kernels_run
    assert len(found) == len(list(model.parameters()))
    assert farthest(found, expected_gradients) < 1e-5
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert (output.logits is None) == loss
    logits = model(input_ids=tokens, attention_mask=mask).logits
    assert float((logits - expected.logits).norm() / expected.logits.norm()) < 1e-5


def test_bf16_is_no_farther_from_fp64_than_transformers_alone() -> None:
    """Over several seeds of ids, since one of two roundings is better by chance."""
    exact = build().double().train()
    plain = build().bfloat16().train()
    exact.load_state_dict({name: x.double() for name, x in plain.state_dict().items()})
    ours = accelerate(copy.deepcopy(plain))
    errors = []
    for seed in range(8):
        tokens = torch.randint(1, 61, (2, 40), generator=torch.manual_seed(seed))
        reference, expected = gradients(exact, input_ids=tokens, labels=tokens)
        row = []
        for model in (plain, ours):
            output, found = gradients(model, input_ids=tokens, labels=tokens)
            distance = (output.logits.double() - reference.logits).norm()
            row += [float(distance), *(float((found[n] - expected[n]).norm()) for n in expected)]
        errors.append(torch.tensor(row).view(2, -1))
    theirs, our_errors = torch.stack(errors).square().mean(0).sqrt()
    assert float((our_errors / theirs).max()) < 1.05
    assert float((our_errors / theirs).log().mean().exp()) < 1


def test_cache_and_generation_are_those_of_transformers(
    model: Any, our_kernels_run: list[int]
) -> None:
    model.eval()
    ours = accelerate(copy.deepcopy(model))
    tokens = ids()
    mask = left_padding(tokens)
    for length in (1, 2, 20):  # shorter and longer than the convolution
        first = {"input_ids": tokens[:, :length], "attention_mask": mask[:, :length]}
        expected, found = model(**first, use_cache=True), ours(**first, use_cache=True)
        for index in range(length, length + 3):
            step = tokens[:, index : index + 1]
            expected = model(input_ids=step, cache_params=expected.cache_params)
            found = ours(input_ids=step, cache_params=found.cache_params)
            torch.testing.assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "eos_token_id": -1}
    texts = [each.generate(tokens, **options) for each in (model, ours)]
    assert torch.equal(*texts) and our_kernels_run


@pytest.mark.parametrize("loss", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_documents_are_separate_ones(model: Any, loss: bool, checkpointing: bool) -> None:
    """Losses and gradients of three documents in one sequence, as collators flatten them."""
    accelerate(model, loss=loss)
    documents = [ids(1, length) for length in (9, 2, 17)]
    tokens = torch.cat(documents, 1)
    labels = torch.cat([without_first_label(document) for document in documents], 1)
    positions = torch.cat([torch.arange(d.shape[1])[None] for d in documents], 1)
    indices = torch.cat([torch.full_like(d, i) for i, d in enumerate(documents)], 1)
    model.zero_grad(set_to_none=True)
    for document in documents:
        (model(input_ids=document, labels=document, num_items_in_batch=25).loss).backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    if checkpointing:
        model.gradient_checkpointing_enable()
    for starts in ({"position_ids": positions}, {"seq_idx": indices}):
        _, found = gradients(
            model, input_ids=tokens, labels=labels, num_items_in_batch=25, **starts
        )
        assert farthest(found, expected) < 1e-5
    _, mixed = gradients(model, input_ids=tokens, labels=labels, num_items_in_batch=25)
    assert farthest(mixed, expected) > 1e-3
    with pytest.raises(InputError, match="use_cache=False"):
        model(input_ids=tokens, position_ids=positions, use_cache=True)


def without_first_label(document: Tensor) -> Tensor:
    labels = document.clone()
    labels[:, 0] = -100
    return labels


def test_checkpointing_and_hidden_states(model: Any) -> None:
    tokens = ids()
    expected, expected_gradients = gradients(
        model, input_ids=tokens, labels=tokens, output_hidden_states=True
    )
    accelerate(model)
    model.gradient_checkpointing_enable()
    output, found = gradients(model, input_ids=tokens, labels=tokens, output_hidden_states=True)
    assert farthest(found, expected_gradients) < 1e-5
    for ours, theirs in zip(output.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    as_tuple = model(input_ids=tokens, labels=tokens, return_dict=False)
    assert torch.equal(as_tuple[0], output.loss) and torch.equal(as_tuple[1], output.logits)


def test_saving_copying_and_a_second_call_change_nothing(model: Any, tmp_path: Path) -> None:
    names = list(model.state_dict())
    model.save_pretrained(tmp_path / "before")
    assert accelerate(accelerate(model, loss=True)) is model
    assert list(model.state_dict()) == names and not model.fused_loss
    model.save_pretrained(tmp_path / "after")
    for file in ("config.json", "model.safetensors", "generation_config.json"):
        after = (tmp_path / "after" / file).read_bytes()
        assert after == (tmp_path / "before" / file).read_bytes(), file
    tokens = ids()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is hf_accelerate.FalconMambaForCausalLM
        assert torch.equal(other(tokens).logits, model(tokens).logits)


class Adapter(nn.Module):
    """A layer with low-rank weights beside it, as PEFT's; `weight` is the layer's own."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base = base
        self.weight = base.weight
        self.bias = base.bias
        out, inner = base.weight.shape[0], base.weight[0].numel()
        self.delta = nn.Parameter(0.1 * torch.randn(out, inner))

    def merged(self) -> Any:
        merged = copy.deepcopy(self.base)
        with torch.no_grad():
            merged.weight += self.delta.view_as(merged.weight)
        return merged

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.base, nn.Conv1d):
            weight = self.delta.view_as(self.base.weight)
            options = {"padding": self.base.padding, "groups": self.base.groups}
            return self.base(x) + nn.functional.conv1d(x, weight, **options)
        return self.base(x) + x @ self.delta.t()


@pytest.mark.parametrize("name", [*LINEARS, "conv1d"])
def test_no_weight_is_read_behind_an_adapter(model: Any, name: str) -> None:
    merged = copy.deepcopy(model)
    for layer, other in zip(model.backbone.layers, merged.backbone.layers, strict=True):
        adapter = Adapter(getattr(layer.mixer, name))
        setattr(layer.mixer, name, adapter)
        setattr(other.mixer, name, adapter.merged())
    model.requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad = parameter_name.endswith("delta")
    tokens = ids()
    _, found = gradients(accelerate(model), input_ids=tokens, labels=tokens)
    expected, expected_gradients = gradients(merged, input_ids=tokens, labels=tokens)
    torch.testing.assert_close(model(tokens).logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert len(found) == len(model.backbone.layers)
    for parameter_name, gradient in found.items():
        weight = parameter_name.replace("delta", "weight")
        torch.testing.assert_close(
            gradient, expected_gradients[weight].view_as(gradient), rtol=1e-4, atol=1e-6
        )
    if name == "conv1d":
        with pytest.raises(InputError, match="adapter"):
            model(tokens, position_ids=torch.zeros_like(tokens))


def test_lora_of_peft_trains_merges_and_unloads(model: Any) -> None:
    peft = pytest.importorskip("peft")
    accelerate(model)
    tokens = ids()
    config = peft.LoraConfig(
        r=4, target_modules=["in_proj", "x_proj", "dt_proj"], task_type="CAUSAL_LM",
        init_lora_weights=False,
    )  # fmt: skip
    adapted = peft.get_peft_model(model, config)
    _, found = gradients(adapted, input_ids=tokens, labels=tokens)
    reached = {name.split(".mixer.")[1].split(".")[0] for name in found}
    assert reached == {"in_proj", "x_proj", "dt_proj"} and all(map(torch.any, found.values()))
    logits = adapted(input_ids=tokens).logits
    merged = adapted.merge_and_unload()
    assert type(merged) is hf_accelerate.FalconMambaForCausalLM
    torch.testing.assert_close(merged(tokens).logits, logits, rtol=1e-4, atol=1e-5)


def test_hooks_of_the_library_accelerate_see_our_classes(
    model: Any, our_kernels_run: list[int]
) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    for module in model.modules():
        hooks.add_hook_to_module(module, hooks.ModelHook())
    accelerate(model)
    model(ids())
    per_layer = 2  # a norm and a mixer
    assert len(our_kernels_run) == per_layer * SIZES["num_hidden_layers"] + 1


def test_norm_has_the_dtype_of_transformers_own(model: Any) -> None:
    norm = model.backbone.norm_f
    ours = accelerate(copy.deepcopy(model)).backbone.norm_f
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(3, 24, dtype=dtype)
        torch.testing.assert_close(ours(x), norm(x), rtol=1e-2, atol=1e-2)
        exact = rms_norm(x.double(), norm.weight.double(), norm.variance_epsilon)
        torch.testing.assert_close(ours(x).double(), exact, rtol=5e-3, atol=5e-3)


def test_other_models_are_refused() -> None:
    with pytest.raises(InputError, match="Linear has no mixers"):
        accelerate(nn.Linear(2, 2))
    with pytest.raises(InputError, match="hidden_act"):
        accelerate(build(hidden_act="gelu"))
    with pytest.raises(InputError, match="use_conv_bias"):
        accelerate(build(use_conv_bias=False))
