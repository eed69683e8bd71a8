"""Triton code of the full SAE between encoder and decoder: which features of a token are the largest.

Features are read once for the largest of each group, where `encode` did not leave these, and then those of few groups
alone. Where more groups tie than `LISTED`, all are searched. TopK of at most `PICKS` lists its features; of more, it
leaves 0 in place of the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_compile.kernels.sae_formula import features, moments
from steer_compile.kernels.sae_full_kernels import far, normalises, slot_of
from steer_compile.kernels.sae_full_keys import (
    GROUP,
    LISTED,
    NOT_A_NUMBER,
    PICKS,
    key_of,
    largest_of_groups,
    limit_of_held,
    packed,
    picks_of,
    reached,
)


@triton.jit
def _limit_of_all(own, wanted, F: tl.constexpr, BF: tl.constexpr):
    """`limit_of_held` of all features of a token, read again for every two bits."""
    base = tl.full((), 0, tl.int32)
    for step in range(16):
        one = tl.full((), 1, tl.int32) << tl.maximum(29 - 2 * step, 0)
        counts = tl.zeros([BF], tl.int64)
        for start in range(0, F, BF):
            f = start + tl.arange(0, BF)
            key = key_of(tl.load(own + f, mask=f < F, other=0.0))
            counts += packed(key - base, one)
        steps, _ = reached(tl.sum(counts, 0), wanted)
        base += steps * one
    above = tl.zeros([BF], tl.int32)
    equal = tl.zeros([BF], tl.int32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        key = key_of(tl.load(own + f, mask=f < F, other=0.0))
        above += (key > base).to(tl.int32)
        equal += (key == base).to(tl.int32)
    left = tl.where(base > 0, wanted - tl.sum(above, 0), 2147483647)
    return tl.maximum(base, 1), left, tl.where(base > 0, tl.sum(equal, 0), 0)


@triton.jit
def _are_listed(largest, chosen):
    """Whether the chosen groups can be held at once, and none has a NaN, which no order has."""
    return (tl.sum(chosen.to(tl.int32), 0) <= LISTED) & (tl.max(largest, 0) < NOT_A_NUMBER)


@triton.jit
def _chosen_groups(groups, wanted, F: tl.constexpr, G: tl.constexpr):
    """Keys (G,) of the groups, which of them have the ``wanted`` largest features, and what as many of these reach."""
    group = tl.arange(0, G)
    largest = tl.load(groups + group, mask=group < (F + GROUP - 1) // GROUP, other=0)
    least, _, _ = limit_of_held(largest, wanted, 0)
    return largest, largest >= least, least


@triton.jit
def _list_groups(groups, chosen, G: tl.constexpr):
    """Write the chosen groups behind the keys of all, and count them."""
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(groups + G + place, tl.arange(0, G), mask=chosen)
    tl.debug_barrier()
    return tl.sum(chosen.to(tl.int32), 0)


@triton.jit
def _of_groups(own, groups, count, N: tl.constexpr, F: tl.constexpr, G: tl.constexpr):
    """Indices and features (N * GROUP,) of the first N listed groups."""
    line = tl.arange(0, N)
    first = tl.load(groups + G + line, mask=line < count, other=0) * GROUP
    f = first[:, None] + tl.arange(0, GROUP)[None, :]
    x = tl.load(own + f, mask=(line < count)[:, None] & (f < F), other=0.0)
    return tl.reshape(f, [N * GROUP]), tl.reshape(x, [N * GROUP])


@triton.jit
def _limit(own, groups, wanted, F: tl.constexpr, BF: tl.constexpr, G: tl.constexpr):
    """`limit_of_held` of all features of a token. ``groups``: keys of its G groups, and room for `LISTED` of them."""
    largest, chosen, least = _chosen_groups(groups, wanted, F, G)
    if _are_listed(largest, chosen):
        count = _list_groups(groups, chosen, G)
        _, x = _of_groups(own, groups, count, LISTED, F, G)
        low, left, equal = limit_of_held(key_of(x), wanted, least)
    else:
        low, left, equal = _limit_of_all(own, wanted, F, BF)
    return low, left, equal


@triton.jit
def _among(key, low, rest, equal, seen):
    """Which keys are among the largest, of equal ones the first ``rest``; ``seen``: how many of these came before."""
    same = key == low
    kept = key >= low
    if equal > rest:  # rare, and a running count is dear
        kept = (key > low) | (same & (seen + tl.cumsum(same.to(tl.int32), 0) <= rest))
    return kept, seen + tl.sum(same.to(tl.int32), 0)


@triton.jit
def _waiting(settings, sae_set, meta, F: tl.constexpr, S: tl.constexpr):
    """How many places there are to look at, 0 where no autoencoder needs it."""
    waiting = False
    for slot in range(S):
        waiting = waiting | normalises(settings, slot, F) | (tl.load(sae_set + slot * 4 + 1) > 0)
    return tl.where(waiting, tl.load(meta + S + 1), 0)


@triton.jit
def select(
    h, settings, rows, row_set, sae_set, order, meta, narrow, wide, log, scratch, picks, H: tl.constexpr,
    BLOCK: tl.constexpr, F: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, G: tl.constexpr,
    L: tl.constexpr, LP: tl.constexpr,
):  # fmt: skip
    """Features of products that `encode` left, the k largest of them, and the L largest to the log."""
    end = tl.load(meta + S + 1) if L > 0 else _waiting(settings, sae_set, meta, F, S)
    for place in range(tl.program_id(0), end, tl.num_programs(0)):
        token = tl.load(order + place)
        if token >= 0:
            slot = slot_of(meta, place // BM, S)
            k = tl.load(sae_set + slot * 4 + 1).to(tl.int32)
            own = wide + far(place, F)
            groups = scratch + far(place, G + LISTED)
            line = picks + far(place, 2 * PICKS)
            listed = picks_of(sae_set, slot) > 0
            if normalises(settings, slot, F):
                lines = settings + far(slot, F) * 8
                _activated(h + far(token, H), own, narrow + far(place, F), groups, lines, H, BLOCK, F, BF)
                tl.debug_barrier()
            if listed:
                _picked(own, groups, line, k, F, BF, G)
                tl.debug_barrier()
            elif k > 0:
                _kept(own, narrow + far(place, F), groups, k, F, BF, G)
                tl.debug_barrier()
            if L > 0:  # noqa: SIM102 -- a constant: without it there is no log
                if tl.load(row_set + tl.load(rows + token) * 4 + 2) > 0:
                    if listed:
                        _logged_picks(line, log + far(token, 2 * L), L, LP)
                    else:
                        _logged(own, log + far(token, 2 * L), groups, F, BF, G, L, LP)


@triton.jit
def _activated(
    row, own, narrow, groups, lines, H: tl.constexpr, BLOCK: tl.constexpr, F: tl.constexpr, BF: tl.constexpr
):  # fmt: skip
    """Features in place of a token's products, behind the norm of its row, and the largest of each group."""
    cols = tl.arange(0, BLOCK)
    x = tl.load(row + cols, mask=cols < H, other=0.0).to(tl.float32)
    mean, deviation = moments(x, cols < H, H)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        p = tl.load(own + f, mask=f < F, other=0.0)
        found = features(p, mean, deviation, lines + f * 8, f < F)
        tl.store(own + f, found, mask=f < F)
        tl.store(narrow + f, found.to(narrow.dtype.element_ty), mask=f < F)
        largest = tl.reshape(largest_of_groups(tl.reshape(found, [1, BF]), 1, BF), [BF // GROUP])
        tl.store(groups + start // GROUP + tl.arange(0, BF // GROUP), largest)


@triton.jit
def _picked(own, groups, line, k, F: tl.constexpr, BF: tl.constexpr, G: tl.constexpr):
    """List the k largest features of a token by their indices, of equal ones the first, and those that are NaN."""
    lane = tl.arange(0, PICKS)
    tl.store(line + lane, tl.full([PICKS], -1.0, tl.float32))
    tl.store(line + PICKS + lane, tl.zeros([PICKS], tl.float32))
    largest, chosen, least = _chosen_groups(groups, k, F, G)
    if _are_listed(largest, chosen):
        count = _list_groups(groups, chosen, G)  # it waits for what is stored above
        if count <= LISTED // 4:
            _pick_held(own, groups, line, count, k, least, LISTED // 4, F, G)
        else:
            _pick_held(own, groups, line, count, k, least, LISTED, F, G)
    else:
        low, rest, equal = _limit_of_all(own, k, F, BF)
        tl.debug_barrier()
        _listed(own, line, low, rest, equal, F, BF, PICKS, True)


@triton.jit
def _pick_held(own, groups, line, count, k, least, N: tl.constexpr, F: tl.constexpr, G: tl.constexpr):
    f, x = _of_groups(own, groups, count, N, F, G)
    key = key_of(x)
    low, rest, equal = limit_of_held(key, k, least)
    kept, _ = _among(key, low, rest, equal, 0)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(line + place, f.to(tl.float32), mask=kept)
    tl.store(line + PICKS + place, x, mask=kept)


@triton.jit
def _listed(
    own, line, low, rest, equal, F: tl.constexpr, BF: tl.constexpr, ROOM: tl.constexpr, NANS: tl.constexpr
):  # fmt: skip
    """Write the indices of the features that are among the largest, and with NANS of NaN ones, then these, as they
    come."""
    seen = tl.full((), 0, tl.int32)
    taken = tl.full((), 0, tl.int32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        x = tl.load(own + f, mask=f < F, other=0.0)
        kept, seen = _among(key_of(x), low, rest, equal, seen)
        kept = kept | ((x != x) & NANS)
        place = taken + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(line + place, f.to(tl.float32), mask=kept & (place < ROOM))
        tl.store(line + ROOM + place, x, mask=kept & (place < ROOM))
        taken += tl.sum(kept.to(tl.int32), 0)


@triton.jit
def _kept(own, narrow, groups, k, F: tl.constexpr, BF: tl.constexpr, G: tl.constexpr):
    """The k largest features of a token, of equal ones the first, and 0 in place of the others."""
    low, rest, equal = _limit(own, groups, k, F, BF, G)
    seen = tl.full((), 0, tl.int32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        x = tl.load(own + f, mask=f < F, other=0.0)
        kept, seen = _among(key_of(x), low, rest, equal, seen)
        y = tl.where(kept | (x != x), x, 0.0)
        tl.store(own + f, y, mask=f < F)
        tl.store(narrow + f, y.to(narrow.dtype.element_ty), mask=f < F)


@triton.jit
def _logged_picks(line, log, L: tl.constexpr, LP: tl.constexpr):
    """Write the L largest of the listed features, in order."""
    lane = tl.arange(0, LP)
    tl.store(log + lane, tl.full([LP], -1.0, tl.float32), mask=lane < L)
    tl.store(log + L + lane, tl.zeros([LP], tl.float32), mask=lane < L)
    tl.debug_barrier()
    own = tl.arange(0, PICKS)
    index = tl.load(line + own)
    value = tl.load(line + PICKS + own)
    rank = tl.zeros([PICKS], tl.int32)
    for start in range(0, PICKS, GROUP):
        other = start + tl.arange(0, GROUP)
        beside = tl.load(line + PICKS + other)
        first = (beside[None, :] == value[:, None]) & (other[None, :] < own[:, None])
        rank += tl.sum(((beside[None, :] > value[:, None]) | first).to(tl.int32), 1)
    tl.store(log + rank, index, mask=(value > 0) & (rank < L))
    tl.store(log + L + rank, value, mask=(value > 0) & (rank < L))


@triton.jit
def _logged(
    own, line, groups, F: tl.constexpr, BF: tl.constexpr, G: tl.constexpr, L: tl.constexpr, LP: tl.constexpr
):  # fmt: skip
    """Write the L largest features of a token: listed as they come, then put in order."""
    lane = tl.arange(0, LP)
    tl.store(line + lane, tl.full([LP], -1.0, tl.float32), mask=lane < L)
    tl.store(line + L + lane, tl.zeros([LP], tl.float32), mask=lane < L)
    tl.debug_barrier()
    low, rest, equal = _limit(own, groups, L, F, BF, G)
    _listed(own, line, low, rest, equal, F, BF, L, False)
    tl.debug_barrier()
    index = tl.load(line + lane, mask=lane < L, other=-1.0)
    value = tl.load(line + L + lane, mask=lane < L, other=-1.0)
    before = (value[None, :] > value[:, None]) | ((value[None, :] == value[:, None]) & (lane[None, :] < lane[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    tl.debug_barrier()
    tl.store(line + rank, index, mask=lane < L)
    tl.store(line + L + rank, value, mask=lane < L)
