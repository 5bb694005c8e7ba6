"""Row kernels of the `cuda` backend: RMSNorm and the cross entropy's operations on logits."""

from ctypes import c_float, c_int, c_longlong
from typing import Any

import torch
from torch import Tensor

from model.kernels import cuda_library
from model.kernels.cuda_library import DTYPES

# sizes that the source fixes; a test compares them with the text
WARPS, ROWS, PARTS, THREADS = 4, 64, 3, 256


def _launch(
    name: str, dtype: torch.dtype, grid: tuple[int, int, int], threads: int, arguments: list[Any]
) -> None:
    cuda_library.launch("rows.cu", name, dtype, grid, threads, 0, arguments)


class PreparedNorm:
    """Inputs of a norm as the kernels want them."""

    def __init__(
        self, x: Tensor, weight: Tensor | None, parts: list[int], result: torch.dtype
    ) -> None:
        if len(parts) > PARTS:
            raise ValueError(
                f"a norm of {len(parts)} parts exceeds the {PARTS} of the CUDA kernels: use "
                "reference"
            )
        dtype = torch.bfloat16 if x.dtype is result is torch.bfloat16 else torch.float32
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        self.x = rows if rows.stride(1) == 1 else rows.contiguous()
        self.weight = None if weight is None else weight.float().contiguous()
        self.count, self.size = self.x.shape
        sizes = [*parts, *[0] * (PARTS - len(parts))]
        self.rows = [c_int(self.count), c_longlong(self.x.stride(0))]
        self.parts = [c_int(len(parts)), *(c_int(size) for size in sizes)]
        self.grid = (-(-self.count // WARPS), 1, 1)

    def result_type(self, dtype: torch.dtype) -> tuple[torch.dtype, str]:
        """What a kernel writes for a wanted type, and the ending of its name."""
        narrow = dtype is torch.bfloat16 and self.x.dtype is torch.float32
        return (torch.bfloat16, "_narrow") if narrow else (self.x.dtype, "")


def norm_forward(
    x: Tensor, weight: Tensor | None, eps: float, parts: list[int], dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The normed rows, and what each part was multiplied by."""
    p = PreparedNorm(x, weight, parts, dtype)
    written, ending = p.result_type(dtype)
    out = torch.empty(x.shape, dtype=written, device=x.device)
    scales = torch.empty(*x.shape[:-1], len(parts), dtype=torch.float32, device=x.device)
    arguments = [p.x, p.weight, out, scales, *p.rows, *p.parts, c_float(eps)]
    _launch(f"norm_forward{ending}", p.x.dtype, p.grid, 32 * WARPS, arguments)
    return out.to(dtype), scales


def norm_backward(
    x: Tensor, weight: Tensor | None, parts: list[int], scales: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight (empty without one)."""
    p = PreparedNorm(x, weight, parts, dout.dtype)
    read, ending = p.result_type(dout.dtype)
    dout, dx = dout.to(read).contiguous(), torch.empty(x.shape, dtype=p.x.dtype, device=x.device)
    arguments = [p.x, p.weight, scales, dout, dx, *p.rows, *p.parts]
    _launch(f"norm_backward{ending}", p.x.dtype, p.grid, 32 * WARPS, arguments)
    if weight is None:
        return dx.to(x.dtype), dx.new_empty(0, dtype=torch.float32)
    blocks = -(-p.count // ROWS)
    sums = torch.empty(blocks, p.size, dtype=torch.float32, device=x.device)
    grid = (-(-p.size // (32 * WARPS)), blocks, 1)
    _launch(
        f"norm_weight{ending}",
        p.x.dtype,
        grid,
        32 * WARPS,
        [p.x, scales, dout, sums, *p.rows, c_int(p.size)],
    )
    return dx.to(x.dtype), sums.sum(0).to(weight.dtype)


def loss_statistics(logits: Tensor, labels: Tensor) -> Tensor:
    """See model.kernels.reference.loss_statistics."""
    rows = logits.contiguous() if logits.dtype in DTYPES else logits.float()
    out = torch.empty(3, len(rows), dtype=torch.float32, device=rows.device)
    arguments = [rows, labels.contiguous(), out, c_int(len(rows)), c_int(rows.shape[1])]
    _launch("loss_statistics", rows.dtype, (len(rows), 1, 1), THREADS, arguments)
    return out


def loss_gradient(
    logits: Tensor, labels: Tensor, log_sums: Tensor, grad_loss: Tensor, grad_log_sum: Tensor
) -> None:
    """See model.kernels.reference.loss_gradient; logits [t, v] become their gradient."""
    rows = logits.contiguous() if logits.dtype in DTYPES else logits.float()
    held = [
        labels.contiguous(),
        *(x.float().contiguous() for x in (log_sums, grad_loss, grad_log_sum)),
    ]
    _launch(
        "loss_gradient", rows.dtype, (len(rows), 1, 1), THREADS, [rows, *held, c_int(rows.shape[1])]
    )
    if rows.data_ptr() != logits.data_ptr():
        logits.copy_(rows)
