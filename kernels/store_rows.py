"""Capture: store the pristine value of every token, or of chosen tokens.

    C[t]      = h[t]        dense; t in the order of the batch: element by element, position by position
    C[row[t]] = h[t]        packed; where row[t] >= 0 and choice[group[t]] is not 0

Which tokens a packed capture stores is data that the graph reads. The last row of its buffer takes all others, so that
the shape of the store does not depend on the data.

The store is a real mutation of a persistent buffer, so it is neither removed as dead nor moved behind the steer. The
buffer takes no part in autograd: a training step captures values without keeping its graph alive.
"""

from __future__ import annotations

import torch
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


def store_packed(h: Tensor, bank: Tensor, rows: Tensor, choice: Tensor, tokens: int) -> Tensor:
    """Copy the chosen tokens of ``h`` into their rows of ``bank``.

    Args:
        h: value (..., H), tokens in batch order.
        bank: persistent buffer (1, N + 1, H), written in place; row N takes the tokens that are not chosen. It is
            whole, since Inductor would copy all of it back after a store into a view.
        rows: row of each token, -1 for none and else below N, and its group (T, 2) int32.
        choice: for each group, whether its tokens are stored here (G, 1) int32.
        tokens: number of tokens of ``h``.

    Returns:
        The buffer.
    """
    row = rows.select(1, 0)
    chosen = (row >= 0) & (choice.select(1, 0).index_select(0, rows.select(1, 1)) != 0)
    place = torch.where(chosen, row, bank.size(1) - 1).long()
    return bank.index_copy_(1, place, h.detach().reshape(1, tokens, h.size(-1)).to(bank.dtype))
