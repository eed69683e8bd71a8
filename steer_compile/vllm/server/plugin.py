"""Entry point of the group ``vllm.endpoint_plugins``. vLLM loads it where ``VLLM_PLUGINS`` names it.

Reading what is steered is open to whoever may use the server. Changes, captured rows, and the status of dynamic
steering, which names requests and has scores of what they say, need the key of the environment variable `KEY_VARIABLE`
in the header ``X-Steering-Key``; without that variable there are none.
"""

from __future__ import annotations

import hmac
import json
import os
from argparse import Namespace
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, Response

from steer_compile.dynamic.dynamics import as_text
from steer_compile.errors import SteerError, UnknownName
from steer_compile.vllm.capture_files import failure, file_at, packed, stage_files
from steer_compile.vllm.metrics import metrics
from steer_compile.vllm.server import autoencoders
from steer_compile.vllm.server.engine import Diverged, Engine, Unavailable
from steer_compile.vllm.server.files import MAX_FILE, file_under, read_vectors

KEY_VARIABLE = "STEER_COMPILE_API_KEY"
_PREFIX = "/v1/steering"
_MOST_TEXT = 16 << 20
"""Most bytes of a JSON body."""
MOST_ACTIONS = 256
"""Most actions of a body."""
MOST_CAPTURE = 256 << 20
"""Most bytes of a capture that is sent."""

Answer = Callable[[Request], Awaitable[Response]]


class Refusal(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class SteeringEndpoints:
    """What vLLM asks of an endpoint plugin."""

    name = "steer_compile_endpoints"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes below ``/v1/steering``."""
        router = APIRouter(prefix=_PREFIX)
        for path, method, answer in (
            ("", "GET", status),
            ("/vectors", "GET", vectors),
            ("/vectors/{name}", "PUT", register),
            ("/vectors/{name}", "DELETE", forget),
            ("/saes", "GET", saes),
            ("/saes/{name}", "PUT", attach_sae),
            ("/saes/{name}", "DELETE", detach_sae),
            ("/global", "PUT", set_global),
            ("/global", "DELETE", clear_global),
            ("/tier", "PUT", set_tier),
            ("/tier", "DELETE", clear_tier),
            ("/monitor", "PUT", set_monitor),
            ("/monitor", "DELETE", clear_monitor),
            ("/actions", "POST", act),
            ("/dynamic", "GET", dynamic),
            ("/dynamic/metrics", "GET", dynamic_metrics),
            ("/captures/{name}", "GET", capture),
            ("/captures/{name}", "DELETE", forget_capture),
        ):
            changes = method != "GET" or answer is capture
            route = answered(answer, changes or answer is dynamic, changes)
            router.add_api_route(path, route, methods=[method], name=answer.__name__)
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Remember the engine."""
        state.steering = None if engine_client is None else Engine.of(engine_client)


def answered(answer: Answer, guarded: bool, changes: bool) -> Answer:
    """A route that turns refusals into answers, and asks for the key where it changes or gives something away."""

    async def route(request: Request) -> Response:
        try:
            if guarded:
                _check_key(request)
            if changes:
                _engine(request).check_changes()
            return await answer(request)
        except Refusal as error:
            return _refused(error.status, str(error))
        except (UnknownName, FileNotFoundError) as error:
            return _refused(404, str(error))
        except Diverged as error:
            return _refused(500, str(error))
        except Unavailable as error:
            return _refused(503, str(error))
        except SteerError as error:
            return _refused(400, str(error))

    return route


def _refused(status: int, text: str) -> Response:
    return JSONResponse({"error": {"message": text, "code": status}}, status)


def _check_key(request: Request) -> None:
    key = os.environ.get(KEY_VARIABLE, "")
    if not key:
        raise Refusal(403, f"this server takes no changes; start it with {KEY_VARIABLE} set")
    given = request.headers.get("X-Steering-Key", "")
    if not hmac.compare_digest(given.encode(), key.encode()):
        raise Refusal(401, "the header X-Steering-Key is missing or wrong; send the server's steering key")


def _engine(request: Request) -> Engine:
    engine = request.app.state.steering
    if engine is None:
        raise Refusal(
            404, "this server steers nothing; start it with additional_config={'steer_compile': {'steer': [...]}}"
        )
    found: Engine = engine
    return found


async def _body(request: Request, most: int) -> bytes:
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise Refusal(413, f"the body has more than {most} bytes; send less")
    return bytes(data)


async def _object(request: Request) -> dict[str, Any]:
    try:
        given = json.loads(await _body(request, _MOST_TEXT))
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is not JSON ({error}); send an object") from error
    if not isinstance(given, dict):
        raise Refusal(400, f"the body is a {type(given).__name__}; send an object")
    return given


def _counted(engine: Engine, what: str) -> None:
    metrics().changes.labels(what).inc()
    metrics().vectors.set(len(engine.front.vectors()))


async def status(request: Request) -> Response:
    """What the engine steers, its named vectors, global steering, and rows in use in each worker."""
    return JSONResponse(await _engine(request).status())


async def vectors(request: Request) -> Response:
    """Named vector sets."""
    return JSONResponse({"vectors": _engine(request).front.vectors()})


async def register(request: Request) -> Response:
    """Name the vectors of an uploaded file, or of ``{"path": ...}`` under the root; ``?replace=true`` changes a set."""
    engine, name = _engine(request), request.path_params["name"]
    replace = request.query_params.get("replace", "false") == "true"
    if request.headers.get("content-type", "").startswith("application/json"):
        given = await _object(request)
        if set(given) != {"path"} or not isinstance(given["path"], str):
            raise Refusal(400, "the body has no path; send {'path': 'calm.safetensors'}, or upload the file itself")
        if not engine.root:
            raise Refusal(403, "this server reads no paths; set vector_root in additional_config, or upload the file")
        data = file_under(engine.root, given["path"]).read_bytes()
    else:
        data = await _body(request, MAX_FILE)
    digest = engine.front.register(name, read_vectors(data), replace)
    await engine.renamed(name)
    _counted(engine, "register")
    return JSONResponse({"name": name, "digest": digest})


async def forget(request: Request) -> Response:
    """Take a name away. Requests that are under way keep their vectors."""
    engine = _engine(request)
    engine.front.forget(request.path_params["name"])
    await engine.renamed(request.path_params["name"])
    _counted(engine, "forget")
    return JSONResponse({"name": request.path_params["name"]})


async def saes(request: Request) -> Response:
    """Attached autoencoders, and the room of sites for more."""
    front = _engine(request).front
    return JSONResponse({"saes": front.saes.listed(), "room": front.saes.room()})


async def attach_sae(request: Request) -> Response:
    """Attach an autoencoder of ``{"path", "sae", "features", "whole", "site", "options"}``, with a path under the root.
    A name that is taken is refused: detach that one first."""
    engine = _engine(request)
    given = await _object(request)
    if not engine.root:
        raise Refusal(403, autoencoders.NO_ROOT)
    line = await autoencoders.attach(engine, request.path_params["name"], given)
    _counted(engine, "attach")
    return JSONResponse(line)


async def detach_sae(request: Request) -> Response:
    """Detach an autoencoder that nothing uses."""
    engine, name = _engine(request), request.path_params["name"]
    await autoencoders.detach(engine, name)
    _counted(engine, "detach")
    return JSONResponse({"name": name})


async def set_global(request: Request) -> Response:
    """Steer every request: ``base``, ``prefill``, ``decode``, ``named``, ``scale``, as in a request."""
    digests = await _engine(request).set_global(await _object(request))
    _counted(_engine(request), "global")
    return JSONResponse({"global": digests})


async def clear_global(request: Request) -> Response:
    """Steer requests by what they ask for alone."""
    digests = await _engine(request).set_global({})
    _counted(_engine(request), "global")
    return JSONResponse({"global": digests})


async def _set_sites(request: Request, what: str, given: dict[str, Any]) -> Response:
    await _engine(request).set_sites({what: given})
    _counted(_engine(request), what)
    return JSONResponse({what: "set" if given.get("monitor") or given.get("vectors") else "clear"})


async def set_tier(request: Request) -> Response:
    """Replace the dynamic tier: ``{"vectors": ..., "gain": 1.0}``, added to generated tokens of all requests."""
    return await _set_sites(request, "tier", await _object(request))


async def clear_tier(request: Request) -> Response:
    """Take the dynamic tier away."""
    return await _set_sites(request, "tier", {})


async def set_monitor(request: Request) -> Response:
    """Put a monitor at a site: ``{"site": "layers.3.post_block", "monitor": {...}, "gate_rows": false}``."""
    given = await _object(request)
    if given.get("monitor") is None:
        raise Refusal(400, "the body has no monitor; give one with its probe, or DELETE with the site")
    return await _set_sites(request, "monitor", given)


async def clear_monitor(request: Request) -> Response:
    """Take the monitor of a site away: ``?site=layers.3.post_block``."""
    site = request.query_params.get("site")
    if site is None:
        raise Refusal(400, "no site is named; give ?site=layers.3.post_block")
    return await _set_sites(request, "monitor", {"site": site})


async def act(request: Request) -> Response:
    """Ask for actions in front of the next step: ``{"actions": [{"kind": "set_override", "request": ...}, ...]}``."""
    given = await _object(request)
    actions = given.get("actions")
    plain = isinstance(actions, list) and 0 < len(actions) <= MOST_ACTIONS
    if set(given) != {"actions"} or not plain or not all(isinstance(action, dict) for action in actions or ()):
        raise Refusal(400, f"the body has no actions; send {{'actions': [...]}} with 1 to {MOST_ACTIONS} objects")
    accepted = await _engine(request).submit(list(actions or ()))
    _counted(_engine(request), "actions")
    return JSONResponse({"accepted": accepted})


async def dynamic(request: Request) -> Response:
    """Status of dynamic steering of all ranks."""
    return JSONResponse(await _engine(request).dynamic())


async def dynamic_metrics(request: Request) -> Response:
    """The same in Prometheus' text form."""
    return PlainTextResponse(as_text(await _engine(request).dynamic()))


async def capture(request: Request) -> Response:
    """The safetensors file of a request's captured rows, by the name that came with its output; with ``?to=CONSUMER``
    what became of them there."""
    to = request.query_params.get("to")
    if to is not None:
        return JSONResponse(await _engine(request).capture_result(to, request.path_params["name"]))
    paths = _capture_files(request)
    size = sum(path.stat().st_size for path in paths)
    if size > MOST_CAPTURE:
        raise Refusal(413, f"the capture has {size} bytes, and {MOST_CAPTURE} are sent at most; read {paths[0]} itself")
    if len(paths) == 1:
        return FileResponse(paths[0], media_type="application/octet-stream")
    return Response(await run_in_threadpool(packed, paths), media_type="application/octet-stream")


async def forget_capture(request: Request) -> Response:
    """Delete the file of a request's captured rows."""
    paths = _capture_paths(request)
    failed = [path.with_suffix(".error") for path in paths if failure(path)]
    for path in failed or _capture_files(request):
        path.unlink()
    return JSONResponse({"name": request.path_params["name"]})


def _capture_paths(request: Request) -> list[Path]:
    front = _engine(request).front
    return stage_files(file_at(front.settings.capture_dir, request.path_params["name"]), front.stages)


def _capture_files(request: Request) -> list[Path]:
    paths, name = _capture_paths(request), request.path_params["name"]
    for path in paths:
        if failed := failure(path):
            raise Refusal(410, f"the capture was not written: {failed}")
        if not path.is_file():
            raise Refusal(404, f"no capture {name!r}; it appears soon after its request has ended")
    return paths
