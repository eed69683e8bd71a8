"""Beam search: vLLM makes new parameters of such a request and drops what it says of steering, so it is refused."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from steer_compile.vllm.adapters.refusal import RefusedRequest
from steer_compile.vllm.requests import KEY

_REQUESTS = (
    ("vllm.entrypoints.openai.completion.protocol", "CompletionRequest"),
    ("vllm.entrypoints.openai.chat_completion.protocol", "ChatCompletionRequest"),
)
_patched: list[str] = []


def refuse_beam_search() -> None:
    """Wrap the requests of a server, which is loaded by the time that it makes an engine."""
    for module, name in _REQUESTS:
        if module in sys.modules and name not in _patched:
            request = vars(sys.modules[module])[name]
            request.to_beam_search_params = _params(request.to_beam_search_params)
            _patched.append(name)


def _params(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def to_beam_search_params(self: Any, *args: Any, **kwargs: Any) -> Any:
        if KEY in (self.vllm_xargs or {}):
            raise RefusedRequest("vLLM's beam search drops what a request says of steering; leave use_beam_search out")
        return original(self, *args, **kwargs)

    return to_beam_search_params
