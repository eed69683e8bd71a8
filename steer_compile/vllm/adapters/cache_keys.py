"""The prefix cache: a block's key holds the steering of the tokens in it.

A block of prompt tokens carries what is added in prefill, one of generated tokens what is added in decode, and one with
both carries both. Steering of decoded tokens alone leaves the prompt's blocks to be shared with everyone.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.v1.core import block_pool, kv_cache_utils

from steer_compile.vllm.requests import digests

_NAME = "generate_block_hash_extra_keys"
_USERS = (kv_cache_utils, block_pool)


def missing() -> str:
    """One function makes the extra keys of a block."""
    absent = [module.__name__ for module in _USERS if _NAME not in vars(module)]
    if absent:
        return f"{absent[0]} has no {_NAME}"
    names = list(inspect.signature(kv_cache_utils.generate_block_hash_extra_keys).parameters)
    return "" if names[:3] == ["request", "start_token_idx", "end_token_idx"] else f"{_NAME} takes {', '.join(names)}"


def install() -> None:
    """Wrap the function wherever it is used."""
    wrapped = _keys(kv_cache_utils.generate_block_hash_extra_keys)
    for module in _USERS:
        vars(module)[_NAME] = wrapped


def _keys(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, following = original(request, start_token_idx, end_token_idx, start_mm_idx)
        own = steering_keys(request, start_token_idx, end_token_idx)
        return ((*(keys or ()), *own) if own else keys), following

    return generate_block_hash_extra_keys


def steering_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """Keys of a block of tokens ``start`` to ``end``."""
    params = request.sampling_params
    prefill, decode = digests(params.extra_args if params is not None else None)
    keys: list[tuple[str, str]] = []
    if prefill and start < request.num_prompt_tokens:
        keys.append(("steer_prefill", prefill))
    if decode and end > request.num_prompt_tokens:
        keys.append(("steer_decode", decode))
    return tuple(keys)
