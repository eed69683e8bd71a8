"""Captured rows in memory, without an engine: what is charged is what is held."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile.vllm.captures import CaptureRequest, Captures, Kept, Room, joined

WIDTH, TOKENS = 4, 32
SITES = tuple(("post_block", n) for n in range(3))
ROW = WIDTH * 4


def made(most: int) -> tuple[Captures, Room, Any]:
    """Captures over tables whose row i of layer n holds 1000 * n + i."""
    banks = [SimpleNamespace(kind="capture", sites=(site,)) for site in SITES]
    rows = torch.arange(TOKENS, dtype=torch.float32).unsqueeze(1)
    tensors = [(1000 * n + rows).expand(-1, WIDTH).clone().unsqueeze(0) for n in range(len(SITES))]
    tables: Any = SimpleNamespace(banks=banks, tensors=tensors)
    room = Room(most)
    return Captures(tables, room), room, tensors


def held(live: list[Kept]) -> int:
    """Bytes of values that the requests keep in memory."""
    chunks = {id(part.chunk): part.chunk for kept in live for part in kept.parts}
    return sum(v.numel() * v.element_size() for chunk in chunks.values() for v in chunk.values.values())


STEPS = st.lists(st.tuples(st.lists(st.integers(0, 3), min_size=4, max_size=4), st.sets(st.integers(0, 3))), max_size=8)


@given(STEPS, st.lists(st.sets(st.integers(0, 2), min_size=1), min_size=4, max_size=4), st.integers(0, 40))
def test_the_room_is_exact(steps: list[tuple[list[int], set[int]]], asked: list[set[int]], rows: int) -> None:
    captures, room, _ = made(rows * ROW)
    place = [0] * 4
    wanted = {i: [1000 * s for s in sorted(sites)] for i, sites in enumerate(asked)}
    for counts, ended in steps:
        for i in range(4):
            captures.begin(str(i), CaptureRequest(str(i), tuple(SITES[s] for s in sorted(asked[i]))))
        spans = np.array([place, counts, [64] * 4], np.int32)
        captures.plan([str(i) for i in range(4)], *spans)
        positions = torch.tensor([place[i] + k for i in range(4) for k in range(counts[i])] + [0] * 16)
        captures.collect(positions.int(), positions)
        place = [p + c for p, c in zip(place, counts, strict=True)]
        live = list(captures._live.values())
        assert room.used == held(live) <= rows * ROW
        for kept in captures.finish([str(i) for i in ended]):
            found, i = joined(kept), int(kept.request)
            assert len(found["positions"]) + kept.dropped == place[i]
            for base, site in zip(wanted[i], kept.asked.sites, strict=True):
                values = found[f"layers.{site[1]}.post_block"]
                assert values.numel() == 0 or ((values >= base) & (values < base + TOKENS)).all()
            room.let_go(kept)
            place[i] = 0
        assert room.used == held(list(captures._live.values()))
    for kept in captures.finish([str(i) for i in range(4)]):
        room.let_go(kept)
    assert room.used == 0
