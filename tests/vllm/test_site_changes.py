"""Changes of sites and actions where the engine fails: the former data is back, or the operator is told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steer_compile import SteerSpec
from steer_compile.errors import SteerError
from steer_compile.vllm.frontend import FrontEnd
from steer_compile.vllm.model import Shape
from steer_compile.vllm.settings import Settings

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

TIER = {"tier": {"vectors": {"layers.1.post_block": [1.0] * 8}}}
FAILED = RuntimeError("a worker is gone")


def engine(answers: list[Any], asleep: bool = False, ops: tuple[str, ...] = ("add", "tier")) -> tuple[Any, list[Any]]:
    """An engine whose workers answer in turn, and the calls that they got."""
    from steer_compile.vllm.server.engine import Engine

    calls: list[Any] = []

    async def is_sleeping() -> bool:
        return asleep

    async def collective_rpc(method: str, args: tuple[Any, ...] = ()) -> Any:
        calls.append((method.removeprefix("steer_compile_"), *args[:1]))
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    front = FrontEnd(
        Settings(SteerSpec(steer=("post_block",), dtype="float32", ops=ops)), Shape(8, torch.float32, range(2), 2)
    )
    return Engine(SimpleNamespace(is_sleeping=is_sleeping, collective_rpc=collective_rpc), front), calls


def test_a_change_that_fails_is_taken_back() -> None:
    made, calls = engine([[None], FAILED, [None], FAILED, FAILED])
    asyncio.run(made.set_sites(TIER))
    with pytest.raises(SteerError, match="the former is back"):
        asyncio.run(made.set_sites(TIER))
    with pytest.raises(SteerError, match="restart the engine"):
        asyncio.run(made.set_sites(TIER))
    first = calls[0][1]  # numbers are the process's, so that no change of another engine's takes this one back
    wanted = [("set_sites", 0), ("set_sites", 1), ("restore_sites", 1), ("set_sites", 2), ("restore_sites", 2)]
    assert [(method, number - first) for method, number in calls] == wanted


@pytest.mark.parametrize("verb", ["set_global", "set_sites"])
def test_a_caller_that_goes_leaves_workers_and_front_end_alike(verb: str) -> None:
    """Cancelled while the workers change: global steering is noted, and a change that fails is taken back."""
    made, calls = engine([[None]] if verb == "set_global" else [FAILED, [None]])
    inner, going = made.client.collective_rpc, list[asyncio.Task[Any]]()

    async def slow(method: str, args: tuple[Any, ...] = ()) -> Any:
        if not calls:
            going[0].cancel()
            await asyncio.sleep(0.05)
        return await inner(method, args)

    async def reset_prefix_cache(reset_running_requests: bool) -> bool:
        return reset_running_requests

    async def interrupted() -> None:
        given = {"base": {"post_block": {"1": [1.0] * 8}}}
        going.append(asyncio.ensure_future(made.set_global(given) if verb == "set_global" else made.set_sites(TIER)))
        with pytest.raises(asyncio.CancelledError):
            await going[0]

    made.client.collective_rpc, made.client.reset_prefix_cache = slow, reset_prefix_cache
    asyncio.run(interrupted())
    if verb == "set_global":
        assert [method for method, *_ in calls] == ["set_everyone"]
        assert made.front.everyone["decode"]
    else:
        assert [method for method, _ in calls] == ["set_sites", "restore_sites"]


@pytest.mark.behaviour(80)
def test_a_change_that_cannot_be_reaches_no_worker() -> None:
    made, calls = engine([])
    probe = {"site": "layers.1.post_block", "monitor": {"probe": [1.0] * 8}}
    beyond = {"vectors": {"layers.2.post_block": [1.0] * 8}}
    for bad, words in (({"tier": beyond}, "layers.2"), ({"monitor": probe}, "monitor")):
        with pytest.raises(SteerError, match=words):
            asyncio.run(made.set_sites(bad))
    asleep, _ = engine([], asleep=True)
    with pytest.raises(SteerError, match="sleeps"):
        asyncio.run(asleep.set_sites(TIER))
    bare, _ = engine([], ops=("add",))
    for call in (bare.dynamic(), bare.submit([{}])):
        with pytest.raises(SteerError, match="no dynamic steering"):
            asyncio.run(call)
    assert not calls


@pytest.mark.behaviour(81)
def test_ranks_that_differ_are_told() -> None:
    from steer_compile.vllm.server.engine import ALIKE, Diverged

    one = dict.fromkeys(ALIKE, "same")
    made, _ = engine([[one, one], [one, {**one, "checksum": "other"}], [[True], [True]], [[True], [False]]])
    assert asyncio.run(made.dynamic())["ranks"] == [one, one]
    with pytest.raises(Diverged, match="differ in checksum"):
        asyncio.run(made.dynamic())
    assert asyncio.run(made.submit([{}])) == [True]
    with pytest.raises(SteerError, match="ranks of the engine differ"):
        asyncio.run(made.submit([{}]))
