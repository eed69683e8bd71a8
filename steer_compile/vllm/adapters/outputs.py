"""Outputs: which live requests use an autoencoder, and where the file of a finished request that captured is."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine import FinishReason
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from steer_compile.vllm.adapters.refusal import RefusedRequest
from steer_compile.vllm.offered_saes import offered
from steer_compile.vllm.requests import CAPTURE, used_saes

_CAPTURES: WeakKeyDictionary[Any, dict[str, Any]] = WeakKeyDictionary()
_SAES: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()


def missing() -> str:
    """`make_request_output` takes what vLLM itself returns beside the text, and live requests are in one place."""
    taken = inspect.signature(RequestState.make_request_output).parameters
    if "kv_transfer_params" not in taken:
        return "RequestState.make_request_output takes no kv_transfer_params"
    made = inspect.getsource(OutputProcessor.__init__)
    return "" if "self.request_states" in made else "OutputProcessor has no request_states"


def using(processor: Any, number: int) -> int:
    """How many requests of an output processor, waiting or running, use the autoencoder of a number."""
    return sum(number in _SAES.get(state, ()) for state in processor.request_states.values())


def install() -> None:
    """Wrap how a request's state is made and how its output is."""
    RequestState.from_new_request = _begin(RequestState.from_new_request.__func__)
    RequestState.make_request_output = _output(RequestState.make_request_output)


def _begin(original: Callable[..., Any]) -> Any:
    @functools.wraps(original)
    def from_new_request(cls: type, *args: Any, **kwargs: Any) -> Any:
        request = kwargs["request"] if "request" in kwargs else args[1]
        params = request.sampling_params
        saes = used_saes(params.extra_args if params is not None else None)
        if not offered(saes):  # it is handed on at once, so none of them can go before it is counted
            raise RefusedRequest(
                "an autoencoder that the request names was detached while the request was taken in; name another one, "
                "or leave it out"
            )
        state = original(cls, *args, **kwargs)
        if saes:
            _SAES[state] = saes
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
