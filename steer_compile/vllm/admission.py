"""What a request's steering means for the scheduler and the prefix cache. Pure functions over vLLM's requests.

A request is anything with ``num_prompt_tokens`` and ``sampling_params``, whose ``extra_args`` the front end filled.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from steer_compile.vllm.requests import digests


def digests_of(request: Any) -> tuple[str, str]:
    """Digests of what a request adds in prefill and in decode, "" for nothing."""
    params = request.sampling_params
    return digests(params.extra_args if params is not None else None)


def row_keys(request: Any) -> set[tuple[str, str]]:
    """Rows that a request needs: one for each phase and content."""
    return {key for key in zip(("prefill", "decode"), digests_of(request), strict=True) if key[1]}


def beyond(capacity: int, running: Iterable[Any], waiting: Iterable[Any]) -> list[Any]:
    """Waiting requests for which there are no rows. Behind the first of them, only requests pass that need no new row:
    what becomes free is for those that waited longest.
    """
    taken: set[tuple[str, str]] = set()
    for request in running:
        taken |= row_keys(request)
    held: list[Any] = []
    for request in waiting:
        new = row_keys(request) - taken
        if new and (held or len(taken) + len(new) > capacity):
            held.append(request)
        else:
            taken |= new
    return held


def block_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """What the key of a cached block of tokens ``start`` to ``end`` says of steering.

    A block of prompt tokens carries what is added in prefill, one of generated tokens what is added in decode, and one
    with both carries both. Steering of decoded tokens alone leaves the prompt's blocks to be shared with everyone.
    """
    prefill, decode = digests_of(request)
    keys: list[tuple[str, str]] = []
    if prefill and start < request.num_prompt_tokens:
        keys.append(("steer_prefill", prefill))
    if decode and end > request.num_prompt_tokens:
        keys.append(("steer_decode", decode))
    return tuple(keys)
