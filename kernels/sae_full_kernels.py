"""Triton code of the full SAE: the opted-in tokens are listed, encoded, chosen among, decoded, and written.

::

    compact   tokens by slot, each slot's filled up to whole tiles; behind them those that need their clamps alone
    encode    f = features(h W_enc), a matmul of tiles of one slot; persistent, over as many tiles as there are
    select    TopK: the k-th largest pre-activation by three histograms of its bits; and the largest features, to log
    decode    partial sums of f W_dec over parts of the features; persistent
    finish    sum of the parts, clamps, norm of rows undone; one program a token

`META` numbers of the list are read on the device by all that follow, so an idle launch is programs that find nothing to
do. Positive floats order as their bits do, which is what the histograms count.
"""

from __future__ import annotations

import triton
import triton.language as tl

META = 4
"""Numbers of the list behind the first tile of each slot: tiles, positions of the tiles, tokens behind them."""


@triton.jit
def compact(
    rows, row_set, sae_set, order, meta, T, capacity, room, S: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr
):  # fmt: skip
    """Lists the first ``capacity`` opted-in tokens. ``order`` (room,): token or -1; ``meta``: see `META`."""
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
            rank = seen + tl.cumsum(opted.to(tl.int32), 0)
            served = opted & (rank <= capacity)
            seen += tl.sum(opted.to(tl.int32), 0)
            mode = tl.load(row_set + row * 4 + 1, mask=there, other=0.0)
            logged = tl.load(row_set + row * 4 + 2, mask=there, other=0.0)
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
def moments(h, tokens, there, H: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Mean and unbiased deviation of the rows of a tile."""
    total = tl.zeros([BM], tl.float32)
    at = tokens.to(tl.int64)[:, None] * H
    for start in range(0, H, BK):
        cols = start + tl.arange(0, BK)[None, :]
        total += tl.sum(tl.load(h + at + cols, mask=there[:, None] & (cols < H), other=0.0).to(tl.float32), 1)
    mean = total / H
    squares = tl.zeros([BM], tl.float32)
    for start in range(0, H, BK):
        cols = start + tl.arange(0, BK)[None, :]
        inside = there[:, None] & (cols < H)
        x = tl.load(h + at + cols, mask=inside, other=0.0).to(tl.float32) - mean[:, None]
        squares += tl.sum(tl.where(inside, x * x, 0.0), 1)
    return mean, tl.sqrt(squares / tl.maximum(H - 1, 1))


@triton.jit
def features(p, mean, deviation, settings, there):
    """Features of products by their lines of settings; ``p`` has the features in its last dimension."""
    bias = tl.load(settings, mask=there, other=0.0)
    threshold = tl.load(settings + 1, mask=there, other=float("inf"))
    scale = tl.load(settings + 2, mask=there, other=0.0)
    magnitude = tl.load(settings + 3, mask=there, other=0.0)
    factor = tl.load(settings + 4, mask=there, other=0.0)
    wsum = tl.load(settings + 5, mask=there, other=0.0)
    eps = tl.load(settings + 6, mask=there, other=-1.0)
    a = tl.where(eps >= 0, (p - mean * wsum) / tl.where(eps >= 0, deviation + eps, 1.0), p * factor)
    f = tl.where(a + bias > threshold, tl.maximum(scale * a + magnitude, 0.0), 0.0)
    return tl.where(a != a, a, f)


@triton.jit
def encode(
    h, encoder, settings, rows, row_set, sae_set, order, meta, narrow, wide, H: tl.constexpr, F: tl.constexpr,
    S: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Features of the listed tokens: ``narrow`` in the dtype of the tables, and ``wide`` in fp32 where they are chosen
    among or logged."""
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
                a = tl.load(left + cols[None, :])
                b = tl.load(right + cols[:, None])
            else:
                a = tl.load(left + cols[None, :], mask=cols[None, :] < H, other=0.0)
                b = tl.load(right + cols[:, None], mask=(cols[:, None] < H) & (f[None, :] < F), other=0.0)
            acc = product(a.to(b.dtype), b, acc, PRECISION)
        mean = tl.zeros([BM], tl.float32)
        deviation = tl.full([BM], 1.0, tl.float32)
        if tl.load(settings + far(slot, F) * 8 + 6) >= 0:
            mean, deviation = moments(h, token, there, H, BM, BK)
        found = features(acc, mean[:, None], deviation[:, None], settings + line[None, :] * 8, (f < F)[None, :])
        target = place.to(tl.int64)[:, None] * F + f[None, :]
        inside = there[:, None] & (f < F)[None, :]
        tl.store(narrow + target, found.to(narrow.dtype.element_ty), mask=inside)
        row = tl.load(rows + token)
        logged = tl.load(row_set + row * 4 + 2, mask=there, other=0.0)
        if (tl.load(sae_set + slot * 4 + 1) > 0) | (tl.max(logged, 0) > 0):
            tl.store(wide + target, found, mask=inside)


@triton.jit
def _bits(values, low, high, count, F: tl.constexpr, BF: tl.constexpr, SHIFT: tl.constexpr, BINS: tl.constexpr):
    """Histogram of some bits of the values whose bits lie in [low, high), 0 and NaN left out."""
    total = tl.zeros([BINS], tl.int32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        x = tl.load(values + f, mask=f < count, other=0.0)
        key = tl.where(x > 0, x, 0.0).to(tl.int32, bitcast=True)
        inside = (x > 0) & (key >= low) & (key < high)
        total += tl.histogram((key >> SHIFT) & (BINS - 1), BINS, mask=inside)
    return total


@triton.jit
def _bin_of(total, wanted, BINS: tl.constexpr):
    """The bin in which the ``wanted`` largest end, and how many of them lie in it."""
    bins = tl.arange(0, BINS)
    behind = tl.sum(total, 0) - tl.cumsum(total, 0)  # in the bins above
    found = tl.max(tl.where(behind + total >= wanted, bins, -1), 0)
    return found, wanted - tl.sum(tl.where(bins == found, behind, 0), 0)


@triton.jit
def limit(values, wanted, count, F: tl.constexpr, BF: tl.constexpr):
    """Bits of the ``wanted``-th largest positive value, and how many of those with just these bits are among them; the
    smallest positive bits and all of them where there are fewer."""
    high = _bits(values, 0, 2147483647, count, F, BF, 20, 2048)
    low = tl.full((), 1, tl.int32)
    rest = tl.full((), 2147483647, tl.int32)
    if tl.sum(high, 0) >= wanted:
        first, left = _bin_of(high, wanted, 2048)
        middle = _bits(values, first << 20, (first + 1) << 20, count, F, BF, 9, 2048)
        second, left = _bin_of(middle, left, 2048)
        base = (first << 20) + (second << 9)
        last, rest = _bin_of(_bits(values, base, base + 512, count, F, BF, 0, 512), left, 512)
        low = base + last
    return low, rest


@triton.jit
def select(
    rows, row_set, sae_set, order, meta, narrow, wide, log, F: tl.constexpr, S: tl.constexpr, BM: tl.constexpr,
    BF: tl.constexpr, L: tl.constexpr, LP: tl.constexpr,
):  # fmt: skip
    """Of each listed token the k largest features, others to 0, and the L largest to the log; one program at a time."""
    for place in range(tl.program_id(0), tl.load(meta + S + 1), tl.num_programs(0)):
        token = tl.load(order + place)
        if token >= 0:
            slot = slot_of(meta, place // BM, S)
            k = tl.load(sae_set + slot * 4 + 1).to(tl.int32)
            count = tl.load(sae_set + slot * 4).to(tl.int32)
            own = wide + far(place, F)
            if k > 0:
                low, rest = limit(own, k, count, F, BF)
                equal = 0
                for start in range(0, F, BF):
                    f = start + tl.arange(0, BF)
                    x = tl.load(own + f, mask=f < count, other=0.0)
                    key = tl.where(x > 0, x, 0.0).to(tl.int32, bitcast=True)
                    same = (key == low) & (x > 0)
                    kept = (key > low) | (same & (equal + tl.cumsum(same.to(tl.int32), 0) <= rest)) | (x != x)
                    equal += tl.sum(same.to(tl.int32), 0)
                    y = tl.where(kept, x, 0.0)
                    tl.store(own + f, y, mask=f < F)
                    tl.store(narrow + far(place, F) + f, y.to(narrow.dtype.element_ty), mask=f < F)
                tl.debug_barrier()
            if L > 0:  # noqa: SIM102 -- a constant: without it there is no log
                if tl.load(row_set + tl.load(rows + token) * 4 + 2) > 0:
                    _logged(own, log + far(token, 2 * L), count, F, BF, L, LP)


@triton.jit
def _logged(own, line, count, F: tl.constexpr, BF: tl.constexpr, L: tl.constexpr, LP: tl.constexpr):
    """Write the L largest features of a token: listed as they come, then put in order."""
    lane = tl.arange(0, LP)
    tl.store(line + lane, tl.full([LP], -1.0, tl.float32), mask=lane < L)
    tl.store(line + L + lane, tl.zeros([LP], tl.float32), mask=lane < L)
    tl.debug_barrier()
    low, rest = limit(own, L, count, F, BF)
    equal = 0
    taken = 0
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        x = tl.load(own + f, mask=f < count, other=0.0)
        key = tl.where(x > 0, x, 0.0).to(tl.int32, bitcast=True)
        same = (key == low) & (x > 0)
        kept = (key > low) | (same & (equal + tl.cumsum(same.to(tl.int32), 0) <= rest))
        place = taken + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(line + place, f.to(tl.float32), mask=kept)
        tl.store(line + L + place, x, mask=kept)
        equal += tl.sum(same.to(tl.int32), 0)
        taken += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    index = tl.load(line + lane, mask=lane < L, other=-1.0)
    value = tl.load(line + L + lane, mask=lane < L, other=-1.0)
    before = (value[None, :] > value[:, None]) | ((value[None, :] == value[:, None]) & (lane[None, :] < lane[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    tl.debug_barrier()
    tl.store(line + rank, index, mask=lane < L)
    tl.store(line + L + rank, value, mask=lane < L)
