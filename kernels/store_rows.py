"""Capture: store the pristine value of every token.

    C[t] = h[t]        t in the order of the batch: element by element, position by position

The store is a real mutation of a persistent buffer, so it is neither removed as dead nor moved behind the steer. The
buffer takes no part in autograd: a training step captures values without keeping its graph alive.
"""

from __future__ import annotations

from torch import Tensor


def store_rows(h: Tensor, buffer: Tensor, tokens: int) -> Tensor:
    """Copy ``h`` into the first rows of ``buffer``.

    Args:
        h: value (..., H), tokens in batch order.
        buffer: persistent buffer (max_tokens, H), written in place.
        tokens: number of tokens of ``h``.

    Returns:
        The written part of the buffer.
    """
    return buffer.narrow(0, 0, tokens).copy_(h.detach().reshape(tokens, h.size(-1)))
