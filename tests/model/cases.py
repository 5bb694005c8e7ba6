"""Problems for kernels, the formula in fp64, and what being equal means."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.kernels import reference
from model.kernels.interface import Kernels


def naive_scan(u, dt, A, B, C, D, z, dt_bias, doc_starts=None, state=None) -> tuple[Tensor, Tensor]:
    """The formula, one token at a time, left to autograd."""
    dt = F.softplus(dt + dt_bias)
    h = torch.zeros(u.shape[0], u.shape[2], A.shape[1], dtype=u.dtype) if state is None else state
    outputs = []
    for t in range(u.shape[1]):
        if doc_starts is not None:
            h = torch.where(doc_starts[:, t, None, None], torch.zeros_like(h), h)
        h = (
            torch.exp(dt[:, t, :, None] * A) * h
            + (dt[:, t] * u[:, t])[..., None] * B[:, t, None, :]
        )
        outputs.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return torch.stack(outputs, 1) * F.silu(z), h


def naive_conv(x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None = None) -> Tensor:
    """Every tap of every token, one at a time."""
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total, back = bias, 0
            while True:
                total = total + weight[:, -1 - back] * x[b, t - back]
                if (
                    back + 1 >= weight.shape[1]
                    or back >= t
                    or (doc_starts is not None and bool(doc_starts[b, t - back]))
                ):
                    break
                back += 1
            rows.append(total)
    return F.silu(torch.stack(rows).view_as(x))


@dataclass
class Case:
    """One random problem."""

    batch: int
    length: int
    channels: int
    states: int
    resets: float = 0.0  # probability that a token opens a document
    first: bool = False  # a state comes in
    dt: float = -2.0  # mean of dt before softplus
    seed: int = 0

    def inputs(
        self, dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None
    ) -> list[Tensor]:
        """u, dt, A, B, C, D, z, dt_bias; `rounded` is the type whose values they have."""
        generator = torch.Generator().manual_seed(self.seed)
        b, l, d, n = self.batch, self.length, self.channels, self.states
        shapes = [(b, l, d), (b, l, d), (d, n), (b, l, n), (b, l, n), (d,), (b, l, d), (d,)]
        tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        tensors[1] += self.dt
        tensors[2] = -tensors[2].exp()
        return [x.to(rounded or dtype).to(dtype).requires_grad_() for x in tensors]

    def doc_starts(self) -> Tensor | None:
        if self.resets == 0:
            return None
        return (
            torch.rand(
                self.batch, self.length, generator=torch.Generator().manual_seed(self.seed + 1)
            )
            < self.resets
        )

    def state(
        self, dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None
    ) -> Tensor | None:
        if not self.first:
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        shape = (self.batch, self.channels, self.states)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(rounded or dtype).to(dtype).requires_grad_()

    def weights(
        self, dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None
    ) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 3)
        tensors = [
            torch.randn(s, generator=generator, dtype=torch.float64)
            for s in ((self.channels, 4), (self.channels,))
        ]
        return [x.to(rounded or dtype).to(dtype).requires_grad_() for x in tensors]


def scan_results(
    scan, case: Case, dtype: torch.dtype, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """y, last state and all gradients, detached."""
    inputs, state = case.inputs(dtype, rounded), case.state(dtype, rounded)
    y, last = scan(*inputs, doc_starts=case.doc_starts(), state=state)
    weight = torch.cos(torch.arange(last.numel(), dtype=torch.float64)).view_as(last)
    loss = (y.double() * torch.sin(torch.arange(y.numel()).view_as(y))).sum() + (
        last.double() * weight
    ).sum()
    gradients = torch.autograd.grad(loss, inputs if state is None else [*inputs, state])
    return [y.detach(), last.detach(), *gradients]


def conv_results(
    conv, case: Case, dtype: torch.dtype, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """Output and all gradients, detached."""
    inputs = [case.inputs(dtype, rounded)[0], *case.weights(dtype, rounded)]
    out = conv(*inputs, case.doc_starts())
    loss = (out.double() * torch.cos(torch.arange(out.numel()).view_as(out))).sum()
    return [out.detach(), *torch.autograd.grad(loss, inputs)]


def naive_norm(x: Tensor, weight: Tensor | None, eps: float, parts=None, dtype=None) -> Tensor:
    """torch's own norm, a part at a time."""
    pieces = x.split(parts or [x.shape[-1]], -1)
    return torch.cat([F.rms_norm(piece, piece.shape[-1:], eps=eps) for piece in pieces], -1) * (
        1 if weight is None else weight
    )


def norm_results(
    norm, case: Case, dtype: torch.dtype, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """Outputs and all gradients of a norm with a weight, and of one in three parts of rows of a
    wider tensor.
    """
    x, weight = case.inputs(dtype, rounded)[0], case.weights(dtype, rounded)[1]
    whole = norm(x, weight, 1e-5)
    wide = torch.cat([x, x, x, x], -1)[..., 1 : case.channels + 3]
    parts = norm(wide, None, 1e-6, [case.channels, 1, 1])
    loss = sum(
        (out.double() * torch.cos(torch.arange(out.numel()).view_as(out))).sum()
        for out in (whole, parts)
    )
    return [whole.detach(), parts.detach(), *torch.autograd.grad(loss, [x, weight])]


def loss_results(
    rows, case: Case, dtype: torch.dtype, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """Statistics of logits, some of whose labels are elsewhere, and their gradient."""
    logits = case.inputs(dtype, rounded)[0].detach().flatten(0, 1) * 4
    generator = torch.Generator().manual_seed(case.seed)
    labels = torch.randint(-2, case.channels + 2, (len(logits),), generator=generator)
    own, top, sums = rows.loss_statistics(logits, labels)
    log_sums = top + sums.log()
    gradient = rows.loss_gradient(logits.clone(), labels, log_sums, torch.cos(own), torch.sin(own))
    return [own, log_sums, gradient]


def assert_equal(kernels: Kernels, case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """Every output and gradient against fp64 of the same values: error relative to the larger of
    its norm and 1.
    """
    for results, ours, naive in (
        (scan_results, kernels.selective_scan, naive_scan),
        (conv_results, kernels.causal_conv1d, naive_conv),
        (norm_results, kernels.rms_norm, naive_norm),
        (loss_results, kernels.loss, reference),
    ):
        pairs = zip(
            results(ours, case, dtype), results(naive, case, torch.float64, dtype), strict=True
        )
        for index, (actual, expected) in enumerate(pairs):
            error = (actual.double() - expected).norm() / expected.norm().clamp(min=1.0)
            assert error <= tolerance, (kernels.name, results.__name__, case, index, float(error))


class OnDevice:
    """Functions of tensors on another device, called with tensors of this one."""

    def __init__(self, functions: Any, device: torch.device) -> None:
        self.functions, self.device = functions, device

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.functions, name)

        def call(*arguments: Any, **named: Any) -> Any:
            there = {
                key: x.to(self.device) if torch.is_tensor(x) else x for key, x in named.items()
            }
            result = function(
                *(x.to(self.device) if torch.is_tensor(x) else x for x in arguments), **there
            )
            return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()

        return call


def on_device(kernels: Kernels, device: torch.device) -> Kernels:
    """A backend of another device that takes and gives CPU tensors, for tests that compare
    there.
    """
    there = OnDevice(kernels, device)
    return Kernels(
        kernels.name,
        there.causal_conv1d,
        there.selective_scan,
        there.rms_norm,
        OnDevice(kernels.loss, device),
    )


def assert_documents_are_isolated(
    kernels: Kernels, cuts: list[int], tolerance: float = 1e-6
) -> None:
    """Packed documents give what each gives alone."""
    limits = {"rtol": tolerance, "atol": tolerance}
    u, dt, A, B, C, D, z, dt_bias = (x.detach() for x in Case(2, 40, 16, 4).inputs(torch.float32))
    weight, bias = (x.detach() for x in Case(2, 40, 16, 4).weights(torch.float32))
    doc_starts = torch.zeros(2, 40, dtype=torch.bool)
    doc_starts[:, cuts] = True
    conv = kernels.causal_conv1d(u, weight, bias, doc_starts)
    state = torch.ones(2, 16, 4) if 0 in cuts else None
    scan, _ = kernels.selective_scan(
        u, dt, A, B, C, D, z, dt_bias, doc_starts=doc_starts, state=state
    )
    edges = sorted({0, *cuts, 40})
    for low, high in zip(edges, edges[1:], strict=False):
        p = slice(low, high)
        torch.testing.assert_close(
            conv[:, p], kernels.causal_conv1d(u[:, p], weight, bias), **limits
        )
        alone, _ = kernels.selective_scan(
            u[:, p], dt[:, p], A, B[:, p], C[:, p], D, z[:, p], dt_bias
        )
        torch.testing.assert_close(scan[:, p], alone, **limits)


def assert_state_carries_over(kernels: Kernels) -> None:
    """A sequence in two pieces, with the state handed over."""
    u, dt, A, B, C, D, z, dt_bias = (x.detach() for x in Case(2, 45, 16, 4).inputs(torch.float32))
    whole, last = kernels.selective_scan(u, dt, A, B, C, D, z, dt_bias)
    state, parts = None, []
    for p in (slice(0, 19), slice(19, 45)):
        y, state = kernels.selective_scan(
            u[:, p], dt[:, p], A, B[:, p], C[:, p], D, z[:, p], dt_bias, state=state
        )
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-6)


CASES = [
    Case(1, 1, 16, 16),
    Case(2, 40, 48, 16),
    Case(2, 37, 5, 3, resets=0.2, first=True),
    Case(3, 17, 33, 6, resets=1.0),  # every token opens a document
    Case(1, 64, 130, 16, resets=0.05, first=True),  # more than one group of channels
    Case(2, 33, 16, 4, dt=12.0),  # decays to nothing at once
    Case(2, 33, 16, 4, dt=-12.0, first=True),  # hardly decays
    Case(2, 33, 48, 16, dt=-6.5),  # time steps as at the beginning of training, 0.0002 to 0.02
]

DOC_START_POSITIONS = [[4], [0, 1, 2, 3], [7, 9]]  # where documents begin

# any of them, for hypothesis
CASE = st.builds(
    Case,
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 16),
    resets=st.sampled_from([0.0, 0.1, 0.5]),
    first=st.booleans(),
    dt=st.sampled_from([-10.0, -6.5, -2.0, 0.0, 8.0]),
    seed=st.integers(0, 1000),
)


def assert_states_saved_only_for_backward(kernels: Kernels, backend: Any, monkeypatch: Any) -> None:
    """Without gradients the scan makes no room for the states that a backward starts from, and
    gives the same.
    """
    inputs, made, room = Case(2, 40, 16, 4).inputs(torch.float32), [], backend.empty_chunk_states
    monkeypatch.setattr(backend, "empty_chunk_states", lambda *x: made.append(room(*x)) or made[-1])
    y, last = kernels.selective_scan(*inputs)
    assert len(made) == 1
    with torch.no_grad():
        plain, end = kernels.selective_scan(*inputs)
    assert len(made) == 1
    assert torch.equal(plain, y)
    assert torch.equal(end, last)
