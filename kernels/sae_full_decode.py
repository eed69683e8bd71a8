"""Triton code of the full SAE behind its features: the decoder's matmul, and what is written of each token."""

from __future__ import annotations

import triton
import triton.language as tl

from steer_compile.kernels.sae_formula import features, moments, move_of
from steer_compile.kernels.sae_full_kernels import far, product, slot_of


@triton.jit
def parts_of(tiles, columns, programs, most: tl.constexpr):
    """Into how many parts the features are split, so that there is work for every program."""
    return tl.minimum(tl.maximum(programs // tl.maximum(tiles * columns, 1), 1), most)


@triton.jit
def decode(
    decoder, rows, row_set, order, meta, narrow, sums, H: tl.constexpr, F: tl.constexpr, S: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Partial sums ``(parts, positions, H)`` of the decoder's products, of tiles with a token that is reconstructed."""
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
        if tl.max(tl.where(there, tl.load(row_set + row * 4 + 1) == 1, False).to(tl.int32), 0) > 0:
            first = far(slot_of(meta, group, S), F)
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
def _moves(x, mean, deviation, own, clamps, encoder, decoder, settings, cols, H: tl.constexpr,
           BLOCK: tl.constexpr, K: tl.constexpr, DENSE: tl.constexpr):  # fmt: skip
    """What the row's clamps add in the decoder's space, and whether any of them changes its feature."""
    moved = tl.zeros([BLOCK], tl.float32)
    changed = tl.full((), 0, tl.int32)
    for j in range(K):
        code = tl.load(clamps + K + j)
        if code > 0:
            f = tl.load(clamps + j).to(tl.int64)
            goal = tl.load(clamps + 2 * K + j)
            if DENSE:
                now = tl.load(own + f).to(tl.float32)
            else:
                e = tl.load(encoder + f * H + cols, mask=cols < H, other=0.0)
                read = x.to(e.dtype).to(tl.float32)
                now = features(tl.sum(read * e.to(tl.float32), 0), mean, deviation, settings + f * 8, True)
            step = move_of(now, code, goal)
            changed = changed | (step != 0).to(tl.int32)
            d = tl.load(decoder + f * H + cols, mask=cols < H, other=0.0)
            moved += step * d.to(tl.float32)
    return moved, changed


@triton.jit
def finish(
    h, encoder, decoder, settings, bias, rows, row_set, row_clamp, sae_set, order, meta, narrow, wide, sums,
    programs, H: tl.constexpr, F: tl.constexpr, S: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
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
            first = far(slot, F)
            lines = settings + first * 8
            at = h + far(token, H) + cols
            x = tl.load(at, mask=within, other=0.0).to(tl.float32)
            mean, deviation = moments(x, within, H)
            normed = tl.load(lines + 6) >= 0
            step = tl.where(normed, deviation, tl.load(lines + 7))
            clamps = row_clamp + far(row, 3 * K)
            here = far(place, F)
            if mode == 1:
                y = tl.load(bias + slot * H + cols, mask=within, other=0.0)
                for part in range(0, parts):
                    line = far(part * tiles * BM + place, H)
                    y += tl.load(sums + line + cols, mask=within, other=0.0)
                moved, _ = _moves(x, mean, deviation, narrow + here, clamps, encoder + first * H,
                                  decoder + first * H, lines, cols, H, BLOCK, K, True)  # fmt: skip
                y = (y + moved) * step + tl.where(normed, mean, 0.0)
                tl.store(at, y.to(h.dtype.element_ty), mask=within)
            elif mode == 2:
                if place < filled:
                    moved, changed = _moves(x, mean, deviation, wide + here, clamps, encoder + first * H,
                                            decoder + first * H, lines, cols, H, BLOCK, K, True)  # fmt: skip
                else:
                    moved, changed = _moves(x, mean, deviation, narrow, clamps, encoder + first * H,
                                            decoder + first * H, lines, cols, H, BLOCK, K, False)  # fmt: skip
                if changed > 0:
                    tl.store(at, (x + moved * step).to(h.dtype.element_ty), mask=within)
