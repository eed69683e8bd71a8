"""Where there is no room, and where the pipeline ends: what waits, what is dropped, what is spilled."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from steer_compile.capture.consumers.memory import MemoryConsumer
from steer_compile.capture.pipeline import Limits, Pipeline
from steer_compile.capture.ring import Ring
from steer_compile.errors import CaptureError
from tests.capture._gate import Gate, until
from tests.capture._rows import assert_rows, rows, submit

ROW = rows([("a", 0, 1)]).nbytes - 12  # the ring holds no request numbers and steps


@pytest.mark.behaviour(76)
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


@pytest.mark.behaviour(76)
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


@pytest.mark.behaviour(76)
def test_spilled_rows_come_back_in_order(making: Callable[..., Pipeline], gate: Gate, tmp_path: Path) -> None:
    memory = MemoryConsumer()
    pipeline = making(
        {"gate": gate, "memory": memory}, policy="spill", spill=tmp_path, limits=Limits(items=4, queue_bytes=300)
    )
    pipeline.begin("a")
    for i in range(40):
        submit(pipeline, rows([("a", i, i + 1)], i))
    until(lambda: pipeline.status()["ring_bytes"] == 0)
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
    assert (pipeline.status()["queue_bytes"], pipeline.status()["spill_bytes"]) == (0, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.behaviour(76)
def test_beyond_its_cap_spill_blocks(making: Callable[..., Pipeline], gate: Gate, tmp_path: Path) -> None:
    limits = Limits(ring_bytes=512, items=2, queue_bytes=1, spill_bytes=3 * 4096)
    pipeline = making({"gate": gate}, policy="spill", spill=tmp_path, limits=limits)
    pipeline.begin("a")
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(lambda: [submit(pipeline, rows([("a", i, i + 1)], i)) for i in range(20)])
        until(lambda: pipeline.status()["spilled"] == 3)
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
    until(lambda: pipeline.status()["ring_bytes"] == 0)
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


@pytest.mark.behaviour(75)
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
    until(pipeline.close)


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
from tests.capture._gate import Gate, until
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
