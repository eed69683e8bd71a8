"""Additive row term.

    h'[t] = round(float(h[t]) + float(T[row[t]]) * scale[row[t]])

All arithmetic in fp32 (fp64 where the stream is fp64), one rounding to the stream dtype at the end. Row 0 of ``T`` is
zeros, so an unsteered token keeps its value. A pointwise term like this needs no kernel of its own: Inductor folds it
into the kernel that writes the stream (measured: no extra kernel, see docs/performance.md), so its lowering is the
reference itself.
"""

from __future__ import annotations

from torch import Tensor


def add_rows(h: Tensor, table: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """Add each token's row.

    Args:
        h: stream value (..., H) in any floating dtype.
        table: vectors (R, H).
        rows: row of each token, integer, with the leading dimensions of ``h``.
        scale: strength of each row (R,), fp32.

    Returns:
        Tensor like ``h``.
    """
    term = table[rows] * scale[rows].unsqueeze(-1)  # fp32: a product with an fp32 tensor is at least that
    return (h + term).to(h.dtype)


def add_rows_fp64(h: Tensor, table: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    """The formula in fp64, unrounded: what `add_rows` is checked against."""
    return h.double() + table.double()[rows.long()] * scale.double()[rows.long()].unsqueeze(-1)
