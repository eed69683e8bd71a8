"""Changes of autoencoders that go wrong on the way: none takes another back, and none is left half made."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_compile.vllm.autoencoders import sae_specs
from tests.vllm.test_sae_routes import BODY, EMPTY, Ranks, attach, detach, engine, room, root  # noqa: F401

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]


def test_a_change_that_fails_takes_no_other_back(root: Path) -> None:  # noqa: F811
    """A script has an `Engine` for each of its calls, and workers know changes by their numbers."""
    from steer_compile.vllm.server.engine import Unavailable

    ranks = Ranks(2)
    attach(engine(root, ranks), "bridge", BODY)
    ranks.failing = {"attach_sae": 0}
    with pytest.raises(Unavailable, match="was taken back"):
        attach(engine(root, ranks), "tower", {"path": "other", "features": [5]})
    assert ranks.names() == [["bridge"], ["bridge"]]


@pytest.mark.parametrize("verb", ["attach", "detach"])
def test_a_caller_that_goes_leaves_no_half(verb: str, root: Path) -> None:  # noqa: F811
    from steer_compile.vllm.server import autoencoders

    ranks = Ranks(2)
    own, inner, going = engine(root, ranks), ranks.collective_rpc, list[asyncio.Task[Any]]()

    async def slow(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        if method.endswith(f"{verb}_sae"):
            going[0].cancel()
            await asyncio.sleep(0.05)
        return await inner(method, args)

    async def interrupted() -> None:
        work = autoencoders.attach(own, "bridge", BODY) if verb == "attach" else autoencoders.detach(own, "bridge")
        going.append(asyncio.ensure_future(work))
        with pytest.raises(asyncio.CancelledError):
            await going[0]

    if verb == "detach":
        attach(own, "bridge", BODY)
    own.client.collective_rpc = slow
    asyncio.run(interrupted())
    there = ["bridge"] if verb == "attach" else []
    assert ranks.names() == [there, there]
    assert [line["name"] for line in own.front.saes.listed()] == there


def test_an_engine_that_falls_asleep_meanwhile_is_left_alone(root: Path) -> None:  # noqa: F811
    from steer_compile.vllm.server.engine import Unavailable

    ranks, asked_for = Ranks(1), list[bool]()
    own = engine(root, ranks)

    async def is_sleeping() -> bool:
        asked_for.append(True)
        return len(asked_for) > 1

    own.client.is_sleeping = is_sleeping
    with pytest.raises(Unavailable, match="sleep"):
        attach(own, "bridge", BODY)
    assert (ranks.calls, room(own)) == ([], EMPTY)


def test_workers_let_go_of_what_was_detached(root: Path) -> None:  # noqa: F811
    ranks = Ranks(1)
    own = engine(root, ranks)
    attach(own, "bridge", BODY)
    weights = weakref.ref(ranks.registries[0].saes.get("bridge").sae)
    detach(own, "bridge")
    gc.collect()
    assert weights() is None


def test_numbers_of_numpy_reach_the_workers_as_plain_ones() -> None:
    (spec,) = sae_specs({"one": {"path": "/", "options": {"norm_factor": np.float64(0.5)}}})
    assert [type(value) for _, value in spec.options] == [float]
