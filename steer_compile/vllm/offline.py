"""Autoencoders of an engine in a script (`vllm.LLM`): what the routes of a server do, by the same code."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from steer_compile.errors import NotSteered
from steer_compile.vllm.capture_files import go_on

if TYPE_CHECKING:
    from steer_compile.vllm.server.engine import Engine

_T = TypeVar("_T")


def attach_sae(
    llm: Any, name: str, path: str | Path, features: Sequence[int] = (), whole: bool = False, sae: str | None = None,
    site: str | None = None, options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Attach an autoencoder to a running engine, into room that its spec has; nothing is compiled.

    Args:
        llm: the `vllm.LLM`.
        name: what requests call it.
        path: its folder or file, under the engine's ``vector_root``.
        features, whole, sae, site, options: as in ``saes`` of `engine_args`.

    Returns:
        Its line of `attached_saes`.

    Raises:
        SteerError, FileNotFoundError: files that cannot be read or lie outside of the root, a name that is taken, no
            room, a worker that refuses it, or one that fails. Nothing is attached then.
    """
    from steer_compile.vllm.server.autoencoders import attach

    given = {"path": str(path), "features": list(features), "whole": whole, "sae": sae, "site": site}
    return _done(attach(_engine(llm), name, {**given, "options": dict(options or {})}))


def detach_sae(llm: Any, name: str) -> None:
    """Detach an autoencoder from a running engine.

    Raises:
        UnknownName: none of this name. SteerError: requests or global steering use it, or a worker fails. It stays
            attached then.
    """
    from steer_compile.vllm.server.autoencoders import detach

    engine = _engine(llm)
    if not llm.llm_engine.has_unfinished_requests():
        go_on(llm)
    _done(detach(engine, name))


def attached_saes(llm: Any) -> dict[str, Any]:
    """``saes``: attached autoencoders, each with name, site, sizes, features and digest; ``room`` by site for more.

    Raises:
        NotSteered: the engine has no spec.
    """
    front = _engine(llm).front
    return {"saes": front.saes.listed(), "room": front.saes.room()}


class _Client:
    """An `LLM` as the engine of a server."""

    def __init__(self, llm: Any) -> None:
        self._llm = llm
        self.vllm_config = llm.llm_engine.vllm_config
        self.input_processor = llm.llm_engine.input_processor
        self.output_processor = llm.llm_engine.output_processor

    async def is_sleeping(self) -> bool:
        return bool(self._llm.llm_engine.is_sleeping())

    async def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> Any:
        return self._llm.collective_rpc(method, args=args)


def _engine(llm: Any) -> Engine:
    from steer_compile.vllm.server.engine import Engine

    found = Engine.of(_Client(llm))
    if found is None:
        raise NotSteered("this engine has no spec; make it with LLM(model, **engine_args(SteerSpec(...)))")
    return found


def _done(work: Coroutine[Any, Any, _T]) -> _T:
    """The outcome, also where this thread runs an event loop, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
