"""The CUDA kernels (compiled and launched by cuda_library.py), called on tensors' memory.

bf16 or fp32 in and out, fp32 state. This module pads channels to a multiple of CHANNELS, states to
STATES, taps to TAPS. Where channels and batch do not fill the GPU, the scan splits the sequence
into segments (scan.cuh). Results are deterministic; their last bits depend on the shape and on the
number of SMs.
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
from model.kernels.cpu import token_stride
from model.kernels.cuda_library import DTYPES
from model.kernels.cuda_rows import loss_gradient, loss_statistics, norm_backward, norm_forward

__all__ = ["loss_gradient", "loss_statistics", "norm_backward", "norm_forward"]

# sizes that the CUDA sources define; a test compares them
STATES = 16
CHANNELS = 128  # per block of the backward; the forward's 64 divide them
FORWARD_CHANNELS = 64
FORWARD_THREADS = 256
BACKWARD_THREADS = 128
BACKWARD_SHARED = (  # bytes of shared memory per block
    4 * SCAN_CHUNK * (4 * CHANNELS + 2 * STATES + 1)
    + 4 * SCAN_CHUNK * CHANNELS * STATES // 2
    + 4 * 4 * SCAN_CHUNK * 32
)
# blocks per SM that fill the GPU: the backward's shared memory allows two; one block of the forward
# has eight warps, which is enough
FORWARD_BLOCKS = 1
BACKWARD_BLOCKS = 2
MIN_SEGMENT = 256  # tokens; shorter segments cost more than they gain
TAPS = 4
CONV_SEGMENT = 64
CONV_THREADS = 128
LOG2E = 1.4426950408889634


def unavailable_reason() -> str | None:
    """Why these kernels cannot be used here, with the fix; None when they can."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "no cuda-core: pip install 'cuda-core[cu13]' (it brings NVRTC; nvcc is not needed)"
    if not torch.cuda.is_available():
        return "torch sees no GPU"
    properties: Any = torch.cuda.get_device_properties(0)
    if properties.major < 8 or properties.shared_memory_per_block_optin < BACKWARD_SHARED:
        return (
            f"the kernels need bf16 and {BACKWARD_SHARED} bytes of shared memory per block (A100, "
            "H100 and later)"
        )
    return None


@functools.cache
def sm_count(device: torch.device) -> int:
    """Number of streaming multiprocessors of a GPU."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _with_token_stride(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [b, l, d] in dtype with contiguous channels and one stride between tokens.

    Pairs of channels are aligned. Copies only when needed.
    """
    x = x.to(dtype)
    regular = x.stride(2) == 1 and (1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1))
    aligned = token_stride(x) % 2 == 0 and x.data_ptr() % (2 * x.element_size()) == 0
    return x if regular and aligned else x.clone(memory_format=torch.contiguous_format)


def _as_bytes(doc_starts: Tensor | None) -> Tensor | None:
    return None if doc_starts is None else doc_starts.contiguous().view(torch.uint8)


class ScanInputs:
    """Padded and converted inputs of a scan."""

    def __init__(self, inputs: Sequence[Tensor], doc_starts: Tensor | None) -> None:
        u, dt, A, B, C, D, z, dt_bias = inputs
        self.batch, self.length, self.channels = u.shape
        self.states = A.shape[1]
        if self.states > STATES:
            raise ValueError(
                f"model.d_state={self.states} exceeds the {STATES} states of the CUDA kernels: set "
                "compute.kernels=reference"
            )
        all_bf16 = all(x.dtype is torch.bfloat16 for x in (u, dt, B, C, z))
        self.dtype = torch.bfloat16 if all_bf16 else torch.float32
        self.d_padding, self.n_padding = -self.channels % CHANNELS, STATES - self.states
        self.d = self.channels + self.d_padding
        self.u, dt, z = (_with_token_stride(self.pad_d(x), self.dtype) for x in (u, dt, z))
        B, C = (_with_token_stride(self.pad_n(x), self.dtype) for x in (B, C))
        A = self.pad_dn(A[None].float() * LOG2E)[0]
        D, dt_bias = (self.pad_d(x).float().contiguous() for x in (D, dt_bias))
        self.inputs = [self.u, dt, z, A, B, C, D, dt_bias, _as_bytes(doc_starts)]
        self.strides = [c_int(token_stride(x)) for x in (self.u, dt, z, B, C)]

    def pad_d(self, x: Tensor) -> Tensor:
        """Pad x [..., d]."""
        return F.pad(x, (0, self.d_padding)) if self.d_padding else x

    def pad_n(self, x: Tensor) -> Tensor:
        """Pad x [..., n]."""
        return F.pad(x, (0, self.n_padding)) if self.n_padding else x

    def pad_dn(self, x: Tensor) -> Tensor:
        """Pad x [b, d, n] and convert it to contiguous fp32."""
        x = x.float()
        if self.n_padding or self.d_padding:  # F.pad copies even without padding
            x = F.pad(x, (0, self.n_padding, 0, self.d_padding))
        return x.contiguous()

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Empty tensor on the inputs' device."""
        return torch.empty(shape, dtype=dtype, device=self.u.device)

    def split_segments(self, channels: int, blocks: int) -> tuple[int, list[Any]]:
        """Number of segments, and the size arguments of the kernels (SIZES in scan.cuh).

        `channels` is per block; `blocks` per SM fill the GPU.
        """
        max_segments = blocks * sm_count(self.u.device) // (self.d // channels * self.batch)
        segments = max(1, min(max_segments, self.length // MIN_SEGMENT))
        segment_length = -(-self.length // (segments * SCAN_CHUNK)) * SCAN_CHUNK
        sizes = [c_int(self.length), c_int(self.d), c_int(segment_length), *self.strides]
        return -(-self.length // segment_length), sizes

    def new_segment_results(self, segments: int) -> list[Tensor]:
        """Empty end_states and dt_sums, which the first kernel writes and the second one reads."""
        return [
            self.new(segments, self.batch, self.d, STATES),
            self.new(segments, self.batch, self.d),
        ]


def empty_chunk_states(u: Tensor, A: Tensor) -> Tensor:
    """Empty tensor for the state before each chunk, from which the backward recomputes."""
    channels = -(-u.shape[2] // CHANNELS) * CHANNELS
    return u.new_empty(
        u.shape[0], -(-u.shape[1] // SCAN_CHUNK), channels, STATES, dtype=torch.float32
    )


def scan_forward(
    inputs: Sequence[Tensor],
    doc_starts: Tensor | None,
    state: Tensor | None,
    chunk_states: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y [b, l, d], last state [b, d, n]; writes the state before each chunk to `chunk_states`."""
    p = ScanInputs(inputs, doc_starts)
    y, last_state = p.new(p.batch, p.length, p.d, dtype=p.dtype), p.new(p.batch, p.d, STATES)
    state = None if state is None else p.pad_dn(state)
    segments, sizes = p.split_segments(FORWARD_CHANNELS, FORWARD_BLOCKS)
    results = [y, last_state, chunk_states, *p.new_segment_results(segments)]
    arguments = [*p.inputs, state, *results, *sizes]
    blocks = (p.d // FORWARD_CHANNELS, p.batch)

    def launch(name: str, grid_z: int) -> None:
        grid = (*blocks, grid_z)
        cuda_library.launch("scan_forward.cu", name, p.dtype, grid, FORWARD_THREADS, 0, arguments)

    if segments > 1:
        launch("scan_summary", segments - 1)
    launch("scan_forward", segments)
    y = y[..., : p.channels].to(inputs[0].dtype).contiguous()
    return y, last_state[:, : p.channels, : p.states].contiguous()


def scan_backward(
    inputs: Sequence[Tensor],
    doc_starts: Tensor | None,
    state: Tensor | None,
    chunk_states: Tensor,
    dy: Tensor,
    dlast_state: Tensor | None,
) -> list[Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and the initial state (empty without one)."""
    p = ScanInputs(inputs, doc_starts)
    segments, sizes = p.split_segments(CHANNELS, BACKWARD_BLOCKS)
    du, ddt, dz = (p.new(p.batch, p.length, p.d, dtype=p.dtype) for _ in range(3))
    dA, dstate = p.new(segments, p.batch, p.d, STATES), p.new(p.batch, p.d, STATES)
    dD, dbias = (p.new(segments, p.batch, p.d) for _ in range(2))
    dBC = p.new(p.d // CHANNELS, p.batch, p.length, 2 * STATES)
    dy = _with_token_stride(p.pad_d(dy), p.dtype).contiguous()
    dlast_state = None if dlast_state is None else p.pad_dn(dlast_state)
    segment_results = p.new_segment_results(segments)
    blocks = (p.d // CHANNELS, p.batch)

    def launch(name: str, grid_z: int, shared: int, arguments: list[Any]) -> None:
        grid = (*blocks, grid_z)
        cuda_library.launch(
            "scan_backward.cu", name, p.dtype, grid, BACKWARD_THREADS, shared, arguments
        )

    if segments > 1:
        arguments = [*p.inputs, dy, dlast_state, *segment_results, *sizes]
        launch("scan_adjoint", segments - 1, 0, arguments)
    results = [du, ddt, dz, dA, dBC, dD, dbias, dstate]
    arguments = [*p.inputs, chunk_states, dy, dlast_state, *segment_results, *results, *sizes]
    launch("scan_backward", segments, BACKWARD_SHARED, arguments)
    c, n = p.channels, p.states
    # separate sums: an operator's results must not share memory
    dB, dC = (x.sum(0) for x in dBC.split(STATES, -1))
    gradients = [
        du[..., :c],
        ddt[..., :c],
        dA.sum((0, 1))[:c, :n],
        dB[..., :n],
        dC[..., :n],
        dD.sum((0, 1))[:c],
        dz[..., :c],
        dbias.sum((0, 1))[:c],
    ]
    gradients = [g.to(x.dtype).contiguous() for g, x in zip(gradients, inputs, strict=True)]
    if state is None:
        return [*gradients, p.new(0)]
    return [*gradients, dstate[:, :c, :n].to(state.dtype).contiguous()]


class ConvInputs:
    """Padded and converted inputs of a convolution."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None) -> None:
        self.batch, self.length, self.channels = x.shape
        self.taps = weight.shape[1]
        if self.taps > TAPS:
            raise ValueError(
                f"model.d_conv={self.taps} exceeds the {TAPS} taps of the CUDA kernels: set "
                "compute.kernels=reference"
            )
        self.dtype = x.dtype if x.dtype in DTYPES else torch.float32
        self.d_padding = self.channels % 2
        self.d = self.channels + self.d_padding
        x, bias = self.pad_d(x), self.pad_d(bias)
        if self.d_padding or self.taps < TAPS:
            weight = F.pad(weight, (TAPS - self.taps, 0, 0, self.d_padding))
        x, weight = _with_token_stride(x, self.dtype), weight.float().t().contiguous()
        self.inputs = [x, weight, bias.float().contiguous(), _as_bytes(doc_starts)]
        self.segments = -(-self.length // CONV_SEGMENT)
        self.grid = (-(-self.d // (2 * CONV_THREADS)), self.segments, self.batch)
        self.sizes = [c_int(self.length), c_int(self.d), c_int(token_stride(x))]

    def pad_d(self, x: Tensor) -> Tensor:
        """Pad x [..., d]."""
        return F.pad(x, (0, self.d_padding)) if self.d_padding else x


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None) -> Tensor:
    """SiLU of the causal convolution, [b, l, d]."""
    p = ConvInputs(x, weight, bias, doc_starts)
    out = torch.empty(p.batch, p.length, p.d, dtype=p.dtype, device=x.device)
    arguments = [*p.inputs, out, *p.sizes]
    cuda_library.launch("conv.cu", "conv_forward", p.dtype, p.grid, CONV_THREADS, 0, arguments)
    return out[..., : p.channels].to(x.dtype).contiguous()


def conv_backward(
    x: Tensor, weight: Tensor, bias: Tensor, doc_starts: Tensor | None, dout: Tensor
) -> list[Tensor]:
    """Gradients of x, weight and bias."""
    p = ConvInputs(x, weight, bias, doc_starts)
    dx = torch.empty(p.batch, p.length, p.d, dtype=p.dtype, device=x.device)
    sums = torch.empty(p.batch, p.segments, TAPS + 1, p.d, dtype=torch.float32, device=x.device)
    dout = _with_token_stride(p.pad_d(dout), p.dtype).contiguous()
    arguments = [*p.inputs, dout, dx, sums, *p.sizes]
    cuda_library.launch("conv.cu", "conv_backward", p.dtype, p.grid, CONV_THREADS, 0, arguments)
    dweight = sums[:, :, TAPS - p.taps : TAPS, : p.channels].sum((0, 1)).t()
    gradients = [dx[..., : p.channels], dweight, sums[:, :, TAPS, : p.channels].sum((0, 1))]
    return [g.to(t.dtype).contiguous() for g, t in zip(gradients, (x, weight, bias), strict=True)]
