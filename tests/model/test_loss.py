"""The chunked loss equals F.cross_entropy: values and gradients, with and without z-loss."""

import pytest
import torch
from torch.nn import functional as F

from model.config import loss_chunk
from model.kernels import CPU, cross_entropy, reference
from tests.tiny import TINY, model_of


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_chunked_loss_equals_plain_loss(
    chunk: int, z_loss: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "loss_chunk", lambda *_: chunk)
    tokens = torch.randint(0, TINY.vocab_size, (2, 26), generator=torch.Generator().manual_seed(0))
    model = model_of(TINY).double()
    losses, log_sums = model(tokens[:, :-1], tokens[:, 1:])
    total = losses.mean() + z_loss * log_sums.square().mean()
    actual = torch.autograd.grad(total, list(model.parameters()))
    logits = model.logits(tokens[:, :-1])
    plain = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    plain = plain + z_loss * logits.logsumexp(-1).square().mean()
    expected = torch.autograd.grad(plain, list(model.parameters()))
    torch.testing.assert_close(total, plain)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)


def test_peak_memory_is_one_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "loss_chunk", lambda *_: 8)
    model = model_of(TINY)
    tokens = torch.randint(0, TINY.vocab_size, (2, 401))
    hidden = model.hidden(tokens[:, :-1]).flatten(0, 1).detach().requires_grad_()
    with torch.profiler.profile(profile_memory=True) as profile:
        cross_entropy.linear_cross_entropy(
            hidden, model.lm_head.weight, tokens[:, 1:].flatten(), reference
        )[0].mean().backward()
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    # the gradient of hidden is a quarter of the upper limit
    assert 8 * TINY.vocab_size * 4 <= largest < 800 * TINY.vocab_size * 4 / 2


def test_loss_chunk_divides_tokens_evenly() -> None:
    assert loss_chunk(8192, 4096) == 4096  # the 7B
    assert loss_chunk(9000, 4096) == 3000
    assert loss_chunk(2048, 192) == 1024  # the demo
    assert loss_chunk(5, 192) == 5
    assert loss_chunk(0, 192) == 1


def test_second_backward_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """The C++ kernels overwrite the saved logits in the first backward; the second recomputes."""
    monkeypatch.setattr(cross_entropy, "loss_chunk", lambda *_: 8)
    hidden, weight = torch.randn(20, 16).requires_grad_(), torch.randn(50, 16).requires_grad_()
    losses, _ = cross_entropy.linear_cross_entropy(
        hidden, weight, torch.randint(0, 50, (20,)), CPU.loss
    )
    first, second = (
        torch.autograd.grad(losses.mean(), [hidden, weight], retain_graph=True) for _ in range(2)
    )
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_bf16_products_keep_fp32_sums() -> None:
    """Under autocast only products round: the loss, its gradients and sums are fp32."""
    tokens = torch.randint(0, TINY.vocab_size, (2, 65), generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(128, TINY.d_model).requires_grad_()
    model = model_of(TINY)
    exact, _ = cross_entropy.linear_cross_entropy(
        hidden, model.lm_head.weight, tokens[:, 1:].flatten(), reference
    )
    with torch.autocast("cpu", torch.bfloat16):
        rounded, log_sums = cross_entropy.linear_cross_entropy(
            hidden, model.lm_head.weight, tokens[:, 1:].flatten(), reference
        )
    rounded.mean().backward()
    assert (
        rounded.dtype
        == log_sums.dtype
        == hidden.grad.dtype
        == model.lm_head.weight.grad.dtype
        == torch.float32
    )
    torch.testing.assert_close(rounded, exact, rtol=1e-2, atol=1e-2)


def test_statistics_of_shards_combine() -> None:
    logits, labels = torch.randn(9, 20, dtype=torch.float64), torch.randint(0, 20, (9,))
    label_logits, max_logits, sum_exp = reference.loss_statistics(logits, labels)
    left = reference.loss_statistics(logits[:, :7], labels)
    right = reference.loss_statistics(logits[:, 7:], labels - 7)
    torch.testing.assert_close(left[0] + right[0], label_logits)
    torch.testing.assert_close(torch.maximum(left[1], right[1]), max_logits)
    shard_sums = [shard[2] * (shard[1] - max_logits).exp() for shard in (left, right)]
    torch.testing.assert_close(sum(shard_sums), sum_exp)
    losses = max_logits + sum_exp.log() - label_logits
    torch.testing.assert_close(losses, F.cross_entropy(logits, labels, reduction="none"))
