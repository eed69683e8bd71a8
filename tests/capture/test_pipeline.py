"""The pipeline: order, bounds and policies, results by request and consumer, isolation, shutdown."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer_compile.capture.consumer import Began, Consumer, Ended, make_consumer
from steer_compile.capture.consumers.callback import CallbackConsumer
from steer_compile.capture.consumers.memory import MemoryConsumer
from steer_compile.capture.pipeline import Limits, Pipeline, StepRows
from steer_compile.capture.ring import Ring
from steer_compile.capture.rows import Rows
from steer_compile.errors import CaptureError, UnknownName
from tests.capture._rows import META, assert_rows, rows, submit

ROW = rows([("a", 0, 1)]).nbytes - 12  # the ring holds no request numbers and steps


class Gate(Consumer):
    """Waits in `rows` until it is opened, and remembers what came."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.seen: list[tuple[str, int, int]] = []
        self.told: list[str] = []

    def began(self, begun: Began) -> None:
        self.told.append(f"began {begun.request}")

    def rows(self, rows: Rows) -> None:
        self.entered.set()
        assert self.open.wait(20)
        self.seen += [
            (rows.requests[r], p, s)
            for r, p, s in zip(rows.request.tolist(), rows.positions.tolist(), rows.steps.tolist(), strict=True)
        ]

    def ended(self, end: Ended) -> None:
        self.told.append(f"ended {end.request} {end.dropped}")

    def forget(self, request: str) -> None:
        self.told.append(f"forgot {request}")

    def close(self) -> None:
        self.told.append("closed")


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def making() -> Iterator[Callable[..., Pipeline]]:
    """Pipelines that are closed behind the test."""
    made: list[Pipeline] = []

    def make(*args: Any, **options: Any) -> Pipeline:
        made.append(Pipeline(*args, **options))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close(5)


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
    submit(pipeline, part)
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


def test_drop_counts_are_exact(making: Callable[..., Pipeline], gate: Gate) -> None:
    pipeline = making({"gate": gate}, policy="drop", limits=Limits(ring_bytes=4096, queue_bytes=1, items=3))
    pipeline.begin("a")
    pipeline.begin("b")
    taken = [0, 0]
    begun = time.monotonic()
    for step in range(60):
        for i, name in enumerate("ab"):
            taken[i] += submit(pipeline, rows([(name, step, step + 1)], step))
    assert time.monotonic() - begun < 5  # nobody waited
    gate.open.set()
    for i, name in enumerate("ab"):
        pipeline.end(name)
        result = pipeline.wait(name)["gate"]
        assert result.status == "partial"
        assert result.text == f"{60 - taken[i]} rows were dropped, as there was no room for them"
        assert f"ended {name} {60 - taken[i]}" in gate.told
        assert len([seen for seen in gate.seen if seen[0] == name]) == taken[i]
    status = pipeline.status()
    assert status["dropped"] == 120 - sum(taken)
    assert (status["submitted"], status["delivered"]) == (120, sum(taken))
    assert gate.seen == sorted(gate.seen, key=lambda seen: (seen[2], seen[0]))


@pytest.mark.parametrize("limits", [Limits(items=2, queue_bytes=1), Limits(ring_bytes=256, queue_bytes=1)])
def test_block_waits_and_loses_nothing(making: Callable[..., Pipeline], gate: Gate, limits: Limits) -> None:
    pipeline = making({"gate": gate}, limits=limits)
    pipeline.begin("a")
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(lambda: [submit(pipeline, rows([("a", i, i + 1)], i)) for i in range(20)])
        assert gate.entered.wait(10)
        time.sleep(0.1)
        assert not work.done()
        assert pipeline.status()["submitted"] < 20
        gate.open.set()
        assert work.result(20) == [1] * 20
    pipeline.end("a")
    assert pipeline.wait("a")["gate"].status == "ok"
    assert gate.seen == [("a", i, i) for i in range(20)]


def test_spilled_rows_come_back_in_order(making: Callable[..., Pipeline], gate: Gate, tmp_path: Path) -> None:
    memory = MemoryConsumer()
    pipeline = making(
        {"gate": gate, "memory": memory}, policy="spill", spill=tmp_path, limits=Limits(items=4, queue_bytes=300)
    )
    pipeline.begin("a")
    for i in range(40):
        submit(pipeline, rows([("a", i, i + 1)], i))
    _until(lambda: pipeline.status()["ring_bytes"] == 0)
    status = pipeline.status()
    assert status["spilled"] > 30
    assert status["queue_bytes"] <= 300
    assert status["spill_bytes"] == 4096 * status["spilled"]
    assert len(list(tmp_path.rglob("*.safetensors"))) == status["spilled"]
    gate.open.set()
    pipeline.end("a")
    assert pipeline.wait("a")["memory"].status == "ok"
    assert gate.seen == [("a", i, i) for i in range(40)]
    assert_rows(memory.get("a"), "a", range(40))
    assert pipeline.close()
    assert list(tmp_path.iterdir()) == []


def test_beyond_its_cap_spill_blocks(making: Callable[..., Pipeline], gate: Gate, tmp_path: Path) -> None:
    limits = Limits(ring_bytes=512, items=2, queue_bytes=1, spill_bytes=3 * 4096)
    pipeline = making({"gate": gate}, policy="spill", spill=tmp_path, limits=limits)
    pipeline.begin("a")
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(lambda: [submit(pipeline, rows([("a", i, i + 1)], i)) for i in range(20)])
        _until(lambda: pipeline.status()["spilled"] == 3)
        time.sleep(0.1)
        assert not work.done()
        assert pipeline.status()["spilled"] == 3
        gate.open.set()
        work.result(20)
    pipeline.end("a")
    assert pipeline.wait("a")["gate"].status == "ok"
    assert gate.seen == [("a", i, i) for i in range(20)]


def test_a_spill_that_is_lost_is_counted(making: Callable[..., Pipeline], gate: Gate, tmp_path: Path) -> None:
    pipeline = making({"gate": gate}, policy="spill", spill=tmp_path, limits=Limits(queue_bytes=1))
    pipeline.begin("a")
    for i in range(4):
        submit(pipeline, rows([("a", i, i + 1)], i))
    _until(lambda: pipeline.status()["ring_bytes"] == 0)
    lost = sorted(tmp_path.rglob("*.safetensors"))
    lost[0].write_bytes(b"")
    gate.open.set()
    pipeline.end("a")
    assert pipeline.wait("a")["gate"].status == "partial"
    assert pipeline.status()["dropped"] == 1
    assert len(gate.seen) == 3


def test_what_a_killed_process_spilled_is_swept(making: Callable[..., Pipeline], tmp_path: Path) -> None:
    stale = tmp_path / f".steer-compile-spill-{'0' * 32}"
    stale.mkdir()
    (stale / "1.safetensors").write_bytes(b"x")
    (tmp_path / "other").mkdir()
    one = making({"memory": MemoryConsumer()}, policy="spill", spill=tmp_path)
    two = making({"memory": MemoryConsumer()}, policy="spill", spill=tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.name.startswith(".")]) == 2
    assert not stale.exists()
    one.close()
    two.close()
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


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
    _until(lambda: len(later) == 2)
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
    for words, arguments in (
        ("a pipeline needs consumers by name", {"consumers": {}}),
        ("a pipeline needs consumers by name", {"consumers": {"x": "memory"}}),
        ("policy='wait' is unknown; choose one of block, drop, spill", {"policy": "wait"}),
        ("policy='spill' needs a folder", {"policy": "spill"}),
        ("policy='spill' needs a folder", {"spill": tmp_path}),
        ("no folder .* can be made", {"policy": "spill", "spill": tmp_path / "file"}),
    ):
        with pytest.raises(CaptureError, match=words):
            Pipeline(**{"consumers": memory, **arguments})
    with pytest.raises(CaptureError, match="items=0 is no limit"):
        Limits(items=0)


def test_closing_ends_what_is_open_and_refuses_more(making: Callable[..., Pipeline], gate: Gate) -> None:
    gate.open.set()
    pipeline = making({"gate": gate})
    for name in "ab":
        pipeline.begin(name)
        submit(pipeline, rows([(name, 0, 1)]))
    pipeline.end("a")
    with pipeline:
        pass
    assert pipeline.close()
    assert pipeline.results("a")["gate"].status == "ok"
    assert pipeline.results("b")["gate"].text == "the capture pipeline was closed before the request ended"
    assert gate.told[-2:] == ["forgot b", "closed"]
    for call in (lambda: pipeline.begin("c"), lambda: submit(pipeline, rows([("a", 0, 1)])), pipeline.flush):
        with pytest.raises(CaptureError, match="the capture pipeline is closed; make a new one"):
            call()


def test_closing_takes_no_longer_than_it_may(gate: Gate) -> None:
    pipeline = Pipeline({"gate": gate}, limits=Limits(ring_bytes=256, queue_bytes=1))
    pipeline.begin("a")
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(submit, pipeline, rows([("a", 0, 10)]))
        assert gate.entered.wait(10)
        begun = time.monotonic()
        assert not pipeline.close(0.3)
        assert time.monotonic() - begun < 3
        assert "not kept within 0.3 s" in pipeline.results("a")["gate"].text
        assert 0 < work.result(10) < 10  # the forward goes on
    gate.open.set()
    _until(pipeline.close)


def test_many_threads(making: Callable[..., Pipeline]) -> None:
    memory = MemoryConsumer()
    pipeline = making({"memory": memory}, limits=Limits(ring_bytes=2048, queue_bytes=2048, items=5))

    def one(name: str) -> str:
        for turn in range(3):
            pipeline.begin(f"{name}{turn}")
            for i in range(20):
                submit(pipeline, rows([(f"{name}{turn}", i, i + 1)], i))
            pipeline.end(f"{name}{turn}")
        return pipeline.wait(f"{name}2")["memory"].status

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, "abcd")) == ["ok"] * 4
    for name in "abcd":
        assert_rows(memory.get(f"{name}2"), f"{name}2", range(20))


def test_rows_are_delivered_when_the_process_ends(tmp_path: Path) -> None:
    program = f"""
import sys
sys.path.insert(0, {os.getcwd()!r})
from steer_compile.capture.consumer import make_consumer
from steer_compile.capture.pipeline import Pipeline
from tests.capture._rows import rows, submit
pipeline = Pipeline({{"files": make_consumer("files", root={str(tmp_path)!r}, layout="packed")}})
pipeline.begin("a")
submit(pipeline, rows([("a", 0, 4)]))
pipeline.end("a")
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["rows.json", "rows.safetensors"]


def test_the_ring_hands_out_what_was_given_back() -> None:
    ring = Ring(100, False)
    spans = [ring.take(40, False), ring.take(40, False)]
    assert ring.take(40, False) is None
    ring.give()
    third = ring.take(40, False)
    assert third is not None
    assert (third.start, third.held, ring.used) == (0, 60, 100)
    assert spans[1] is not None
    assert ring.take(1, False) is None
    ring.give()
    ring.give()
    assert ring.used == 0
    assert ring.take(100, False) is not None
    ring.give()
    assert [ring.take(50, False), ring.take(50, False)] == [(0, 50, 50), (50, 100, 50)]
    ring.give()
    assert ring.take(50, False) == (0, 50, 50)  # behind one that ends where the ring does
    ring.shut()
    assert ring.take(1, True) is None


def _until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)
