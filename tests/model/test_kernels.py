"""The reference kernels equal a naive recurrence in fp64, forward and every gradient, with and without resets."""

import pytest
import torch
from torch import Tensor

from model.kernels import reference


def naive_scan(u, dt, A, B, C, D, z, dt_bias, starts=None, state=None) -> tuple[Tensor, Tensor]:
    """The formula, one token at a time, left to autograd."""
    dt = torch.nn.functional.softplus(dt + dt_bias)
    h = torch.zeros(u.shape[0], u.shape[2], A.shape[1], dtype=u.dtype) if state is None else state
    outputs = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], torch.zeros_like(h), h)
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return torch.stack(outputs, 1) * torch.nn.functional.silu(z), h


def scan_inputs(length: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    b, d, n = 2, 5, 3
    shapes = [(b, length, d), (b, length, d), (d, n), (b, length, n), (b, length, n), (d,), (b, length, d), (d,)]
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    inputs[2] = -inputs[2].exp()
    return [x.requires_grad_() for x in inputs]


def document_starts(length: int) -> Tensor:
    return torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.2


@pytest.mark.parametrize("resets", [False, True])
@pytest.mark.parametrize("length", [1, 9, 40])
def test_scan_equals_the_recurrence(length: int, resets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 16 * 2 * 5 * 3)  # 40 tokens then take three chunks
    monkeypatch.setattr(reference, "KEPT_ELEMENTS", 20 * 2 * 5 * 3)  # and 40 are too many to keep
    starts = document_starts(length) if resets else None
    inputs = scan_inputs(length)
    state = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    results = []
    for scan in (naive_scan, reference.selective_scan):
        y, last = scan(*inputs, starts=starts, state=state)
        gradients = torch.autograd.grad(
            (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum() + last.sum(), [*inputs, state]
        )
        results.append([y, last, *gradients])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def test_conv_equals_torch() -> None:
    x = torch.randn(2, 11, 5, dtype=torch.float64)
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    expected = torch.nn.functional.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=3, groups=5)[..., :11]
    expected = torch.nn.functional.silu(expected).transpose(1, 2)
    torch.testing.assert_close(reference.causal_conv1d(x, weight, bias), expected)
    short = reference.causal_conv1d(x[:, :2], weight, bias)  # shorter than the taps
    torch.testing.assert_close(short, expected[:, :2])


@pytest.mark.parametrize("cuts", [[4], [1, 2, 3], [7, 9]])
def test_resets_isolate_documents(cuts: list[int]) -> None:
    """Packed documents give what each gives alone."""
    length = 12
    inputs = [x.detach() for x in scan_inputs(length)]
    weight, bias = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    starts = torch.zeros(2, length, dtype=torch.bool)
    starts[:, cuts] = True
    u, dt, A, B, C, D, z, dt_bias = inputs
    packed_conv = reference.causal_conv1d(u, weight, bias, starts)
    packed_scan, _ = reference.selective_scan(*inputs, starts=starts)
    edges = [0, *cuts, length]
    for low, high in zip(edges, edges[1:], strict=False):
        part = slice(low, high)
        alone = reference.causal_conv1d(u[:, part], weight, bias)
        torch.testing.assert_close(packed_conv[:, part], alone, rtol=1e-12, atol=1e-12)
        alone, _ = reference.selective_scan(u[:, part], dt[:, part], A, B[:, part], C[:, part], D, z[:, part], dt_bias)
        torch.testing.assert_close(packed_scan[:, part], alone, rtol=1e-12, atol=1e-12)


def test_backward_cost_grows_linearly() -> None:
    """Tensors that the backward allocates grow with length, not with its square."""
    sizes = []
    for length in (64, 128):
        inputs = scan_inputs(length)
        with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
            reference.selective_scan(*inputs)[0].sum().backward()
        sizes.append(sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()))
    assert sizes[1] < 2.5 * sizes[0], sizes


def test_rms_norm() -> None:
    x = torch.randn(3, 7)
    expected = torch.nn.functional.rms_norm(x, (7,), eps=1e-6)
    torch.testing.assert_close(reference.rms_norm(x, None, 1e-6), expected)
    assert reference.rms_norm(x.bfloat16(), None, 1e-6).dtype == torch.bfloat16
