"""What both model runners share: rows and captures of the model that a runner built, step by step."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor

from steer_compile.capture.consumer import Meta
from steer_compile.capture.plain import spec_digest
from steer_compile.dynamic.controller import Controller
from steer_compile.errors import LoweringError, NotSteered
from steer_compile.vllm.capture_consumers import Consumers
from steer_compile.vllm.capture_files import Writer
from steer_compile.vllm.capture_requests import CaptureRequest
from steer_compile.vllm.captures import Captures, Room
from steer_compile.vllm.dynamic import RequestDynamics
from steer_compile.vllm.model import SteeredModel
from steer_compile.vllm.operator_code import loaded
from steer_compile.vllm.requests import KEY as REQUEST_KEY
from steer_compile.vllm.rows import Numbers, RequestRows
from steer_compile.vllm.sae_changes import SAEChanges
from steer_compile.vllm.settings import KEY, Settings, captures
from steer_compile.vllm.site_data import Former


@dataclass
class Live:
    """The requests of one runner: their rows, what changes them while they run, and in the first of its ranks what
    they capture."""

    rows: RequestRows
    saes: SAEChanges
    dynamic: RequestDynamics | None = None
    captures: Captures | None = None
    writer: Writer | None = None
    tokens: tuple[Tensor, Tensor] | None = None
    """Token ids and positions of the step, on the device."""
    steps: int = 0
    """Forwards so far."""
    former: tuple[int, Former] | None = None
    """The last change of sites by an operator, and what they had before."""

    def ended(self, scheduled: Any) -> None:
        """Rows become free at every step, also at one without tokens, which tells an idle engine what has finished."""
        if self.dynamic is not None:
            self.dynamic.ended(scheduled.finished_req_ids, scheduled.preempted_req_ids or ())
        self.rows.drop(scheduled.finished_req_ids)
        self.rows.drop(scheduled.preempted_req_ids or ())
        if self.captures is not None and self.writer is not None:
            for kept in self.captures.finish(scheduled.finished_req_ids):
                self.writer.put(kept)

    def begun(self, requests: Iterable[tuple[str, Any]]) -> None:
        """Requests begin, begin again or go on with more input; given with their sampling parameters."""
        for request, params in requests:
            extra = params.extra_args if params is not None else None
            given = (extra or {}).get(REQUEST_KEY, {})
            if self.dynamic is not None:
                self.dynamic.begun(request, given)
            self.rows.admit(request, extra)
            asked = given.get("capture")
            if asked is not None and self.captures is not None:
                self.captures.begin(request, CaptureRequest.of_data(asked))

    def step(self, requests: list[str], spans: tuple[Numbers, Numbers, Numbers], tokens: tuple[Tensor, Tensor]) -> None:
        """A forward follows. ``spans``: starts, counts and prompts, as in `RequestRows.step`."""
        if self.dynamic is not None:
            self.dynamic.begin(requests, spans, tokens[0])
        self.rows.step(requests, *spans)
        if self.captures is not None and self.captures.expecting:
            self.captures.plan(requests, *spans, self.steps)
            self.tokens = tokens
        self.steps += 1

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Requests of vLLM's own, in a warm-up: no controller sees them."""
        dynamic, self.dynamic = self.dynamic, None
        try:
            yield
        finally:
            self.dynamic, self.steps = dynamic, 0

    def ran(self) -> None:
        """The forward has been launched."""
        if self.tokens is not None and self.captures is not None:
            self.captures.collect(*self.tokens)
            self.tokens = None
        if self.dynamic is not None:
            self.dynamic.end()


_LIVE: WeakKeyDictionary[Any, Live] = WeakKeyDictionary()
_ANNOUNCED: dict[int, tuple[SteeredModel, Settings, tuple[Controller, ...], Consumers | None]] = {}


WORKER = "vllm.v1.worker.gpu_worker"
"""Module of the worker whose warm-up runs the V2 runner on requests that it makes up."""
Wrapper = Callable[[Callable[..., Any]], Callable[..., Any]]
_wrapped: list[type] = []


def building(
    module: str, wrappers: Mapping[str, Wrapper], config: Any, steered: SteeredModel, settings: Settings
) -> None:
    """A runner of a module is building this model; from its first step on it writes rows, by its wrapped methods.

    The module is not imported, as that starts the device: a model is built by a runner that is there.

    Raises:
        LoweringError: the module is not loaded, or its runner lacks a method. SpecError: a controller that cannot be.
        SpecError, UnknownName, CaptureError: a consumer that cannot be made.
    """
    if module not in sys.modules:
        raise LoweringError(f"the model is built outside of {module}, and nothing would write the rows of its tokens")
    runner = vars(sys.modules[module])["GPUModelRunner"]
    wrappers = {**wrappers, "execute_model": _executed}
    absent = [name for name in wrappers if name not in vars(runner)]
    if absent:
        raise LoweringError(f"{module}.GPUModelRunner has no {absent[0]}; use vLLM 0.26 to 0.32")
    if runner not in _wrapped:
        for name, wrapper in wrappers.items():
            setattr(runner, name, wrapper(vars(runner)[name]))
        _wrapped.append(runner)
    worker = vars(sys.modules[WORKER])["Worker"] if WORKER in sys.modules else None
    if worker is not None and worker not in _wrapped:
        worker.compile_or_warm_up_model = warmed(worker.compile_or_warm_up_model)
        _wrapped.append(worker)
    consumers = _consumers(settings, str(config.model_config.model))
    _ANNOUNCED[id(config)] = steered, settings, loaded(settings.controllers), consumers


def live_of(runner: Any) -> Live | None:
    """A runner's requests, None where its engine has no spec.

    Raises:
        NotSteered: its engine has one, and the model was built without tables.
    """
    live = _LIVE.get(runner)
    if live is not None:
        return live
    if id(runner.vllm_config) in _ANNOUNCED:
        return _LIVE.setdefault(runner, _made(*_ANNOUNCED.pop(id(runner.vllm_config))))
    if KEY in (runner.vllm_config.additional_config or {}):
        raise NotSteered(
            "this engine has a spec, and its model was built without tables; no step runs unsteered: report the model "
            "and the version of vLLM"
        )
    return None


def _executed(original: Callable[..., Any]) -> Callable[..., Any]:
    """A runner's ``execute_model``, behind whose forward captured rows are copied."""

    @functools.wraps(original)
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        live = live_of(self)
        if live is not None:
            live.ran()
        return result

    return execute_model


def warmed(original: Callable[..., Any]) -> Callable[..., Any]:
    """A worker's warm-up, whose requests are vLLM's own."""

    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any) -> Any:
        live = live_of(self.model_runner)
        with nullcontext() if live is None else live.aside():
            return original(self)

    return compile_or_warm_up_model


def _consumers(settings: Settings, model: str) -> Consumers | None:
    """What takes captured rows in this process, None where none are kept: the first tensor parallel rank keeps them.

    Raises:
        SpecError, UnknownName, CaptureError: a consumer that cannot be made.
    """
    from vllm.distributed import get_pp_group, get_tensor_model_parallel_rank

    kept = settings.capture_dir or settings.consumers
    if not (captures(settings.spec) and kept and get_tensor_model_parallel_rank() == 0):
        return None
    stages = get_pp_group()
    stage = stages.rank_in_group if stages.world_size > 1 else None
    return Consumers(settings.consumers, Meta(model, spec_digest(settings.spec)), stage)


def _made(
    steered: SteeredModel, settings: Settings, controllers: tuple[Controller, ...], consumers: Consumers | None
) -> Live:
    live = Live(RequestRows(steered.registry), SAEChanges(steered.registry))
    if settings.dynamic:
        live.dynamic = RequestDynamics(steered.registry, live.rows, controllers)
    if consumers is not None:
        room = Room(settings.capture_bytes)
        writer = Writer(settings.capture_dir, room, consumers)
        live.captures, live.writer = Captures(steered.registry.tables, room), writer
    return live
