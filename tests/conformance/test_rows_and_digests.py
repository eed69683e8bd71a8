"""What a change writes and what it leaves alone, and what a digest is of."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer_compile import Clamp, Monitor, Steering
from steer_compile.dynamic.actions import SetOverride, SetScale, SetTier
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.vectors import vector_set
from tests.dynamic._world import SITE, World, contents, unit


def snapshot(world: World) -> list[torch.Tensor]:
    """All banks of rows, without the tier's own."""
    tables = world.registry.tables
    return [t.clone() for bank, t in zip(tables.banks, tables.tensors, strict=True) if bank.kind != "tier"]


def apply(world: World, *actions: Any) -> list[str]:
    world.dynamic.ask(actions, "operator")
    return [outcome.reason for outcome in world.dynamic.begin()]


@pytest.mark.behaviour(45)
def test_a_scale_alone_writes_no_table_and_goes_with_its_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(overrides=1)
    assert apply(world, SetOverride("a", unit(0))) == [""]
    before, row, written = snapshot(world), world.routes["a"], list[Any]()
    with monkeypatch.context() as patch:
        patch.setattr(world.registry.tables, "put", lambda *given: written.append(given))
        assert apply(world, SetScale(3.0, "a"), SetScale(2.0)) == ["", ""]
        assert written == []
        world.registry.set_global()
        assert written  # as what changes vectors does
    assert all(torch.equal(a, b) for a, b in zip(snapshot(world), before, strict=True))
    assert world.of("a") == [3, 0, 0, 0]
    world.dynamic.finish(["a"])
    assert apply(world, SetOverride("b", unit(1))) == [""]
    assert (world.routes["b"], world.of("b")) == (row, [0, 1, 0, 0])
    assert world.registry.tables.scale[:2].tolist() == [1.0, 1.0]  # nothing, and prompts


@pytest.mark.behaviour(66)
def test_the_tier_touches_no_row() -> None:
    world = World()
    apply(world, SetOverride("a", unit(0)))
    handle = world.registry.register(Steering(unit(1)))
    before, scales = snapshot(world), world.registry.tables.scale.clone()
    assert apply(world, SetTier(unit(3, 5.0), 2.0), SetScale(0.5, gain=True)) == ["", ""]
    assert all(torch.equal(a, b) for a, b in zip(snapshot(world), before, strict=True))
    assert torch.equal(world.registry.tables.scale, scales)
    assert world.registry.tables.view("tier", SITE)[0].tolist() == [0, 0, 0, 5]
    assert world.line(handle.rows["decode"]) == [0, 1, 0, 0]


@pytest.mark.behaviour(61)
def test_a_digest_is_of_contents_alone() -> None:
    vectors = {"post_block": {0: [1.0, 2.0], 1: [3.0, 4.0]}, "mlp_out": {0: [5.0, 6.0]}}
    whole = contents(vectors).digest()
    assert whole == contents({hook: dict(reversed(at.items())) for hook, at in reversed(vectors.items())}).digest()
    assert whole == Contents(contents(vectors).parts, (), ()).digest()  # families that are not used leave no trace
    bound = ((("post_block", 0), (Clamp([1.0, 0.0], 0.0),)),)
    probe = ((("post_block", 0), Monitor([1.0, 0.0])),)
    changed = [
        contents({**vectors, "mlp_out": {1: [5.0, 6.0]}}),
        contents({"post_block": vectors["post_block"], "mlp_in": vectors["mlp_out"]}),
        contents({**vectors, "mlp_out": {0: [5.0, 7.0]}}),
        contents(vectors, 2.0),
        Contents(contents(vectors).parts, probe),
        Contents(contents(vectors).parts, (), bound),
    ]
    assert len({whole, *(each.digest() for each in changed)}) == len(changed) + 1
    assert vector_set(None).digest == vector_set({}).digest == ""
