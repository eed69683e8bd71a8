"""The prefix cache: a block's key holds the steering of the tokens in it (`admission.block_keys`)."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm.v1.core import block_pool, kv_cache_utils

from steer_compile.vllm.admission import block_keys

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
        own = block_keys(request, start_token_idx, end_token_idx)
        return ((*(keys or ()), *own) if own else keys), following

    return generate_block_hash_extra_keys
