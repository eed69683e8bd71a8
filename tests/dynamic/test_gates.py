"""Declarative gates: what may be said, and what each scope does."""

import json
from typing import Any

import pytest
import torch

from steer_compile import Clamp, Monitor
from steer_compile.dynamic.actions import SetOverride
from steer_compile.dynamic.codec import packed
from steer_compile.dynamic.declarative import DeclarativeGates
from steer_compile.dynamic.gate_program import compile_gates
from steer_compile.dynamic.gates import MOST_GATES, gates_from_data
from steer_compile.dynamic.latches import Latches
from steer_compile.errors import SiteNotFound, SpecError, SteerError, TableFull, UnknownName
from steer_compile.runtime.contents import Contents
from tests.dynamic._world import SITE, WIDTH, World, contents, unit

NAME, OTHER = "layers.1.post_block", "layers.2.post_block"
WHEN = {"site": NAME, "probe": [1.0, 0.0, 0.0, 0.0], "threshold": 1.0, "sharpness": 4.0}
ON, OFF = [2.0, 0, 0, 0], [0.0] * 4


def vectors(place: int, site: str = NAME) -> dict[str, Any]:
    return {site: [float(i == place) for i in range(WIDTH)]}


def add(place: int = 1, strength: float = 1.0, site: str = NAME) -> dict[str, Any]:
    return {"add": {"vectors": vectors(place, site), "strength": strength}}


CALM = {"add": {"named": [["calm", 2.0]]}}
CLAMP = {"clamp": {NAME: [{"direction": [0.0, 1.0, 0.0, 0.0], "hi": 1.0}]}}


def gate(scope: str = "this_token", when: Any = "always", apply: Any = None) -> dict[str, Any]:
    return {"when": when, "scope": scope, "apply": apply or add()}


def of(world: World, request: str = "a") -> list[float]:
    """What the coming step's decoded token of a request gets."""
    world.dynamic.begin()
    return world.of(request)


REFUSED: list[tuple[Any, type[SteerError], str]] = [
    ({}, SpecError, "gates are a dict; give a list of 16 at most"),
    ([gate()] * (MOST_GATES + 1), SpecError, "gates are 17 gates"),
    ([3], SpecError, "gate 0 is a int; give an object with when, scope, apply"),
    ([{"scope": "this_token"}], SpecError, "gate 0 lacks the field 'apply'"),
    ([{**gate(), "code": "x"}], SpecError, "gate 0 has the unknown field 'code'"),
    ([gate("ever")], SpecError, "scope='ever' of a gate is unknown; choose one of this_token, next_step"),
    ([gate(when="sometimes")], SpecError, "when='sometimes'; give 'always', or an object"),
    ([gate(when={"site": NAME})], SpecError, "lacks the field 'probe'"),
    ([gate(when={**WHEN, "probe": [1.0, float("nan"), 0.0, 0.0]})], SteerError, "NaN or infinity"),
    ([gate(when={**WHEN, "sharpness": -1.0})], SteerError, "the sharpness of a monitor is -1.0, below 0"),
    ([gate(when={**WHEN, "site": "somewhere"})], SpecError, "'somewhere' names no site"),
    ([gate("next_step")], SpecError, "always and for the next step, which is always; give the scope this_token"),
    ([gate("this_token", WHEN, {"attenuate": 0.5})], SpecError, "scope this_token with a probe cannot attenuate"),
    ([gate("this_token", WHEN, CLAMP)], SpecError, "scope this_token with a probe cannot clamp"),
    ([gate("rest_of_conversation", WHEN)], SpecError, "later requests refer to what it adds by name"),
    ([gate("rest_of_conversation", WHEN, CLAMP)], SpecError, "holds vectors or clamps of its own"),
    ([gate(apply={"add": {}})], SpecError, "gate 0 adds nothing; give named, vectors or both"),
    ([gate(apply={"add": {"named": ["x"] * 17}})], SpecError, "give up to 16 names"),
    ([gate(apply={**add(), "attenuate": 1.0})], SpecError, "applies add, attenuate; give one of add, attenuate, clamp"),
    ([gate(apply={"attenuate": 1.5})], SteerError, "attenuates by 1.5; give a factor from 0 to 1"),
    ([gate(apply={"clamp": {}})], SpecError, "clamps nothing"),
    ([gate(apply={"clamp": {NAME: 3}})], SpecError, "give a list of 16 clamps at most"),
    ([gate(apply={"add": {"named": "unknown"}})], UnknownName, "no vector set is named 'unknown'"),
    ([gate(when=WHEN, apply=add(site=OTHER))], SpecError, f"adds at {OTHER}, and its probe at {NAME} gates that site"),
    (
        [gate(when=WHEN), gate()],
        SpecError,
        "two gates add at layers.1.post_block, and the probe of one would gate both",
    ),
    ([gate(apply={"add": {"vectors": {NAME: [1.0]}}})], SteerError, "has 1 numbers but the site is 4 wide"),
    ([gate(apply=add(site="layers.9.post_block"))], SiteNotFound, "no compiled graph has layers.9.post_block"),
    ([gate("next_step", {**WHEN, "site": "layers.9.post_block"})], SiteNotFound, "is read between steps, and the spec"),
    ([gate("next_step", {**WHEN, "probe": [1.0]})], SteerError, "has 1 numbers but the site is 4 wide"),
    ([gate(when={**WHEN, "probe": [1.0]})], SteerError, "has 1 numbers but the site is 4 wide; give one"),
    ([gate(apply={"clamp": {NAME: [{"direction": [1.0, 0, 0, 0], "hi": 1.0}] * 5}})], SteerError, "gets 5 clamps"),
]


@pytest.mark.behaviour(71)
@pytest.mark.parametrize(("given", "kind", "text"), REFUSED, ids=[text for _, _, text in REFUSED])
def test_gates_that_cannot_be_are_refused(given: Any, kind: type[SteerError], text: str) -> None:
    world = World()
    with pytest.raises(kind) as error:
        world.dynamic.gate("a", given)
    assert text in str(error.value).splitlines()[0]
    world.step({"a": ON})
    assert of(world) == [0] * 4


def test_without_a_pool_gates_are_refused() -> None:
    with pytest.raises(TableFull, match="no rows for overrides, which gates act by"):
        World(overrides=0).dynamic.gate("a", [gate()])


def test_gates_are_the_same_in_json_and_packed() -> None:
    plain = [gate(when=WHEN, scope="next_step"), gate(apply=CLAMP)]
    again = json.loads(json.dumps(plain))
    again[0]["when"]["probe"] = packed(torch.tensor(WHEN["probe"]))
    assert [g.digest for g in gates_from_data(again)] == [g.digest for g in gates_from_data(plain)]
    assert gates_from_data(gates_from_data(plain)) == gates_from_data(plain)


@pytest.mark.behaviour(71)
def test_what_always_holds_is_there_from_the_first_decoded_token_on() -> None:
    world = World()
    world.own["a"] = contents(unit(0, 4.0))
    world.dynamic.gate(
        "a",
        [gate(apply={"attenuate": 0.5}), gate(apply=add(1, 3.0)), gate(apply={"attenuate": 0.5}), gate(apply=CLAMP)],
    )
    world.step({"a": OFF, "b": OFF}, {"a": "prefill"})
    assert of(world) == [1, 3, 0, 0]
    assert of(world, "b") == [0] * 4
    assert world.registry.tables.view("clamp_set", SITE)[world.routes["a"] * 4].tolist() == [-torch.inf, 1.0, 1.0]
    for _ in range(3):
        world.step({"a": OFF})
    assert world.dynamic.status()["actions"]["applied"] == {"declarative": 1}


def test_a_probe_of_this_token_goes_into_the_row() -> None:
    world = World()
    world.dynamic.gate("a", [gate(when=WHEN)])
    world.step({"a": OFF}, {"a": "prefill"})
    world.dynamic.begin()
    row = world.routes["a"]
    assert world.registry.tables.view("rowprobe", SITE)[row].tolist() == WHEN["probe"]
    assert world.registry.tables.view("rowprobe_set", SITE)[row].tolist() == [1.0, 4.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0]
    assert world.line(row) == [0, 1, 0, 0]


@pytest.mark.behaviour(71)
def test_a_pulse_is_for_one_step() -> None:
    world = World()
    world.dynamic.gate("a", [gate("next_step", WHEN)])
    shown = []
    for value in (OFF, ON, ON, OFF, OFF, ON):
        world.step({"a": value})
        shown.append(of(world)[1])
    assert shown == [0, 1, 1, 0, 0, 1]


@pytest.mark.behaviour(71)
def test_the_rest_of_a_request_latches_and_ends_with_it() -> None:
    world = World()
    world.dynamic.gate(
        "a", [gate("rest_of_request", WHEN), gate("rest_of_request", {**WHEN, "threshold": 5.0}, {"attenuate": 0.0})]
    )
    world.own["a"] = contents(unit(3))
    shown = []
    for value in (OFF, ON, OFF, [6.0, 0, 0, 0], OFF):
        world.step({"a": value})
        shown.append(of(world))
    assert shown == [[0] * 4, [0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 0, 0], [0, 1, 0, 0]]
    world.dynamic.interrupt(["a"])
    assert world.routes == {}
    world.step({"a": OFF})
    assert of(world) == [0, 1, 0, 0]  # the latch outlives a preemption
    world.dynamic.finish(["a"])
    world.step({"a": ON})
    assert of(world) == [0] * 4


@pytest.mark.behaviour(71)
def test_the_rest_of_a_conversation_latches_by_name_and_notices_a_changed_set() -> None:
    world = World(overrides=3)
    world.phases |= dict.fromkeys(("a@x", "b@x", "c@y", "d@x", "e@x"), "decode")
    world.registry.register_vectors("calm", unit(2))
    world.dynamic.gate("a@x", [gate("rest_of_conversation", WHEN, CALM)])
    world.step({"a@x": ON, "c@y": ON})
    assert (of(world, "a@x"), of(world, "c@y")) == ([0, 0, 2, 0], [0] * 4)
    world.dynamic.finish(["a@x"])
    world.step({"b@x": OFF})
    assert of(world, "b@x") == [0, 0, 2, 0]
    assert world.dynamic.status()["gates"]["conversations"] == 1
    world.registry.register_vectors("calm", unit(3), replace=True)
    world.step({"d@x": OFF})
    assert of(world, "d@x") == [0] * 4
    assert "'calm' had the digest" in world.dynamic.status()["rejections"][-1]["reason"]
    for _ in range(4):
        world.step({"e@x": OFF})
    assert of(world, "e@x") == [0] * 4
    assert world.dynamic.status()["gates"] | {"fired": 0} == {
        "requests": 0, "conversations": 0, "held_bytes": 0, "evicted": 0, "fired": 0, "changed_sets": 1,
    }  # fmt: skip
    assert of(world, "b@x") == [0, 0, 2, 0]  # what lies in its row is what it was


def test_a_set_that_changes_before_its_gate_fires_is_noticed() -> None:
    world = World()
    world.registry.register_vectors("calm", unit(2))
    world.dynamic.gate("a", [gate("rest_of_request", WHEN, CALM), gate(apply={"attenuate": 0.5})])
    world.registry.register_vectors("calm", unit(3), replace=True)
    for value in (OFF, ON, ON, ON, ON):
        world.step({"a": value})
    assert of(world) == [0] * 4
    assert world.dynamic.status()["gates"]["changed_sets"] == 1


@pytest.mark.behaviour(71)
def test_conversations_are_bounded() -> None:
    world = World(overrides=1)
    gates = DeclarativeGates(world.registry, Latches(2))
    world.registry.register_vectors("calm", unit(2))
    world.dynamic.add(gates)
    for name in ("a@1", "a@2", "a@3"):
        world.phases[name] = "decode"
        gates.declare(name, gates_from_data([gate("rest_of_conversation", "always", CALM)]))
        world.step({name: OFF})
        world.dynamic.finish([name])
    assert list(gates.held) == ["2", "3"]
    assert gates.status()["evicted"] == 1


@pytest.mark.behaviour(67)
def test_gates_yield_to_the_operator() -> None:
    world = World()
    world.dynamic.gate("a", [gate()])
    world.dynamic.submit(SetOverride("a", unit(3)))
    world.step({"a": OFF})
    world.step({"a": OFF})
    assert of(world) == [0, 0, 0, 1]
    assert "before which its gates yield" in world.dynamic.status()["rejections"][-1]["reason"]


def test_gates_can_be_declared_anew_and_taken_away() -> None:
    world = World()
    world.dynamic.gate("a", [gate()])
    world.step({"a": OFF})
    assert of(world) == [0, 1, 0, 0]
    world.dynamic.gate("a", [gate(apply=add(2))])
    world.step({"a": OFF})
    assert of(world) == [0, 0, 1, 0]
    world.dynamic.gate("a", [])
    world.step({"a": OFF})
    assert of(world) == [0] * 4


def test_a_host_can_put_what_always_holds_into_the_request_s_own_row() -> None:
    world = World()
    world.registry.register_vectors("calm", unit(2, layer=2))
    given = [gate(apply={"attenuate": 0.25}), gate(when=WHEN), gate(apply=CLAMP), gate("rest_of_request", WHEN, CALM)]
    program = compile_gates(gates_from_data(given), world.registry.named)
    made = program.contents(contents(unit(0, 4.0)), world.registry.named)
    expected = Contents(
        (*contents(unit(0, 4.0), 0.25).parts, *contents(unit(1)).parts),
        ((SITE, Monitor(WHEN["probe"], 1.0, 4.0)),),
        ((SITE, (Clamp([0.0, 1.0, 0.0, 0.0], hi=1.0),)),),
    )
    assert made.digest() == expected.digest()
    assert len(program.host) == 1


def test_gates_of_one_probe_share_a_site_and_reach_later_layers_with_cross_layer() -> None:
    named = World().registry.named
    given = gates_from_data([gate(when=WHEN), gate(when=WHEN, apply=add(2))])
    assert len(compile_gates(given, named).row) == 2
    later = gates_from_data([gate(when=WHEN, apply=add(1, site=OTHER))])
    assert len(compile_gates(later, named, cross_layer=True).row) == 1
    with pytest.raises(SpecError, match="would gate both"):
        compile_gates((*later, *gates_from_data([gate(apply=add(2, site=OTHER))])), named, cross_layer=True)
