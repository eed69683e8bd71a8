"""The engine behind the routes: the front end of this process, and the workers through vLLM's collective calls."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable, Coroutine
from itertools import count
from typing import Any, ParamSpec, Self, TypeVar

from steer_compile.errors import NotSteered, UnknownName
from steer_compile.vllm.adapters.intake import front_end_of
from steer_compile.vllm.adapters.workers import (
    DYNAMIC,
    RENAME,
    RESTORE_SITES,
    SET_EVERYONE,
    SET_SITES,
    STATE,
    SUBMIT,
)
from steer_compile.vllm.capture_files import RESULT, worst
from steer_compile.vllm.frontend import Everyone, FrontEnd, digests_of
from steer_compile.vllm.site_data import read
from steer_compile.vllm.transport import sent, sent_sets

TRIES = 40
PAUSE = 0.05
"""Seconds between attempts to empty the prefix cache, and between looks for rows that become free."""


_T = TypeVar("_T")
_P = ParamSpec("_P")
change_numbers = count(1)
"""Numbers of changes, of all engines of this process: by its own a change is taken back in workers, and no other is."""
ALIKE = ("step", "checksum", "applied", "overrides", "tier", "monitors")
"""What is the same in the status of all ranks."""


class Diverged(NotSteered):
    """The ranks of an engine hold different steering: what it generates is of neither."""


class Unavailable(NotSteered):
    """The engine took no change: it sleeps, blocks of its prefix cache are in use, or a part of it failed."""


def to_its_end(change: Callable[_P, Coroutine[Any, Any, _T]]) -> Callable[_P, Coroutine[Any, Any, _T]]:
    """A change that is made as a whole also where its caller is cancelled, as by an interrupt: workers and front end
    would differ. A second cancel ends it where it is, as its workers may never answer."""

    @functools.wraps(change)
    async def made(*args: _P.args, **named: _P.kwargs) -> _T:
        task = asyncio.ensure_future(change(*args, **named))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            await asyncio.wait((task,))
            raise

    return made


class Engine:
    """One engine of this server.

    Attributes:
        front: checks requests and holds the named vectors.
        root: folder whose vector files and autoencoders may be named by path, "" for none.
        client: vLLM's, and ``lock``, under which changes follow one another, each by a number of its own.
    """

    def __init__(self, client: Any, front: FrontEnd) -> None:
        self.client = client
        self.front = front
        self.root = front.settings.vector_root
        self.lock = asyncio.Lock()

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
        processes = self.client.vllm_config.parallel_config._api_process_count
        if processes > 1:
            raise NotSteered(f"{processes} server processes share this engine, and a change would reach one; start one")

    async def status(self) -> dict[str, Any]:
        """Spec, named vectors, digests of global steering, and what the workers hold."""
        workers = await self.client.collective_rpc(STATE)
        return {**self.front.status(), "workers": workers}

    @to_its_end
    async def set_global(self, given: dict[str, Any]) -> dict[str, str]:
        """Change what every request gets; returns digests by phase.

        What has been computed with the former steering goes: the prefix cache is emptied, and running requests compute
        their tokens so far again.

        Raises:
            SteerError: bad steering. Unavailable: the engine sleeps, its prefix cache could not be emptied, or a worker
                failed; the former steering is back.
        """
        async with self.lock:
            made = self.front.checked_global(given)
            await self.check_awake()
            if not await self._forget_prefixes():
                raise Unavailable("the prefix cache cannot be emptied now, so global steering stays; try again")
            # Emptied again behind the change, as steps in between have filled it with either steering.
            if not (await self._set(made) and await self._forget_prefixes()):
                back = await self._set(self.front.everyone) and await self._forget_prefixes()
                state = "the former is back" if back else "and the former could not be set again: restart the engine"
                raise Unavailable(f"global steering was not changed in all of the engine, {state}")
            self.front.everyone = made
            return digests_of(made)

    async def _set(self, everyone: Everyone) -> bool:
        """Whether all workers have it."""
        sending = self.client.collective_rpc(SET_EVERYONE, args=(sent(everyone, None),))
        return await returned(sending) is not None

    async def _forget_prefixes(self) -> bool:
        for _ in range(TRIES):
            if await returned(self.client.reset_prefix_cache(reset_running_requests=True)) is True:
                return True
            await asyncio.sleep(PAUSE)
        return False

    async def capture_result(self, consumer: str, name: str) -> dict[str, str]:
        """What became of a request's rows in a consumer, as `capture_files.capture_result`.

        Raises:
            UnknownName: no such consumer.
        """
        names = [spec.name for spec in self.front.settings.consumers]
        if consumer not in names:
            raise UnknownName(f"no consumer {consumer!r:.80}; this engine has {', '.join(names) or 'none'}")
        answers = await self.client.collective_rpc(RESULT, args=(consumer, name))
        return worst([answer for answer in answers if answer])

    # -- dynamic steering -----------------------------------------------------------------------------------------

    @to_its_end
    async def set_sites(self, given: dict[str, Any]) -> None:
        """Change the dynamic tier or a site's monitor, between two steps; running requests go on under it.

        Args:
            given: as in `site_data.read`.

        Raises:
            SteerError: bad data, or nothing of the kind in the spec. Unavailable: the engine sleeps, or a worker
                failed; the former data is back.
        """
        async with self.lock:
            self.front.check_sites(read(given))
            await self.check_awake()
            number = next(change_numbers)
            if await returned(self.client.collective_rpc(SET_SITES, args=(number, given))) is None:
                back = await returned(self.client.collective_rpc(RESTORE_SITES, args=(number,))) is not None
                state = "the former is back" if back else "and the former could not be set again: restart the engine"
                raise Unavailable(f"the change did not reach all of the engine, {state}")

    async def submit(self, actions: list[dict[str, Any]]) -> list[bool]:
        """Ask for actions in front of the next step; which of them found room in the queue.

        They are checked when they are applied, and what was rejected is in `dynamic`.

        Raises:
            NotSteered: the engine has no dynamic steering. Unavailable: it sleeps. Diverged: its ranks differ.
        """
        self._check_dynamic()
        async with self.lock:
            await self.check_awake()
            sets = sent_sets(self.front.sets(_names(actions)))
            answers = await self.client.collective_rpc(SUBMIT, args=(actions, sets))
        if any(answer != answers[0] for answer in answers):
            raise Diverged("the ranks of the engine differ in which actions they took; restart the engine")
        return list(answers[0])

    async def dynamic(self) -> dict[str, Any]:
        """Status of dynamic steering: that of the first rank, and of each rank what must be alike.

        Raises:
            NotSteered: the engine has no dynamic steering. Diverged: its ranks differ.
        """
        self._check_dynamic()
        ranks = await self.client.collective_rpc(DYNAMIC)
        found = {**ranks[0], "ranks": [{name: rank[name] for name in ALIKE} for rank in ranks]}
        apart = [name for name in ALIKE if any(rank[name] != ranks[0][name] for rank in ranks)]
        if apart:
            raise Diverged(
                f"the ranks of the engine differ in {', '.join(apart)}: {found['ranks']}; their controllers are no "
                "pure functions of what they see; restart the engine without them"
            )
        return found

    async def renamed(self, name: str) -> None:
        """A named set was changed or taken away: what conversations hold of it is not reused."""
        if self.front.settings.dynamic:
            sets = self.front.sets([name])
            await self.client.collective_rpc(RENAME, args=(sent_sets(sets), [] if sets else [name]))

    def _check_dynamic(self) -> None:
        if not self.front.settings.dynamic:
            raise NotSteered(
                "this engine has no dynamic steering; give its spec overrides or the op families tier or monitor, or "
                "name controllers in additional_config"
            )

    async def check_awake(self) -> None:
        """Raise `Unavailable` while the engine sleeps."""
        if await self.client.is_sleeping():
            raise Unavailable("the engine sleeps, and its tables with it; wake it up first")


def _names(actions: list[dict[str, Any]]) -> list[str]:
    """Vector sets that actions name, in any form that they take."""
    found: list[str] = []
    for action in actions:
        given = action.get("named", [])
        for item in [given] if isinstance(given, str) else given if isinstance(given, list) else []:
            name = item[0] if isinstance(item, list) and item else item
            found += [name] if isinstance(name, str) else []
    return found


async def returned(call: Awaitable[Any]) -> Any:
    """What a call of the engine returns, None where it raised: vLLM hands on errors of any kind."""
    found = await asyncio.gather(call, return_exceptions=True)
    return None if isinstance(found[0], BaseException) else found[0]
