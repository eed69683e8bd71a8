"""Triton code of the full SAE behind its features: the decoder's matmul, and what is written of each token."""

from __future__ import annotations

import triton
import triton.language as tl

from steer_compile.kernels.sae_formula import features, moments, move_of
from steer_compile.kernels.sae_full_kernels import far, product, slot_of
from steer_compile.kernels.sae_full_keys import PICKS, picks_of

GATHERED = tl.constexpr(8192)
"""Most numbers of the decoder that are read at once for a token with a list of features."""


@triton.jit
def parts_of(tiles, columns, programs, most: tl.constexpr):
    """Into how many parts the features are split, so that there is work for every program."""
    return tl.minimum(tl.maximum(programs // tl.maximum(tiles * columns, 1), 1), most)


@triton.jit
def decode(
    decoder, rows, row_set, sae_set, order, meta, narrow, sums, H: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums ``(parts, positions, H)`` of the decoder's products, of tiles with a token that is reconstructed of
    all features."""
    tiles = tl.load(meta + S)
    columns = (H + BN - 1) // BN
    parts = parts_of(tiles, columns, tl.num_programs(0), PARTS)
    share = ((F + BK - 1) // BK + parts - 1) // parts * BK
    for tile in range(tl.program_id(0), tiles * columns * parts, tl.num_programs(0)):
        group = tile % tiles
        column = tile // tiles % columns
        part = tile // (tiles * columns)
        place = group * BM + tl.arange(0, BM)
        token = tl.load(order + place)
        there = token >= 0
        row = tl.load(rows + tl.maximum(token, 0))
        slot = slot_of(meta, group, S)
        rebuilt = tl.max(tl.where(there, tl.load(row_set + row * 4 + 1) == 1, False).to(tl.int32), 0) > 0
        if rebuilt & (picks_of(sae_set, slot) == 0):
            first = far(slot, F)
            n = column * BN + tl.arange(0, BN)
            left = narrow + place.to(tl.int64)[:, None] * F
            acc = tl.zeros([BM, BN], tl.float32)
            for start in range(part * share, tl.minimum(part * share + share, F), BK):
                f = start + tl.arange(0, BK)
                right = decoder + (first + f)[:, None] * H + n[None, :]
                if H % BN == 0 and F % BK == 0:
                    a = tl.load(left + f[None, :], mask=there[:, None], other=0.0)
                    b = tl.load(right)
                else:
                    a = tl.load(left + f[None, :], mask=there[:, None] & (f < F)[None, :], other=0.0)
                    b = tl.load(right, mask=(f < F)[:, None] & (n < H)[None, :], other=0.0)
                acc = product(a, b, acc, PRECISION)
            target = (part * tiles * BM + place).to(tl.int64)[:, None] * H + n[None, :]
            tl.store(sums + target, acc, mask=there[:, None] & (n < H)[None, :])


@triton.jit
def _of_picks(line, decoder, cols, H: tl.constexpr, BLOCK: tl.constexpr):
    """Sum (BLOCK,) of the decoder's rows of the listed features: k, fewer, or more where some are NaN."""
    picks = tl.sum((tl.load(line + tl.arange(0, PICKS)) >= 0).to(tl.int32), 0)
    FT: tl.constexpr = GATHERED // BLOCK if GATHERED // BLOCK > 1 else 1
    y = tl.zeros([BLOCK], tl.float32)
    for start in range(0, picks, FT):
        place = start + tl.arange(0, FT)
        index = tl.load(line + place, mask=place < picks, other=-1.0).to(tl.int32)
        value = tl.load(line + PICKS + place, mask=place < picks, other=0.0)
        spots = decoder + index.to(tl.int64)[:, None] * H + cols[None, :]
        rows = tl.load(spots, mask=(index >= 0)[:, None] & (cols < H)[None, :], other=0.0)
        y += tl.sum(rows.to(tl.float32) * value[:, None], 0)
    return y


@triton.jit
def _own_of(line, own, f, picks, there):
    """A token's features, of its list where it has one."""
    if picks > 0:
        lane = tl.arange(0, PICKS)
        here = tl.load(line + lane)[None, :] == f.to(tl.float32)[:, None]
        value = tl.sum(tl.where(here, tl.load(line + PICKS + lane)[None, :], 0.0), 1)
    else:
        value = tl.load(own + f, mask=there, other=0.0).to(tl.float32)
    return value


@triton.jit
def _moves(x, mean, deviation, line, own, picks, clamps, encoder, decoder, settings, cols, H: tl.constexpr,
           BLOCK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """What the row's clamps add in the decoder's space, and whether any of them changes its feature."""
    KP: tl.constexpr = tl.constexpr(1) if K < 2 else tl.constexpr(2) if K < 3 else tl.constexpr(4)
    FT: tl.constexpr = 1 if GATHERED < BLOCK * 2 else KP if GATHERED // BLOCK > KP else GATHERED // BLOCK
    moved = tl.zeros([BLOCK], tl.float32)
    changed = tl.full((), 0, tl.int32)
    for start in range(0, K, FT):
        j = start + tl.arange(0, FT)
        code = tl.load(clamps + K + j, mask=j < K, other=0.0)
        if tl.max(code, 0) > 0:
            there = code > 0
            f = tl.load(clamps + j, mask=there, other=0.0).to(tl.int64)
            goal = tl.load(clamps + 2 * K + j, mask=there, other=0.0)
            spots = f[:, None] * H + cols[None, :]
            inside = there[:, None] & (cols < H)[None, :]
            if DENSE:
                now = _own_of(line, own, f, picks, there)
            else:
                e = tl.load(encoder + spots, mask=inside, other=0.0)
                read = x.to(e.dtype).to(tl.float32)
                now = features(tl.sum(e.to(tl.float32) * read[None, :], 1), mean, deviation, settings + f * 8, there)
            step = move_of(now, code, goal)
            changed = changed | tl.max((step != 0).to(tl.int32), 0)
            d = tl.load(decoder + spots, mask=inside, other=0.0)
            moved += tl.sum(d.to(tl.float32) * step[:, None], 0)
    return moved, changed


@triton.jit
def _gate_of(gates, token, GATED: tl.constexpr):
    """The part of the way that a token's value moves."""
    gate = tl.full((), 1.0, tl.float32)
    if GATED:
        gate = tl.load(gates + far(token, 4) + 2)
    return gate


@triton.jit
def finish(
    h, encoder, decoder, settings, bias, rows, row_set, row_clamp, sae_set, gates, order, meta, narrow, wide, listed,
    sums, programs, H: tl.constexpr, F: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Write the new value of each listed token."""
    tiles = tl.load(meta + S)
    filled = tl.load(meta + S + 1)
    parts = parts_of(tiles, (H + BN - 1) // BN, programs, PARTS)
    cols = tl.arange(0, BLOCK)
    within = cols < H
    for place in range(tl.program_id(0), filled + tl.load(meta + S + 2), tl.num_programs(0)):
        token = tl.load(order + place)
        if token >= 0:
            row = tl.load(rows + token)
            slot = tl.load(row_set + row * 4).to(tl.int32) - 1
            mode = tl.load(row_set + row * 4 + 1)
            gate = _gate_of(gates, token, GATED)
            mode = tl.where(gate == 0, 0.0, mode)  # it is listed for its log
            first = far(slot, F)
            lines = settings + first * 8
            at = h + far(token, H) + cols
            x = tl.load(at, mask=within, other=0.0).to(tl.float32)
            normed = tl.load(lines + 6) >= 0
            mean, deviation = 0.0, 1.0
            if normed:
                mean, deviation = moments(x, within, H)
            step = tl.where(normed, deviation, tl.load(lines + 7))
            clamps = row_clamp + far(row, 3 * K)
            here = far(place, F)
            picks = picks_of(sae_set, slot)
            line = listed + far(place, 2 * PICKS)
            if mode == 1:
                y = tl.load(bias + slot * H + cols, mask=within, other=0.0)
                if picks > 0:
                    y += _of_picks(line, decoder + first * H, cols, H, BLOCK)
                else:
                    for part in range(0, parts):
                        at_part = sums + far(part * tiles * BM + place, H)
                        y += tl.load(at_part + cols, mask=within, other=0.0)
                moved, _ = _moves(x, mean, deviation, line, narrow + here, picks, clamps, encoder + first * H,
                                  decoder + first * H, lines, cols, H, BLOCK, K, True)  # fmt: skip
                y = (y + moved) * step + tl.where(normed, mean, 0.0)
                y = tl.where(gate == 1, y, x + gate * (y - x))
                tl.store(at, y.to(h.dtype.element_ty), mask=within)
            elif mode == 2:
                if place < filled:
                    moved, changed = _moves(x, mean, deviation, line, wide + here, picks, clamps, encoder + first * H,
                                            decoder + first * H, lines, cols, H, BLOCK, K, True)  # fmt: skip
                else:
                    moved, changed = _moves(x, mean, deviation, line, narrow, 0, clamps, encoder + first * H,
                                            decoder + first * H, lines, cols, H, BLOCK, K, False)  # fmt: skip
                if changed > 0:
                    tl.store(at, (x + moved * step * gate).to(h.dtype.element_ty), mask=within)
