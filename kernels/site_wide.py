"""Triton code of the site template for rows that registers do not hold: chunks, once for each reduction.

The formula and the arguments are those of `kernels/site.py`, the stages those of `kernels/site_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_compile.kernels.gate_kernels import gates_in_front, read_number
from steer_compile.kernels.site_kernels import (
    ADD,
    BRANCH,
    CAPTURE,
    CLAMP,
    GATES,
    MONITOR,
    ROW_MONITOR,
    TIER,
    add_branch,
    behind_monitors,
    capture_place,
    pull_of,
    read_bounds,
    read_directions,
    read_monitors,
    read_param,
    read_shared,
    store_scores,
    weigh,
    write_capture,
    write_row,
)  # fmt: skip


@triton.jit
def _moments(pointer, H: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """Mean and inverse deviation of a stored row; the mean is 0 in an RMSNorm."""
    mean = 0.0
    if NORM % 4 == 3:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, H, BLOCK):
            total += read_shared(pointer, start + tl.arange(0, BLOCK), H, BLOCK)
        mean = tl.sum(total, 0) / H
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.where(cols < H, read_shared(pointer, cols, H, BLOCK) - mean, 0.0)
        squares += x * x
    return mean, tl.rsqrt(tl.sum(squares, 0) / H + EPS)


@triton.jit
def _value(
    h, branch, branch_weight, branch_bias, cols, mean, inverse, dtype: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """A chunk of the pristine value."""
    x = read_shared(h, cols, H, BLOCK)
    if BRANCH & STAGES:
        b = read_shared(branch, cols, H, BLOCK)
        if NORM != 0:
            w = read_param(branch_weight, cols, H, BLOCK, NORM & 4)
            bias = read_param(branch_bias, cols, H, BLOCK, NORM & 8)
            b = weigh((b - mean) * inverse, w, bias, dtype, NORM, OFFSET).to(dtype).to(tl.float32)
        x = add_branch(x, b, dtype, SCALE, STAGES)
    return x


@triton.jit
def _moved(x, vector, strength, tier, tier_gain, cols, H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """A chunk with the row's vector and the tier."""
    if ADD & STAGES:
        x += read_shared(vector, cols, H, BLOCK) * strength
    if TIER & STAGES:
        x += read_shared(tier, cols, H, BLOCK) * tier_gain
    return x


@triton.jit
def _stored_and_scored(
    h, branch, branch_weight, branch_bias, capture, place, probe, rowprobe, mean, inverse, dtype: tl.constexpr,
    H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """The pass over the pristine value: its capture, and the scores of both probes."""
    site_dots = tl.zeros([BLOCK], tl.float32)
    row_dots = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _value(h, branch, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES, NORM, OFFSET,
                   SCALE)  # fmt: skip
        write_capture(capture, place, cols, x.to(dtype), H, BLOCK, STAGES)
        if MONITOR & STAGES:
            site_dots += x * read_shared(probe, cols, H, BLOCK)
        if ROW_MONITOR & STAGES:
            row_dots += x * read_shared(rowprobe, cols, H, BLOCK)
    return tl.sum(site_dots, 0), tl.sum(row_dots, 0)


@triton.jit
def site_wide(
    h, branch, branch_weight, branch_bias, capture, capture_rows, choice, rows, table, scale, tier, gain, decode, probe,
    probe_set, rowprobe, rowprobe_set, clamp, clamp_set, sae, sae_set, sae_clamp, gates, score, weight, bias, out,
    normed, H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    STAGES: tl.constexpr, BRANCH_NORM: tl.constexpr, BRANCH_EPS: tl.constexpr, BRANCH_OFFSET: tl.constexpr,
    BRANCH_SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One token, its row in chunks: a pass for the branch's norm, the probes, the clamps, the write and the norm."""
    dtype: tl.constexpr = h.dtype.element_ty
    KP: tl.constexpr = 1 if K < 2 else 2 if K < 3 else 4 if K < 5 else 8 if K < 9 else 16
    t = tl.program_id(0)
    at = tl.full((), H, tl.int64) * t
    r = read_number(rows + t) if (ADD | ROW_MONITOR | CLAMP) & STAGES else 0
    line = tl.full((), H, tl.int64) * r
    d = read_number(decode + t) if (MONITOR | ROW_MONITOR) & STAGES else 0.0
    tier_gain = read_number(gain + t) if TIER & STAGES else 0.0
    strength = read_number(scale + r) if ADD & STAGES else 0.0
    mean, inverse = 0.0, 1.0
    if BRANCH_NORM != 0:
        mean, inverse = _moments(branch + at, H, BLOCK, BRANCH_NORM, BRANCH_EPS)
    scores = 0.0, 0.0
    place = capture_place(capture_rows, choice, t, at, H, STAGES)
    if (CAPTURE | MONITOR | ROW_MONITOR) & STAGES:
        scores = _stored_and_scored(
            h + at, branch + at, branch_weight, branch_bias, capture, place, probe, rowprobe + line, mean, inverse,
            dtype, H, BLOCK, STAGES, BRANCH_NORM, BRANCH_OFFSET, BRANCH_SCALE,
        )  # fmt: skip
    store_scores(score, t, scores, STAGES)
    monitors = read_monitors(probe_set, rowprobe_set, r, STAGES)
    factors = gates_in_front(gates, t, (GATES & STAGES) != 0)
    tier_gate, row_gate, clamp_gate = behind_monitors(scores, monitors, factors, d, STAGES)
    strength, tier_gain = strength * row_gate, tier_gain * tier_gate
    # The steered value, and the projections that clamps bound; unrounded, so it is made again in the next pass.
    dots = tl.zeros([KP], tl.float32)
    if CLAMP & STAGES:
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = _value(h + at, branch + at, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES,
                       BRANCH_NORM, BRANCH_OFFSET, BRANCH_SCALE)  # fmt: skip
            x = _moved(x, table + line, strength, tier, tier_gain, cols, H, BLOCK, STAGES)
            dots += tl.sum(read_directions(clamp, r * K, cols, H, K, KP, False) * x[None, :], 1)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _value(h + at, branch + at, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES,
                   BRANCH_NORM, BRANCH_OFFSET, BRANCH_SCALE)  # fmt: skip
        x = _moved(x, table + line, strength, tier, tier_gain, cols, H, BLOCK, STAGES)
        if CLAMP & STAGES:
            low, high, pull = read_bounds(clamp_set, r * K, K, KP)
            moves = pull_of(dots, low, high, pull * clamp_gate)[:, None]
            x += tl.sum(read_directions(clamp, r * K, cols, H, K, KP, False) * moves, 0)
        write_row(out + at, cols, x.to(dtype), H, BLOCK)
    if NORM != 0:
        tl.debug_barrier()  # the norm reads what this program wrote
        mean, inverse = _moments(out + at, H, BLOCK, NORM, EPS)
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            y = (read_shared(out + at, cols, H, BLOCK) - mean) * inverse
            w = read_param(weight, cols, H, BLOCK, NORM & 4)
            y = weigh(y, w, read_param(bias, cols, H, BLOCK, NORM & 8), dtype, NORM, OFFSET)
            write_row(normed + at, cols, y.to(dtype), H, BLOCK)
