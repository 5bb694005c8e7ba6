"""The loss in chunks equals the plain one: values and gradients, with and without z-loss."""

import pytest
import torch
from torch.nn import functional as F

from model import mamba
from tests.tiny import TINY, model_of


@pytest.mark.parametrize("z_loss", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7, 1000])
def test_chunks_change_nothing(chunk: int, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba, "LOSS_CHUNK", chunk)
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


def test_all_logits_never_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba, "LOSS_CHUNK", 8)
    largest = 0
    model = model_of(TINY)

    def look(module, inputs, output) -> None:
        nonlocal largest
        largest = max(largest, output.shape[0])

    model.lm_head.register_forward_hook(look)
    tokens = torch.randint(0, TINY.vocab_size, (2, 41))
    model(tokens[:, :-1], tokens[:, 1:])[0].mean().backward()
    assert largest == 8
