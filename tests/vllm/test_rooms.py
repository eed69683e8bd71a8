"""Captured rows in memory, without an engine: what is charged is what is held."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile.capture.reduce import Reduction
from steer_compile.capture.selection import EVERYTHING, Selection, Top
from steer_compile.runtime.vectors import TokenSelection
from steer_compile.vllm.capture_requests import CaptureRequest
from steer_compile.vllm.captures import Captures, Kept, Room, joined

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


KEEP = {
    "rows": Reduction(),
    "norm": Reduction(["norm", "rows"]),
    "project": Reduction("project", {site: torch.eye(WIDTH)[: n + 1] for n, site in enumerate(SITES)}),
    "mean": Reduction("mean"),
}
SELECTIONS = st.builds(
    Selection,
    st.sampled_from([EVERYTHING, TokenSelection(last_prompt=True), TokenSelection(((1, 4),), generated=True)]),
    st.integers(1, 3),
    st.lists(st.integers(0, 20), max_size=3).map(tuple),
    st.sampled_from([None, Top(3, SITES[1], torch.tensor([1.0, 0.0, 0.0, 0.0]))]),
)


def possible(asked: tuple[Selection, str]) -> bool:
    """A mean is not of the tokens with the largest scores: a request for that is refused."""
    return asked[0].top is None or asked[1] != "mean"


@pytest.mark.behaviour(73)
@given(
    st.lists(st.tuples(st.lists(st.integers(0, 4), min_size=3, max_size=3), st.booleans()), min_size=1, max_size=7),
    st.lists(st.tuples(SELECTIONS, st.sampled_from(sorted(KEEP))).filter(possible), min_size=3, max_size=3),
    st.integers(0, 8),
)
def test_selections_and_reductions_in_any_steps(
    steps: list[tuple[list[int], bool]], asked: list[tuple[Selection, str]], prompt: int
) -> None:
    """Requests of staggered lengths, in an order of their own in each step, preempted now and then."""
    captures, room, tensors = made(1 << 20)
    place, seen = [0] * 3, [0] * 3
    values: list[dict[int, torch.Tensor]] = [{}, {}, {}]
    requests = [CaptureRequest(str(i), SITES, tokens, KEEP[keep]) for i, (tokens, keep) in enumerate(asked)]
    for number, (counts, preempted) in enumerate(steps):
        order = [(i + number) % 3 for i in range(3)]
        if preempted:
            place[number % 3] = 0
        if preempted or not number:
            for i in range(3):
                captures.begin(str(i), requests[i])
        owners = [i for i in order for _ in range(counts[i])]
        places = [place[i] + k for i in order for k in range(counts[i])]
        for row, (i, position) in enumerate(zip(owners, places, strict=True)):
            fresh = torch.tensor([(7 * position + 3 * i) % 5 - 2.0, position, i, 1.0])
            for n in range(len(SITES)):
                tensors[n][0, row] = fresh + n
            values[i][position] = fresh
        spans = np.array([[place[i] for i in order], [counts[i] for i in order], [prompt] * 3], np.int32)
        captures.plan([str(i) for i in order], spans[0], spans[1], spans[2], number)
        labels = torch.tensor(places, dtype=torch.int64)
        captures.collect(labels + 100, labels)
        place = [p + c for p, c in zip(place, counts, strict=True)]
        seen = [max(s, p) for s, p in zip(seen, place, strict=True)]
    for kept in captures.finish(["0", "1", "2"]):
        i = int(kept.request)
        tokens, keep = kept.asked.tokens, asked[i][1]
        wanted = np.flatnonzero(tokens.candidates(0, seen[i], prompt)).tolist()
        if tokens.top is not None:
            wanted = sorted(sorted(wanted, key=lambda p: (-float(values[i][p][0]), p))[: tokens.top.count])
        check(joined(kept), [values[i][p] for p in wanted], wanted, keep)
        assert kept.dropped == 0
        room.let_go(kept)
    assert room.used == 0


def check(found: Any, values: list[torch.Tensor], wanted: list[int], keep: str) -> None:
    if keep == "mean":
        assert found["positions"].tolist() == wanted[-1:]
        if wanted:
            assert found["tokens"].tolist() == [len(wanted)]
            torch.testing.assert_close(found["layers.2.post_block.mean"][0], torch.stack(values).mean(0) + 2)
        return
    assert found["positions"].tolist() == wanted
    assert found["token_ids"].tolist() == [p + 100 for p in wanted]
    assert len(found["steps"]) == len(wanted)
    for n, (hook, layer) in enumerate(SITES):
        rows = torch.stack(values) + n if values else torch.zeros(0, WIDTH)
        expected = {"": rows, ".norm": torch.linalg.vector_norm(rows, dim=-1), ".project": rows[:, : n + 1]}
        ends = {"rows": [""], "norm": ["", ".norm"], "project": [".project"]}[keep]
        for end in ends if values else []:
            torch.testing.assert_close(found[f"layers.{layer}.{hook}{end}"], expected[end])
