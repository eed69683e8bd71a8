"""Triton code of the SAE delta in the site template: the formula of `kernels/sae_delta.py`, a row in registers.

A token whose row has no code reads its codes and nothing else. Features are read in tiles, and a tile without a code is
skipped, so that a row with few clamped features reads about as many.
"""

from __future__ import annotations

import triton
import triton.language as tl

SHARED = tl.constexpr("evict_last")


@triton.jit
def read_codes(sae_clamp, r, C: tl.constexpr, CP: tl.constexpr):
    """Codes (CP,) of a row's features."""
    c = tl.arange(0, CP)
    at = tl.full((), 2 * C, tl.int64) * r
    return tl.load(sae_clamp + at + c, mask=c < C, other=0.0, eviction_policy=SHARED)


@triton.jit
def settled(p, mean, deviation, code, goal, settings, there):
    """How far each feature of a tile moves the row, of its product ``p``."""
    bias = tl.load(settings, mask=there, other=0.0, eviction_policy=SHARED)
    threshold = tl.load(settings + 1, mask=there, other=float("inf"), eviction_policy=SHARED)
    scale = tl.load(settings + 2, mask=there, other=0.0, eviction_policy=SHARED)
    magnitude = tl.load(settings + 3, mask=there, other=0.0, eviction_policy=SHARED)
    factor = tl.load(settings + 4, mask=there, other=0.0, eviction_policy=SHARED)
    wsum = tl.load(settings + 5, mask=there, other=0.0, eviction_policy=SHARED)
    eps = tl.load(settings + 6, mask=there, other=-1.0, eviction_policy=SHARED)
    step = tl.load(settings + 7, mask=there, other=0.0, eviction_policy=SHARED)
    a = tl.where(eps >= 0, (p - mean * wsum) / tl.where(eps >= 0, deviation + eps, 1.0), p * factor)
    f = tl.where(a + bias > threshold, tl.maximum(scale * a + magnitude, 0.0), 0.0)
    f = tl.where(a != a, a, f)
    acts = (code > 0) & ((code < 3) | (f > 0))
    changed = tl.where((code == 2) | (code == 4), f + goal, goal)
    return tl.where(acts, (changed - f) * tl.where(eps >= 0, deviation, step), 0.0)


@triton.jit
def steered_by_features(x, codes, sae, sae_set, sae_clamp, r, factor, cols, H: tl.constexpr, BLOCK: tl.constexpr,
                        C: tl.constexpr, CP: tl.constexpr, FT: tl.constexpr):  # fmt: skip
    """x moved by the row's clamped features, each of them read from the x that comes in.

    All of a tile is asked for at once, the decoder's rows before they are needed: what a token waits for is the memory.
    """
    within = cols < H
    mean = tl.sum(x, 0) / H
    centred = tl.where(within, x - mean, 0.0)
    deviation = tl.sqrt(tl.sum(centred * centred, 0) / tl.maximum(H - 1, 1))
    out = x
    line = sae_clamp + tl.full((), 2 * C, tl.int64) * r
    behind = sae + tl.full((), C, tl.int64) * H
    end = tl.max(tl.where(codes > 0, tl.arange(0, CP) + 1, 0), 0)
    for start in range(0, end, FT):
        c = start + tl.arange(0, FT)
        code = tl.load(line + c, mask=c < C, other=0.0, eviction_policy=SHARED)
        goal = tl.load(line + C + c, mask=c < C, other=0.0, eviction_policy=SHARED)
        active = (c < C) & (code > 0)
        spots = c.to(tl.int64)[:, None] * H + cols[None, :]
        inside = active[:, None] & within[None, :]
        encoder = tl.load(sae + spots, mask=inside, other=0.0, eviction_policy=SHARED).to(tl.float32)
        decoder = tl.load(behind + spots, mask=inside, other=0.0, eviction_policy=SHARED)
        p = tl.sum(encoder * x[None, :], 1)
        moved = settled(p, mean, deviation, code, goal, sae_set + c * 8, active) * factor
        out += tl.sum(decoder.to(tl.float32) * moved[:, None], 0)
    return out
