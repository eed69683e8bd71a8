"""The queue: order, bounds, threads and time; the counters beside it."""

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_compile.dynamic.actions import ClearOverride, SetOverride, SetScale
from steer_compile.dynamic.counts import MOST_SOURCES, OTHERS, Counts
from steer_compile.dynamic.dynamics import Limits
from steer_compile.dynamic.queue import ActionQueue
from steer_compile.errors import SpecError
from tests.dynamic._world import World, unit


@pytest.mark.behaviour(62)
@given(capacity=st.integers(1, 5), submits=st.lists(st.integers(0, 9), max_size=30), every=st.integers(1, 8))
def test_what_is_drained_is_what_had_room_in_order(capacity: int, submits: list[int], every: int) -> None:
    counts = Counts()
    queue, expected, drained, dropped = ActionQueue(capacity, counts), list[int](), list[int](), 0
    waiting: list[int] = []
    for i, number in enumerate(submits):
        room = len(waiting) < capacity
        assert queue.submit({"number": number}, "s") is room
        waiting += [number] if room else []
        dropped += not room
        if i % every == 0:
            drained += [item.given["number"] for item in queue.drain()]  # type: ignore[index]
            expected, waiting = expected + waiting, []
    assert drained == expected
    assert counts.data().get("dropped", {}).get("s", 0) == dropped
    assert len(queue) == len(waiting)


def test_several_are_taken_together_or_not_at_all() -> None:
    queue = ActionQueue(3, Counts())
    assert queue.submit_all([ClearOverride("a"), ClearOverride("b")], group="g")
    assert not queue.submit_all([ClearOverride("c"), ClearOverride("d")])
    assert [(item.given.request, item.group) for item in queue.drain()] == [("a", "g"), ("b", "g")]  # type: ignore[attr-defined]


@pytest.mark.behaviour(62)
def test_submits_of_many_threads_arrive_while_the_steps_go_on() -> None:
    world = World(limits=Limits(queue=100_000))
    threads, each = 8, 300

    def work(number: int) -> None:
        for i in range(each):
            assert world.dynamic.submit(SetScale(1.0 + i, "a"), f"thread {number}")
            world.dynamic.submit({"kind": "nonsense", "at": i}, f"thread {number}")
            world.dynamic.status()

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        world.step({"a": [0.0] * 4})
    world.step()
    status = world.dynamic.status()
    assert status["actions"]["applied"] == {f"thread {n}": each for n in range(threads)}
    assert status["actions"]["rejected"] == {f"thread {n}": each for n in range(threads)}
    assert status["queue"]["waiting"] == 0
    assert world.dynamic.journal.applied == threads * each


def test_a_submit_takes_microseconds_and_never_waits_for_a_step() -> None:
    world = World(limits=Limits(queue=20_000))
    action = SetOverride("a", unit(0))
    best = float("inf")
    for _ in range(20):
        begun = time.perf_counter()
        for _ in range(500):
            world.dynamic.submit(action)
        best = min(best, (time.perf_counter() - begun) / 500)
        world.dynamic.queue.drain()
    assert best < 5e-6
    held = world.registry._lock
    done = threading.Event()

    def work() -> None:
        world.dynamic.submit(action)
        world.dynamic.status()
        done.set()

    with held:  # as a step does while it applies what was asked for
        thread = threading.Thread(target=work)
        thread.start()
        assert done.wait(10.0)
    thread.join()


def test_sources_are_bounded() -> None:
    counts = Counts()
    for i in range(3 * MOST_SOURCES):
        counts.add("applied", f"source {i}")
    found = counts.data()["applied"]
    assert len(found) == MOST_SOURCES + 1
    assert found[OTHERS] == 2 * MOST_SOURCES


def test_a_queue_without_room_is_refused() -> None:
    with pytest.raises(SpecError, match="capacity=0; give at least 1"):
        ActionQueue(0, Counts())
