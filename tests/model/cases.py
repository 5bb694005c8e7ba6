"""Random kernel inputs, naive fp64 implementations, and assertions that backends equal them."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from model.kernels import reference
from model.kernels.interface import Kernels


def naive_scan(u, dt, A, B, C, D, z, dt_bias, doc_starts=None, state=None) -> tuple[Tensor, Tensor]:
    """The recurrence one token at a time, differentiated by autograd."""
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
    outputs = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = bias
            for lag in range(min(weight.shape[1], t + 1)):
                total = total + weight[:, -1 - lag] * x[b, t - lag]
                if doc_starts is not None and bool(doc_starts[b, t - lag]):
                    break
            outputs.append(total)
    return F.silu(torch.stack(outputs).view_as(x))


@dataclass
class Case:
    """Shape and seed of random inputs."""

    batch: int
    length: int
    channels: int
    states: int
    resets: float = 0.0  # probability that a token starts a document
    has_state: bool = False  # an initial state is given
    dt: float = -2.0  # mean of dt before softplus
    seed: int = 0

    def inputs(
        self, dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None
    ) -> list[Tensor]:
        """u, dt, A, B, C, D, z, dt_bias in dtype, with values rounded to the type `rounded`."""
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
        generator = torch.Generator().manual_seed(self.seed + 1)
        return torch.rand(self.batch, self.length, generator=generator) < self.resets

    def state(
        self, dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None
    ) -> Tensor | None:
        if not self.has_state:
            return None
        generator = torch.Generator().manual_seed(self.seed + 2)
        shape = (self.batch, self.channels, self.states)
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        return values.to(rounded or dtype).to(dtype).requires_grad_()

    def weights(
        self, dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None
    ) -> list[Tensor]:
        """Weight [d, 4] and bias [d] of a convolution; the bias is also a norm's weight."""
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
    y, last_state = scan(*inputs, doc_starts=case.doc_starts(), state=state)
    y_weight = torch.sin(torch.arange(y.numel()).view_as(y))
    state_weight = torch.cos(torch.arange(last_state.numel(), dtype=torch.float64))
    loss = (y.double() * y_weight).sum()
    loss = loss + (last_state.double() * state_weight.view_as(last_state)).sum()
    gradients = torch.autograd.grad(loss, inputs if state is None else [*inputs, state])
    return [y.detach(), last_state.detach(), *gradients]


def conv_results(
    conv, case: Case, dtype: torch.dtype, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """Output and all gradients, detached."""
    inputs = [case.inputs(dtype, rounded)[0], *case.weights(dtype, rounded)]
    out = conv(*inputs, case.doc_starts())
    loss = (out.double() * torch.cos(torch.arange(out.numel()).view_as(out))).sum()
    return [out.detach(), *torch.autograd.grad(loss, inputs)]


def naive_norm(x, weight: Tensor | None, eps: float, split_sizes=None, dtype=None) -> Tensor:
    """torch's rms_norm of each split."""
    splits = x.split(split_sizes or [x.shape[-1]], -1)
    normed = torch.cat([F.rms_norm(s, s.shape[-1:], eps=eps) for s in splits], -1)
    return normed if weight is None else normed * weight


def norm_results(
    norm, case: Case, dtype: torch.dtype, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """Outputs and all gradients of a norm with a weight and of one with three splits.

    The second norms slices of the rows of a wider tensor.
    """
    x, weight = case.inputs(dtype, rounded)[0], case.weights(dtype, rounded)[1]
    weighted = norm(x, weight, 1e-5)
    sliced = torch.cat([x, x, x, x], -1)[..., 1 : case.channels + 3]
    split = norm(sliced, None, 1e-6, [case.channels, 1, 1])
    loss = sum(
        (out.double() * torch.cos(torch.arange(out.numel()).view_as(out))).sum()
        for out in (weighted, split)
    )
    return [weighted.detach(), split.detach(), *torch.autograd.grad(loss, [x, weight])]


def loss_results(
    kernels, case: Case, dtype: torch.dtype, rounded: torch.dtype | None = None
) -> list[Tensor]:
    """Statistics and gradient of logits; some labels are outside the vocabulary shard."""
    logits = case.inputs(dtype, rounded)[0].detach().flatten(0, 1) * 4
    generator = torch.Generator().manual_seed(case.seed)
    labels = torch.randint(-2, case.channels + 2, (len(logits),), generator=generator)
    label_logits, max_logits, sum_exp = kernels.loss_statistics(logits, labels)
    log_sums = max_logits + sum_exp.log()
    gradient = kernels.loss_gradient(
        logits.clone(), labels, log_sums, torch.cos(label_logits), torch.sin(label_logits)
    )
    return [label_logits, log_sums, gradient]


def assert_equal(kernels: Kernels, case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """Compare every output and gradient with the naive fp64 implementation on the same values.

    The norm of an error is relative to the norm of the expected tensor, or to 1 if that is larger.
    """
    for results, function, naive in (
        (scan_results, kernels.selective_scan, naive_scan),
        (conv_results, kernels.causal_conv1d, naive_conv),
        (norm_results, kernels.rms_norm, naive_norm),
        (loss_results, kernels.loss, reference),
    ):
        pairs = zip(
            results(function, case, dtype), results(naive, case, torch.float64, dtype), strict=True
        )
        for index, (actual, expected) in enumerate(pairs):
            error = (actual.double() - expected).norm() / expected.norm().clamp(min=1.0)
            assert error <= tolerance, (kernels.name, results.__name__, case, index, float(error))


class OnDevice:
    """Functions of a backend that move CPU tensors to its device and results back."""

    def __init__(self, functions: Any, device: torch.device) -> None:
        self.functions = functions
        self.device = device

    def __getattr__(self, name: str) -> Any:
        function = getattr(self.functions, name)

        def move(x: Any) -> Any:
            return x.to(self.device) if torch.is_tensor(x) else x

        def call(*args: Any, **kwargs: Any) -> Any:
            args = tuple(move(x) for x in args)
            result = function(*args, **{name: move(x) for name, x in kwargs.items()})
            return tuple(x.cpu() for x in result) if isinstance(result, tuple) else result.cpu()

        return call


def on_device(kernels: Kernels, device: torch.device) -> Kernels:
    """A backend of a device that takes and returns CPU tensors, to compare with fp64 results."""
    functions = OnDevice(kernels, device)
    return Kernels(
        kernels.name,
        functions.causal_conv1d,
        functions.selective_scan,
        functions.rms_norm,
        OnDevice(kernels.loss, device),
    )


def assert_documents_are_isolated(
    kernels: Kernels, starts: list[int], tolerance: float = 1e-6
) -> None:
    """Documents packed into one sequence give the same outputs as each document by itself."""
    tolerances = {"rtol": tolerance, "atol": tolerance}
    u, dt, A, B, C, D, z, dt_bias = (x.detach() for x in Case(2, 40, 16, 4).inputs(torch.float32))
    weight, bias = (x.detach() for x in Case(2, 40, 16, 4).weights(torch.float32))
    doc_starts = torch.zeros(2, 40, dtype=torch.bool)
    doc_starts[:, starts] = True
    conv = kernels.causal_conv1d(u, weight, bias, doc_starts)
    state = torch.ones(2, 16, 4) if 0 in starts else None
    scan, _ = kernels.selective_scan(
        u, dt, A, B, C, D, z, dt_bias, doc_starts=doc_starts, state=state
    )
    boundaries = sorted({0, *starts, 40})
    for start, end in zip(boundaries, boundaries[1:], strict=False):
        s = slice(start, end)
        expected = kernels.causal_conv1d(u[:, s], weight, bias)
        torch.testing.assert_close(conv[:, s], expected, **tolerances)
        expected, _ = kernels.selective_scan(
            u[:, s], dt[:, s], A, B[:, s], C[:, s], D, z[:, s], dt_bias
        )
        torch.testing.assert_close(scan[:, s], expected, **tolerances)


def assert_state_carries_over(kernels: Kernels) -> None:
    """Two chunks of a sequence, with the state passed on, give the output of the full sequence."""
    u, dt, A, B, C, D, z, dt_bias = (x.detach() for x in Case(2, 45, 16, 4).inputs(torch.float32))
    expected, last_state = kernels.selective_scan(u, dt, A, B, C, D, z, dt_bias)
    state, chunks = None, []
    for s in (slice(0, 19), slice(19, 45)):
        y, state = kernels.selective_scan(
            u[:, s], dt[:, s], A, B[:, s], C[:, s], D, z[:, s], dt_bias, state=state
        )
        chunks.append(y)
    torch.testing.assert_close(torch.cat(chunks, 1), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, last_state, rtol=1e-5, atol=1e-6)


CASES = [
    Case(1, 1, 16, 16),
    Case(2, 40, 48, 16),
    Case(2, 37, 5, 3, resets=0.2, has_state=True),
    Case(3, 17, 33, 6, resets=1.0),  # every token starts a document
    Case(1, 64, 130, 16, resets=0.05, has_state=True),  # more than one group of channels
    Case(2, 33, 16, 4, dt=12.0),  # the state decays to zero in one step
    Case(2, 33, 16, 4, dt=-12.0, has_state=True),  # the state hardly decays
    Case(2, 33, 48, 16, dt=-6.5),  # dt as at initialisation, 0.0002 to 0.02
]

DOC_START_POSITIONS = [[4], [0, 1, 2, 3], [7, 9]]

# for hypothesis
RANDOM_CASES = st.builds(
    Case,
    st.integers(1, 3),
    st.integers(1, 70),
    st.integers(1, 40),
    st.integers(1, 16),
    resets=st.sampled_from([0.0, 0.1, 0.5]),
    has_state=st.booleans(),
    dt=st.sampled_from([-10.0, -6.5, -2.0, 0.0, 8.0]),
    seed=st.integers(0, 1000),
)


def assert_states_saved_only_for_backward(kernels: Kernels, backend: Any, monkeypatch: Any) -> None:
    """Without gradients the scan saves no chunk states and gives the same results."""
    inputs = Case(2, 40, 16, 4).inputs(torch.float32)
    allocated = []
    empty_chunk_states = backend.empty_chunk_states

    def record(*args: Any) -> Tensor:
        allocated.append(empty_chunk_states(*args))
        return allocated[-1]

    monkeypatch.setattr(backend, "empty_chunk_states", record)
    expected, expected_state = kernels.selective_scan(*inputs)
    assert len(allocated) == 1
    with torch.no_grad():
        y, last_state = kernels.selective_scan(*inputs)
    assert len(allocated) == 1
    assert torch.equal(y, expected)
    assert torch.equal(last_state, expected_state)
