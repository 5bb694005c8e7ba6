"""Our CUDA kernels: compiled with NVRTC at first use, launched on tensors' memory.

mamba_scan.cu and mamba_conv.cu need `cuda-core` (NVIDIA's own package, with NVRTC as a wheel) and no nvcc; compiling
takes about a second per process. bf16 and fp32 in and out, fp32 state; channels are padded to 64, states to 16, taps
to 4.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from model.kernels.cpu import row_stride

FOLDER = Path(__file__).parent
# sizes that the sources fix; a test compares them with the text
CHANNELS, STATES, CHUNK, SCAN_THREADS = 64, 16, 32, 256
TAPS, SEGMENT, CONV_THREADS = 4, 64, 128
BACKWARD_SHARED = 4 * CHUNK * (3 * CHANNELS + 2 * STATES) + 16 * SCAN_THREADS * (CHUNK // 4 + 3 * 4)
LOG2E = 1.4426950408889634
DTYPES = {torch.float32: 0, torch.bfloat16: 1}  # the sources' BF16


def missing() -> str | None:
    """Why these kernels cannot be used here, with the fix; None when they can."""
    if importlib.util.find_spec("cuda") is None or importlib.util.find_spec("cuda.core") is None:
        return "no cuda-core: pip install 'cuda-core[cu13]' (it brings NVRTC; nvcc is not needed)"
    if not torch.cuda.is_available():
        return "no GPU that torch sees"
    properties: Any = torch.cuda.get_device_properties(0)
    if properties.major < 8 or properties.shared_memory_per_block_optin < BACKWARD_SHARED:
        return f"no GPU with bf16 and {BACKWARD_SHARED} bytes of shared memory a block (A100, H100 and later have them)"
    return None


def compile_source(name: str, bf16: int, arch: str, log: Any = None) -> Any:
    """The compiled source of an architecture ("sm_90"); ptxas' account of registers and spills goes to `log`."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        arch=arch,
        std="c++17",
        define_macro=[("BF16", str(bf16))],
        include_path=[str(FOLDER)],
        ptxas_options=["-v"],
    )
    return Program((FOLDER / name).read_text(encoding="utf-8"), "c++", options).compile("cubin", logs=log)


_compiled = functools.cache(compile_source)  # once for all kernels of a source


@functools.cache
def _kernel(source: str, name: str, bf16: int, device: int, shared: int) -> Any:
    """A kernel loaded on a device, allowed its shared memory."""
    from cuda.bindings import driver
    from cuda.core import Device

    Device(device).set_current()
    major, minor = torch.cuda.get_device_capability(device)
    kernel = _compiled(source, bf16, f"sm_{major}{minor}").get_kernel(name)
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (status,) = driver.cuKernelSetAttribute(attribute, shared, int(kernel.handle), device)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{name} needs {shared} bytes of shared memory a block: {status}")
    return kernel


Arguments = Sequence[Any]  # tensors, None for a null pointer, and ctypes integers


def launch(
    source: str,
    name: str,
    dtype: torch.dtype,
    grid: tuple[int, int, int],
    threads: int,
    shared: int,
    arguments: Arguments,
) -> None:
    """Run a kernel on the current stream of its first tensor's device."""
    from cuda.core import LaunchConfig, Stream
    from cuda.core import launch as enqueue

    device = next(x for x in arguments if isinstance(x, Tensor)).device
    with torch.cuda.device(device):
        kernel = _kernel(source, name, DTYPES[dtype], device.index, shared)
        stream = Stream.from_handle(torch.cuda.current_stream(device).cuda_stream)
        enqueue(stream, LaunchConfig(grid=grid, block=threads, shmem_size=shared), kernel, *parameters(arguments))


def parameters(arguments: Arguments) -> list[Any]:
    """Arguments as cuda-core takes them: pointers as plain integers, sizes as ctypes."""
    return [_address(x) if x is None or isinstance(x, Tensor) else x for x in arguments]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [b, l, d] in a type: neighbouring channels adjacent, rows equally apart and aligned for pairs of channels."""
    x = x.to(dtype)
    regular = x.stride(2) == 1 and (1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1))
    aligned = row_stride(x) % 2 == 0 and x.data_ptr() % (2 * x.element_size()) == 0
    return x if regular and aligned else x.clone(memory_format=torch.contiguous_format)


def _computing(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in DTYPES else torch.float32


def _flags(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.to(torch.uint8).contiguous()


class Prepared:
    """Inputs of a scan as the kernels want them."""

    def __init__(self, inputs: list[Tensor], starts: Tensor | None) -> None:
        u, dt, A, B, C, D, z, dt_bias = inputs
        self.batch, self.length, self.channels, self.states = *u.shape, A.shape[1]
        if self.states > STATES:
            raise ValueError(
                f"model.d_state {self.states} exceeds the {STATES} states of the CUDA kernels: use reference"
            )
        self.dtype = _computing(u.dtype)
        self.pad_d, self.pad_n = -self.channels % CHANNELS, STATES - self.states
        self.d = self.channels + self.pad_d
        self.u, self.dt, self.z = (_rows(self.wide(x), self.dtype) for x in (u, dt, z))
        self.B, self.C = (_rows(F.pad(x, (0, self.pad_n)) if self.pad_n else x, self.dtype) for x in (B, C))
        self.A = self.state(A[None] * LOG2E)[0]
        self.D, self.bias = (self.wide(x).float().contiguous() for x in (D, dt_bias))
        self.starts = _flags(starts)
        self.rows = [ctypes.c_longlong(row_stride(x)) for x in (self.u, self.dt, self.z, self.B, self.C)]
        self.sizes = [ctypes.c_int(self.length), ctypes.c_int(self.d)]
        self.inputs = [self.u, self.dt, self.z, self.A, self.B, self.C, self.D, self.bias, self.starts]
        self.grid = (self.d // CHANNELS, self.batch, 1)

    def wide(self, x: Tensor) -> Tensor:
        """x with its last axis, the channels, padded."""
        return F.pad(x, (0, self.pad_d)) if self.pad_d else x

    def state(self, x: Tensor) -> Tensor:
        """[b, d, n] fp32, padded."""
        return F.pad(x.float(), (0, self.pad_n, 0, self.pad_d)).contiguous()

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=dtype, device=self.u.device)


def kept_like(u: Tensor, A: Tensor) -> Tensor:
    """An empty tensor of the shape that scan_forward keeps for the backward."""
    channels = -(-u.shape[2] // CHANNELS) * CHANNELS
    return u.new_empty(u.shape[0], -(-u.shape[1] // CHUNK), channels, STATES, dtype=torch.float32)


def scan_forward(inputs: list[Tensor], starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y [b, l, d], the last state [b, d, n], and the states that the backward starts its chunks from."""
    p = Prepared(inputs, starts)
    y, last = p.new(p.batch, p.length, p.d, dtype=p.dtype), p.new(p.batch, p.d, STATES)
    kept, first = kept_like(inputs[0], inputs[2]), None if state is None else p.state(state)
    arguments = [*p.inputs, first, y, last, kept, *p.sizes, *p.rows]
    launch("mamba_scan.cu", "scan_forward", p.dtype, p.grid, SCAN_THREADS, 0, arguments)
    return y[..., : p.channels].to(inputs[0].dtype).contiguous(), last[:, : p.channels, : p.states].contiguous(), kept


def scan_backward(
    inputs: list[Tensor], starts: Tensor | None, state: Tensor | None, kept: Tensor, dy: Tensor, dlast: Tensor
) -> list[Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and of the first state, in this order."""
    p = Prepared(inputs, starts)
    du, ddt, dz = (p.new(p.batch, p.length, p.d, dtype=p.dtype) for _ in range(3))
    dA, dfirst = (p.new(p.batch, p.d, STATES) for _ in range(2))
    dD, dbias = (p.new(p.batch, p.d) for _ in range(2))
    dBC = p.new(p.d // CHANNELS, p.batch, p.length, 2 * STATES)
    dy, dlast = _rows(p.wide(dy), p.dtype).contiguous(), p.state(dlast)
    arguments = [*p.inputs, kept, dy, dlast, du, ddt, dz, dA, dBC, dD, dbias, dfirst, *p.sizes, *p.rows]
    launch("mamba_scan.cu", "scan_backward", p.dtype, p.grid, SCAN_THREADS, BACKWARD_SHARED, arguments)
    c, n = p.channels, p.states
    dB, dC = (part.sum(0) for part in dBC.split(STATES, -1))  # an operator's results must not share memory
    gradients = [du[..., :c], ddt[..., :c], dA.sum(0)[:c, :n], dB[..., :n], dC[..., :n], dD.sum(0)[:c], dz[..., :c]]
    gradients += [dbias.sum(0)[:c], dfirst[:, :c, :n]]
    types = [x.dtype for x in inputs] + [torch.float32 if state is None else state.dtype]
    return [gradient.to(dtype).contiguous() for gradient, dtype in zip(gradients, types, strict=True)]


class PreparedConv:
    """Inputs of a convolution as the kernels want them."""

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> None:
        self.batch, self.length, self.channels = x.shape
        self.taps = weight.shape[1]
        if self.taps > TAPS:
            raise ValueError(f"model.d_conv {self.taps} exceeds the {TAPS} taps of the CUDA kernels: use reference")
        self.dtype, self.pad = _computing(x.dtype), self.channels % 2
        self.d = self.channels + self.pad
        self.x = _rows(F.pad(x, (0, self.pad)) if self.pad else x, self.dtype)
        self.weight = F.pad(weight.float().t(), (0, self.pad, TAPS - self.taps, 0)).contiguous()
        self.bias, self.starts = F.pad(bias.float(), (0, self.pad)).contiguous(), _flags(starts)
        self.segments = -(-self.length // SEGMENT)
        self.grid = (-(-self.d // (2 * CONV_THREADS)), self.segments, self.batch)
        self.tail = [ctypes.c_int(self.length), ctypes.c_int(self.d), ctypes.c_longlong(row_stride(self.x))]


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> Tensor:
    """SiLU of the causal convolution, [b, l, d]."""
    p = PreparedConv(x, weight, bias, starts)
    out = torch.empty(p.batch, p.length, p.d, dtype=p.dtype, device=x.device)
    arguments = [p.x, p.weight, p.bias, p.starts, out, *p.tail]
    launch("mamba_conv.cu", "conv_forward", p.dtype, p.grid, CONV_THREADS, 0, arguments)
    return out[..., : p.channels].to(x.dtype).contiguous()


def conv_backward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, dout: Tensor) -> list[Tensor]:
    """Gradients of x, weight and bias."""
    p = PreparedConv(x, weight, bias, starts)
    dx = torch.empty(p.batch, p.length, p.d, dtype=p.dtype, device=x.device)
    sums = torch.empty(p.batch, p.segments, TAPS + 1, p.d, device=x.device)
    dout = _rows(F.pad(dout, (0, p.pad)) if p.pad else dout, p.dtype).contiguous()
    arguments = [p.x, p.weight, p.bias, p.starts, dout, dx, sums, *p.tail]
    launch("mamba_conv.cu", "conv_backward", p.dtype, p.grid, CONV_THREADS, 0, arguments)
    dweight = sums[:, :, TAPS - p.taps : TAPS, : p.channels].sum((0, 1)).t()
    gradients = [dx[..., : p.channels], dweight, sums[:, :, TAPS, : p.channels].sum((0, 1))]
    return [g.to(t.dtype).contiguous() for g, t in zip(gradients, (x, weight, bias), strict=True)]
