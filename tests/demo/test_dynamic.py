"""The demonstrations of dynamic steering, short and uncompiled: what engages, what is held, and the pictures."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("matplotlib")

from steer_compile.demo import engage, set_point
from steer_compile.demo.dynamic_run import Stage


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads take longer than one for so small a model."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_probe_engages_only_where_it_fires() -> None:
    stage = Stage(engage.LAYERS, len(engage.PROMPTS), "eager")
    traces = {trace.name: trace for trace in engage.run(stage, 24)}
    gains = {name: [p.gain for p in trace.points["code"]] for name, trace in traces.items()}
    assert gains["unsteered"] == [0.0] * 24
    assert gains["latched"] == [engage.STRENGTH] * 24
    assert len(set(gains["proportional"])) > 3
    assert all(p.gain == 0.0 for trace in traces.values() for p in trace.points["scripture"])
    assert len({trace.texts["scripture"] for trace in traces.values()}) == 1
    below = [sum(p.projection for p in traces[name].points["code"][1:]) for name in ("latched", "unsteered")]
    assert below[0] < below[1]
    # an action acts on the step behind the one that asked: the prompt's step reads the same in all runs
    assert len({trace.points["code"][0].projection for trace in traces.values()}) == 1
    assert stage.backend.runtime.dynamic.status()["actions"]["rejected"] == {}


def test_a_closed_loop_holds_a_projection(tmp_path: Path) -> None:
    set_point.main(tmp_path, tokens=100, inner="eager")
    assert (tmp_path / "set_point.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "set_point.json").read_text())["errors"]
    for free, held in zip(found["unsteered"], found["held"], strict=True):
        assert abs(held) < 0.5 < abs(free)


def test_the_loop_does_not_wind_up_at_its_bound() -> None:
    pid, state = set_point.Pid(most=1.0), dict[str, float]()
    outputs = [pid.step(5.0, state) for _ in range(50)]
    assert outputs == [1.0] * 50
    assert pid.step(-0.1, state) < 1.0
