"""The signature of what steers a request changes exactly when any part of it does."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_compile import Clamp, Monitor
from steer_compile.dynamic.actions import SetMonitor, SetOverride, SetScale, SetTier
from steer_compile.runtime.contents import Contents
from tests.dynamic._world import SITE, WIDTH, World, contents, unit

PROBE = [1.0] * WIDTH

Change = Callable[[World], object]
CHANGES: dict[str, list[Change]] = {
    "everyone": [
        lambda w: w.registry.clear_global(),
        lambda w: w.registry.set_global(decode=unit(0)),
        lambda w: w.registry.set_global(decode=unit(1)),
    ],
    "own": [
        lambda w: w.own.pop("a", None),
        lambda w: w.own.update(a=contents(unit(0))),
        lambda w: w.own.update(a=contents(unit(0), 2.0)),
        lambda w: w.own.update(a=Contents((), ((SITE, Monitor(PROBE)),))),
        lambda w: w.own.update(a=Contents((), ((("post_block", 2), Monitor(PROBE)),))),
        lambda w: w.own.update(a=Contents((), ((SITE, Monitor(PROBE)), (("post_block", 2), Monitor(PROBE))))),
        lambda w: w.own.update(a=Contents((), (), ((SITE, (Clamp(PROBE, 0.0),)),))),
    ],
    "scale": [lambda w, s=s: do(w, SetScale(s)) for s in (1.0, 0.5, 2.0)],  # type: ignore[misc]
    "tier": [lambda w, v=v: do(w, SetTier(v, 1.0)) for v in (None, unit(0), unit(1))],  # type: ignore[misc]
    "gain": [lambda w, s=s: do(w, SetScale(s, gain=True)) for s in (1.0, 3.0)],  # type: ignore[misc]
    "monitor": [
        lambda w: do(w, SetMonitor(SITE)),
        lambda w: do(w, SetMonitor(SITE, Monitor(PROBE))),
        lambda w: do(w, SetMonitor(SITE, Monitor(PROBE), gate_rows=True)),
        lambda w: do(w, SetMonitor(SITE, Monitor(PROBE, 1.0))),
    ],
    "other monitor": [
        lambda w: do(w, SetMonitor(("post_block", 2))),
        lambda w: do(w, SetMonitor(("post_block", 2), Monitor(PROBE))),
    ],
    "override": [
        lambda w: w.dynamic.finish(["a"]),
        lambda w: do(w, SetOverride("a", unit(0))),
        lambda w: do(w, SetOverride("a", unit(1))),
        lambda w: do(w, SetOverride("a", unit(0), scale=2.0)),
        lambda w: do(w, SetOverride("a", unit(0), gain=2.0)),
        lambda w: do(w, SetOverride("a", unit(0), monitors={SITE: Monitor(PROBE)})),
        lambda w: do(w, SetOverride("a")),
    ],
}
"""By part of the state: how to set it to one of its values, the first of which is neutral."""


def do(world: World, action: Any) -> None:
    world.dynamic.ask([action], "operator")
    assert [outcome.reason for outcome in world.dynamic.begin()] == [""]


def meaning(state: dict[str, int]) -> tuple[Any, ...]:
    """The state, without what has no effect in it: own contents beside an override, the gain of an empty tier."""
    overridden, tier = state["override"], state["tier"]
    own, scale = (0, 0) if overridden else (state["own"], state["scale"])
    gain = 0 if not tier else state["gain"]
    monitors = (state["monitor"], state["other monitor"])
    if not (overridden or own or tier or state["everyone"]):
        return ()
    return (state["everyone"], own, scale, tier, gain, monitors, overridden)


steps = st.lists(st.sampled_from([(part, i) for part, each in CHANGES.items() for i in range(len(each))]), max_size=25)


@pytest.mark.behaviour(59)
@settings(max_examples=40, deadline=None)
@given(steps)
def test_it_changes_exactly_when_a_part_does(path: list[tuple[str, int]]) -> None:
    world = World()
    state = dict.fromkeys(CHANGES, 0)
    seen: dict[tuple[Any, ...], str] = {(): ""}
    for part, value in path:
        CHANGES[part][value](world)
        if part == "tier":  # which brings a gain of its own
            state["gain"] = 0
        state[part] = value
        signature = world.dynamic.signature("a")
        assert seen.setdefault(meaning(state), signature) == signature
        assert len(set(seen.values())) == len(seen)
        assert not signature or signature != world.admitted("a").digest()


@pytest.mark.behaviour(59)
def test_named_sets_count_by_their_content() -> None:
    found = []
    for place in (0, 1, 0):
        world = World()
        world.registry.register_vectors("calm", unit(place))
        do(world, SetOverride("a", named="calm"))
        found.append(world.dynamic.signature("a"))
    assert found[0] == found[2] != found[1]
    world = World()
    world.registry.register_vectors("calm", unit(0))
    do(world, SetOverride("a", named="calm"))
    before = world.dynamic.signature("a")
    world.registry.register_vectors("calm", unit(1), replace=True)
    assert world.dynamic.signature("a") == before  # its row holds what it held
    do(world, SetOverride("a", named="calm"))
    assert world.dynamic.signature("a") != before
    assert world.dynamic.signature("b") == ""
