"""The checksum, the record, the status and its bounds."""

import json
import math
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from steer_compile import Clamp, Monitor
from steer_compile.dynamic.actions import (
    Action,
    ClearOverride,
    SetMonitor,
    SetOverride,
    SetScale,
    SetTier,
    action_from_data,
)
from steer_compile.dynamic.dynamics import Limits, as_text
from steer_compile.dynamic.journal import read_replay
from steer_compile.dynamic.steering_controller import Decision, RequestState, SteeringController, Values
from steer_compile.dynamic.views import RequestView
from steer_compile.errors import SpecError
from tests import _tree
from tests.dynamic._world import SITE, WIDTH, World, unit

PROBE = [1.0] * WIDTH
ACTIONS: list[Action] = [
    SetTier(unit(0), 0.5),
    SetTier(),
    SetOverride("a", unit(1), scale=0.3, compose=True, admitted=0.5, gain=2.0),
    SetOverride("b", monitors={SITE: Monitor(PROBE, 0.1, 3.0)}, clamps={SITE: [Clamp([0.6, 0.8, 0.0, 0.0], hi=1.0)]}),
    SetOverride("a", named=[("calm", -1.5)], expect={"calm": "x"}),
    SetScale(2.0),
    SetScale(0.1, "a"),
    SetScale(0.0, gain=True),
    SetMonitor(SITE, Monitor(PROBE, -1.0), gate_rows=True),
    SetMonitor(SITE),
    ClearOverride("a"),
]


@pytest.mark.parametrize("action", ACTIONS, ids=[f"{i} {type(a).__name__}" for i, a in enumerate(ACTIONS)])
def test_actions_are_the_same_as_plain_data(action: Action) -> None:
    again = action_from_data(json.loads(json.dumps(action.to_data())))
    assert type(again) is type(action)
    assert again == action
    assert again.digest == action.digest
    assert hash(again) == hash(action)


def test_digests_tell_actions_apart() -> None:
    assert len({action.digest for action in ACTIONS}) == len(ACTIONS)


def run(path: list[tuple[int, Action]], source: str = "operator") -> str:
    """Checksum after actions at steps."""
    world = World()
    last = max(step for step, _ in path)
    for step in range(last + 1):
        for at, action in path:
            if at == step:
                world.dynamic.submit(action, source)
        world.step()
    return world.dynamic.journal.checksum


@pytest.mark.behaviour(69)
def test_the_checksum_says_what_was_applied_when_and_in_which_order() -> None:
    first, second = SetOverride("a", unit(0)), SetOverride("b", unit(1))
    base = [(0, first), (0, second)]
    sums = {
        "base": run(base),  # type: ignore[arg-type]
        "order": run(base[::-1]),  # type: ignore[arg-type]
        "step": run([(0, first), (1, second)]),
        "content": run([(0, first), (0, SetOverride("b", unit(2)))]),
        "fewer": run([(0, first)]),
        "source": run(base, "other"),  # type: ignore[arg-type]
    }
    assert len(set(sums.values())) == len(sums)
    assert run([*base, (0, SetOverride("x", unit(0)))]) == sums["base"]
    assert World().dynamic.journal.checksum == ""


def test_the_checksum_knows_what_a_name_stood_for() -> None:
    sums = []
    for place in (0, 1, 0):
        world = World()
        world.registry.register_vectors("calm", unit(place))
        world.dynamic.submit(SetOverride("a", named="calm"))
        world.step()
        sums.append(world.dynamic.journal.checksum)
    assert sums[0] == sums[2] != sums[1]


_RANK = """
import sys
from steer_compile.dynamic.steering_controller import Decision, SteeringController
from steer_compile.dynamic.actions import SetScale
from tests.dynamic._world import SITE, World, unit
import torch

class Gate(SteeringController):
    def decide(self, request, values, state):
        score = values.score(SITE)
        return Decision(unit(1), gain=abs(score), score=score) if score > 0 else None

world = World(overrides=2)
world.dynamic.add(Gate("gate", {SITE: torch.eye(4)[0]}))
for step in range(50):
    names = [name for name in {"a", "b", "c"} if (step // 7 + ord(name)) % 3]
    world.step({name: [(step * ord(name)) % 11 - 5.0, 0, 0, 0] for name in sorted(names)})
    if step == 30 and sys.argv[1] == "planted":
        world.dynamic.submit(SetScale(1.0000001))
    if step % 10 == 9:
        print(world.dynamic.journal.checksum)
"""


@pytest.mark.behaviour(61, 69)
def test_ranks_agree_and_a_divergence_shows() -> None:
    environment = {**os.environ, "PYTHONPATH": str(_tree.ROOT), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _RANK, kind], env={**environment, "PYTHONHASHSEED": seed}, stdout=subprocess.PIPE,
            text=True, cwd=_tree.ROOT,
        )
        for kind, seed in (("same", "1"), ("same", "2"), ("planted", "1"))
    ]  # fmt: skip
    first, second, planted = ([*rank.communicate()[0].split()] for rank in ranks)
    assert len(first) == 5
    assert first == second
    assert first[:3] == planted[:3]
    assert first[3] != planted[3]


def test_a_record_reads_back_and_says_when_it_was_cut_off(tmp_path: Path) -> None:
    world = World()
    world.registry.register_vectors("calm", unit(2))
    path = tmp_path / "folder" / "run.jsonl"
    world.step()
    world.dynamic.record(path)
    with pytest.raises(SpecError, match="is written already; stop that first"):
        world.dynamic.record(path)
    world.dynamic.submit(SetOverride("a", named="calm"))
    world.dynamic.submit(SetOverride("x"))
    world.step()
    world.dynamic.submit(SetScale(2.0, "a"))
    world.step()
    world.dynamic.stop_recording()
    replay = read_replay(path)
    digest = world.registry.names["calm"]
    assert [(type(a).__name__, s) for a, s in replay.at(0)] == [("SetOverride", "operator")]
    assert replay.at(0)[0][0].expect == (("calm", digest),)  # type: ignore[union-attr]
    assert replay.at(1) == [(SetScale(2.0, "a"), "operator")]
    assert (replay.last, replay.at(9)) == (1, ())
    world.dynamic.record(path, most_bytes=500)
    for _ in range(10):
        world.dynamic.submit(SetOverride("a", unit(0)))
        world.step()
    world.dynamic.stop_recording()
    assert path.stat().st_size < 600
    with pytest.raises(SpecError, match="as it became too large; record with more most_bytes"):
        read_replay(path)
    path.write_text("{}\n")
    with pytest.raises(SpecError, match="begins with"):
        read_replay(path)
    path.write_text("not json\n")
    with pytest.raises(SpecError, match="line 1 of .* is not JSON"):
        read_replay(path)


def test_the_status_is_plain_and_bounded() -> None:
    world = World(limits=Limits(queue=4, ring=8))
    for i in range(50):
        world.dynamic.submit(SetOverride("x", unit(0)))
        world.dynamic.submit(SetScale(float(i), "a"), "s" * (i % 3 + 1))
        world.step()
    status = json.loads(json.dumps(world.dynamic.status()))
    assert len(status["rejections"]) == 8
    assert status["actions"]["rejected"] == {"operator": 50}
    assert sum(status["actions"]["applied"].values()) == 50
    assert status["overrides"] == {"in_use": 1, "capacity": 2}
    assert status["queue"] == {"waiting": 0, "capacity": 4}
    assert (status["step"], len(status["checksum"])) == (50, 32)


def test_the_status_as_prometheus_text() -> None:
    pytest.importorskip("prometheus_client")
    world = World()
    world.dynamic.add(Wobble())
    world.dynamic.submit(SetOverride("a", unit(0)), 'an "odd" source')
    world.step({"b": [1.0, 0, 0, 0]})
    text = as_text(world.dynamic.status())
    assert "steer_compile_dynamic_overrides 1.0" in text
    assert 'steer_compile_dynamic_actions_total{outcome="applied",source="an \\"odd\\" source"} 1.0' in text
    assert 'steer_compile_dynamic_controller_fire_rate{controller="wobble"} 1.0' in text


class Wobble(SteeringController):
    """Engages by score, with a gain that changes in each step; latches some requests, and conversations."""

    def __init__(self) -> None:
        super().__init__("wobble", {SITE: unit(0)["post_block"][1]})

    def decide(self, request: RequestView, values: Values, state: RequestState) -> Decision | None:
        score = values.score(SITE)
        state.data["sum"] = state.data.get("sum", 0.0) + score
        latch = "conversation" if score > 2.9 else "request" if score > 2.8 else "no"
        return Decision(unit(1), gain=abs(state.data["sum"]), score=score, latch=latch) if score > 0 else None


def soak(steps: int) -> None:
    """Steps with requests that come, decode and go, or are preempted; what is held must not grow."""
    world = World(overrides=3, limits=Limits(queue=64, ring=32))
    world.dynamic.add(Wobble())
    world.registry.register_vectors("calm", unit(2))
    live: list[str] = []
    middle = 0

    def step(i: int) -> None:
        if i % 3 == 0:
            live.append(f"r{i}@c{i % 5000}")
            world.phases[live[-1]] = "decode"
            if i % 2:
                world.dynamic.gate(live[-1], GATES)
        if len(live) > 5:
            gone = live.pop(0)
            world.dynamic.finish([gone])
            del world.phases[gone]
        if i % 11 == 0:
            world.dynamic.interrupt(live[:2])
        world.dynamic.submit(SetScale(1.0 + i % 7, live[i % len(live)]), f"source {i % 100}")
        world.dynamic.submit({"kind": "bad", "n": i})
        world.step({name: [3 * math.sin(i + len(name)), 0, 0, 0] for name in live})

    for i in range(steps // 2):
        step(i)
    tracemalloc.start()
    for i in range(steps // 2, steps // 2 + 200):
        step(i)
    middle = tracemalloc.get_traced_memory()[0]
    for i in range(steps // 2 + 200, steps):
        step(i)
    grown = tracemalloc.get_traced_memory()[0] - middle
    tracemalloc.stop()
    assert grown < 1 << 21
    status = world.dynamic.status()
    assert status["overrides"]["in_use"] == len(world.routes) <= 3
    assert status["controllers"]["wobble"]["errors"] == 0
    assert len(world.routes) == len(set(world.routes.values()))


GATES: list[Any] = [
    {"when": "always", "apply": {"attenuate": 0.5}},
    {
        "when": {"site": "layers.1.post_block", "probe": [1.0, 0.0, 0.0, 0.0], "threshold": 2.0},
        "scope": "rest_of_conversation",
        "apply": {"add": {"named": "calm"}},
    },
]


def test_nothing_grows_with_the_requests_that_come_and_go() -> None:
    soak(2000)


@pytest.mark.slow
def test_nothing_grows_over_100_000_steps() -> None:
    soak(100_000)
