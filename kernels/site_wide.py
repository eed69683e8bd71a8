"""Triton code of the site template for rows that registers do not hold: chunks, once for each reduction.

The formula and the arguments are those of `kernels/site.py`, the stages those of `kernels/site_kernels.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_compile.kernels.gate_kernels import gates_in_front, read_number
from steer_compile.kernels.sae_formula import SHARED
from steer_compile.kernels.sae_stage import (
    count_of,
    listed,
    ranks_of,
    read_codes,
    read_features,
    settled,
)
from steer_compile.kernels.site_kernels import (
    ADD,
    BRANCH,
    CAPTURE,
    CLAMP,
    GATES,
    MONITOR,
    ROW_MONITOR,
    SAE,
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

WIDE_TILE = tl.constexpr(4096)
"""Most numbers of features that are read at once."""


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
def value_of(
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
def moved(x, vector, strength, tier, tier_gain, cols, H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
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
        x = value_of(h, branch, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES, NORM, OFFSET,
                   SCALE)  # fmt: skip
        write_capture(capture, place, cols, x.to(dtype), H, BLOCK, STAGES)
        if MONITOR & STAGES:
            site_dots += x * read_shared(probe, cols, H, BLOCK)
        if ROW_MONITOR & STAGES:
            row_dots += x * read_shared(rowprobe, cols, H, BLOCK)
    return tl.sum(site_dots, 0), tl.sum(row_dots, 0)


@triton.jit
def _steered(
    source, push, pull, cols, dtype: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr,
    KP: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """A chunk of the value behind its vectors and clamps, unrounded."""
    h, branch, branch_weight, branch_bias, mean, inverse = source
    x = value_of(h, branch, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES, NORM, OFFSET,
                 SCALE)  # fmt: skip
    vector, strength, tier, tier_gain = push
    x = moved(x, vector, strength, tier, tier_gain, cols, H, BLOCK, STAGES)
    if CLAMP & STAGES:
        clamp, at, moves = pull
        x += tl.sum(read_directions(clamp, at, cols, H, K, KP, False) * moves[:, None], 0)
    return x


@triton.jit
def _clamp_moves(
    source, push, clamp, clamp_set, at, factor, dtype: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """How far each clamp of a row moves it (KP,): a pass over the value in front of the clamps."""
    moves = tl.zeros([KP], tl.float32)
    if CLAMP & STAGES:
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = _steered(source, push, 0.0, cols, dtype, H, BLOCK, K, KP, STAGES - CLAMP, NORM, OFFSET, SCALE)
            moves += tl.sum(read_directions(clamp, at, cols, H, K, KP, False) * x[None, :], 1)
        low, high, strength = read_bounds(clamp_set, at, K, KP)
        moves = pull_of(moves, low, high, strength * factor)
    return moves


@triton.jit
def _deviation(
    source, push, pull, dtype: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
    STAGES: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """Mean and unbiased deviation of the value behind its clamps."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _steered(source, push, pull, cols, dtype, H, BLOCK, K, KP, STAGES, NORM, OFFSET, SCALE)
        total += tl.where(cols < H, x, 0.0)
    mean = tl.sum(total, 0) / H
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _steered(source, push, pull, cols, dtype, H, BLOCK, K, KP, STAGES, NORM, OFFSET, SCALE)
        squares += tl.where(cols < H, (x - mean) * (x - mean), 0.0)
    return mean, tl.sqrt(tl.sum(squares, 0) / tl.maximum(H - 1, 1))


@triton.jit
def _feature_moves(
    source, push, pull, sae, sae_set, line, codes, dtype: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    K: tl.constexpr, KP: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, FT: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """How far the clamped features move the row (CP,), by their ranks: a pass over the row for each tile of them."""
    every = tl.arange(0, CP)
    normed = tl.load(sae_set + every * 8 + 6, mask=(every < C) & (codes > 0), other=-1.0, eviction_policy=SHARED)
    mean, deviation = 0.0, 0.0
    if tl.max(normed, 0) >= 0:
        mean, deviation = _deviation(source, push, pull, dtype, H, BLOCK, K, KP, STAGES, NORM, OFFSET, SCALE)
    moves = tl.zeros([CP], tl.float32)
    count, ranks = count_of(codes), ranks_of(codes)
    for first in range(0, count, FT):
        wanted = first + tl.arange(0, FT)
        there = wanted < count
        c = listed(ranks, wanted, CP)
        p = tl.zeros([FT], tl.float32)
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = _steered(source, push, pull, cols, dtype, H, BLOCK, K, KP, STAGES, NORM, OFFSET, SCALE)
            p += tl.sum(read_features(sae, c, there, cols, H).to(tl.float32) * x[None, :], 1)
        code = tl.load(line + c, mask=there, other=0.0, eviction_policy=SHARED)
        goal = tl.load(line + C + c, mask=there, other=0.0, eviction_policy=SHARED)
        part = settled(p, mean, deviation, code, goal, sae_set + c * 8, there)
        moves += tl.sum(tl.where(every[:, None] == wanted[None, :], part[None, :], 0.0), 1)
    return moves


@triton.jit
def _by_features(x, moves, ranks, count, decoder, cols, H: tl.constexpr, CP: tl.constexpr, FT: tl.constexpr):
    """A chunk moved by the clamped features."""
    for first in range(0, count, FT):
        wanted = first + tl.arange(0, FT)
        part = tl.sum(tl.where(tl.arange(0, CP)[None, :] == wanted[:, None], moves[None, :], 0.0), 1)
        rows = read_features(decoder, listed(ranks, wanted, CP), wanted < count, cols, H)
        x += tl.sum(rows.to(tl.float32) * part[:, None], 0)
    return x


@triton.jit
def _write_norm(out, normed, weight, bias, dtype: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
                NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    tl.debug_barrier()  # the norm reads what this program wrote
    mean, inverse = _moments(out, H, BLOCK, NORM, EPS)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        y = (read_shared(out, cols, H, BLOCK) - mean) * inverse
        w = read_param(weight, cols, H, BLOCK, NORM & 4)
        y = weigh(y, w, read_param(bias, cols, H, BLOCK, NORM & 8), dtype, NORM, OFFSET)
        write_row(normed, cols, y.to(dtype), H, BLOCK)


@triton.jit
def site_wide(
    h, branch, branch_weight, branch_bias, capture, capture_rows, choice, rows, table, scale, tier, gain, decode, probe,
    probe_set, rowprobe, rowprobe_set, clamp, clamp_set, sae, sae_set, sae_clamp, gates, score, weight, bias, out,
    normed, H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    STAGES: tl.constexpr, BRANCH_NORM: tl.constexpr, BRANCH_EPS: tl.constexpr, BRANCH_OFFSET: tl.constexpr,
    BRANCH_SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One token, its row in chunks: a pass for the branch's norm, the probes, the clamps, the clamped features, the
    write and the norm."""
    dtype: tl.constexpr = h.dtype.element_ty
    KP: tl.constexpr = 1 if K < 2 else 2 if K < 3 else 4 if K < 5 else 8 if K < 9 else 16
    FT: tl.constexpr = WIDE_TILE // BLOCK if WIDE_TILE // BLOCK < CP else CP
    t = tl.program_id(0)
    at = tl.full((), H, tl.int64) * t
    r = read_number(rows + t) if (ADD | ROW_MONITOR | CLAMP | SAE) & STAGES else 0
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
    # The steered value, and the projections that clamps bound; unrounded, so it is made again in each later pass.
    source = h + at, branch + at, branch_weight, branch_bias, mean, inverse
    push = table + line, strength * row_gate, tier, tier_gain * tier_gate
    moves = _clamp_moves(source, push, clamp, clamp_set, r * K, clamp_gate, dtype, H, BLOCK, K, KP, STAGES, BRANCH_NORM,
                         BRANCH_OFFSET, BRANCH_SCALE)  # fmt: skip
    pull = clamp, r * K, moves
    count, ranks, features = 0, tl.zeros([CP], tl.int32), tl.zeros([CP], tl.float32)
    if SAE & STAGES:
        codes = read_codes(sae_clamp, r, C, CP)
        ranks = ranks_of(codes)
        count = tl.where(clamp_gate != 0, count_of(codes), 0)
        if count > 0:
            features = clamp_gate * _feature_moves(
                source, push, pull, sae, sae_set, sae_clamp + tl.full((), 2 * C, tl.int64) * r, codes, dtype, H, BLOCK,
                K, KP, C, CP, FT, STAGES, BRANCH_NORM, BRANCH_OFFSET, BRANCH_SCALE,
            )  # fmt: skip
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _steered(source, push, pull, cols, dtype, H, BLOCK, K, KP, STAGES, BRANCH_NORM, BRANCH_OFFSET, BRANCH_SCALE)
        if SAE & STAGES:
            x = _by_features(x, features, ranks, count, sae + tl.full((), C, tl.int64) * H, cols, H, CP, FT)
        write_row(out + at, cols, x.to(dtype), H, BLOCK)
    if NORM != 0:
        _write_norm(out + at, normed + at, weight, bias, dtype, H, BLOCK, NORM, EPS, OFFSET)
