"""Whatever is sent: an action is applied or rejected, and gates are taken or refused with the package's errors."""

import copy
import math
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steer_compile import Clamp, Monitor
from steer_compile.dynamic.actions import SetMonitor, SetOverride, SetScale, SetTier
from steer_compile.errors import SteerError
from tests.dynamic._world import SITE, World, unit

PROBE = [1.0, 0.0, 0.0, 0.0]
GOOD: list[Any] = [
    SetTier(unit(0)).to_data(),
    SetOverride(
        "a", unit(1), named=["calm"], monitors={SITE: Monitor(PROBE)}, clamps={SITE: [Clamp(PROBE, 0.0)]}
    ).to_data(),
    SetScale(2.0, "a").to_data(),
    SetMonitor(SITE, Monitor(PROBE)).to_data(),
    {"kind": "clear_override", "request": "a"},
]
GATES: list[Any] = [
    {
        "when": {"site": "layers.1.post_block", "probe": PROBE, "threshold": 0.5, "sharpness": 4.0},
        "scope": "next_step",
        "apply": {"add": {"named": [["calm", 2.0]], "vectors": {"post_block": {"1": PROBE}}, "strength": 1.0}},
    },
    {
        "when": "always",
        "scope": "this_token",
        "apply": {"clamp": {"layers.1.post_block": [{"direction": PROBE, "lo": 0.0}]}},
    },
    {"when": "always", "scope": "rest_of_request", "apply": {"attenuate": 0.5}},
]
nested = st.recursive(
    st.floats() | st.text(max_size=3),
    lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=5), x, max_size=3),
    max_leaves=6,
)
special = [10**400, math.nan, -1.0, "a" * 600, {"data": "!", "dtype": "float32", "shape": [4]}, [[1.0]], object()]
simple = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=4)
odd = simple | nested | st.sampled_from(special)


@st.composite
def damaged(draw: st.DrawFn, good: list[Any]) -> Any:
    """Good data in which one or two things were exchanged, added or taken away."""
    data = copy.deepcopy(draw(st.sampled_from(good)))
    for _ in range(draw(st.integers(1, 2))):
        at: Any = data
        while isinstance(at, dict | list) and at:
            key = draw(st.sampled_from(list(at) if isinstance(at, dict) else list(range(len(at)))))
            if not isinstance(at[key], dict | list) or draw(st.booleans()):
                how = draw(st.sampled_from(["exchange", "take away", "add"]))
                if how == "exchange":
                    at[key] = draw(odd)
                elif how == "take away":
                    del at[key]
                elif isinstance(at, dict):
                    at[draw(st.text(max_size=8))] = draw(odd)
                else:
                    at.append(draw(odd))
                break
            at = at[key]
    return data


@pytest.mark.behaviour(63)
@settings(max_examples=300, deadline=None)
@given(st.lists(damaged(GOOD) | odd, min_size=1, max_size=4))
@example([{"kind": ["set_tier"]}])
def test_a_step_survives_any_action(given: list[Any]) -> None:
    world = World()
    world.registry.register_vectors("calm", unit(2))
    for item in (*given, SetScale(3.0, "b")):
        world.dynamic.submit(item)
    outcomes = world.dynamic.begin()
    assert len(outcomes) == len(given) + 1
    assert outcomes[-1].applied
    assert all(outcome.applied or outcome.reason for outcome in outcomes)
    for row in (2, *world.routes.values()):
        assert all(map(math.isfinite, world.line(row)))


@settings(max_examples=300, deadline=None)
@given(st.lists(damaged(GATES) | odd, min_size=1, max_size=3) | odd)
def test_any_gates_are_taken_or_refused(given: Any) -> None:
    world = World()
    world.registry.register_vectors("calm", unit(2))
    with suppress(SteerError):
        world.dynamic.gate("a", given)
    for _ in range(3):
        world.step({"a": [1.0, 2.0, 3.0, 4.0]})
    controllers = world.dynamic.status()["controllers"]
    assert all(data["errors"] == 0 for data in controllers.values())
