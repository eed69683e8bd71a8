"""Overrides: which row a request reads, what lies in it, and that a refusal changes nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_compile import Clamp, Monitor
from steer_compile.dynamic.actions import Action, ClearOverride, SetMonitor, SetOverride, SetScale, SetTier
from tests.dynamic._world import SITE, WIDTH, World, contents, unit


def apply(world: World, *actions: Any, source: str = "operator", group: str = "") -> list[str]:
    """Apply actions in front of a step; the reasons of those that were rejected, "" for the others."""
    world.dynamic.ask(actions, source, group)
    return [outcome.reason for outcome in world.dynamic.begin()]


def state(world: World) -> Any:
    tables = world.registry.tables
    sites = world.registry.sites
    pool = {name: (o.number, o.row, o.digest(), o.source) for name, o in world.dynamic.pool.live().items()}
    lines = {row: (world.line(row), tables.view("rowprobe_set", SITE)[row].tolist()) for row in world.routes.values()}
    return pool, dict(world.routes), lines, world.line(2), (sites.tier, sites.gain, dict(sites.monitors))


@pytest.mark.behaviour(65)
def test_an_override_replaces_what_a_request_brought_and_keeps_what_everyone_gets() -> None:
    world = World()
    world.registry.set_global(decode=unit(3))
    world.own["a"] = contents(unit(1))
    assert apply(world, SetOverride("a", unit(0, 2.0))) == [""]
    assert world.of("a") == [2, 0, 0, 1]
    assert world.of("b") == [0, 0, 0, 1]
    world.registry.set_global(decode=unit(2))
    assert world.of("a") == [2, 0, 1, 0]
    assert apply(world, ClearOverride("a"), ClearOverride("a")) == ["", ""]
    assert world.of("a") == [0, 0, 1, 0]
    assert world.routes == {}


@pytest.mark.behaviour(67)
def test_an_override_composes_with_what_a_request_brought() -> None:
    world = World()
    world.own["a"] = contents(unit(1), 3.0)
    assert apply(world, SetOverride("a", unit(0), compose=True, admitted=0.5)) == [""]
    assert world.of("a") == [1, 1.5, 0, 0]


@pytest.mark.behaviour(47)
def test_named_sets_of_an_override_are_those_of_the_moment() -> None:
    world = World()
    first = world.registry.register_vectors("calm", unit(0))
    guarded = SetOverride("a", named=[("calm", 2.0)], scale=0.5, expect={"calm": first})
    assert apply(world, guarded) == [""]
    assert world.of("a") == [1, 0, 0, 0]
    second = world.registry.register_vectors("calm", unit(1), replace=True)
    assert world.of("a") == [1, 0, 0, 0]
    (reason,) = apply(world, guarded)
    assert reason.startswith(f"vector set 'calm' had the digest {first} and has {second} now")
    assert world.of("a") == [1, 0, 0, 0]


@pytest.mark.behaviour(65)
def test_numbers_rise_and_stay_while_an_override_is_replaced() -> None:
    world = World()
    apply(world, SetOverride("a", unit(0)), SetOverride("b", unit(1)))
    numbers = {name: o.number for name, o in world.dynamic.pool.live().items()}
    assert numbers == {"a": 1, "b": 2}
    row = world.routes["a"]
    apply(world, SetOverride("a", unit(2)), ClearOverride("b"), SetOverride("b", unit(3)))
    assert {name: o.number for name, o in world.dynamic.pool.live().items()} == {"a": 1, "b": 3}
    assert world.routes["a"] == row
    assert world.of("a") == [0, 0, 1, 0]


REFUSED: list[tuple[Any, str]] = [
    (SetOverride("x", unit(0)), "no request 'x' runs; overrides are for requests that decode"),
    (SetOverride("p", unit(0)), "request 'p' is in prefill, whose tokens no override reaches"),
    (SetScale(2.0, "p"), "request 'p' is in prefill"),
    (SetOverride("c", unit(0)), "all 2 rows for overrides are in use; clear one, or raise overrides in the spec"),
    (SetScale(2.0, "c"), "all 2 rows for overrides are in use"),
    (SetOverride("a", {"post_block": {1: [1.0]}}), "has 1 numbers but the site is 4 wide"),
    (SetOverride("a", unit(0, layer=7)), "no compiled graph has layers.7.post_block"),
    (SetOverride("a", unit(0, 3e38), scale=3e38), "overflows the table's dtype"),
    (SetOverride("a", monitors={SITE: Monitor([1.0])}), "has 1 numbers but the site is 4 wide"),
    (SetOverride("a", clamps={SITE: [Clamp(torch.eye(WIDTH)[0], 0.0)] * 5}), "gets 5 clamps"),
    (SetOverride("a", named="none"), "no vector set is named 'none'"),
    (SetTier({"post_block": {1: [1.0]}}), "has 1 numbers but the site is 4 wide"),
    (SetMonitor(SITE, Monitor([1.0])), "has 1 numbers but the site is 4 wide"),
    ({"kind": "set_tier", "phase": "prefill"}, "cannot change the tier 'prefill', since cached prompts"),
    ({"kind": "set_tier", "phase": "base"}, "cannot change the tier 'base'"),
    ({"kind": "set_tier", "gain": float("nan")}, "the gain of the dynamic tier nan is not finite"),
    ({"kind": "set_scale", "scale": -1.0}, "the scale of set_scale is -1.0, below 0"),
    ({"kind": "set_scale", "scale": 1.0, "request": "a", "gain": True}, "names a request and the tier's gain"),
    ({"kind": "set_scale", "scale": "1"}, "the scale of set_scale '1' is not finite"),
    ({"kind": "set_override", "request": ["a"]}, "the request of set_override is ['a']; give a text"),
    ({"kind": "set_override", "request": "a", "compose": 1}, "compose=1 is neither true nor false"),
    ({"kind": "set_override", "request": "a", "vectors": {"layers.1.post_block": [float("inf")] * 4}}, "NaN or inf"),
    ({"kind": "set_override", "request": "a", "vectors": {"layers.1.nowhere": [1.0] * 4}}, "unknown hook 'nowhere'"),
    ({"kind": "set_override", "request": "a", "monitors": {"layers.1.post_block": {"probe": 3}}}, "the probe of"),
    ({"kind": "set_monitor", "site": "layers.1.post_block", "monitor": {"threshold": 1.0}}, "lacks the field 'probe'"),
    ({"kind": "set_override", "request": "a", "who": 1}, "has the unknown field 'who'"),
    ({"kind": "dance"}, "kind 'dance' is no action; give one of set_tier, set_override"),
    ({}, "kind None is no action"),
    ("nonsense", "str is no action"),
    (None, "NoneType is no action"),
]


@pytest.mark.behaviour(62, 63, 65)
@pytest.mark.parametrize(("given", "text"), REFUSED, ids=[text for _, text in REFUSED])
def test_a_bad_action_is_rejected_with_its_reason_and_the_others_apply(given: Any, text: str) -> None:
    world = World()
    world.registry.set_tier(unit(0), 2.0)
    world.registry.set_monitor(SITE, torch.ones(WIDTH))
    assert apply(world, SetOverride("a", unit(1)), SetOverride("b", unit(2), monitors={SITE: Monitor([1.0] * 4)})) == [
        "",
        "",
    ]
    before = state(world)
    reasons = apply(world, given)
    assert text in reasons[0].splitlines()[0]
    assert state(world) == before
    reasons = apply(world, SetScale(3.0, "a"), given, SetScale(4.0, "b"))
    assert [bool(reason) for reason in reasons] == [False, True, False]
    assert (world.of("a"), world.of("b")) == ([0, 3, 0, 0], [0, 0, 4, 0])
    assert world.dynamic.status()["actions"]["rejected"] == {"operator": 2}
    assert text in world.dynamic.status()["rejections"][-1]["reason"]


@pytest.mark.behaviour(65)
def test_without_a_pool_an_override_is_rejected() -> None:
    world = World(overrides=0)
    (reason,) = apply(world, SetOverride("a", unit(0)))
    assert reason.startswith("the spec has no rows for overrides; give SteerSpec(overrides=...)")


@pytest.mark.behaviour(45)
def test_scales() -> None:
    world = World()
    world.registry.set_global(decode=unit(0))
    world.own["a"] = contents(unit(1))
    apply(world, SetScale(3.0), SetScale(2.0, "a"))
    assert world.of("b") == [3, 0, 0, 0]
    assert world.of("a") == [2, 2, 0, 0]  # a row of its own, with what it brought
    world.registry.set_global(decode=unit(2))
    assert world.of("b") == [0, 0, 3, 0]
    assert world.of("a") == [0, 2, 2, 0]
    apply(world, SetTier(unit(3), 0.5), SetScale(4.0, gain=True))
    assert world.registry.sites.gain == 4.0
    assert world.registry.tables.view("tier", SITE)[0].tolist() == [0, 0, 0, 1]
    assert not world.registry.tables.scale[:2].ne(1.0).any()  # nothing, and prompts


@pytest.mark.behaviour(68)
def test_a_group_applies_as_a_whole_or_not_at_all() -> None:
    world = World()
    apply(world, SetOverride("b", unit(3)), SetMonitor(SITE, Monitor([1.0] * 4)))
    before = state(world)
    good: list[Action] = [SetOverride("a", unit(0)), SetOverride("b", unit(1)), SetTier(unit(0)), SetScale(2.0)]
    good += [SetScale(0.5, gain=True), SetMonitor(SITE), ClearOverride("b"), SetScale(2.0, "b")]
    reasons = apply(world, *good, SetMonitor(SITE, Monitor([1.0])), ClearOverride("a"), group="g")
    assert all(reasons)
    assert reasons[0].startswith("undone, as an action of its group was rejected: the probe of layers.1.post_block")
    assert state(world) == before
    assert apply(world, *good, group="h") == [""] * len(good)


@pytest.mark.behaviour(67)
def test_what_a_request_declared_yields_to_the_operator() -> None:
    world = World()
    assert apply(world, SetOverride("a", unit(0)), source="declarative") == [""]
    assert apply(world, SetOverride("a", unit(1))) == [""]
    for action in (SetOverride("a", unit(2)), ClearOverride("a"), SetScale(2.0, "a")):
        (reason,) = apply(world, action, source="declarative")
        assert reason == "request 'a' has an override of 'operator', before which its gates yield"
    assert world.of("a") == [0, 1, 0, 0]
    for everyone in (SetTier(unit(0)), SetMonitor(SITE), SetScale(1.0), SetScale(1.0, gain=True)):
        (reason,) = apply(world, everyone, source="declarative")
        assert reason.startswith("a request's own gates change nothing of other requests")


@pytest.mark.behaviour(68)
def test_a_declared_override_goes_with_its_monitor() -> None:
    world = World()
    pair = [SetOverride("a", unit(0)), SetMonitor(SITE, Monitor([1.0]))]
    assert all(apply(world, *pair, source="declarative", group="a"))
    assert world.routes == {}
    assert apply(world, SetOverride("b", unit(0)), source="declarative", group="b") == [""]


@pytest.mark.behaviour(65)
def test_overrides_end_with_their_requests() -> None:
    world = World()
    apply(world, SetOverride("a", unit(0)), SetOverride("b", unit(1)))
    world.dynamic.finish(["a", "unknown"])
    world.dynamic.interrupt(["b"])
    assert world.routes == {}
    assert len(world.dynamic.pool) == 0
    assert apply(world, SetOverride("c", unit(2)), SetOverride("a", unit(3))) == ["", ""]
    assert world.of("c") == [0, 0, 1, 0]


@pytest.mark.behaviour(46)
def test_a_row_that_another_request_had_begins_anew() -> None:
    world = World(overrides=1)
    full = SetOverride(
        "a", unit(0), monitors={SITE: Monitor([1.0] * 4)}, clamps={SITE: [Clamp([1.0] * 4, 0.0)]}, gain=3.0
    )
    assert apply(world, full) == [""]
    row = world.routes["a"]
    world.dynamic.finish(["a"])
    assert apply(world, SetOverride("b", unit(1))) == [""]
    assert world.routes == {"b": row}
    assert world.of("b") == [0, 1, 0, 0]
    tables = world.registry.tables
    assert not tables.view("rowprobe", SITE)[row].any()
    assert tables.view("clamp_set", SITE)[4 * row].tolist() == [-torch.inf, torch.inf, 0.0]


step = st.one_of(
    st.tuples(st.just("set"), st.sampled_from("abc"), st.integers(0, 3), st.booleans(), st.sampled_from([1.0, 2.0])),
    st.tuples(st.just("scale"), st.sampled_from("abc"), st.sampled_from([0.0, 0.5, 1.0])),
    st.tuples(st.sampled_from(["clear", "finish"]), st.sampled_from("abc")),
    st.tuples(st.just("everyone"), st.integers(0, 3)),
)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 3), st.lists(step, max_size=30))
def test_requests_get_what_was_asked_for_whatever_comes_and_goes(room: int, path: list[tuple[Any, ...]]) -> None:
    world, eye = World(overrides=room), torch.eye(WIDTH)
    own = {"a": eye[0], "b": 2 * eye[1], "c": torch.zeros(WIDTH)}
    world.own = {name: contents({SITE: vector}) for name, vector in own.items()}
    live: dict[str, tuple[torch.Tensor, float]] = {}
    everyone, numbers = torch.zeros(WIDTH), [0]
    for kind, *rest in path:
        fits = bool(rest) and (rest[0] in live or len(live) < room)
        if kind == "everyone":
            everyone = eye[rest[0]]
            world.registry.set_global(decode={SITE: everyone})
        elif kind == "set":
            name, place, compose, gain = rest
            (reason,) = apply(world, SetOverride(name, {SITE: 3 * eye[place]}, compose=compose, gain=gain))
            assert bool(reason) is not fits
            if fits:
                live[name] = (3 * eye[place] + (own[name] if compose else 0), gain)
        elif kind == "scale":
            (reason,) = apply(world, SetScale(rest[1], rest[0]))
            assert bool(reason) is not fits
            if fits:
                live[rest[0]] = (live.get(rest[0], (own[rest[0]], 1.0))[0], rest[1])
        else:
            live.pop(rest[0], None)
            world.dynamic.finish([rest[0]]) if kind == "finish" else apply(world, ClearOverride(rest[0]))
        assert set(world.routes) == set(live) == set(world.dynamic.pool.live())
        assert len(set(world.routes.values())) == len(live) <= room
        for name, (vector, gain) in live.items():
            assert world.of(name) == (gain * (vector + everyone)).tolist()
        made = sorted(o.number for o in world.dynamic.pool.live().values())
        assert len(set(made)) == len(made)
        numbers.append(max([numbers[-1], *made]))
