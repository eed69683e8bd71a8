"""Attaching and detaching autoencoders of a running engine: in the front end and in all workers, or in none."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from steer_compile.dynamic.codec import text_of
from steer_compile.errors import NotSteered, SAEError, SpecError, SteerError
from steer_compile.sae.model import SAE
from steer_compile.vllm.adapters.outputs import using
from steer_compile.vllm.adapters.workers import ATTACH_SAE, DETACH_SAE, KEEP_SAE, SAE_USERS, UNDO_SAE
from steer_compile.vllm.autoencoders import SAESpec, sae_specs
from steer_compile.vllm.offered_saes import Held, offered
from steer_compile.vllm.server import engine as engines
from steer_compile.vllm.server.engine import Engine, Unavailable, returned, to_its_end
from steer_compile.vllm.server.files import autoencoder_under

NO_ROOT = "this engine reads no paths; set vector_root in additional_config, the folder that autoencoders lie under"


class Torn(Unavailable):
    """Some workers have a change that others lack, and it could not be taken back."""


@to_its_end
async def attach(engine: Engine, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Load an autoencoder while requests run; returns its line of the list.

    Its files are read apart from the event loop, and then by each worker between two steps, which wait for that.
    Nothing is compiled, and no tensor moves.

    Args:
        given: ``path`` under the root, and ``sae``, ``features``, ``whole``, ``site``, ``options`` as in `SAESpec`.

    Raises:
        SteerError, FileNotFoundError: data of another form, files that cannot be read or lie outside of the root, a
            name that is taken, no room, or a worker that refuses it. Unavailable: the engine sleeps, or a worker
            failed. Nothing is attached then.
    """
    text_of("the name of an autoencoder", name)
    _check_replicas(engine)
    async with engine.lock:
        saes = engine.front.saes
        saes.check_free(name)
        await engine.check_awake()
        spec, made = await asyncio.to_thread(_read, engine.root, name, given)
        held = saes.put(spec, made)
        try:
            await _change(engine, ATTACH_SAE, held.to_data())
            saes.offer(name)
        finally:
            if not offered((held.number,)):
                saes.drop(name)
        return next(line for line in saes.listed() if line["name"] == name)


@to_its_end
async def detach(engine: Engine, name: str) -> None:
    """Give an autoencoder's room back. From the first moment on requests that name it are refused.

    Raises:
        UnknownName: none of this name. SAEError: everyone, or a request that waits or runs, uses it. Unavailable: the
            engine sleeps, or a worker failed. It stays attached then.
    """
    _check_replicas(engine)
    async with engine.lock:
        saes = engine.front.saes
        held = saes.get(name)
        await engine.check_awake()
        _check_everyone(engine, held)
        saes.hide(name)
        try:
            _check_requests(engine, held)
            await _rows_gone(engine, held)
            await _change(engine, DETACH_SAE, name)
        except Torn:
            raise
        except SteerError:
            saes.offer(name)
            raise
        saes.drop(name)


def _where(held: Held) -> str:
    return f"the autoencoder {held.spec.name!r} at {held.attached.place}"


def _check_everyone(engine: Engine, held: Held) -> None:
    everyone = engine.front.everyone
    phases = [phase for phase, contents in everyone.items() if held.spec.name in contents.features.names]
    if phases:
        raise SAEError(
            f"{_where(held)} is in use by everyone ({' and '.join(phases)}); set global steering without it first, or "
            "clear it"
        )


def _check_requests(engine: Engine, held: Held) -> None:
    used = using(engine.client.output_processor, held.number)
    if used:
        many, them = ("1 request", "it") if used == 1 else (f"{used} requests", "them")
        raise SAEError(f"{_where(held)} is in use by {many}; let {them} end or abort {them}, and detach it then")


def _check_replicas(engine: Engine) -> None:
    count = engine.client.vllm_config.parallel_config.data_parallel_size
    if count > 1:
        raise NotSteered(
            f"the engine has {count} replicas, and the answers of one alone come back; name autoencoders in saes when "
            "it starts, or set data_parallel_size=1"
        )


def _read(root: str, name: str, given: Mapping[str, Any]) -> tuple[SAESpec, SAE]:
    path = given.get("path")
    if not isinstance(path, str):
        raise SpecError(f"saes: {name!r} has the path {path!r:.80}; give a folder or a file under vector_root")
    if not root:
        raise SpecError(NO_ROOT)
    try:
        (spec,) = sae_specs({name: {**given, "path": str(autoencoder_under(root, path))}})
        return spec, spec.read()
    except PermissionError as error:
        raise SAEError(f"{path!r} cannot be read ({error.strerror}); let the server's user read it") from error


async def _rows_gone(engine: Engine, held: Held) -> None:
    """Wait for workers to hear of the end of the last requests that used it."""
    for _ in range(engines.TRIES):
        rows = await returned(engine.client.collective_rpc(SAE_USERS, args=(held.spec.name,)))
        if rows is None:
            raise Unavailable(f"a worker of the engine does not answer, so {_where(held)} stays; try again")
        if not any(rows):
            return
        await asyncio.sleep(engines.PAUSE)
    raise SAEError(
        f"{_where(held)} is in use by {max(rows)} rows of overrides or of requests that have "
        "ended; let the engine run a step, and detach it then"
    )


async def _change(engine: Engine, method: str, given: object) -> None:
    """Change all workers or none.

    Raises:
        SAEError: one refuses. Unavailable: one failed. Torn: the change could not be taken back.
    """
    await engine.check_awake()  # it may have gone to sleep while files were read
    number = next(engines.change_numbers)
    answers = await returned(engine.client.collective_rpc(method, args=(number, given)))
    if answers is not None and not any(answers):
        await returned(engine.client.collective_rpc(KEEP_SAE, args=(number,)))
        return
    refusal = next((f": {answer}" for answer in answers or () if answer), "")
    if await returned(engine.client.collective_rpc(UNDO_SAE, args=(number,))) is None:
        raise Torn(
            f"the change of autoencoders did not reach all of the engine, and could not be taken back: restart the "
            f"engine{refusal}"
        )
    if not refusal:
        raise Unavailable("the change of autoencoders did not reach all of the engine, and was taken back; try again")
    raise SAEError(f"a worker of the engine refuses the change, which was taken back in all{refusal}")
