"""Outputs: a finished request that captured says where its file is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import RequestState

from steer_compile.vllm.requests import CAPTURE

_CAPTURES: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()


def missing() -> str:
    """`make_request_output` takes what vLLM itself returns beside the text."""
    taken = inspect.signature(RequestState.make_request_output).parameters
    return "" if "kv_transfer_params" in taken else "RequestState.make_request_output takes no kv_transfer_params"


def install() -> None:
    """Wrap how a request's state is made and how its output is."""
    RequestState.from_new_request = _begin(RequestState.from_new_request.__func__)
    RequestState.make_request_output = _output(RequestState.make_request_output)


def _begin(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def from_new_request(cls: type, *args: Any, **kwargs: Any) -> Any:
        state = original(cls, *args, **kwargs)
        request = kwargs["request"] if "request" in kwargs else args[1]
        params = request.sampling_params
        reference = (params.extra_args or {}).get(CAPTURE) if params is not None else None
        if reference is not None:
            _CAPTURES[state] = reference
        return state

    return classmethod(from_new_request)


def _output(original: Callable[..., Any]) -> Callable[..., Any]:
    place = inspect.signature(original).bind_partial

    @functools.wraps(original)
    def make_request_output(self: Any, *args: Any, **kwargs: Any) -> Any:
        reference = _CAPTURES.get(self)
        if reference is None:
            return original(self, *args, **kwargs)
        given = place(self, *args, **kwargs)
        reason = given.arguments.get("finish_reason")
        never_ran = reason is FinishReason.ABORT and self.is_prefilling  # or not far enough to have said a token
        if reason is not None and not never_ran:
            before = given.arguments.get("kv_transfer_params") or {}
            shown = "delta" if self.output_kind is RequestOutputKind.DELTA else "whole"
            given.arguments["kv_transfer_params"] = {**before, "steer_capture": {**reference, "output": shown}}
        return original(*given.args, **given.kwargs)

    return make_request_output
