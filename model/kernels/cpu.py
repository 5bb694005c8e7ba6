"""The C++ kernels for CPUs (compiled by cpu_library.py), called on tensors' memory.

The C++ side takes and computes fp32 with contiguous channels; this module converts other types. It
pads channels to a multiple of the vector width, states to a number in STATES, taps to TAPS.
"""

import ctypes
from collections.abc import Sequence
from ctypes import Structure, byref, c_float, c_int64, c_void_p

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import SCAN_CHUNK
from model.kernels.cpu_library import VECTOR_WIDTHS, instruction_set, load_library
from model.kernels.cpu_library import unavailable_reason as unavailable_reason

# numbers of states that the C++ loops are compiled for; others are padded with zeros
STATES = (4, 8, 16, 32)
TAPS = 4  # equals TAPS in conv_cpu.cpp


class ScanArguments(Structure):
    """`struct Scan` in scan_cpu.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "channels", "states")),
        *((name, c_void_p) for name in ("u", "dt", "z", "A", "B", "C", "D", "bias")),
        *((f"{name}_stride", c_int64) for name in ("u", "dt", "z", "B", "C")),
        ("threads", c_int64),
        *((name, c_void_p) for name in ("doc_starts", "initial_state")),
    ]


class GradientPointers(Structure):
    """`struct Gradients` in scan_cpu.cpp."""

    _fields_ = [(name, c_void_p) for name in "u dt z A B C D bias initial_state".split()]


class ConvArguments(Structure):
    """`struct Conv` in conv_cpu.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "channels")),
        *((name, c_void_p) for name in ("x", "weight", "bias")),
        *((name, c_int64) for name in ("x_stride", "threads")),
        ("doc_starts", c_void_p),
    ]


class NormArguments(Structure):
    """`struct Norm` in rows_cpu.cpp."""

    _fields_ = [
        *((name, c_int64) for name in ("rows", "size", "row_stride", "num_splits", "threads")),
        *((name, c_void_p) for name in ("x", "weight", "split_sizes")),
        ("eps", c_float),
    ]


def active_library() -> ctypes.CDLL:
    """The library for this processor's instruction set."""
    return load_library(instruction_set())


def _new(*shape: int) -> Tensor:
    """Empty fp32 CPU tensor, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _pointer(x: Tensor | None) -> c_void_p:
    return c_void_p(_address(x))


def _as_bytes(doc_starts: Tensor | None) -> Tensor | None:
    return None if doc_starts is None else doc_starts.contiguous().view(torch.uint8)


def token_stride(x: Tensor) -> int:
    """Elements between tokens of x [b, l, d]; an axis of length 1 has an arbitrary stride."""
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


def _with_token_stride(x: Tensor) -> Tensor:
    """x [b, l, d] in fp32, channels contiguous, one stride between tokens; copies if needed."""
    x = x.float()
    regular = x.stride(2) == 1 and (1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1))
    return x if regular else x.clone(memory_format=torch.contiguous_format)


def padded_states(states: int) -> int:
    """Smallest number in STATES of at least `states`; raises ValueError above the largest."""
    if states > STATES[-1]:
        raise ValueError(
            f"model.d_state={states} exceeds the {STATES[-1]} states of the C++ kernels: set "
            "compute.kernels=reference"
        )
    return next(n for n in STATES if n >= states)


def _padding(u: Tensor, A: Tensor) -> tuple[int, int]:
    """Padding of channels and of states."""
    return -u.shape[2] % VECTOR_WIDTHS[instruction_set()], padded_states(A.shape[1]) - A.shape[1]


def empty_chunk_states(u: Tensor, A: Tensor) -> Tensor:
    """Empty tensor for the state before each chunk, from which the backward recomputes."""
    d_padding, n_padding = _padding(u, A)
    chunks = -(-u.shape[1] // SCAN_CHUNK)
    shape = (u.shape[0], chunks, A.shape[1] + n_padding, u.shape[2] + d_padding)
    return u.new_empty(shape, dtype=torch.float32)


class ScanInputs:
    """Padded inputs of a scan; keeps alive the tensors that `arguments` points to."""

    def __init__(
        self, inputs: Sequence[Tensor], doc_starts: Tensor | None, state: Tensor | None
    ) -> None:
        u, dt, A, B, C, D, z, dt_bias = inputs
        self.d_padding, self.n_padding = _padding(u, A)
        if self.d_padding or self.n_padding:
            u, dt, D, z, dt_bias = (self.pad_d(x) for x in (u, dt, D, z, dt_bias))
            B, C = (F.pad(x, (0, self.n_padding)) for x in (B, C))
            A, state = self.pad_dn(A), None if state is None else self.pad_dn(state)
        self.batch, self.length, self.d = u.shape
        self.n = A.shape[1]
        strided = [_with_token_stride(x) for x in (u, dt, z, B, C)]
        A, D, dt_bias = (x.float().contiguous() for x in (A, D, dt_bias))
        doc_starts = _as_bytes(doc_starts)
        state = None if state is None else state.float().contiguous()
        self.tensors = [*strided, A, D, dt_bias, doc_starts, state]
        u, dt, z, B, C = strided
        sizes = [self.batch, self.length, self.d, self.n]
        pointers = [x.data_ptr() for x in (u, dt, z, A, B, C, D, dt_bias)]
        strides = [token_stride(x) for x in strided]
        self.arguments = ScanArguments(
            *sizes,
            *pointers,
            *strides,
            torch.get_num_threads(),
            _address(doc_starts),
            _address(state),
        )

    def pad_d(self, x: Tensor) -> Tensor:
        """Pad x [..., d]."""
        return F.pad(x, (0, self.d_padding))

    def pad_dn(self, x: Tensor) -> Tensor:
        """Pad x [..., d, n]."""
        return F.pad(x, (0, self.n_padding, 0, self.d_padding))

    def unpad_d(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cut the padding off x [..., d] and convert it."""
        if self.d_padding:
            x = x[..., : self.d - self.d_padding].contiguous()
        return x.to(dtype)

    def unpad_n(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cut the padding off x [..., n] and convert it."""
        if self.n_padding:
            x = x[..., : self.n - self.n_padding].contiguous()
        return x.to(dtype)

    def unpad_dn(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Cut the padding off x [..., d, n] and convert it."""
        if self.d_padding or self.n_padding:
            x = x[..., : self.d - self.d_padding, : self.n - self.n_padding].contiguous()
        return x.to(dtype)


def scan_forward(
    inputs: Sequence[Tensor],
    doc_starts: Tensor | None,
    state: Tensor | None,
    chunk_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [b, l, d], last state [b, d, n]; writes the state before each chunk to `chunk_states`."""
    p = ScanInputs(inputs, doc_starts, state)
    y, last_state = _new(p.batch, p.length, p.d), _new(p.batch, p.d, p.n)
    outputs = map(_pointer, (y, last_state, chunk_states))
    active_library().selective_scan_forward(byref(p.arguments), *outputs)
    return p.unpad_d(y, inputs[0].dtype), p.unpad_dn(last_state)


def scan_backward(
    inputs: Sequence[Tensor],
    doc_starts: Tensor | None,
    state: Tensor | None,
    chunk_states: Tensor,
    dy: Tensor,
    dlast_state: Tensor | None,
) -> list[Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state (empty without one)."""
    p = ScanInputs(inputs, doc_starts, state)
    du, ddt, dz = (_new(p.batch, p.length, p.d) for _ in range(3))
    dB, dC = (_new(p.batch, p.length, p.n) for _ in range(2))
    dD, dbias = (_new(p.d) for _ in range(2))
    dA = _new(p.d, p.n)
    dstate = None if state is None else _new(p.batch, p.d, p.n)
    dy = (p.pad_d(dy) if p.d_padding else dy).float().contiguous()
    if dlast_state is not None:
        padded = p.pad_dn(dlast_state) if p.d_padding or p.n_padding else dlast_state
        dlast_state = padded.float().contiguous()
    gradients = GradientPointers(*map(_address, (du, ddt, dz, dA, dB, dC, dD, dbias, dstate)))
    active_library().selective_scan_backward(
        byref(p.arguments), *map(_pointer, (chunk_states, dy, dlast_state)), byref(gradients)
    )
    u, dt, A, B, C, D, z, dt_bias = (x.dtype for x in inputs)
    return [
        p.unpad_d(du, u),
        p.unpad_d(ddt, dt),
        p.unpad_dn(dA, A),
        p.unpad_n(dB, B),
        p.unpad_n(dC, C),
        p.unpad_d(dD, D),
        p.unpad_d(dz, z),
        p.unpad_d(dbias, dt_bias),
        _new(0) if state is None or dstate is None else p.unpad_dn(dstate, state.dtype),
    ]


class ConvInputs:
    """Padded inputs of a convolution; keeps alive the tensors that `arguments` points to."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None) -> None:
        self.d_padding = -x.shape[2] % VECTOR_WIDTHS[instruction_set()]
        self.tap_padding = TAPS - weight.shape[1]
        if self.tap_padding < 0:
            raise ValueError(
                f"model.d_conv={weight.shape[1]} exceeds the {TAPS} taps of the C++ kernels: set "
                "compute.kernels=reference"
            )
        if self.d_padding or self.tap_padding:
            x, bias = self.pad_d(x), self.pad_d(bias)
            weight = F.pad(weight, (self.tap_padding, 0, 0, self.d_padding))
        self.shape = x.shape
        x = _with_token_stride(x)
        weight, bias = weight.float().contiguous(), bias.float().contiguous()
        doc_starts = _as_bytes(doc_starts)
        self.tensors = [x, weight, bias, doc_starts]
        pointers = [t.data_ptr() for t in (x, weight, bias)]
        self.arguments = ConvArguments(
            *self.shape, *pointers, token_stride(x), torch.get_num_threads(), _address(doc_starts)
        )

    def pad_d(self, x: Tensor) -> Tensor:
        """Pad x [..., d]."""
        return F.pad(x, (0, self.d_padding))

    def unpad_d(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Cut the padding off x [..., d] and convert it."""
        if self.d_padding:
            x = x[..., : self.shape[2] - self.d_padding].contiguous()
        return x.to(dtype)


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None) -> Tensor:
    """SiLU of the causal convolution, [b, l, d]."""
    p = ConvInputs(x, weight, bias, doc_starts)
    out = _new(*p.shape)
    active_library().causal_conv_forward(byref(p.arguments), _pointer(out))
    return p.unpad_d(out, x.dtype)


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None, dout: Tensor
) -> list[Tensor]:
    """Gradients of x, weight and bias."""
    p = ConvInputs(x, weight, bias, doc_starts)
    dout = (p.pad_d(dout) if p.d_padding else dout).float().contiguous()
    dx, dweight = _new(*p.shape), _new(p.shape[2], TAPS)
    dbias = _new(p.shape[2])
    pointers = map(_pointer, (dout, dx, dweight, dbias))
    active_library().causal_conv_backward(byref(p.arguments), *pointers)
    if p.d_padding or p.tap_padding:
        dweight = dweight[: x.shape[2], p.tap_padding :].contiguous()
    return [p.unpad_d(dx, x.dtype), dweight.to(weight.dtype), p.unpad_d(dbias, bias.dtype)]


class NormInputs:
    """Inputs of a norm; keeps alive the tensors that `arguments` points to."""

    def __init__(
        self, x: Tensor, weight: Tensor | None, eps: float, split_sizes: list[int]
    ) -> None:
        rows = x.reshape(-1, x.shape[-1]).float()
        rows = rows if rows.stride(1) == 1 else rows.contiguous()
        weight = None if weight is None else weight.float().contiguous()
        sizes = (c_int64 * len(split_sizes))(*split_sizes)
        self.tensors = [rows, weight, sizes]
        counts = [*rows.shape, rows.stride(0), len(split_sizes), torch.get_num_threads()]
        pointers = [rows.data_ptr(), _address(weight), ctypes.addressof(sizes)]
        self.arguments = NormArguments(*counts, *pointers, eps)


def norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, split_sizes: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The normed rows, and the factor 1 / rms of each split [..., split]."""
    p = NormInputs(x, weight, eps, split_sizes)
    out, scales = _new(*x.shape), _new(*x.shape[:-1], len(split_sizes))
    active_library().rms_norm_forward(byref(p.arguments), _pointer(out), _pointer(scales))
    return out.to(dtype), scales


def norm_backward(
    x: Tensor, weight: Tensor | None, split_sizes: list[int], scales: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty without one)."""
    p = NormInputs(x, weight, 0.0, split_sizes)
    dout, dx = dout.float().contiguous(), _new(*x.shape)
    dweight = None if weight is None else _new(*weight.shape)
    pointers = map(_pointer, (dout, scales, dx, dweight))
    active_library().rms_norm_backward(byref(p.arguments), *pointers)
    if weight is None or dweight is None:
        return dx.to(x.dtype), _new(0)
    return dx.to(x.dtype), dweight.to(weight.dtype)


def _loss_sizes(logits: Tensor) -> list[c_int64]:
    return [c_int64(n) for n in (*logits.shape, torch.get_num_threads())]


def loss_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """See model.kernels.reference.loss_statistics."""
    logits, labels = logits.float().contiguous(), labels.contiguous()
    out = _new(3, logits.shape[0])
    pointers = map(_pointer, (logits, labels, out))
    active_library().loss_statistics(*pointers, *_loss_sizes(logits))
    return out


def loss_gradient(
    logits: Tensor, labels: Tensor, log_sums: Tensor, grad_loss: Tensor, grad_log_sum: Tensor
) -> None:
    """See model.kernels.reference.loss_gradient; overwrites logits [t, v] with their gradient."""
    gradient, labels = logits.float().contiguous(), labels.contiguous()
    inputs = [x.float().contiguous() for x in (log_sums, grad_loss, grad_log_sum)]
    pointers = map(_pointer, (gradient, labels, *inputs))
    active_library().loss_gradient(*pointers, *_loss_sizes(logits))
    if gradient.data_ptr() != logits.data_ptr():
        logits.copy_(gradient)
