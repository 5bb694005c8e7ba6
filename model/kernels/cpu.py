"""The kernels in C++ for CPUs: compiled once per machine at first use, called on tensors' memory.

mamba_cpu.cpp needs g++ (or CXX) and nothing of torch. The library is cached by source, flags and compiler under
$XDG_CACHE_HOME/falcon_mamba (default ~/.cache). AVX-512, AVX2 or a portable path is chosen by what the processor has.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from ctypes import POINTER, Structure, c_float, c_int64, c_uint8, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SOURCE = Path(__file__).with_name("mamba_cpu.cpp")
FLAGS = ["-O3", "-std=c++17", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
PATHS = {  # instruction set -> its flags
    "avx512": ["-DW=16", "-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mavx2", "-mfma"],
    "avx2": ["-DW=8", "-mavx2", "-mfma"],
    "portable": ["-DW=4"],
}
STATES = (4, 8, 16, 32)  # numbers of states that the loops are built for; others are padded with zeros
WIDTHS = {"avx512": 16, "avx2": 8, "portable": 4}  # channels of a vector
CHUNK = 16  # of mamba_cpu.cpp
LOG2E = 1.4426950408889634
Pointer = POINTER(c_float)


class ScanArguments(Structure):
    """`struct Scan` of the C++ side."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "channels", "states")),
        *((name, Pointer) for name in ("u", "dt", "z", "A", "B", "C", "D", "bias")),
        *((name, c_int64) for name in ("u_row", "dt_row", "z_row", "B_row", "C_row", "threads")),
        ("starts", POINTER(c_uint8)),
        ("first", Pointer),
    ]


class GradientPointers(Structure):
    """`struct Gradients` of the C++ side."""

    _fields_ = [(name, Pointer) for name in ("u", "dt", "z", "A", "B", "C", "D", "bias", "first")]


class ConvArguments(Structure):
    """`struct Conv` of the C++ side."""

    _fields_ = [
        *((name, c_int64) for name in ("batch", "length", "channels", "taps")),
        *((name, Pointer) for name in ("x", "weight", "bias")),
        *((name, c_int64) for name in ("x_row", "threads")),
        ("starts", POINTER(c_uint8)),
    ]


def missing() -> str | None:
    """Why the CPU kernels cannot be used here, with the fix; None when they can."""
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return "no C++ compiler: install one (apt-get install g++), or name yours in CXX"
    return None


@functools.cache
def instruction_set() -> str:
    """The widest path that this processor runs."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return "portable"
    flags = set(next((line.split(":")[1].split() for line in text.splitlines() if line.startswith("flags")), []))
    if {"avx512f", "avx512dq", "avx512vl", "avx512bw"} <= flags:
        return "avx512"
    return "avx2" if {"avx2", "fma"} <= flags else "portable"


@functools.cache
def library(path: str) -> ctypes.CDLL:
    """The compiled library of an instruction set; compiles it into the cache when it is not there."""
    compiler = os.environ.get("CXX", "g++")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    command = [compiler, *FLAGS, *PATHS[path]]
    key = hashlib.sha256("\n".join([SOURCE.read_text(), *command, version, platform.machine()]).encode()).hexdigest()
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "falcon_mamba"
    target = home / f"mamba_cpu-{path}-{key[:16]}.so"
    if not target.is_file():
        home.mkdir(parents=True, exist_ok=True)
        # ranks, on several machines perhaps, may compile at once; each renames a file of its own into place
        handle, part = tempfile.mkstemp(dir=home, suffix=".part")
        os.close(handle)
        result = subprocess.run([*command, str(SOURCE), "-o", part], capture_output=True, text=True)
        if result.returncode:
            os.unlink(part)
            raise RuntimeError(f"compiling {SOURCE.name} failed:\n{result.stderr}")
        os.chmod(part, 0o755)
        os.replace(part, target)
    return ctypes.CDLL(str(target))


def active() -> ctypes.CDLL:
    """The library of this processor."""
    return library(instruction_set())


def _pointer(x: Tensor | None) -> Any:
    return None if x is None else ctypes.cast(c_void_p(x.data_ptr()), Pointer)


def _flags(starts: Tensor | None) -> tuple[Tensor | None, Any]:
    """starts as bytes that live, and their address."""
    held = None if starts is None else starts.to(torch.uint8).contiguous()
    return held, None if held is None else ctypes.cast(c_void_p(held.data_ptr()), POINTER(c_uint8))


def _rows(x: Tensor) -> Tensor:
    """fp32 with neighbouring channels adjacent and one distance between all rows [b, l]; copies only when needed."""
    x = x.float()
    regular = x.stride(2) == 1 and (1 in x.shape[:2] or x.stride(0) == x.shape[1] * x.stride(1))
    return x if regular else x.clone(memory_format=torch.contiguous_format)


def row_stride(x: Tensor) -> int:
    """Elements between neighbouring rows of x [b, l, d]; the stride of an axis of length 1 says nothing."""
    return x.stride(0) if x.shape[1] == 1 else x.stride(1)


class Prepared:
    """Inputs of a scan as the C++ side wants them: fp32, channels padded to its vectors, states to a built number."""

    def __init__(self, inputs: list[Tensor], starts: Tensor | None, state: Tensor | None, lib: ctypes.CDLL) -> None:
        u, dt, A, B, C, D, z, dt_bias = inputs
        self.batch, self.length, self.channels, self.states = *u.shape, A.shape[1]
        self.pad_d = -self.channels % lib.vector_width()
        self.pad_n = padded_states(self.states) - self.states
        self.u, self.dt, self.z = (_rows(self.wide(x)) for x in (u, dt, z))
        self.B, self.C = (_rows(F.pad(x, (0, self.pad_n))) if self.pad_n else _rows(x) for x in (B, C))
        self.A = self.inner(A.unsqueeze(0)).mul_(LOG2E)
        self.D, self.bias = (self.wide(x).float().contiguous() for x in (D, dt_bias))
        self.first = None if state is None else self.inner(state)
        self.starts, flags = _flags(starts)
        rows = [row_stride(x) for x in (self.u, self.dt, self.z, self.B, self.C)]
        sizes = (self.batch, self.length, self.channels + self.pad_d, self.states + self.pad_n)
        tensors = [_pointer(x) for x in (self.u, self.dt, self.z, self.A, self.B, self.C, self.D, self.bias)]
        self.arguments = ScanArguments(*sizes, *tensors, *rows, torch.get_num_threads(), flags, _pointer(self.first))

    def wide(self, x: Tensor) -> Tensor:
        """x with its last axis, the channels, padded."""
        return F.pad(x, (0, self.pad_d)) if self.pad_d else x

    def inner(self, state: Tensor) -> Tensor:
        """A state [b, d, n] as padded [b, n, d]."""
        state = state.float().transpose(1, 2)
        if self.pad_d or self.pad_n:
            state = F.pad(state, (0, self.pad_d, 0, self.pad_n))
        return state.clone(memory_format=torch.contiguous_format)

    def outer(self, state: Tensor) -> Tensor:
        """Padded [b, n, d] as a state [b, d, n]."""
        return state[:, : self.states, : self.channels].transpose(1, 2).contiguous()

    def new(self, *shape: int) -> Tensor:
        """Memory for a result."""
        return torch.empty(shape, dtype=torch.float32)


def padded_states(states: int) -> int:
    """The number of states that a loop is built for; raises ValueError above the largest."""
    if states > STATES[-1]:
        raise ValueError(f"model.d_state {states} exceeds the {STATES[-1]} states of the C++ kernels: use reference")
    return next(n for n in STATES if n >= states)


def kept_like(u: Tensor, A: Tensor) -> Tensor:
    """An empty tensor of the shape that scan_forward keeps for the backward."""
    channels = -(-u.shape[2] // WIDTHS[instruction_set()]) * WIDTHS[instruction_set()]
    return u.new_empty(u.shape[0], -(-u.shape[1] // CHUNK), padded_states(A.shape[1]), channels, dtype=torch.float32)


def scan_forward(inputs: list[Tensor], starts: Tensor | None, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """y [b, l, d], the last state [b, d, n], and the states that the backward starts its chunks from."""
    lib = active()
    p = Prepared(inputs, starts, state, lib)
    d, n, chunks = p.channels + p.pad_d, p.states + p.pad_n, -(-p.length // lib.chunk_steps())
    y, last, kept = p.new(p.batch, p.length, d), p.new(p.batch, n, d), p.new(p.batch, chunks, n, d)
    lib.selective_scan_forward(ctypes.byref(p.arguments), _pointer(y), _pointer(last), _pointer(kept))
    return y[..., : p.channels].to(inputs[0].dtype).contiguous(), p.outer(last), kept


def scan_backward(
    inputs: list[Tensor], starts: Tensor | None, state: Tensor | None, kept: Tensor, dy: Tensor, dlast: Tensor
) -> list[Tensor]:
    """Gradients of u, dt, A, B, C, D, z, dt_bias and of the first state, in this order."""
    lib = active()
    p = Prepared(inputs, starts, state, lib)
    d, n, groups = p.channels + p.pad_d, p.states + p.pad_n, -(-(p.channels + p.pad_d) // lib.group_channels())
    du, ddt, dz = (p.new(p.batch, p.length, d) for _ in range(3))
    dA, dD, dbias = torch.zeros(p.batch, n, d), torch.zeros(p.batch, d), torch.zeros(p.batch, d)
    dB, dC = (p.new(groups, p.batch, p.length, n) for _ in range(2))
    dfirst = p.new(p.batch, n, d)
    dy, dlast = p.wide(dy.float()).contiguous(), p.inner(dlast)
    pointers = GradientPointers(*(_pointer(x) for x in (du, ddt, dz, dA, dB, dC, dD, dbias, dfirst)))
    lib.selective_scan_backward(
        ctypes.byref(p.arguments), _pointer(kept), _pointer(dy), _pointer(dlast), ctypes.byref(pointers)
    )
    c, s = p.channels, p.states
    gradients = [du[..., :c], ddt[..., :c], total(dA).t()[:c, :s], total(dB)[..., :s], total(dC)[..., :s]]
    gradients += [total(dD)[:c], dz[..., :c], total(dbias)[:c], p.outer(dfirst)]
    types = [x.dtype for x in inputs] + [torch.float32 if state is None else state.dtype]
    return [gradient.contiguous().to(dtype) for gradient, dtype in zip(gradients, types, strict=True)]


def total(parts: Tensor) -> Tensor:
    """Sum over the first axis; a single part is taken as it is."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def _conv(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, pad: int) -> tuple[ConvArguments, list[Any]]:
    """Arguments of a convolution, and the tensors that must live while they are used."""
    rows = _rows(F.pad(x, (0, pad)) if pad else x)
    taps = F.pad(weight.float().t(), (0, pad)).contiguous()
    shift = F.pad(bias.float(), (0, pad)).contiguous()
    held, flags = _flags(starts)
    sizes = (x.shape[0], x.shape[1], x.shape[2] + pad, weight.shape[1])
    tensors = (_pointer(rows), _pointer(taps), _pointer(shift))
    return ConvArguments(*sizes, *tensors, row_stride(rows), torch.get_num_threads(), flags), [rows, taps, shift, held]


def conv_forward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> Tensor:
    """SiLU of the causal convolution, [b, l, d]."""
    lib = active()
    pad = -x.shape[2] % lib.vector_width()
    arguments, _held = _conv(x, weight, bias, starts, pad)
    out = torch.empty(x.shape[0], x.shape[1], x.shape[2] + pad)
    lib.causal_conv_forward(ctypes.byref(arguments), _pointer(out))
    return out[..., : x.shape[2]].to(x.dtype).contiguous()


def conv_backward(x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None, dout: Tensor) -> list[Tensor]:
    """Gradients of x, weight and bias."""
    lib = active()
    channels = x.shape[2]
    pad = -channels % lib.vector_width()
    arguments, _held = _conv(x, weight, bias, starts, pad)
    dout = (F.pad(dout, (0, pad)) if pad else dout).float().contiguous()
    dx = torch.zeros(x.shape[0], x.shape[1], channels + pad)
    dweight = torch.zeros(x.shape[0], weight.shape[1], channels + pad)
    dbias = torch.zeros(x.shape[0], channels + pad)
    lib.causal_conv_backward(ctypes.byref(arguments), *(_pointer(t) for t in (dout, dx, dweight, dbias)))
    gradients = [dx[..., :channels], total(dweight).t()[:channels], total(dbias)[:channels]]
    return [g.contiguous().to(t.dtype) for g, t in zip(gradients, (x, weight, bias), strict=True)]
