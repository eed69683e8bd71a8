"""Triton code of the full SAE: the opted-in tokens are listed, encoded, chosen among, decoded, and written.

::

    compact   tokens by slot, each slot's filled up to whole tiles; behind them those that need their clamps alone
    encode    f = features(h W_enc), a matmul of tiles of one slot; persistent, over as many tiles as there are
    select    features behind a norm of rows; TopK: what lies below the k-th largest to 0; the largest, to log
    decode    partial sums of f W_dec over parts of the features; persistent
    finish    sum of the parts, clamps, norm of rows undone; one program a token

`META` numbers of the list are read on the device by all that follow, so an idle launch is programs that find nothing to
do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_compile.kernels.sae_full_keys import GROUP, LISTED, largest_of_groups, picks_of

META = 4
"""Numbers of the list behind the first tile of each slot: tiles, positions of the tiles, tokens behind them."""


@triton.jit(do_not_specialize=["T", "capacity", "room"])
def compact(
    rows, row_set, sae_set, gates, order, meta, T, capacity, room, S: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr,
    ALL: tl.constexpr, GATED: tl.constexpr,
):  # fmt: skip
    """Lists the first ``capacity`` opted-in tokens, all of them with ALL, in ``order`` (room,), -1 where there is none.
    Those behind a closed gate are listed to be logged only. ``meta``: see `META`."""
    lane = tl.arange(0, BT)
    for start in range(0, room, BT):
        tl.store(order + start + lane, tl.full([BT], -1, tl.int32), mask=start + lane < room)
    tl.debug_barrier()
    filled = 0
    for kind in range(S + 1):
        if kind < S:
            tl.store(meta + kind, filled // BM)
        taken = 0
        seen = 0
        for start in range(0, T, BT):
            t = start + lane
            there = t < T
            row = tl.load(rows + t, mask=there, other=0)
            slot = tl.load(row_set + row * 4, mask=there, other=0.0).to(tl.int32) - 1
            opted = there & (slot >= 0)
            logged = tl.load(row_set + row * 4 + 2, mask=there, other=0.0)
            if GATED:
                opted = opted & ((tl.load(gates + t * 4 + 2, mask=there, other=0.0) != 0) | (logged > 0))
            served = opted
            if ALL == 0:
                served = opted & (seen + tl.cumsum(opted.to(tl.int32), 0) <= capacity)
                seen += tl.sum(opted.to(tl.int32), 0)
            mode = tl.load(row_set + row * 4 + 1, mask=there, other=0.0)
            k = tl.load(sae_set + tl.maximum(slot, 0) * 4 + 1, mask=served, other=0.0)
            dense = (mode == 1) | (k > 0) | (logged > 0)
            mine = served & tl.where(kind < S, dense & (slot == kind), (dense == 0) & (mode == 2))
            place = filled + taken + tl.cumsum(mine.to(tl.int32), 0) - 1
            tl.store(order + place, t, mask=mine)
            taken += tl.sum(mine.to(tl.int32), 0)
        if kind < S:
            filled += (taken + BM - 1) // BM * BM
        else:
            tl.store(meta + S, filled // BM)
            tl.store(meta + S + 1, filled)
            tl.store(meta + S + 2, taken)


@triton.jit
def far(number, pitch: tl.constexpr):
    """A place in a tensor of more than 2**31 numbers."""
    return tl.full((), pitch, tl.int64) * number


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """A matmul of two tiles added to a third; ``ieee`` is in fp32, as the interpreter needs it for bf16."""
    if PRECISION == "ieee":
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def slot_of(meta, tile, S: tl.constexpr):
    """Slot of a tile of the list."""
    slot = 0
    for s in tl.static_range(1, S):
        slot += (tile >= tl.load(meta + s)).to(tl.int32)
    return slot


@triton.jit
def encode(
    h, encoder, settings, rows, row_set, sae_set, order, meta, narrow, wide, groups, H: tl.constexpr, F: tl.constexpr,
    G: tl.constexpr, S: tl.constexpr, L: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Features of the listed tokens to ``narrow`` in the tables' dtype, or their products to ``wide`` in fp32.

    Features that `select` chooses among are in ``wide``, with the key of each group's largest in ``groups``.
    """
    tiles = tl.load(meta + S)
    columns = (F + BN - 1) // BN
    for tile in range(tl.program_id(0), tiles * columns, tl.num_programs(0)):
        group = tile % tiles
        column = tile // tiles
        slot = slot_of(meta, group, S)
        place = group * BM + tl.arange(0, BM)
        token = tl.load(order + place)
        there = token >= 0
        token = tl.maximum(token, 0)
        f = column * BN + tl.arange(0, BN)
        line = far(slot, F) + f
        left = h + token.to(tl.int64)[:, None] * H
        right = encoder + line[None, :] * H
        acc = tl.zeros([BM, BN], tl.float32)
        for start in range(0, H, BK):
            cols = start + tl.arange(0, BK)
            if H % BK == 0 and F % BN == 0:
                a = tl.load(left + cols[None, :], mask=there[:, None], other=0.0)
                b = tl.load(right + cols[:, None])
            else:
                a = tl.load(left + cols[None, :], mask=there[:, None] & (cols < H)[None, :], other=0.0)
                b = tl.load(right + cols[:, None], mask=(cols[:, None] < H) & (f[None, :] < F), other=0.0)
            acc = product(a.to(b.dtype), b, acc, PRECISION)
        ordered = tl.load(sae_set + slot * 4 + 1) > 0
        if L > 0:
            logged = tl.load(row_set + tl.load(rows + token) * 4 + 2, mask=there, other=0.0)
            ordered = ordered | (tl.max(logged, 0) > 0)
        kinds = normalises(settings, slot, F), ordered, picks_of(sae_set, slot) == 0
        corner = far(group * BM, F) + column * BN
        keys = groups + far(group * BM, G + LISTED) + column * (BN // GROUP)
        lines = settings + (far(slot, F) + column * BN) * 8
        _store_tile(acc, kinds, narrow + corner, wide + corner, keys, lines, there, F - column * BN, F, G, BM, BN)


@triton.jit
def _store_tile(p, kinds, narrow, wide, groups, lines, there, end, F: tl.constexpr, G: tl.constexpr, BM: tl.constexpr,
                BN: tl.constexpr):  # fmt: skip
    """Write a tile of products, or of their features; pointers are those of its corner, ``end`` its features."""
    normed, ordered, dense = kinds
    f = tl.arange(0, BN)
    target = (tl.arange(0, BM) * F)[:, None] + f[None, :]
    inside = there[:, None] & (f < end)[None, :]
    found = tl.where(normed, p, _features_of_tile(p, (lines + f * 8)[None, :], (f < end)[None, :]))
    if dense & (normed == 0):
        tl.store(narrow + target, found.to(narrow.dtype.element_ty), mask=inside)
    if ordered | normed:
        tl.store(wide + target, found, mask=inside)
    if ordered & (normed == 0):
        number = tl.arange(0, BN // GROUP)
        spots = groups + (tl.arange(0, BM) * (G + LISTED))[:, None] + number[None, :]
        here = there[:, None] & (number * GROUP < end)[None, :]
        tl.store(spots, largest_of_groups(found, BM, BN), mask=here)


@triton.jit
def normalises(settings, slot, F: tl.constexpr):
    """Whether an autoencoder normalises rows: its products become features in `select` only."""
    return tl.load(settings + far(slot, F) * 8 + 6) >= 0


@triton.jit
def _features_of_tile(p, lines, there):
    """Features of products without a norm of rows."""
    limit = tl.load(lines + 1, mask=there, other=float("inf")) - tl.load(lines, mask=there, other=0.0)
    a = p * tl.load(lines + 4, mask=there, other=1.0)
    f = tl.load(lines + 2, mask=there, other=0.0) * a + tl.load(lines + 3, mask=there, other=0.0)
    return tl.where(a <= limit, 0.0, tl.maximum(f, 0.0, propagate_nan=tl.PropagateNan.ALL))
