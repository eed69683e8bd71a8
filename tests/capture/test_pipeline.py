"""The pipeline: order, bounds and policies, results by request and consumer, isolation, shutdown."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer_compile.capture.consumer import Began, Consumer, Ended, make_consumer
from steer_compile.capture.consumers.callback import CallbackConsumer
from steer_compile.capture.consumers.memory import MemoryConsumer
from steer_compile.capture.pipeline import Limits, Pipeline, StepRows
from steer_compile.capture.rows import Rows
from steer_compile.errors import CaptureError, UnknownName
from tests.capture._gate import Gate, until
from tests.capture._rows import META, assert_rows, rows, submit

ROW = rows([("a", 0, 1)]).nbytes - 12  # the ring holds no request numbers and steps


def test_rows_arrive_with_their_labels(making: Callable[..., Pipeline]) -> None:
    memory = MemoryConsumer()
    pipeline = making({"memory": memory})
    for name in ("a", "b"):
        pipeline.begin(name, "tag", META)
    assert submit(pipeline, rows([("a", 0, 3), ("b", 2, 4)], 0)) == 5
    submit(pipeline, rows([("b", 4, 5)], 1))
    for name in ("a", "b"):
        pipeline.end(name)
        assert pipeline.wait(name)["memory"].status == "ok"
        assert pipeline.results(name)["memory"].place == name
    assert_rows(memory.get("a"), "a", range(3))
    assert_rows(memory.get("b"), "b", range(2, 5))
    assert memory.get("b").steps.tolist() == [0, 0, 1]
    status = pipeline.status()
    assert (status["submitted"], status["delivered"], status["dropped"], status["open"]) == (6, 6, 0, 0)
    assert (status["ring_bytes"], status["queue_bytes"]) == (0, 0)


def test_the_tensors_of_a_step_may_be_written_to_afterwards(making: Callable[..., Pipeline], gate: Gate) -> None:
    memory = MemoryConsumer()
    pipeline = making({"gate": gate, "memory": memory})
    pipeline.begin("a")
    part = rows([("a", 0, 4)])
    names, request, index = ["a"], part.request.numpy(), np.arange(4)
    pipeline.submit(StepRows(names, request, index, 0), part.positions, part.values, part.token_ids)
    names[0] = "b"
    request.fill(-7)
    index.fill(-7)
    for tensor in (*part.values.values(), part.positions, part.token_ids):
        tensor.fill_(-7)
    gate.open.set()
    pipeline.end("a")
    pipeline.wait("a")
    assert_rows(memory.get("a"), "a", range(4))


def test_some_rows_of_a_step_and_no_token_ids(making: Callable[..., Pipeline]) -> None:
    memory = MemoryConsumer()
    pipeline = making({"memory": memory})
    pipeline.begin("a")
    part = rows([("a", 0, 6)])
    of = StepRows(("a",), np.zeros(2, np.int32), np.array([4, 1]), 3)
    assert pipeline.submit(of, part.positions, part.values) == 2
    pipeline.end("a")
    pipeline.wait("a")
    found = memory.get("a")
    assert (found.positions.tolist(), found.token_ids.tolist(), found.steps.tolist()) == ([4, 1], [-1, -1], [3, 3])


def test_a_step_larger_than_the_ring_comes_in_pieces(making: Callable[..., Pipeline]) -> None:
    memory = MemoryConsumer()
    pipeline = making({"memory": memory}, limits=Limits(ring_bytes=640))
    pipeline.begin("a")
    assert submit(pipeline, rows([("a", 0, 50)])) == 50
    pipeline.end("a")
    assert pipeline.wait("a")["memory"].status == "ok"
    assert_rows(memory.get("a"), "a", range(50))
    small = making({"memory": MemoryConsumer()}, limits=Limits(ring_bytes=100))
    small.begin("a")
    with pytest.raises(CaptureError, match=r"one row has \d+ bytes, and the ring 100; raise Limits.ring_bytes"):
        submit(small, rows([("a", 0, 1)]))


class Failing(Consumer):
    """Raises where it is told to."""

    def __init__(self, where: str, request: str) -> None:
        self.where, self.request = where, request
        self.forgotten: list[str] = []
        self.got: list[str] = []

    def _maybe(self, where: str, *names: str) -> None:
        if where == self.where and self.request in names:
            raise RuntimeError(f"no {where} for you")

    def began(self, begun: Began) -> None:
        self._maybe("began", begun.request)

    def rows(self, rows: Rows) -> None:
        self._maybe("rows", *rows.requests)
        self.got += [rows.requests[r] for r in rows.request.tolist()]

    def ended(self, end: Ended) -> str:
        self._maybe("ended", end.request)
        return "there"

    def forget(self, request: str) -> None:
        self.forgotten.append(request)


@pytest.mark.behaviour(75)
@pytest.mark.parametrize("where", ["began", "rows", "ended"])
def test_a_consumer_that_raises_harms_nobody_else(making: Callable[..., Pipeline], where: str) -> None:
    failing, memory = Failing(where, "b"), MemoryConsumer()
    pipeline = making({"failing": failing, "memory": memory})
    for name in "abc":
        pipeline.begin(name)
    submit(pipeline, rows([("a", 0, 2)]))
    submit(pipeline, rows([("b", 0, 2)]))
    submit(pipeline, rows([("a", 2, 3), ("b", 2, 3), ("c", 0, 2)], 1))
    for name in "abc":
        pipeline.end(name)
        results = pipeline.wait(name)
        assert results["memory"].status == "ok"
        if name == "b":
            assert results["failing"].status == "error"
            assert results["failing"].text == f"RuntimeError: no {where} for you"
        else:
            assert (results["failing"].status, results["failing"].place) == ("ok", "there")
    assert_rows(memory.get("b"), "b", range(3))
    assert failing.forgotten == ["b"]
    assert failing.got.count("a") == 3
    assert failing.got.count("c") == 2
    assert pipeline.status()["errors"] == {"failing": 1, "memory": 0}


def test_asynchronous_consumers_are_awaited_in_order(making: Callable[..., Pipeline]) -> None:
    seen: list[object] = []

    async def on_rows(rows: Rows) -> None:
        await asyncio.sleep(0.01)
        seen.append(rows.positions.tolist())

    async def on_ended(end: Ended) -> str:
        await asyncio.sleep(0)
        seen.append(end.request)
        if end.request == "b":
            raise LookupError("gone")
        return "sent"

    pipeline = making({"stream": CallbackConsumer(on_rows, on_ended)})
    for name in "ab":
        pipeline.begin(name)
        submit(pipeline, rows([(name, 0, 2)]))
        submit(pipeline, rows([(name, 2, 3)]))
        pipeline.end(name)
    assert pipeline.wait("b")["stream"].text == "LookupError: gone"
    assert pipeline.wait("a")["stream"].place == "sent"
    assert seen == [[0, 1], [2], "a", [0, 1], [2], "b"]


def test_results_that_come_later(making: Callable[..., Pipeline], tmp_path: Path) -> None:
    pipeline = making({"files": make_consumer("files", root=tmp_path, layout="packed")})
    pipeline.begin("a")
    submit(pipeline, rows([("a", 0, 2)]))
    pipeline.end("a")
    assert pipeline.wait("a", 0.05)["files"].status == "pending"
    pipeline.flush()
    result = pipeline.wait("a")["files"]
    assert (result.status, result.place) == ("ok", str(tmp_path / "rows.json"))
    pipeline.begin("b")
    submit(pipeline, rows([("b", 0, 2)]))
    pipeline.end("b")
    assert pipeline.close()
    assert pipeline.results("b")["files"].status == "ok"


def test_a_name_may_be_used_again(making: Callable[..., Pipeline]) -> None:
    later: list[Future[str]] = []

    def on_ended(end: Ended) -> Future[str]:
        later.append(Future())
        return later[-1]

    pipeline = making({"later": CallbackConsumer(lambda rows: None, on_ended)})
    for _ in range(2):
        pipeline.begin("a")
        with pytest.raises(CaptureError, match="request 'a' is captured already; end it, or give another name"):
            pipeline.begin("a")
        pipeline.end("a")
    until(lambda: len(later) == 2)
    later[0].set_result("first")
    assert pipeline.results("a")["later"].status == "pending"
    later[1].set_exception(OSError("full"))
    assert pipeline.wait("a")["later"].text == "full"


def test_requests_that_are_given_up(making: Callable[..., Pipeline], gate: Gate) -> None:
    gate.open.set()
    pipeline = making({"gate": gate})
    pipeline.begin("a")
    pipeline.abort("a", "it was preempted for good")
    assert pipeline.wait("a")["gate"].text == "it was preempted for good"
    assert gate.told == ["began a", "forgot a"]


def test_what_is_not_there(making: Callable[..., Pipeline]) -> None:
    pipeline = making({"memory": MemoryConsumer()}, limits=Limits(requests=2, results=2))
    for call in (pipeline.end, lambda name: submit(pipeline, rows([(name, 0, 1)]))):
        with pytest.raises(UnknownName, match="no request 'a' is being captured; there are none; begin it first"):
            call("a")
    with pytest.raises(UnknownName, match="no result of a captured request 'a' is known"):
        pipeline.wait("a")
    pipeline.begin("a")
    pipeline.begin("b")
    with pytest.raises(CaptureError, match="2 captured requests have no result yet"):
        pipeline.begin("c")
    for name in "ab":
        pipeline.end(name)
        pipeline.wait(name)
    for name in "cd":
        pipeline.begin(name)
        pipeline.end(name)
        pipeline.wait(name)
    with pytest.raises(UnknownName):
        pipeline.results("a")
    part = rows([("a", 0, 2)])
    pipeline.begin("a")
    index = np.array([0, 1])
    for words, given in (
        ("row 1 is asked for of 1", (StepRows("a", index * 0, index, 0), part.positions[:1], {})),
        ("request 1 is asked for of 1", (StepRows("a", index, index, 0), part.positions, {})),
        ("x has shape .3, 1. and positions 2 tokens", (StepRows("a", index * 0, index, 0), part.positions,
                                                        {"x": torch.zeros(3, 1)})),
    ):  # fmt: skip
        with pytest.raises(CaptureError, match=words):
            pipeline.submit(*given)
    with pytest.raises(CaptureError, match="give one for each"):
        StepRows(("a",), index, index[:1], 0)


def test_pipelines_that_cannot_be_meant(tmp_path: Path) -> None:
    memory = {"memory": MemoryConsumer()}
    (tmp_path / "file").write_text("")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("a pipeline needs consumers by name", {"consumers": {}}),
        ("a pipeline needs consumers by name", {"consumers": {"x": "memory"}}),
        ("policy='wait' is unknown; choose one of block, drop, spill", {"policy": "wait"}),
        ("policy='spill' needs a folder", {"policy": "spill"}),
        ("policy='spill' needs a folder", {"spill": tmp_path}),
        ("no folder .* can be made", {"policy": "spill", "spill": tmp_path / "file"}),
    ]
    for words, arguments in cases:
        with pytest.raises(CaptureError, match=words):
            Pipeline(**{"consumers": memory, **arguments})
    with pytest.raises(CaptureError, match="items=0 is no limit"):
        Limits(items=0)
