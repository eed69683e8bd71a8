"""The engine behind the routes: the front end of this process, and the workers through vLLM's collective calls."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Self

from steer_compile.errors import NotSteered
from steer_compile.vllm.adapters.intake import front_end_of
from steer_compile.vllm.adapters.workers import SET_EVERYONE, STATE
from steer_compile.vllm.frontend import Everyone, FrontEnd, digests_of
from steer_compile.vllm.transport import sent

_TRIES = 40
_PAUSE = 0.05
"""Seconds between attempts to empty the prefix cache."""


class Engine:
    """One engine of this server.

    Attributes:
        front: checks requests and holds the named vectors.
        root: folder whose vector files may be registered by path, "" for none.
    """

    def __init__(self, client: Any, front: FrontEnd) -> None:
        self._client = client
        self.front = front
        self.root = front.settings.vector_root
        self._lock = asyncio.Lock()

    @classmethod
    def of(cls, client: Any) -> Self | None:
        """The engine of a client of vLLM, None where it has no spec."""
        front = front_end_of(client.input_processor)
        return None if front is None else cls(client, front)

    def check_changes(self) -> None:
        """Refuse changes of one of several server processes, which would not reach the others.

        Raises:
            NotSteered: there are several.
        """
        processes = self._client.vllm_config.parallel_config._api_process_count
        if processes > 1:
            raise NotSteered(f"{processes} server processes share this engine, and a change would reach one; start one")

    async def status(self) -> dict[str, Any]:
        """Spec, named vectors, digests of global steering, and what the workers hold."""
        workers = await self._client.collective_rpc(STATE)
        return {**self.front.status(), "workers": workers}

    async def set_global(self, given: dict[str, Any]) -> dict[str, str]:
        """Change what every request gets; returns digests by phase.

        What has been computed with the former steering goes: the prefix cache is emptied, and running requests compute
        their tokens so far again.

        Raises:
            SteerError: bad steering. NotSteered: the engine sleeps, its prefix cache could not be emptied, or a worker
                failed; the former steering is back.
        """
        async with self._lock:
            made = self.front.checked_global(given)
            if await self._client.is_sleeping():
                raise NotSteered("the engine sleeps, and its tables with it; wake it up first")
            if not await self._forget_prefixes():
                raise NotSteered("the prefix cache cannot be emptied now, so global steering stays; try again")
            # Emptied again behind the change, as steps in between have filled it with either steering.
            if not (await self._set(made) and await self._forget_prefixes()):
                back = await self._set(self.front.everyone) and await self._forget_prefixes()
                state = "the former is back" if back else "and the former could not be set again: restart the engine"
                raise NotSteered(f"global steering was not changed in all of the engine, {state}")
            self.front.everyone = made
            return digests_of(made)

    async def _set(self, everyone: Everyone) -> bool:
        """Whether all workers have it."""
        sending = self._client.collective_rpc(SET_EVERYONE, args=(sent(everyone, None),))
        return await _returned(sending) is not None

    async def _forget_prefixes(self) -> bool:
        for _ in range(_TRIES):
            if await _returned(self._client.reset_prefix_cache(reset_running_requests=True)) is True:
                return True
            await asyncio.sleep(_PAUSE)
        return False


async def _returned(call: Awaitable[Any]) -> Any:
    """What a call of the engine returns, None where it raised: vLLM hands on errors of any kind."""
    found = await asyncio.gather(call, return_exceptions=True)
    return None if isinstance(found[0], BaseException) else found[0]
