"""The kernels in C++ for CPUs (cpu_library.py compiles them), called on tensors' memory; fp32
inside.

What reaches the C++ side is fp32 with neighbouring channels adjacent; other types are converted
here. Channels are padded to a vector, states to a built number, taps to four, where they are not so
already.
"""

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import SCAN_CHUNK
from model.kernels.cpu_library import WIDTHS, instruction_set, library
from model.kernels.cpu_library import missing as missing

# numbers of states that the loops are built for; others are padded with zeros
STATES = (4, 8, 16, 32)
TAPS = 4  # of the C++ side, as SCAN_CHUNK


class ScanArguments(Structure):
    """`struct Scan` of the C++ side."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "channels", "states")),
        *((name, c_void_p) for name in ("u", "dt", "z", "A", "B", "C", "D", "bias")),
        *((name, c_int64) for name in ("u_row", "dt_row", "z_row", "B_row", "C_row", "threads")),
        *((name, c_void_p) for name in ("doc_starts", "state")),
    ]


class GradientPointers(Structure):
    """`struct Gradients` of the C++ side."""

    _fields_ = [(name, c_void_p) for name in ("u", "dt", "z", "A", "B", "C", "D", "bias", "first")]


class ConvArguments(Structure):
    """`struct Conv` of the C++ side."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "channels")),
        *((name, c_void_p) for name in ("x", "weight", "bias")),
        *((name, c_int64) for name in ("x_row", "threads")),
        ("doc_starts", c_void_p),
    ]


class NormArguments(Structure):
    """`struct Norm` of the C++ side."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "size", "x_row", "count", "threads")),
        *((name, c_void_p) for name in ("x", "weight", "parts")),
        ("eps", c_float),
    ]


def active() -> ctypes.CDLL:
    """The library of this processor."""
    return library(instruction_set())


def _new(*shape: int) -> Tensor:
    """Memory for a result, whatever the process' defaults are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _pointer(x: Tensor | None) -> c_void_p:
    return c_void_p(_address(x))


def _flags(doc_starts: Tensor | None) -> Tensor | None:
    """doc_starts as bytes."""
    return None if doc_starts is None else doc_starts.contiguous().view(torch.uint8)


def row_stride(x: Tensor) -> int:
    """Stride of the rows of x [b, l, d]; an axis of length 1 has an arbitrary stride."""
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


def _rows(x: Tensor) -> Tensor:
    """fp32 with contiguous channels and evenly spaced rows [b, l]; copies only when needed."""
    x = x.float()
    regular = x.stride(2) == 1 and (1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1))
    return x if regular else x.clone(memory_format=torch.contiguous_format)


def padded_states(states: int) -> int:
    """The number of states that a loop is built for; raises ValueError above the largest."""
    if states > STATES[-1]:
        raise ValueError(
            f"model.d_state {states} exceeds the {STATES[-1]} states of the C++ kernels: use "
            "reference"
        )
    return next(n for n in STATES if n >= states)


def _padding(u: Tensor, A: Tensor) -> tuple[int, int]:
    """Channels and states to add."""
    return -u.shape[2] % WIDTHS[instruction_set()], padded_states(A.shape[1]) - A.shape[1]


def kept_like(u: Tensor, A: Tensor) -> Tensor:
    """An empty tensor for the states that the backward starts its chunks from."""
    pad_d, pad_n = _padding(u, A)
    shape = (u.shape[0], -(-u.shape[1] // SCAN_CHUNK), A.shape[1] + pad_n, u.shape[2] + pad_d)
    return u.new_empty(shape, dtype=torch.float32)


class Prepared:
    """Scan inputs for the C++ library; owns the tensors that `arguments` points to."""

    def __init__(
        self, inputs: Sequence[Tensor], doc_starts: Tensor | None, state: Tensor | None
    ) -> None:
        u, dt, A, B, C, D, z, dt_bias = inputs
        self.pad_d, self.pad_n = _padding(u, A)
        if self.pad_d or self.pad_n:
            u, dt, D, z, dt_bias = (F.pad(x, (0, self.pad_d)) for x in (u, dt, D, z, dt_bias))
            B, C = (F.pad(x, (0, self.pad_n)) for x in (B, C))
            A, state = self.inner(A), None if state is None else self.inner(state)
        self.batch, self.length, self.d, self.n = *u.shape, A.shape[1]
        wide = [_rows(x) for x in (u, dt, z, B, C)]
        whole = [x.float().contiguous() for x in (A, D, dt_bias)]
        first, flags = None if state is None else state.float().contiguous(), _flags(doc_starts)
        self.held = [*wide, *whole, first, flags]
        pointers = [x.data_ptr() for x in (*wide[:3], whole[0], *wide[3:], *whole[1:])]
        self.arguments = ScanArguments(
            self.batch, self.length, self.d, self.n, *pointers, *(row_stride(x) for x in wide),
            torch.get_num_threads(), _address(flags), _address(first),
        )  # fmt: skip

    def inner(self, x: Tensor) -> Tensor:
        """[..., d, n] padded."""
        return F.pad(x, (0, self.pad_n, 0, self.pad_d))

    def channels(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A result [..., d] without its padding, in a type."""
        return (x[..., : self.d - self.pad_d].contiguous() if self.pad_d else x).to(dtype)

    def states(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A result [..., n] without its padding, in a type."""
        return (x[..., : self.n - self.pad_n].contiguous() if self.pad_n else x).to(dtype)

    def outer(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """A result [..., d, n] without its padding, in a type."""
        if self.pad_d or self.pad_n:
            x = x[..., : self.d - self.pad_d, : self.n - self.pad_n].contiguous()
        return x.to(dtype)


def scan_forward(
    inputs: Sequence[Tensor], doc_starts: Tensor | None, state: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [b, l, d], last state [b, d, n]; fills `kept` with the backward's chunk start states."""
    p = Prepared(inputs, doc_starts, state)
    y, last = _new(p.batch, p.length, p.d), _new(p.batch, p.d, p.n)
    active().selective_scan_forward(byref(p.arguments), _pointer(y), _pointer(last), _pointer(kept))
    return p.channels(y, inputs[0].dtype), p.outer(last)


def scan_backward(
    inputs: Sequence[Tensor],
    doc_starts: Tensor | None,
    state: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
) -> list[Tensor]:
    """Gradients in this order: u, dt, A, B, C, D, z, dt_bias, first state (empty without one)."""
    p = Prepared(inputs, doc_starts, state)
    du, ddt, dz = (_new(p.batch, p.length, p.d) for _ in range(3))
    dB, dC = (_new(p.batch, p.length, p.n) for _ in range(2))
    dA, dD, dbias = _new(p.d, p.n), _new(p.d), _new(p.d)
    dfirst = None if state is None else _new(p.batch, p.d, p.n)
    dy = (F.pad(dy, (0, p.pad_d)) if p.pad_d else dy).float().contiguous()
    if dlast is not None:
        dlast = (p.inner(dlast) if p.pad_d or p.pad_n else dlast).float().contiguous()
    pointers = GradientPointers(
        *(_address(x) for x in (du, ddt, dz, dA, dB, dC, dD, dbias, dfirst))
    )
    active().selective_scan_backward(
        byref(p.arguments), _pointer(kept), _pointer(dy), _pointer(dlast), byref(pointers)
    )
    u, dt, A, B, C, D, z, dt_bias = (x.dtype for x in inputs)
    return [
        p.channels(du, u),
        p.channels(ddt, dt),
        p.outer(dA, A),
        p.states(dB, B),
        p.states(dC, C),
        p.channels(dD, D),
        p.channels(dz, z),
        p.channels(dbias, dt_bias),
        _new(0) if state is None or dfirst is None else p.outer(dfirst, state.dtype),
    ]


class PreparedConv:
    """Inputs of a convolution as the C++ side wants them."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None) -> None:
        self.pad_d, self.pad_k = -x.shape[2] % WIDTHS[instruction_set()], TAPS - weight.shape[1]
        if self.pad_k < 0:
            raise ValueError(
                f"model.d_conv {weight.shape[1]} exceeds the {TAPS} taps of the C++ kernels: use "
                "reference"
            )
        if self.pad_d or self.pad_k:
            x, bias = F.pad(x, (0, self.pad_d)), F.pad(bias, (0, self.pad_d))
            weight = F.pad(weight, (self.pad_k, 0, 0, self.pad_d))
        self.shape = x.shape
        x, weight, bias, flags = (
            _rows(x),
            weight.float().contiguous(),
            bias.float().contiguous(),
            _flags(doc_starts),
        )
        self.held = [x, weight, bias, flags]
        pointers = (x.data_ptr(), weight.data_ptr(), bias.data_ptr())
        self.arguments = ConvArguments(
            *self.shape, *pointers, row_stride(x), torch.get_num_threads(), _address(flags)
        )

    def channels(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A result [..., d] without its padding, in a type."""
        return (x[..., : self.shape[2] - self.pad_d].contiguous() if self.pad_d else x).to(dtype)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None) -> Tensor:
    """SiLU of the causal convolution, [b, l, d]."""
    p = PreparedConv(x, weight, bias, doc_starts)
    out = _new(*p.shape)
    active().causal_conv_forward(byref(p.arguments), _pointer(out))
    return p.channels(out, x.dtype)


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None, dout: Tensor
) -> list[Tensor]:
    """Gradients of x, weight and bias."""
    p = PreparedConv(x, weight, bias, doc_starts)
    dout = (F.pad(dout, (0, p.pad_d)) if p.pad_d else dout).float().contiguous()
    dx, dweight, dbias = _new(*p.shape), _new(p.shape[2], TAPS), _new(p.shape[2])
    active().causal_conv_backward(
        byref(p.arguments), *(_pointer(t) for t in (dout, dx, dweight, dbias))
    )
    if p.pad_d or p.pad_k:
        dweight = dweight[: x.shape[2], p.pad_k :].contiguous()
    return [p.channels(dx, x.dtype), dweight.to(weight.dtype), p.channels(dbias, bias.dtype)]


class PreparedNorm:
    """Inputs of a norm as the C++ side wants them."""

    def __init__(self, x: Tensor, weight: Tensor | None, eps: float, parts: list[int]) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        self.weight = None if weight is None else weight.float().contiguous()
        sizes = (c_int64 * len(parts))(*parts)
        self.held = [rows, sizes]
        self.arguments = NormArguments(
            *rows.shape, rows.stride(0), len(parts), torch.get_num_threads(), rows.data_ptr(),
            _address(self.weight), ctypes.addressof(sizes), eps,
        )  # fmt: skip


def norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, parts: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The normed rows, and what each part was multiplied by."""
    p = PreparedNorm(x, weight, eps, parts)
    out, scales = _new(*x.shape), _new(*x.shape[:-1], len(parts))
    active().rms_norm_forward(byref(p.arguments), _pointer(out), _pointer(scales))
    return out.to(dtype), scales


def norm_backward(
    x: Tensor, weight: Tensor | None, parts: list[int], scales: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty without one)."""
    p = PreparedNorm(x, weight, 0.0, parts)
    dout, dx = dout.float().contiguous(), _new(*x.shape)
    dweight = None if weight is None else _new(*weight.shape)
    active().rms_norm_backward(
        byref(p.arguments), *(_pointer(t) for t in (dout, scales, dx, dweight))
    )
    return dx.to(x.dtype), _new(0) if weight is None or dweight is None else dweight.to(
        weight.dtype
    )


def loss_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """See model.kernels.reference.loss_statistics."""
    wide, out = logits.float().contiguous(), _new(3, logits.shape[0])
    sizes = (c_int64(logits.shape[0]), c_int64(logits.shape[1]), c_int64(torch.get_num_threads()))
    active().loss_statistics(_pointer(wide), _pointer(labels.contiguous()), _pointer(out), *sizes)
    return out


def loss_gradient(
    logits: Tensor, labels: Tensor, log_sums: Tensor, grad_loss: Tensor, grad_log_sum: Tensor
) -> None:
    """See model.kernels.reference.loss_gradient; logits [t, v] become their gradient."""
    wide = logits.float().contiguous()
    held = [
        labels.contiguous(),
        *(x.float().contiguous() for x in (log_sums, grad_loss, grad_log_sum)),
    ]
    sizes = (c_int64(logits.shape[0]), c_int64(logits.shape[1]), c_int64(torch.get_num_threads()))
    active().loss_gradient(_pointer(wide), *(_pointer(x) for x in held), *sizes)
    if wide.data_ptr() != logits.data_ptr():
        logits.copy_(wide)
