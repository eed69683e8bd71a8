"""Triton code of the SAE delta in the site template: the formula of `kernels/sae_delta.py` for one token.

A token whose row has no code reads its codes and nothing else. The features that have one are listed and read in tiles,
so that a row with few clamped features reads just these, whatever the number of slots. Of few tokens, one with many of
them reads all slots: their places are then known beforehand, so that tiles are under way while others are summed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_compile.kernels.sae_formula import SHARED, features, moments, move_of

FEW_TILE, MANY_TILE = tl.constexpr(8192), tl.constexpr(4096)
"""Most numbers of features that are read at once, for few tokens and for many: registers that a program of the second
kind takes for features are those of programs beside it, which mostly have none."""
STREAMED, UNDER_WAY = tl.constexpr(16384), tl.constexpr(4)
"""Bytes of a tile of all slots, and how many tiles are under way: what any GPU's shared memory holds. Wider rows are
listed."""


@triton.jit
def read_codes(sae_clamp, r, C: tl.constexpr, CP: tl.constexpr):
    """Codes (CP,) of a row's features."""
    c = tl.arange(0, CP)
    at = tl.full((), 2 * C, tl.int64) * r
    return tl.load(sae_clamp + at + c, mask=c < C, other=0.0, eviction_policy=SHARED)


@triton.jit
def count_of(codes):
    """How many features have a code."""
    return tl.sum((codes > 0).to(tl.int32), 0)


@triton.jit
def ranks_of(codes):
    """Number of each feature (CP,) among those that have a code, -1 for the others."""
    coded = codes > 0
    return tl.where(coded, tl.cumsum(coded.to(tl.int32), 0) - 1, -1)


@triton.jit
def listed(ranks, wanted, CP: tl.constexpr):
    """Features (FT,) of the ranks ``wanted``, 0 where there is none."""
    found = ranks[None, :] == wanted[:, None]
    return tl.sum(tl.where(found, tl.arange(0, CP)[None, :], 0), 1)


@triton.jit
def settled(p, mean, deviation, code, goal, settings, there):
    """How far each feature of a tile moves the row, of its product ``p``."""
    f = features(p, mean, deviation, settings, there)
    eps = tl.load(settings + 6, mask=there, other=-1.0, eviction_policy=SHARED)
    step = tl.load(settings + 7, mask=there, other=0.0, eviction_policy=SHARED)
    return move_of(f, code, goal) * tl.where(eps >= 0, deviation, step)


@triton.jit
def read_features(features, c, there, cols, H: tl.constexpr):
    """Rows (FT, BLOCK) of the features ``c``."""
    spots = c.to(tl.int64)[:, None] * H + cols[None, :]
    inside = there[:, None] & (cols < H)[None, :]
    return tl.load(features + spots, mask=inside, other=0.0, eviction_policy=SHARED)


@triton.jit
def steered_by_features(x, codes, sae, sae_set, sae_clamp, r, factor, cols, H: tl.constexpr, BLOCK: tl.constexpr,
                        C: tl.constexpr, CP: tl.constexpr, FEW: tl.constexpr):  # fmt: skip
    """A row in registers, moved by its clamped features, each of them read from the x that comes in."""
    if FEW and CP >= 16 and BLOCK * (sae.dtype.element_ty.primitive_bitwidth // 8) <= STREAMED:
        if count_of(codes) * 8 > C * 3:
            out = _by_all(x, codes, sae, sae_set, sae_clamp, r, factor, cols, H, BLOCK, C, CP)
        else:
            out = _by_listed(x, codes, sae, sae_set, sae_clamp, r, factor, cols, H, BLOCK, C, CP, FEW)
    else:
        out = _by_listed(x, codes, sae, sae_set, sae_clamp, r, factor, cols, H, BLOCK, C, CP, FEW)
    return out


@triton.jit
def _by_all(x, codes, sae, sae_set, sae_clamp, r, factor, cols, H: tl.constexpr, BLOCK: tl.constexpr, C: tl.constexpr,
            CP: tl.constexpr):  # fmt: skip
    TILE: tl.constexpr = STREAMED // (sae.dtype.element_ty.primitive_bitwidth // 8)
    FT: tl.constexpr = TILE // BLOCK if TILE // BLOCK < CP else CP
    mean, deviation = moments(x, cols < H, H)
    slot = tl.arange(0, CP)
    line = sae_clamp + tl.full((), 2 * C, tl.int64) * r
    goal = tl.load(line + C + slot, mask=slot < C, other=0.0, eviction_policy=SHARED)
    p = tl.zeros([CP], tl.float32)
    for start in tl.range(0, C, FT, num_stages=UNDER_WAY):
        c = start + tl.arange(0, FT)
        part = tl.sum(read_features(sae, c, c < C, cols, H).to(tl.float32) * x[None, :], 1)
        p += tl.sum(tl.where(slot[:, None] == c[None, :], part[None, :], 0.0), 1)
    moved = settled(p, mean, deviation, codes, goal, sae_set + slot * 8, slot < C) * factor
    out = x
    for start in tl.range(0, C, FT, num_stages=UNDER_WAY):
        c = start + tl.arange(0, FT)
        decoder = read_features(sae + tl.full((), C, tl.int64) * H, c, c < C, cols, H).to(tl.float32)
        step = tl.sum(tl.where(slot[None, :] == c[:, None], moved[None, :], 0.0), 1)
        out += tl.sum(decoder * step[:, None], 0)
    return out


@triton.jit
def _by_listed(x, codes, sae, sae_set, sae_clamp, r, factor, cols, H: tl.constexpr, BLOCK: tl.constexpr,
               C: tl.constexpr, CP: tl.constexpr, FEW: tl.constexpr):  # fmt: skip
    """With FEW, all of a tile is asked for at once, the decoder's rows before they are needed: what a token waits for
    is the memory."""
    TILE: tl.constexpr = FEW_TILE if FEW else MANY_TILE
    FT: tl.constexpr = 1 if BLOCK > TILE else TILE // BLOCK if TILE // BLOCK < CP else CP
    mean, deviation = moments(x, cols < H, H)
    out = x
    line = sae_clamp + tl.full((), 2 * C, tl.int64) * r
    count = count_of(codes)
    ranks = ranks_of(codes)
    for start in range(0, count, FT):
        wanted = start + tl.arange(0, FT)
        there = wanted < count
        c = listed(ranks, wanted, CP)
        code = tl.load(line + c, mask=there, other=0.0, eviction_policy=SHARED)
        goal = tl.load(line + C + c, mask=there, other=0.0, eviction_policy=SHARED)
        encoder = read_features(sae, c, there, cols, H).to(tl.float32)
        if FEW:
            decoder = read_features(sae + tl.full((), C, tl.int64) * H, c, there, cols, H)
        p = tl.sum(encoder * x[None, :], 1)
        moved = settled(p, mean, deviation, code, goal, sae_set + c * 8, there) * factor
        if not FEW:
            decoder = read_features(sae + tl.full((), C, tl.int64) * H, c, there, cols, H)
        out += tl.sum(decoder.to(tl.float32) * moved[:, None], 0)
    return out
