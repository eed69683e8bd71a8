"""Triton code of the formula of `kernels/sae_delta.py`, for both ops that steer by features: in fp32."""

from __future__ import annotations

import triton
import triton.language as tl

SHARED = tl.constexpr("evict_last")
"""Cache policy of what other tokens or later steps read as well."""


@triton.jit
def moments(x, within, H: tl.constexpr):
    """Mean and unbiased deviation of a row in registers; ``within``: its numbers."""
    mean = tl.sum(x, 0) / H
    centred = tl.where(within, x - mean, 0.0)
    return mean, tl.sqrt(tl.sum(centred * centred, 0) / tl.maximum(H - 1, 1))


@triton.jit
def features(p, mean, deviation, settings, there):
    """Features of products, by the lines of settings that ``settings`` points to."""
    bias = tl.load(settings, mask=there, other=0.0, eviction_policy=SHARED)
    threshold = tl.load(settings + 1, mask=there, other=float("inf"), eviction_policy=SHARED)
    scale = tl.load(settings + 2, mask=there, other=0.0, eviction_policy=SHARED)
    magnitude = tl.load(settings + 3, mask=there, other=0.0, eviction_policy=SHARED)
    factor = tl.load(settings + 4, mask=there, other=0.0, eviction_policy=SHARED)
    wsum = tl.load(settings + 5, mask=there, other=0.0, eviction_policy=SHARED)
    eps = tl.load(settings + 6, mask=there, other=-1.0, eviction_policy=SHARED)
    a = tl.where(eps >= 0, (p - mean * wsum) / tl.where(eps >= 0, deviation + eps, 1.0), p * factor)
    f = tl.where(a + bias > threshold, tl.maximum(scale * a + magnitude, 0.0), 0.0)
    return tl.where(a != a, a, f)


@triton.jit
def move_of(f, code, goal):
    """How far a clamp moves its feature, 0 where it does not act; a NaN feature that is moved stays NaN."""
    acts = (code > 0) & ((code < 3) | (f > 0))
    move = tl.where((code == 2) | (code == 4), goal, goal - f)
    return tl.where(acts, tl.where(f != f, f, move), 0.0)
