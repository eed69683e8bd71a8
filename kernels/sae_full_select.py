"""Triton code of the full SAE between encoder and decoder: which features of a token are the largest.

A token's k-th largest feature is found bit by bit, as positive floats order as their bits do. Features come in groups
of `GROUP`, and the k largest lie in the groups whose own largest is at least the k-th largest of these: so features are
read once for the groups, and then those of few groups alone. Where more groups tie than `LISTED`, all are searched.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_compile.kernels.sae_formula import features, moments
from steer_compile.kernels.sae_full_kernels import far, normalises, slot_of

GROUP, LISTED = tl.constexpr(32), tl.constexpr(256)


@triton.jit
def key_of(x):
    """Bits of a positive number, which order as the numbers do; 0 for all others and for NaN."""
    return tl.where(x > 0, x, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def _packed(key, one, J: tl.constexpr):
    """Whether keys reach J, J + 1 and J + 2 steps, in three fields of one number, so that one sum counts all."""
    found = (key >= J * one).to(tl.int64)
    found += (key >= (J + 1) * one).to(tl.int64) << 21
    return found + ((key >= (J + 2) * one).to(tl.int64) << 42)


@triton.jit
def _reached(counts, wanted):
    """How many of the three fields are at least ``wanted``."""
    low = ((counts & 2097151) >= wanted).to(tl.int32) + (((counts >> 21) & 2097151) >= wanted).to(tl.int32)
    return low + ((counts >> 42) >= wanted).to(tl.int32)


@triton.jit
def _step_of(some, more, few, wanted, shift):
    """Three bits of the answer, of the counts of keys that reach each of the seven numbers above it."""
    return (_reached(some, wanted) + _reached(more, wanted) + (few >= wanted).to(tl.int32)) << shift


@triton.jit
def limit_of_held(held, wanted):
    """The ``wanted``-th largest of keys in registers, how many of those that equal it are among them, and how many
    there are; 1 where there are fewer that are not 0."""
    base = tl.full((), 0, tl.int32)
    for step in range(11):
        shift = tl.maximum(28 - 3 * step, 0)
        one = tl.full((), 1, tl.int32) << shift
        key = held - base  # what is below it turns negative, and stays so
        some, more = tl.sum(_packed(key, one, 1), 0), tl.sum(_packed(key, one, 4), 0)
        few = tl.sum((key >= 7 * one).to(tl.int32), 0)
        base += _step_of(some, more, few, wanted, shift)
    left = wanted - tl.sum((held > base).to(tl.int32), 0)
    equal = tl.sum((held == base).to(tl.int32), 0)
    return tl.maximum(base, 1), tl.where(base > 0, left, 2147483647), tl.where(base > 0, equal, 0)


@triton.jit
def _limit_of_all(own, wanted, F: tl.constexpr, BF: tl.constexpr):
    """`limit_of_held` of all features of a token, read again for every three bits."""
    base = tl.full((), 0, tl.int32)
    for step in range(11):
        shift = tl.maximum(28 - 3 * step, 0)
        one = tl.full((), 1, tl.int32) << shift
        first = tl.zeros([BF], tl.int64)
        second = tl.zeros([BF], tl.int64)
        third = tl.zeros([BF], tl.int32)
        for start in range(0, F, BF):
            f = start + tl.arange(0, BF)
            key = key_of(tl.load(own + f, mask=f < F, other=0.0)) - base
            first += _packed(key, one, 1)
            second += _packed(key, one, 4)
            third += (key >= 7 * one).to(tl.int32)
        base += _step_of(tl.sum(first, 0), tl.sum(second, 0), tl.sum(third, 0), wanted, shift)
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
def limit(own, scratch, wanted, F: tl.constexpr, BF: tl.constexpr, G: tl.constexpr):
    """`limit_of_held` of all features of a token, by groups. ``scratch``: G numbers, and `LISTED` more."""
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        key = key_of(tl.load(own + f, mask=f < F, other=0.0))
        tl.store(scratch + start // GROUP + tl.arange(0, BF // GROUP), tl.max(tl.reshape(key, [BF // GROUP, GROUP]), 1))
    tl.debug_barrier()
    group = tl.arange(0, G)
    largest = tl.load(scratch + group, mask=group < (F + GROUP - 1) // GROUP, other=0)
    least, _, _ = limit_of_held(largest, wanted)
    chosen = largest >= least
    count = tl.sum(chosen.to(tl.int32), 0)
    if count <= LISTED:
        place = tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(scratch + G + place, group, mask=chosen)
        tl.debug_barrier()
        line = tl.arange(0, LISTED)
        first = tl.load(scratch + G + line, mask=line < count, other=0) * GROUP
        f = first[:, None] + tl.arange(0, GROUP)[None, :]
        x = tl.load(own + f, mask=(line < count)[:, None] & (f < F), other=0.0)
        low, left, equal = limit_of_held(tl.reshape(key_of(x), [LISTED * GROUP]), wanted)
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
def select(
    h, settings, rows, row_set, sae_set, order, meta, narrow, wide, log, scratch, H: tl.constexpr,
    BLOCK: tl.constexpr, F: tl.constexpr, S: tl.constexpr, BM: tl.constexpr, BF: tl.constexpr, G: tl.constexpr,
    L: tl.constexpr, LP: tl.constexpr,
):  # fmt: skip
    """Features of products that `encode` left, the k largest of them, others 0, and the L largest to the log."""
    end = tl.load(meta + S + 1)
    if L == 0:
        waiting = False
        for slot in range(S):
            waiting = waiting | normalises(settings, slot, F) | (tl.load(sae_set + slot * 4 + 1) > 0)
        end = tl.where(waiting, end, 0)
    for place in range(tl.program_id(0), end, tl.num_programs(0)):
        token = tl.load(order + place)
        if token >= 0:
            slot = slot_of(meta, place // BM, S)
            k = tl.load(sae_set + slot * 4 + 1).to(tl.int32)
            own = wide + far(place, F)
            notes = scratch + far(place, G + LISTED)
            if normalises(settings, slot, F):
                lines = settings + far(slot, F) * 8
                _activated(h + far(token, H), own, narrow + far(place, F), lines, H, BLOCK, F, BF)
                tl.debug_barrier()
            if k > 0:
                _kept(own, narrow + far(place, F), notes, k, F, BF, G)
                tl.debug_barrier()
            if L > 0:  # noqa: SIM102 -- a constant: without it there is no log
                if tl.load(row_set + tl.load(rows + token) * 4 + 2) > 0:
                    _logged(own, log + far(token, 2 * L), notes, F, BF, G, L, LP)


@triton.jit
def _activated(row, own, narrow, lines, H: tl.constexpr, BLOCK: tl.constexpr, F: tl.constexpr, BF: tl.constexpr):
    """Features in place of a token's products, behind the norm of its row."""
    cols = tl.arange(0, BLOCK)
    x = tl.load(row + cols, mask=cols < H, other=0.0).to(tl.float32)
    mean, deviation = moments(x, cols < H, H)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        p = tl.load(own + f, mask=f < F, other=0.0)
        found = features(p, mean, deviation, lines + f * 8, f < F)
        tl.store(own + f, found, mask=f < F)
        tl.store(narrow + f, found.to(narrow.dtype.element_ty), mask=f < F)


@triton.jit
def _kept(own, narrow, scratch, k, F: tl.constexpr, BF: tl.constexpr, G: tl.constexpr):
    """The k largest features of a token, of equal ones the first, and 0 in place of the others."""
    low, rest, equal = limit(own, scratch, k, F, BF, G)
    seen = tl.full((), 0, tl.int32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        x = tl.load(own + f, mask=f < F, other=0.0)
        kept, seen = _among(key_of(x), low, rest, equal, seen)
        y = tl.where(kept | (x != x), x, 0.0)
        tl.store(own + f, y, mask=f < F)
        tl.store(narrow + f, y.to(narrow.dtype.element_ty), mask=f < F)


@triton.jit
def _logged(
    own, line, scratch, F: tl.constexpr, BF: tl.constexpr, G: tl.constexpr, L: tl.constexpr, LP: tl.constexpr
):  # fmt: skip
    """Write the L largest features of a token: listed as they come, then put in order."""
    lane = tl.arange(0, LP)
    tl.store(line + lane, tl.full([LP], -1.0, tl.float32), mask=lane < L)
    tl.store(line + L + lane, tl.zeros([LP], tl.float32), mask=lane < L)
    tl.debug_barrier()
    low, rest, equal = limit(own, scratch, L, F, BF, G)
    seen = tl.full((), 0, tl.int32)
    taken = tl.full((), 0, tl.int32)
    for start in range(0, F, BF):
        f = start + tl.arange(0, BF)
        x = tl.load(own + f, mask=f < F, other=0.0)
        kept, seen = _among(key_of(x), low, rest, equal, seen)
        place = taken + tl.cumsum(kept.to(tl.int32), 0) - 1
        tl.store(line + place, f.to(tl.float32), mask=kept)
        tl.store(line + L + place, x, mask=kept)
        taken += tl.sum(kept.to(tl.int32), 0)
    tl.debug_barrier()
    index = tl.load(line + lane, mask=lane < L, other=-1.0)
    value = tl.load(line + L + lane, mask=lane < L, other=-1.0)
    before = (value[None, :] > value[:, None]) | ((value[None, :] == value[:, None]) & (lane[None, :] < lane[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    tl.debug_barrier()
    tl.store(line + rank, index, mask=lane < L)
    tl.store(line + L + rank, value, mask=lane < L)
