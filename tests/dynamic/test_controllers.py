"""Controllers: what they may do wrong without harm, and what `SteeringController` keeps for its one method."""

import logging
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile.dynamic.actions import Action, ClearOverride, SetOverride, SetScale
from steer_compile.dynamic.controller import MOST_ACTIONS, Controller
from steer_compile.dynamic.dynamics import Limits
from steer_compile.dynamic.latches import Latches
from steer_compile.dynamic.steering_controller import Decision, RequestState, SteeringController, Values
from steer_compile.dynamic.views import RequestView, StepView
from steer_compile.errors import SpecError, UnknownName
from tests.dynamic._world import SITE, WIDTH, World, unit

ON, OFF = [2.0, 0, 0, 0], [0.0] * 4
PROBE = torch.eye(WIDTH)[0]
Rule = Callable[[RequestView, Values, RequestState], Decision | None]


class By(SteeringController):
    """Decides by a function."""

    def __init__(self, rule: Rule, name: str = "by", **options: Any) -> None:
        super().__init__(name, {SITE: PROBE}, **options)
        self.rule = rule
        self.asked: list[list[Action]] = []

    def decide(self, request: RequestView, values: Values, state: RequestState) -> Decision | None:
        return self.rule(request, values, state)

    def on_step(self, view: StepView) -> Iterable[Action]:
        self.asked.append(list(super().on_step(view)))
        return self.asked[-1]


def fires(latch: str = "no", **fields: Any) -> Rule:
    def rule(request: RequestView, values: Values, state: RequestState) -> Decision | None:
        score = values.score(SITE)
        return Decision(unit(1), score=score, latch=latch, **fields) if score > 1.0 else None

    return rule


def test_an_override_follows_the_score_and_is_asked_for_only_when_that_changes() -> None:
    world = World()
    controller = By(fires())
    world.dynamic.add(controller)
    for values in ({"a": ON, "b": OFF}, {"a": ON, "b": OFF}, {"a": OFF, "b": ON}, {"a": OFF, "b": ON}, {"b": OFF}):
        world.step(values)
    kinds = [[(type(a), a.request) for a in asked] for asked in controller.asked]  # type: ignore[union-attr]
    assert kinds == [
        [(SetOverride, "a")], [], [(ClearOverride, "a"), (SetOverride, "b")], [], [(ClearOverride, "b")],
    ]  # fmt: skip
    world.step({})
    assert world.routes == {}
    events = world.dynamic.status()["events"]
    assert [(e["step"], e["request"], e["score"], e["gain"]) for e in events][:3] == [
        (1, "a", 2.0, 1.0), (2, "a", 2.0, 1.0), (3, "a", None, 0.0),
    ]  # fmt: skip


def test_a_gain_alone_changes_no_vector() -> None:
    world, decision = World(), Decision(unit(1))
    controller = By(lambda r, v, s: decision.at(None, v.score(SITE)))
    world.dynamic.add(controller)
    for size in (1.0, 3.0, 3.0, 0.0):
        world.step({"a": [size, 0, 0, 0]})
        world.dynamic.begin()
        assert world.of("a") == [0, size, 0, 0]
    assert [[type(a) for a in asked] for asked in controller.asked] == [[SetOverride], [SetScale], [], [SetScale]]


def test_a_request_in_prefill_is_asked_for_when_its_next_token_is_decoded() -> None:
    world = World()
    controller = By(fires())
    world.dynamic.add(controller)
    world.dynamic.begin()
    rows = torch.tensor([ON, ON, ON])
    for start, asked in ((0, 0), (3, 1)):
        view = StepView(1, {SITE: rows}, {}, (RequestView("a", 0, 3, start, "prefill", 6),))
        world.dynamic.end(view)
        assert len(controller.asked[-1]) == asked


@pytest.mark.parametrize("latch", ["request", "conversation"])
def test_latches(latch: str) -> None:
    world = World(overrides=4)
    world.phases |= {name: "decode" for name in ("a@x", "b@x", "c@y")}
    calls: list[str] = []

    def rule(request: RequestView, values: Values, state: RequestState) -> Decision | None:
        calls.append(request.request)
        return fires(latch)(request, values, state)

    controller = By(rule)
    world.dynamic.add(controller)
    world.step({"a@x": ON})
    world.step({"a@x": OFF})
    world.step({"a@x": OFF})
    assert calls == ["a@x"]  # latched: not asked again
    assert world.of("a@x") == [0, 1, 0, 0]
    world.dynamic.interrupt(["a@x"])
    world.step({"a@x": OFF})
    world.dynamic.begin()
    assert world.of("a@x") == [0, 1, 0, 0]
    world.dynamic.finish(["a@x"])
    world.step({"b@x": OFF, "c@y": OFF})
    world.dynamic.begin()
    assert world.of("b@x") == ([0, 1, 0, 0] if latch == "conversation" else [0] * 4)
    assert world.of("c@y") == [0] * 4


def test_what_is_rejected_is_asked_for_again_later() -> None:
    world = World(overrides=1)
    world.dynamic.submit(SetOverride("b", unit(0)))
    controller = By(fires())
    world.dynamic.add(controller)
    for _ in range(12):
        world.step({"a": ON})
    tries = [i for i, asked in enumerate(controller.asked) if asked]
    assert tries == [0, 2, 6]  # the pauses double
    world.dynamic.submit(ClearOverride("b"))
    for _ in range(10):
        world.step({"a": ON})
    assert world.of("a") == [0, 1, 0, 0]


class Raises(Controller):
    name = "raises"

    def on_step(self, view: StepView) -> Iterable[Action]:
        yield SetOverride("b", unit(3))
        raise RuntimeError("out of ideas")


class Wrong(Controller):
    name = "wrong"

    def on_step(self, view: StepView) -> Iterable[Action]:
        return 3  # type: ignore[return-value]


class Endless(Controller):
    name = "endless"

    def on_step(self, view: StepView) -> Iterable[Action]:
        while True:
            yield ClearOverride("b")


class Slow(Controller):
    name = "slow"

    def on_step(self, view: StepView) -> Iterable[Action]:
        time.sleep(0.003)
        return [SetOverride("c", unit(2))]


def test_controllers_that_misbehave_are_reported_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    world = World(limits=Limits(budget_ms=1.0))
    for controller in (Raises(), Wrong(), By(fires()), Endless(), Slow()):
        world.dynamic.add(controller)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            world.step({"a": ON})
    world.dynamic.begin()
    assert (world.of("a"), world.of("b"), world.of("c")) == ([0, 1, 0, 0], [0] * 4, [0, 0, 1, 0])
    status = world.dynamic.status()
    assert {name: data["errors"] for name, data in status["controllers"].items()} == {
        "raises": 3, "wrong": 3, "by": 0, "endless": 3, "slow": 0,
    }  # fmt: skip
    assert "RuntimeError: out of ideas (on_step, line" in status["controllers"]["raises"]["last_errors"][0]
    assert status["controllers"]["slow"]["late"] == 3
    assert status["controllers"]["slow"]["fire_rate"] == 1.0
    assert status["actions"]["discarded"] == {"endless": 3 * (MOST_ACTIONS + 1), "raises": 3, "wrong": 0}
    assert [text for text in caplog.messages if "'slow' took" in text][1:] == []


def test_a_decision_that_raises_discards_the_step_and_keeps_the_state() -> None:
    world = World()

    def rule(request: RequestView, values: Values, state: RequestState) -> Decision | None:
        if values.score(SITE) < 0:
            raise ValueError("negative")
        return Decision(unit(1))

    controller = By(rule)
    world.dynamic.add(controller)
    world.step({"a": ON, "b": [-1.0, 0, 0, 0]})
    world.step({"a": ON, "b": ON})
    world.dynamic.begin()
    assert (world.of("a"), world.of("b")) == ([0, 1, 0, 0], [0, 1, 0, 0])
    assert world.dynamic.status()["controllers"]["by"]["errors"] == 1


def test_a_probe_of_another_width_or_site_is_reported() -> None:
    for probes, text in (
        ({SITE: torch.ones(3)}, "has 3 numbers but the site is 4 wide"),
        ({("post_block", 2): PROBE}, "layers.2.post_block is not captured, and layers.1.post_block are"),
    ):
        world = World()
        controller = By(fires())
        controller.bank = type(controller.bank)({site: [probe] for site, probe in probes.items()})
        world.dynamic.add(controller)
        world.step({"a": ON})
        (error,) = world.dynamic.status()["controllers"]["by"]["last_errors"]
        assert text in error


def test_names_of_controllers() -> None:
    world = World()
    world.dynamic.add(Slow())
    with pytest.raises(SpecError, match="a controller named 'slow' runs already"):
        world.dynamic.add(Slow())
    with pytest.raises(UnknownName, match="no controller is named 'fast'; there are: slow"):
        world.dynamic.remove("fast")
    with pytest.raises(SpecError, match="a str is no controller"):
        world.dynamic.add("slow")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="latch='ever' is unknown; choose one of no, request, conversation"):
        Decision(latch="ever")


@pytest.mark.behaviour(71)
@given(
    st.integers(1, 4),
    st.integers(1, 60),
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(1, 40), st.booleans()), max_size=60),
)
def test_latches_keep_to_their_bounds_and_evict_what_was_not_used_for_longest(
    most: int, most_bytes: int, calls: list[tuple[str, int, bool]]
) -> None:
    latches: Latches[int] = Latches(most, most_bytes)
    model: list[tuple[str, int]] = []
    for name, size, read in calls:
        if read:
            found = latches.get(name)
            assert found == dict(model).get(name)
            model = [m for m in model if m[0] != name] + [m for m in model if m[0] == name]
            continue
        fits = latches.put(name, size, size)
        assert fits == (size <= most_bytes)
        model = [m for m in model if m[0] != name] + ([(name, size)] if fits else [])
        while len(model) > most or sum(s for _, s in model) > most_bytes:
            model.pop(0)
        assert list(latches) == [m[0] for m in model]
        assert latches.bytes == sum(s for _, s in model)


def test_latches_without_room_are_refused() -> None:
    with pytest.raises(SpecError, match="room for 0 conversations and 1 bytes"):
        Latches(0, 1)


def test_what_was_asked_for_a_request_that_ended_is_forgotten() -> None:
    world = World()
    world.dynamic.add(By(fires()))
    world.step({"a": ON, "b": ON})
    world.dynamic.finish(["a"])
    world.step({"b": ON})
    assert set(world.routes) == {"b"}
    world.dynamic.interrupt(["b"])
    world.step({"b": ON})
    world.dynamic.begin()
    assert set(world.routes) == {"b"}
    assert world.dynamic.status()["actions"]["rejected"] == {}
