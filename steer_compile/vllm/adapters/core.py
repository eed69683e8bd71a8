"""The engine core: it takes no steering that no front end of this package has checked."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from vllm.v1.engine.core import EngineCore

from steer_compile.vllm.adapters.refusal import RefusedRequest
from steer_compile.vllm.requests import DIGESTS, KEY


def missing() -> str:
    """Requests are made ready by one method, whose errors end the request alone."""
    return "" if "preprocess_add_request" in vars(EngineCore) else "EngineCore has no preprocess_add_request"


def install() -> None:
    """Wrap it."""
    EngineCore.preprocess_add_request = _preprocess(EngineCore.preprocess_add_request)


def _preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        extra = (request.sampling_params.extra_args or {}) if request.sampling_params is not None else {}
        if KEY in extra and DIGESTS not in extra:
            raise RefusedRequest(
                "the request's steering came past the checks of steer_compile; use vLLM's Python server"
            )
        return original(self, request)

    return preprocess_add_request
