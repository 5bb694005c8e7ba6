"""Our CUDA kernels (cuda_library.py compiles and launches them), called on tensors' memory.

bf16 and fp32 in and out, fp32 state; channels are padded to 128, states to 16, taps to 4. Where
channels and batch alone do not fill the GPU, the scan cuts the sequence into segments (scan.cuh):
last bits depend on the shape and on the GPU's size, not on chance.
"""

import functools
import importlib.util
from collections.abc import Sequence
from ctypes import c_int
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.config import SCAN_CHUNK
from model.kernels import cuda_library
from model.kernels.cpu import row_stride
from model.kernels.cuda_library import DTYPES
from model.kernels.cuda_rows import loss_gradient, loss_statistics, norm_backward, norm_forward

# the rest of the backend stands here
__all__ = ["loss_gradient", "loss_statistics", "norm_backward", "norm_forward"]

# sizes that the sources fix; a test compares them with the text
CHANNELS, STATES = 128, 16
FORWARD_CHANNELS, FORWARD_THREADS, BACKWARD_THREADS = 64, 256, 128
BACKWARD_SHARED = (
    4 * SCAN_CHUNK * (4 * CHANNELS + 2 * STATES + 1)
    + 4 * SCAN_CHUNK * CHANNELS * STATES // 2
    + 4 * 4 * SCAN_CHUNK * 32
)
# of an SM at once, by shared memory; the forward, eight warps a block, makes do with one
BACKWARD_BLOCKS = 2
LEAST_SEGMENT = 256  # tokens below which cutting the sequence costs more than it fills
TAPS, CONV_SEGMENT, CONV_THREADS = 4, 64, 128
LOG2E = 1.4426950408889634


def missing() -> str | None:
    """Why these kernels cannot be used here, with the fix; None when they can."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "no cuda-core: pip install 'cuda-core[cu13]' (it brings NVRTC; nvcc is not needed)"
    if not torch.cuda.is_available():
        return "no GPU that torch sees"
    properties: Any = torch.cuda.get_device_properties(0)
    if properties.major < 8 or properties.shared_memory_per_block_optin < BACKWARD_SHARED:
        return (
            f"no GPU with bf16 and {BACKWARD_SHARED} bytes of shared memory a block (A100, H100 "
            "and later have them)"
        )
    return None


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [b, l, d] in dtype, contiguous channels, evenly spaced rows aligned for channel pairs."""
    x = x.to(dtype)
    regular = x.stride(2) == 1 and (1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1))
    aligned = row_stride(x) % 2 == 0 and x.data_ptr() % (2 * x.element_size()) == 0
    return x if regular and aligned else x.clone(memory_format=torch.contiguous_format)


def _computing(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in DTYPES else torch.float32


def _flags(doc_starts: Tensor | None) -> Tensor | None:
    return None if doc_starts is None else doc_starts.contiguous().view(torch.uint8)


class Prepared:
    """Inputs of a scan as the kernels want them."""

    def __init__(self, inputs: Sequence[Tensor], doc_starts: Tensor | None) -> None:
        u, dt, A, B, C, D, z, dt_bias = inputs
        self.batch, self.length, self.channels, self.states = *u.shape, A.shape[1]
        if self.states > STATES:
            raise ValueError(
                f"model.d_state {self.states} exceeds the {STATES} states of the CUDA kernels: "
                "use reference"
            )
        narrow = all(x.dtype is torch.bfloat16 for x in (u, dt, B, C, z))
        self.dtype = torch.bfloat16 if narrow else torch.float32
        self.pad_d, self.pad_n = -self.channels % CHANNELS, STATES - self.states
        self.d = self.channels + self.pad_d
        self.u, self.dt, self.z = (_rows(self.wide(x), self.dtype) for x in (u, dt, z))
        self.B, self.C = (
            _rows(F.pad(x, (0, self.pad_n)) if self.pad_n else x, self.dtype) for x in (B, C)
        )
        self.A = self.state(A[None].float() * LOG2E)[0]
        self.D, self.bias = (self.wide(x).float().contiguous() for x in (D, dt_bias))
        self.rows = [c_int(row_stride(x)) for x in (self.u, self.dt, self.z, self.B, self.C)]
        self.inputs = [
            self.u,
            self.dt,
            self.z,
            self.A,
            self.B,
            self.C,
            self.D,
            self.bias,
            _flags(doc_starts),
        ]

    def wide(self, x: Tensor) -> Tensor:
        """x with its last axis, the channels, padded."""
        return F.pad(x, (0, self.pad_d)) if self.pad_d else x

    def state(self, x: Tensor) -> Tensor:
        """[b, d, n] fp32, padded."""
        padded = self.pad_n or self.pad_d  # F.pad copies also by nothing
        return (
            F.pad(x.float(), (0, self.pad_n, 0, self.pad_d)) if padded else x.float()
        ).contiguous()

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=dtype, device=self.u.device)

    def cut(self, channels: int, blocks: int) -> tuple[int, list[Any]]:
        """Segments that fill the GPU, `blocks` of `channels` per SM; the last kernel arguments."""
        room = blocks * processors(self.u.device) // (self.d // channels * self.batch)
        segments = max(1, min(room, self.length // LEAST_SEGMENT))
        segment = -(-self.length // (segments * SCAN_CHUNK)) * SCAN_CHUNK
        return -(-self.length // segment), [
            c_int(self.length),
            c_int(self.d),
            c_int(segment),
            *self.rows,
        ]

    def joints(self, segments: int) -> list[Tensor]:
        """What segments add to the state at their far ends, and the time that passes in them."""
        return [
            self.new(segments, self.batch, self.d, STATES),
            self.new(segments, self.batch, self.d),
        ]


def kept_like(u: Tensor, A: Tensor) -> Tensor:
    """An empty tensor for the states that the backward starts its chunks from."""
    channels = -(-u.shape[2] // CHANNELS) * CHANNELS
    return u.new_empty(
        u.shape[0], -(-u.shape[1] // SCAN_CHUNK), channels, STATES, dtype=torch.float32
    )


def scan_forward(
    inputs: Sequence[Tensor], doc_starts: Tensor | None, state: Tensor | None, kept: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y [b, l, d], last state [b, d, n]; fills `kept` with the backward's chunk start states."""
    p = Prepared(inputs, doc_starts)
    y, last = p.new(p.batch, p.length, p.d, dtype=p.dtype), p.new(p.batch, p.d, STATES)
    first = None if state is None else p.state(state)
    segments, sizes = p.cut(FORWARD_CHANNELS, 1)
    arguments = [*p.inputs, first, y, last, kept, *p.joints(segments), *sizes]
    blocks = (p.d // FORWARD_CHANNELS, p.batch)
    if segments > 1:
        grid = (*blocks, segments - 1)
        cuda_library.launch(
            "scan_forward.cu", "scan_summary", p.dtype, grid, FORWARD_THREADS, 0, arguments
        )
    cuda_library.launch(
        "scan_forward.cu",
        "scan_forward",
        p.dtype,
        (*blocks, segments),
        FORWARD_THREADS,
        0,
        arguments,
    )
    return y[..., : p.channels].to(inputs[0].dtype).contiguous(), last[
        :, : p.channels, : p.states
    ].contiguous()


def scan_backward(
    inputs: Sequence[Tensor],
    doc_starts: Tensor | None,
    state: Tensor | None,
    kept: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
) -> list[Tensor]:
    """Gradients in this order: u, dt, A, B, C, D, z, dt_bias, first state (empty without one)."""
    p = Prepared(inputs, doc_starts)
    segments, sizes = p.cut(CHANNELS, BACKWARD_BLOCKS)
    du, ddt, dz = (p.new(p.batch, p.length, p.d, dtype=p.dtype) for _ in range(3))
    dA, dfirst = p.new(segments, p.batch, p.d, STATES), p.new(p.batch, p.d, STATES)
    dD, dbias = (p.new(segments, p.batch, p.d) for _ in range(2))
    dBC = p.new(p.d // CHANNELS, p.batch, p.length, 2 * STATES)
    dy, joints = _rows(p.wide(dy), p.dtype).contiguous(), p.joints(segments)
    dlast = None if dlast is None else p.state(dlast)
    blocks = (p.d // CHANNELS, p.batch)
    if segments > 1:
        grid, arguments = (*blocks, segments - 1), [*p.inputs, dy, dlast, *joints, *sizes]
        cuda_library.launch(
            "scan_backward.cu", "scan_adjoint", p.dtype, grid, BACKWARD_THREADS, 0, arguments
        )
    arguments = [
        *p.inputs,
        kept,
        dy,
        dlast,
        *joints,
        du,
        ddt,
        dz,
        dA,
        dBC,
        dD,
        dbias,
        dfirst,
        *sizes,
    ]
    grid, shared = (*blocks, segments), BACKWARD_SHARED
    cuda_library.launch(
        "scan_backward.cu", "scan_backward", p.dtype, grid, BACKWARD_THREADS, shared, arguments
    )
    c, n = p.channels, p.states
    # an operator's results must not share memory
    dB, dC = (part.sum(0) for part in dBC.split(STATES, -1))
    gradients = [
        du[..., :c],
        ddt[..., :c],
        dA.sum((0, 1))[:c, :n],
        dB[..., :n],
        dC[..., :n],
        dD.sum((0, 1))[:c],
    ]
    gradients += [dz[..., :c], dbias.sum((0, 1))[:c]]
    results = [
        gradient.to(x.dtype).contiguous() for gradient, x in zip(gradients, inputs, strict=True)
    ]
    return [*results, p.new(0) if state is None else dfirst[:, :c, :n].to(state.dtype).contiguous()]


class PreparedConv:
    """Inputs of a convolution as the kernels want them."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None) -> None:
        self.batch, self.length, self.channels = x.shape
        self.taps = weight.shape[1]
        if self.taps > TAPS:
            raise ValueError(
                f"model.d_conv {self.taps} exceeds the {TAPS} taps of the CUDA kernels: use "
                "reference"
            )
        self.dtype, self.pad = _computing(x.dtype), self.channels % 2
        self.d = self.channels + self.pad
        if self.pad or self.taps < TAPS:
            x, bias = F.pad(x, (0, self.pad)), F.pad(bias, (0, self.pad))
            weight = F.pad(weight, (TAPS - self.taps, 0, 0, self.pad))
        self.x, self.weight = _rows(x, self.dtype), weight.float().t().contiguous()
        self.bias, self.doc_starts = bias.float().contiguous(), _flags(doc_starts)
        self.segments = -(-self.length // CONV_SEGMENT)
        self.grid = (-(-self.d // (2 * CONV_THREADS)), self.segments, self.batch)
        self.tail = [c_int(self.length), c_int(self.d), c_int(row_stride(self.x))]


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None) -> Tensor:
    """SiLU of the causal convolution, [b, l, d]."""
    p = PreparedConv(x, weight, bias, doc_starts)
    out = torch.empty(p.batch, p.length, p.d, dtype=p.dtype, device=x.device)
    arguments = [p.x, p.weight, p.bias, p.doc_starts, out, *p.tail]
    cuda_library.launch("conv.cu", "conv_forward", p.dtype, p.grid, CONV_THREADS, 0, arguments)
    return out[..., : p.channels].to(x.dtype).contiguous()


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None, dout: Tensor
) -> list[Tensor]:
    """Gradients of x, weight and bias."""
    p = PreparedConv(x, weight, bias, doc_starts)
    dx = torch.empty(p.batch, p.length, p.d, dtype=p.dtype, device=x.device)
    sums = torch.empty(p.batch, p.segments, TAPS + 1, p.d, dtype=torch.float32, device=x.device)
    dout = _rows(F.pad(dout, (0, p.pad)) if p.pad else dout, p.dtype).contiguous()
    arguments = [p.x, p.weight, p.bias, p.doc_starts, dout, dx, sums, *p.tail]
    cuda_library.launch("conv.cu", "conv_backward", p.dtype, p.grid, CONV_THREADS, 0, arguments)
    dweight = sums[:, :, TAPS - p.taps : TAPS, : p.channels].sum((0, 1)).t()
    gradients = [dx[..., : p.channels], dweight, sums[:, :, TAPS, : p.channels].sum((0, 1))]
    return [g.to(t.dtype).contiguous() for g, t in zip(gradients, (x, weight, bias), strict=True)]
