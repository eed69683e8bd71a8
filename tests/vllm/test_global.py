"""Changes of global steering where the engine fails: the former steering is back, or the operator is told."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from steer_compile import SteerSpec
from steer_compile.errors import NotSteered, SteerError, UnknownName, VectorError
from steer_compile.vllm.frontend import FrontEnd
from steer_compile.vllm.model import Shape
from steer_compile.vllm.settings import Settings
from steer_compile.vllm.transport import received

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

GIVEN = {"base": {"post_block": {"1": [1.0] * 8}}}


class Client:
    """An engine whose prefix cache answers in turn, and whose workers hold what they are sent."""

    def __init__(self, answers: list[Any], workers: list[Any], asleep: bool = False) -> None:
        self.answers, self.workers, self.asleep = answers, workers, asleep
        self.held: list[bool] = []

    async def is_sleeping(self) -> bool:
        return self.asleep

    async def reset_prefix_cache(self, reset_running_requests: bool) -> bool:
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return bool(answer)

    async def collective_rpc(self, method: str, args: tuple[Any, ...]) -> list[None]:
        answer = self.workers.pop(0) if self.workers else None
        if isinstance(answer, Exception):
            raise answer
        self.held.append(bool(received(args[0])[0]["prefill"]))
        return [None]


FAILED = RuntimeError("blocks are in use")
CASES = {
    "all is well": (Client([], []), [True], ""),
    "asleep": (Client([], [], asleep=True), [], "sleeps"),
    "never empty": (Client([FAILED] * 100, []), [], "cannot be emptied"),
    "not empty at first": (Client([False, FAILED, True], []), [True], ""),
    "not empty behind the change": (Client([True] + [FAILED] * 3, []), [True, False], "the former is back"),
    "a worker fails": (Client([], [FAILED]), [False], "the former is back"),
    "workers fail for good": (Client([], [FAILED, FAILED]), [], "restart the engine"),
}


@pytest.mark.behaviour(80)
@pytest.mark.parametrize("name", CASES)
def test_what_an_engine_holds_after_a_change(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer_compile.vllm.server import engine as module

    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setattr(module, "TRIES", 3)
    client, held, refused = CASES[name]
    shape = Shape(8, torch.float32, range(2), 2)
    front = FrontEnd(Settings(SteerSpec(steer=("post_block",), dtype="float32")), shape)
    engine = module.Engine(SimpleNamespace(**{n: getattr(client, n) for n in
                           ("is_sleeping", "reset_prefix_cache", "collective_rpc")}), front)  # fmt: skip
    if refused:
        with pytest.raises(module.Unavailable, match=refused):
            asyncio.run(engine.set_global(GIVEN))
    else:
        assert asyncio.run(engine.set_global(GIVEN))["prefill"]
    assert client.held == held
    assert any(front.status()["global"].values()) is not bool(refused)


@pytest.mark.behaviour(80, 81)
def test_refusals_have_a_status_of_their_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    """400: what was asked for; 404: a name; 500: ranks differ; 503: the engine could not, now."""
    from steer_compile.vllm.server import plugin
    from steer_compile.vllm.server.engine import Diverged, Unavailable

    raised: list[SteerError] = []

    async def answer(request: Any) -> Any:
        raise raised[-1]

    engine = SimpleNamespace(check_changes=lambda: None)
    request: Any = SimpleNamespace(headers={"X-Steering-Key": "k"}, app=SimpleNamespace(state=SimpleNamespace()))
    request.app.state.steering = engine
    monkeypatch.setenv(plugin.KEY_VARIABLE, "k")
    route = plugin.answered(answer, True, True)

    async def status_of(kind: type[SteerError]) -> int:
        raised.append(kind("as it is"))
        answered: Any = await route(request)
        return int(answered.status_code)

    kinds = (VectorError, NotSteered, UnknownName, Diverged, Unavailable)
    assert [asyncio.run(status_of(kind)) for kind in kinds] == [400, 400, 404, 500, 503]
    request.headers = {}
    assert asyncio.run(status_of(SteerError)) == 401
