"""The front end: a request's steering is checked before the engine core sees it."""

from __future__ import annotations

import functools
import inspect
import time
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm import SamplingParams
from vllm.v1.engine.input_processor import InputProcessor

from steer_compile.errors import SteerError
from steer_compile.vllm.adapters.beam_search import refuse_beam_search
from steer_compile.vllm.adapters.compile_path import settings_of, shape_of
from steer_compile.vllm.adapters.engine_options import check
from steer_compile.vllm.adapters.refusal import RefusedRequest
from steer_compile.vllm.frontend import Checked, FrontEnd
from steer_compile.vllm.metrics import metrics
from steer_compile.vllm.requests import CAPTURE, DIGESTS, KEY, SAES
from steer_compile.vllm.settings import Settings

_FRONT_ENDS: WeakKeyDictionary[Any, FrontEnd | None] = WeakKeyDictionary()


def front_end_of(processor: Any) -> FrontEnd | None:
    """The front end of an input processor, None where its engine has no spec."""
    return _FRONT_ENDS.get(processor)


def missing() -> str:
    """`process_inputs` takes the parameters of a request."""
    if "params" not in inspect.signature(InputProcessor.process_inputs).parameters:
        return "InputProcessor.process_inputs has no argument params"
    return ""


def install() -> None:
    """Wrap the input processor's constructor and its one method."""
    InputProcessor.__init__ = _constructor(InputProcessor.__init__)
    InputProcessor.process_inputs = _process(InputProcessor.process_inputs)


def _constructor(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        config = self.vllm_config
        settings = settings_of(config)
        if settings is not None:
            check(config, settings)
        _FRONT_ENDS[self] = None if settings is None else _front_end(config, settings)
        refuse_beam_search()

    return __init__


def _front_end(config: Any, settings: Settings) -> FrontEnd:
    stages, drafts = config.parallel_config.pipeline_parallel_size, config.speculative_config is not None
    return FrontEnd(settings, shape_of(config).whole, stages, drafts)


def _checked(front: FrontEnd, given: object) -> Checked:
    start = time.perf_counter()
    try:
        checked = front.checked(given)
    except SteerError as error:
        metrics().refused.labels(type(error).__name__).inc()
        raise RefusedRequest(str(error)) from error
    metrics().steered.inc()
    metrics().check.observe(time.perf_counter() - start)
    return checked


def _process(original: Callable[..., Any]) -> Callable[..., Any]:
    order = list(inspect.signature(original).parameters)
    place = order.index("params") - 1

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        params = kwargs["params"] if "params" in kwargs else args[place]
        given = (params.extra_args or {}) if isinstance(params, SamplingParams) else {}
        if KEY not in given:
            return original(self, *args, **kwargs)
        if kwargs.get("resumable"):
            raise RefusedRequest("a session that streams its input is not steered; send each turn as a request")
        front = _FRONT_ENDS.get(self)
        if front is None:
            raise RefusedRequest(
                "the request asks for steering, and this engine has no spec; start it with "
                "additional_config={'steer_compile': {'steer': ['post_block']}}"
            )
        checked = _checked(front, given[KEY])
        made = params.clone()
        made.extra_args = {**given, KEY: checked.data, DIGESTS: checked.digests, SAES: list(checked.saes)}
        if checked.capture is not None:
            if params.n > 1:
                raise RefusedRequest("a request that captures has one output; send it n times in place of n > 1")
            made.extra_args[CAPTURE] = checked.capture
            made.skip_reading_prefix_cache = checked.whole or params.skip_reading_prefix_cache
        if "params" in kwargs:
            return original(self, *args, **{**kwargs, "params": made})
        return original(self, *args[:place], made, *args[place + 1 :], **kwargs)

    return process_inputs
