"""State of the causal convolution between pieces of a sequence, for any backend's convolution.

The inputs of the last k - 1 tokens are all of it. Where a document began among them, what precedes
it is zero: an input of zero adds nothing, so the next piece sees exactly the taps that it may.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.kernels.interface import CausalConv1d


def continued_conv(
    conv: CausalConv1d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    starts: Tensor | None,
    taps: Tensor | None,
) -> Tensor:
    """conv(x [b, l, d]) as it is after a piece whose last inputs are taps [b, k - 1, d]; None at
    the beginning.

    The first k - 1 outputs, which taps reach, are computed apart: taps joined to x would be kept
    for the backward.
    """
    if taps is None or taps.shape[1] == 0:
        return conv(x, weight, bias, starts)
    behind = taps.shape[1]
    rows = torch.cat([taps, x[:, :behind]], 1)
    first = conv(
        rows, weight, bias, None if starts is None else F.pad(starts[:, :behind], (behind, 0))
    )[:, behind:]
    return (
        first
        if x.shape[1] <= behind
        else torch.cat([first, conv(x, weight, bias, starts)[:, behind:]], 1)
    )


def last_taps(x: Tensor, starts: Tensor | None, taps: Tensor | None, behind: int) -> Tensor:
    """Last `behind` = k - 1 inputs [b, k - 1, d] after x [b, l, d]; see continued_conv."""
    before = x.new_zeros(x.shape[0], behind, x.shape[2]) if taps is None else taps
    rows = (
        torch.cat([before, x[:, max(0, x.shape[1] - behind) :]], 1)[:, -behind:]
        if behind
        else x[:, :0]
    )
    if starts is None or behind == 0:
        return rows
    # an input is hidden when any later token opens a document
    opens = F.pad(starts[:, -behind:], (max(0, behind - starts.shape[1]), 0))
    later = F.pad(opens[:, 1:].flip(1).cumsum(1).flip(1), (0, 1))
    return rows.masked_fill((later > 0).unsqueeze(-1), 0.0)
