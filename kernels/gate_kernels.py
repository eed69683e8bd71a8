"""Triton code of gates: formula and layout of the settings are those of `kernels/gates.py`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_number(pointer):
    return tl.load(pointer, eviction_policy="evict_last")


@triton.jit
def settings_of(pointer, there: tl.constexpr):
    """A line of a monitor's settings: threshold, sharpness, kind, low, high, active, rows too, clamps too."""
    threshold, sharpness, kind, low, high, active, rows, clamps = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if there:
        threshold, sharpness, kind = read_number(pointer), read_number(pointer + 1), read_number(pointer + 2)
        low, high, active = read_number(pointer + 3), read_number(pointer + 4), read_number(pointer + 5)
        rows, clamps = read_number(pointer + 6), read_number(pointer + 7)
    return threshold, sharpness, kind, low, high, active, rows, clamps


@triton.jit
def opened(score, settings, was):
    """The gate of a score; ``was``: whether a step gate was open."""
    threshold, sharpness, kind, low, high, active, rows, clamps = settings
    distance = sharpness * (score - threshold)
    line = tl.where(distance < low, low, tl.where(distance > high, high, distance))
    step = tl.where(score > threshold, 1.0, tl.where(score < low, 0.0, was))
    g = tl.where(kind == 0, tl.sigmoid(distance), tl.where(kind == 1, line, step))
    return tl.where(active > 0, g, 1.0)


@triton.jit
def guarded(factors, g, settings, decode, TIER: tl.constexpr):
    """Factors of tier, rows and clamps behind one more monitor; ``TIER``: whether it guards the dynamic tier."""
    tier, row, clamp = factors
    threshold, sharpness, kind, low, high, active, rows, clamps = settings
    if TIER:
        tier *= g
    row *= tl.where(decode * rows * active > 0, g, 1.0)
    clamp *= tl.where(decode * clamps * active > 0, g, 1.0)
    return tier, row, clamp


@triton.jit
def gates_in_front(gates, t, there: tl.constexpr):
    """Factors of token t from sites in front."""
    tier, row, clamp = 1.0, 1.0, 1.0
    if there:
        tier, row, clamp = read_number(gates + t * 4), read_number(gates + t * 4 + 1), read_number(gates + t * 4 + 2)
    return tier, row, clamp
