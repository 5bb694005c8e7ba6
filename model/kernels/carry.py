"""State of the causal convolution between pieces of a sequence, for any backend's convolution.

The inputs of the last k - 1 tokens are all of it. Where a document began among them, what precedes
it is zero: an input of zero adds nothing, so the next piece sees exactly the taps that it may.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from model.kernels.interface import CausalConv1d


def conv_from_state(
    conv: CausalConv1d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    doc_starts: Tensor | None,
    conv_state: Tensor | None,
) -> Tensor:
    """conv(x [b, l, d]) as it is after a piece whose last inputs are taps [b, k - 1, d]; None at
    the beginning.

    The first k - 1 outputs, which taps reach, are computed apart: taps joined to x would be kept
    for the backward.
    """
    if conv_state is None or conv_state.shape[1] == 0:
        return conv(x, weight, bias, doc_starts)
    behind = conv_state.shape[1]
    rows = torch.cat([conv_state, x[:, :behind]], 1)
    first = conv(
        rows,
        weight,
        bias,
        None if doc_starts is None else F.pad(doc_starts[:, :behind], (behind, 0)),
    )[:, behind:]
    return (
        first
        if x.shape[1] <= behind
        else torch.cat([first, conv(x, weight, bias, doc_starts)[:, behind:]], 1)
    )


def final_conv_state(
    x: Tensor, doc_starts: Tensor | None, conv_state: Tensor | None, behind: int
) -> Tensor:
    """Last `behind` = k - 1 inputs [b, k - 1, d] after x [b, l, d]; see continued_conv."""
    before = x.new_zeros(x.shape[0], behind, x.shape[2]) if conv_state is None else conv_state
    rows = (
        torch.cat([before, x[:, max(0, x.shape[1] - behind) :]], 1)[:, -behind:]
        if behind
        else x[:, :0]
    )
    if doc_starts is None or behind == 0:
        return rows
    # an input is hidden when any later token opens a document
    opens = F.pad(doc_starts[:, -behind:], (max(0, behind - doc_starts.shape[1]), 0))
    later = F.pad(opens[:, 1:].flip(1).cumsum(1).flip(1), (0, 1))
    return rows.masked_fill((later > 0).unsqueeze(-1), 0.0)
