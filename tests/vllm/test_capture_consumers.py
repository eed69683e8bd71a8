"""Consumers of an engine, without an engine: what they get of requests, and what becomes of it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer_compile.capture.consumer import Meta
from steer_compile.capture.read import read
from steer_compile.capture.reduce import Reduction
from steer_compile.errors import SteerError, UnknownName
from steer_compile.vllm.capture_consumers import Consumers, consumer_specs
from steer_compile.vllm.capture_files import worst
from steer_compile.vllm.capture_requests import CaptureRequest
from steer_compile.vllm.captures import Captures, Kept
from tests.vllm.test_rooms import SITES, made


def specs(root: Path) -> Any:
    return consumer_specs({"acts": {"consumer": "files", "options": {"root": str(root)}}, "seen": {"consumer": "log"}})


def kept_of(captures: Captures, asked: CaptureRequest, steps: list[tuple[int, int]]) -> Kept:
    """What a request keeps of steps: first position and number of tokens."""
    captures.begin(asked.name, asked)
    for number, (start, count) in enumerate(steps):
        span = np.array([[start], [count], [4]], np.int32)
        captures.plan([asked.name], span[0], span[1], span[2], number)
        positions = torch.arange(start, start + count)
        captures.collect(positions + 100, positions)
    (kept,) = captures.finish([asked.name])
    return kept


def settled(consumers: Consumers, consumer: str, name: str) -> dict[str, str]:
    end = time.monotonic() + 20
    while (found := consumers.results(consumer, name))["status"] == "pending" and time.monotonic() < end:
        time.sleep(0.01)
    return found


def test_rows_go_to_the_consumer_that_is_asked_for(tmp_path: Path) -> None:
    """Positions 2 and 3 are computed twice: the later rows count, with the number of the later forward."""
    captures, room, _ = made(1 << 20)
    consumers = Consumers(specs(tmp_path), Meta("tiny", "digest"))
    kept = kept_of(captures, CaptureRequest("a-1", SITES[:2], to="acts", tag="train"), [(0, 4), (2, 2), (4, 1)])
    consumers.put(kept)
    room.let_go(kept)
    assert settled(consumers, "acts", "a-1")["status"] == "ok"
    found = read(tmp_path)
    rows, info = found.rows, found.requests["a-1"]
    assert rows.positions.tolist() == [0, 1, 2, 3, 4]
    assert rows.token_ids.tolist() == [100, 101, 102, 103, 104]
    assert rows.steps.tolist() == [0, 0, 1, 1, 2]
    assert set(rows.values) == {"layers.0.post_block", "layers.1.post_block"}
    assert (info.tag, info.model, info.spec, info.prompt_length) == ("train", "tiny", "digest", 4)
    assert room.used == 0
    consumers.close()


def test_a_mean_has_its_number_of_tokens(tmp_path: Path) -> None:
    captures, _, _ = made(1 << 20)
    consumers = Consumers(specs(tmp_path))
    consumers.put(
        kept_of(captures, CaptureRequest("m", SITES[:1], keep=Reduction("mean"), to="acts"), [(0, 4), (4, 2)])
    )
    assert settled(consumers, "acts", "m")["status"] == "ok"
    values = read(tmp_path).rows.values
    assert values["layers.0.post_block.mean.tokens"].tolist() == [6]
    assert values["layers.0.post_block.mean"].shape == (1, 4)
    consumers.close()


def test_rows_without_room_make_it_partial(tmp_path: Path) -> None:
    captures, _, _ = made(4 * 16)
    consumers = Consumers(specs(tmp_path))
    consumers.put(kept_of(captures, CaptureRequest("a", SITES[:1], to="acts"), [(0, 4), (4, 1)]))
    found = settled(consumers, "acts", "a")
    assert (found["status"], found["text"][:16]) == ("partial", "1 rows were drop")
    consumers.close()


def test_what_was_not_taken_is_an_error_and_what_is_unknown_is_told(tmp_path: Path) -> None:
    captures, _, _ = made(1 << 20)
    consumers = Consumers(specs(tmp_path))
    assert consumers.results("acts", "later")["status"] == "pending"
    with pytest.raises(UnknownName, match="no consumer 'other'; this engine has acts, seen"):
        consumers.results("other", "a")
    consumers.close()
    kept = kept_of(captures, CaptureRequest("late", SITES[:1], to="acts"), [(0, 4)])
    with pytest.raises(SteerError, match="closed") as raised:
        consumers.put(kept)
    consumers.refused(kept, raised.value)
    assert consumers.results("acts", "late")["status"] == "error"
    assert "closed" in consumers.results("acts", "late")["text"]


def test_the_worst_of_several_stages_counts() -> None:
    ok, partial = ({"status": s, "text": s, "place": f"/{s}"} for s in ("ok", "partial"))
    pending, error = ({"status": s, "text": s, "place": ""} for s in ("pending", "error"))
    assert worst([ok, partial]) == {"status": "partial", "text": "partial", "place": "/ok\n/partial"}
    assert worst([partial, pending])["status"] == "pending"
    assert worst([ok, pending, error])["status"] == "error"


@pytest.mark.parametrize(
    "given",
    [
        [],
        {"a": {}},
        {"a": {"consumer": 3}},
        {"a": {"consumer": "log", "level": 3}},
        {"a": {"consumer": "log", "options": []}},
        {"a": {"consumer": "log", "options": {"level": {1, 2}}}},
        {3: {"consumer": "log"}},
        {str(n): {"consumer": "log"} for n in range(17)},
    ],
)
def test_specs_that_cannot_be(given: Any) -> None:
    with pytest.raises(SteerError):
        consumer_specs(given)
