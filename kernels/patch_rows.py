"""Patching: a row that was captured, or any other, in place of the value of a token, or a mixture of both.

For token t with slot s = slots[t] of its site, element by element::

    m[t]  = (1 - a[s]) * h[t] + a[s] * P[s]         between the ends
    h'[t] = h[t] where a[s] = 0,  P[s] where a[s] = 1,  m[t] elsewhere

Slot 0 passes through: its line of ``a`` is 0. The ends are selected and not computed, so both are exact to the bit:
what is not taken has no part in the result, not even where it is NaN or infinite. Between the ends NaN and infinity of
either pass on to the result. Arithmetic is in fp32 (fp64 beside a stream of fp64); the one rounding follows behind
what else is done at the site. A dimension with a = 1 hands no gradient on to h.

Plain operators: the reference is the lowering, which Inductor fuses with what makes or reads the value.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class PatchArgs(NamedTuple):
    """Data of one site. S slots, width H; ``(...)`` are the leading dimensions of the value."""

    table: Tensor
    """Rows P that are put in place (S, H), in any floating dtype."""
    alpha: Tensor
    """Share of them in each dimension (S, H), fp32; line 0 is zeros."""
    slots: Tensor
    """Slot of each token (...), integer."""


def patch_rows(h: Tensor, args: PatchArgs, dtype: torch.dtype) -> Tensor:
    """Patch a value.

    Args:
        h: stream value (..., H) of dtype ``dtype``.

    Returns:
        The patched value, unrounded: like ``h``, in fp32 or wider.
    """
    return _patched(h, args, torch.promote_types(dtype, torch.float32))


def patch_rows_fp64(h: Tensor, args: PatchArgs) -> Tensor:
    """The formula in fp64: what the lowering is checked against."""
    return _patched(h.double(), PatchArgs(args.table.double(), args.alpha.double(), args.slots), torch.float64)


def _patched(h: Tensor, args: PatchArgs, wide: torch.dtype) -> Tensor:
    own, row, share = h.to(wide), args.table[args.slots].to(wide), args.alpha[args.slots].to(wide)
    mixed = (1 - share) * own + share * row
    return torch.where(share == 0, own, torch.where(share == 1, row, mixed))
