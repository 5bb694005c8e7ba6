"""Convolution state that one chunk of a sequence passes to the next, for every backend.

The state is the inputs of the last k - 1 tokens. Inputs that precede a document boundary among them
are zero: a zero input adds nothing, so the next chunk sees only taps of its own document.
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
    """conv(x [b, l, d]) that continues from conv_state [b, k - 1, d]; None at the beginning.

    The first k - 1 outputs, which read the state, come from a separate call: concatenating the
    state with all of x would save a copy of x for the backward.
    """
    if conv_state is None or conv_state.shape[1] == 0:
        return conv(x, weight, bias, doc_starts)
    state_length = conv_state.shape[1]
    prefix = torch.cat([conv_state, x[:, :state_length]], 1)
    prefix_starts = (
        None if doc_starts is None else F.pad(doc_starts[:, :state_length], (state_length, 0))
    )
    first = conv(prefix, weight, bias, prefix_starts)[:, state_length:]
    if x.shape[1] <= state_length:
        return first
    return torch.cat([first, conv(x, weight, bias, doc_starts)[:, state_length:]], 1)


def final_conv_state(
    x: Tensor, doc_starts: Tensor | None, conv_state: Tensor | None, state_length: int
) -> Tensor:
    """Convolution state [b, state_length = k - 1, d] after x [b, l, d]; see conv_from_state."""
    if state_length == 0:
        return x[:, :0]
    if conv_state is None:
        conv_state = x.new_zeros(x.shape[0], state_length, x.shape[2])
    inputs = torch.cat([conv_state, x[:, -state_length:]], 1)[:, -state_length:]
    if doc_starts is None:
        return inputs
    # an input is hidden when any later token starts a document
    starts = F.pad(doc_starts[:, -state_length:], (max(0, state_length - doc_starts.shape[1]), 0))
    later_starts = F.pad(starts[:, 1:].flip(1).cumsum(1).flip(1), (0, 1))
    return inputs.masked_fill((later_starts > 0).unsqueeze(-1), 0.0)
