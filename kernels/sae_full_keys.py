"""Triton code of the full SAE: which numbers are the largest, found bit by bit, as positive floats order as their bits.

Features come in groups of `GROUP`. The k largest lie in the groups whose own largest is at least the k-th largest of
these, so `encode` leaves the largest of each group, and then only the features of few groups are read.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(32)
"""Features of a group."""
LISTED = tl.constexpr(256)
"""Most groups whose features are held at once."""
PICKS = tl.constexpr(256)
"""Most features that TopK may keep to be decoded one by one; with more, all are decoded in a matmul."""
NOT_A_NUMBER = tl.constexpr(2147483647)
"""Key of a group with a NaN, above that of every number."""


@triton.jit
def key_of(x):
    """Bits of a positive number, which order as the numbers do; 0 for all others and for NaN."""
    return tl.where(x > 0, x, 0.0).to(tl.int32, bitcast=True)


@triton.jit
def packed(key, one):
    """Whether keys reach one, two and three steps, in three fields of one number, so that one sum counts all."""
    found = (key >= one).to(tl.int64)
    found += (key >= 2 * one).to(tl.int64) << 21
    return found + ((key >= 3 * one).to(tl.int64) << 42)


@triton.jit
def reached(counts, wanted):
    """How many of the three fields are at least ``wanted``, and the last of these, -1 if none is."""
    one, two, three = counts & 2097151, (counts >> 21) & 2097151, counts >> 42
    steps = (one >= wanted).to(tl.int32) + (two >= wanted).to(tl.int32) + (three >= wanted).to(tl.int32)
    return steps, tl.where(steps == 3, three, tl.where(steps == 2, two, tl.where(steps == 1, one, -1))).to(tl.int32)


@triton.jit
def first_shift(span):
    """Bits behind the first two of the answer, which is at most ``span`` above where the search begins."""
    exponent = (span.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127  # one too high where rounded up
    return tl.minimum(tl.maximum(exponent - 1, 0), 29)


@triton.jit
def limit_of_held(held, wanted, least):
    """A number that the ``wanted`` largest of keys in registers reach, and how many of those that equal it are among
    them, and how many there are, where more than these reach it; at least 1.

    Args:
        least: what at least ``wanted`` keys reach, 0 where that is not known.
    """
    base = least
    shift = first_shift(tl.maximum(tl.max(held, 0) - base, 1))
    exact = False
    searching = True
    while searching:
        one = tl.full((), 1, tl.int32) << shift
        steps, count = reached(tl.sum(packed(held - base, one), 0), wanted)  # what is below base is negative
        base += steps * one
        exact = count == wanted
        searching = (shift > 0) & (exact == 0)
        shift = tl.maximum(shift - 2, 0)
    left = wanted - tl.sum((held > base).to(tl.int32), 0)
    equal = tl.sum((held == base).to(tl.int32), 0)
    whole = exact | (base == 0)
    return tl.maximum(base, 1), tl.where(whole, 2147483647, left), tl.where(whole, 0, equal)


@triton.jit
def largest_of_groups(x, M: tl.constexpr, N: tl.constexpr):
    """Keys (M, N / GROUP) of the largest number of each group of a tile (M, N)."""
    key = tl.where(x != x, NOT_A_NUMBER, key_of(x))
    return tl.max(tl.reshape(key, [M, N // GROUP, GROUP]), 2)


@triton.jit
def picks_of(sae_set, slot):
    """k of an autoencoder whose features are listed one by one, 0 for one whose features are all decoded."""
    k = tl.load(sae_set + slot * 4 + 1).to(tl.int32)
    return tl.where(k <= PICKS, k, 0)
