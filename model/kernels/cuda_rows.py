"""Row kernels of the `cuda` backend: RMSNorm and the cross entropy's operations on logits."""

from ctypes import c_float, c_int, c_longlong
from typing import Any

import torch
from torch import Tensor

from model.kernels import cuda_library
from model.kernels.cuda_library import DTYPES

# sizes that rows.cu defines; a test compares them
WARPS = 4
ROWS = 64
MAX_SPLITS = 3
THREADS = 256


def _launch(
    name: str, dtype: torch.dtype, grid: tuple[int, int, int], threads: int, arguments: list[Any]
) -> None:
    cuda_library.launch("rows.cu", name, dtype, grid, threads, 0, arguments)


class NormInputs:
    """Converted inputs of a norm; `dtype` is the type of its result."""

    def __init__(
        self, x: Tensor, weight: Tensor | None, split_sizes: list[int], dtype: torch.dtype
    ) -> None:
        if len(split_sizes) > MAX_SPLITS:
            raise ValueError(
                f"a norm of {len(split_sizes)} splits exceeds the {MAX_SPLITS} of the CUDA "
                "kernels: set compute.kernels=reference"
            )
        x_dtype = torch.bfloat16 if x.dtype is dtype is torch.bfloat16 else torch.float32
        rows = x.reshape(-1, x.shape[-1]).to(x_dtype)
        self.x = rows if rows.stride(1) == 1 else rows.contiguous()
        self.weight = None if weight is None else weight.float().contiguous()
        self.count, self.size = self.x.shape
        self.row_sizes = [c_int(self.count), c_longlong(self.x.stride(0))]
        padded_sizes = [*split_sizes, *[0] * (MAX_SPLITS - len(split_sizes))]
        self.splits = [c_int(n) for n in (len(split_sizes), *padded_sizes)]
        self.grid = (-(-self.count // WARPS), 1, 1)

    def kernel_variant(self, dtype: torch.dtype) -> tuple[torch.dtype, str]:
        """Type that the kernel for a result in `dtype` writes, and the suffix of its name."""
        narrow = dtype is torch.bfloat16 and self.x.dtype is torch.float32
        return (torch.bfloat16, "_narrow") if narrow else (self.x.dtype, "")


def norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, split_sizes: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The normed rows, and the factor 1 / rms of each split [..., split]."""
    p = NormInputs(x, weight, split_sizes, dtype)
    out_dtype, suffix = p.kernel_variant(dtype)
    out = torch.empty(x.shape, dtype=out_dtype, device=x.device)
    scales = torch.empty(*x.shape[:-1], len(split_sizes), dtype=torch.float32, device=x.device)
    arguments = [p.x, p.weight, out, scales, *p.row_sizes, *p.splits, c_float(eps)]
    _launch(f"norm_forward{suffix}", p.x.dtype, p.grid, 32 * WARPS, arguments)
    return out.to(dtype), scales


def norm_backward(
    x: Tensor, weight: Tensor | None, split_sizes: list[int], scales: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty without one)."""
    p = NormInputs(x, weight, split_sizes, dout.dtype)
    dout_dtype, suffix = p.kernel_variant(dout.dtype)
    dout = dout.to(dout_dtype).contiguous()
    dx = torch.empty(x.shape, dtype=p.x.dtype, device=x.device)
    arguments = [p.x, p.weight, scales, dout, dx, *p.row_sizes, *p.splits]
    _launch(f"norm_backward{suffix}", p.x.dtype, p.grid, 32 * WARPS, arguments)
    if weight is None:
        return dx.to(x.dtype), dx.new_empty(0, dtype=torch.float32)
    blocks = -(-p.count // ROWS)
    sums = torch.empty(blocks, p.size, dtype=torch.float32, device=x.device)
    grid = (-(-p.size // (32 * WARPS)), blocks, 1)
    arguments = [p.x, scales, dout, sums, *p.row_sizes, c_int(p.size)]
    _launch(f"norm_weight{suffix}", p.x.dtype, grid, 32 * WARPS, arguments)
    return dx.to(x.dtype), sums.sum(0).to(weight.dtype)


def _kernel_logits(logits: Tensor) -> Tensor:
    """logits as the kernels take them: contiguous bf16 or fp32."""
    return logits.contiguous() if logits.dtype in DTYPES else logits.float()


def loss_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """See model.kernels.reference.loss_statistics."""
    logits = _kernel_logits(logits)
    tokens, vocab = logits.shape
    out = torch.empty(3, tokens, dtype=torch.float32, device=logits.device)
    arguments = [logits, labels.contiguous(), out, c_int(tokens), c_int(vocab)]
    _launch("loss_statistics", logits.dtype, (tokens, 1, 1), THREADS, arguments)
    return out


def loss_gradient(
    logits: Tensor, labels: Tensor, log_sums: Tensor, grad_loss: Tensor, grad_log_sum: Tensor
) -> None:
    """See model.kernels.reference.loss_gradient; overwrites logits [t, v] with their gradient."""
    gradient = _kernel_logits(logits)
    tokens, vocab = gradient.shape
    inputs = [x.float().contiguous() for x in (log_sums, grad_loss, grad_log_sum)]
    arguments = [gradient, labels.contiguous(), *inputs, c_int(vocab)]
    _launch("loss_gradient", gradient.dtype, (tokens, 1, 1), THREADS, arguments)
    if gradient.data_ptr() != logits.data_ptr():
        logits.copy_(gradient)
