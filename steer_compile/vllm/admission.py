"""What a request's steering means for the scheduler and the prefix cache, over vLLM's requests.

A request is anything with ``request_id``, ``num_prompt_tokens`` and ``sampling_params``, whose ``extra_args`` the front
end filled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import count
from typing import Any

from steer_compile.vllm.requests import digests, overrides

RowKey = tuple[str, str]
_OVERRIDE = "override"


def digests_of(request: Any) -> tuple[str, str]:
    """Digests of what a request adds in prefill and in decode, "" for nothing."""
    params = request.sampling_params
    return digests(params.extra_args if params is not None else None)


def row_keys(request: Any) -> set[RowKey]:
    """Rows that a request needs: one for each phase and content, and one of the pool of overrides for its gates."""
    keys = {key for key in zip(("prefill", "decode"), digests_of(request), strict=True) if key[1]}
    params = request.sampling_params
    if overrides(params.extra_args if params is not None else None):
        keys.add((_OVERRIDE, request.request_id))
    return keys


class Grants:
    """The rows that the model runners hold after each step, as the scheduler knows them from what it sends them."""

    def __init__(self, capacity: int, overrides: int = 0) -> None:
        self._capacity = capacity
        self._overrides = overrides
        self._of: dict[str, set[RowKey]] = {}
        self._counts: Counter[RowKey] = Counter()

    def grant(self, request: Any) -> None:
        """A request begins, begins again or goes on with more input: its rows are those of its steering now."""
        self.release((request.request_id,))
        if keys := row_keys(request):
            self._of[request.request_id] = keys
            self._counts.update(keys)

    def release(self, requests: Iterable[str]) -> None:
        """Requests finished or were preempted."""
        for request in requests:
            if keys := self._of.pop(request, None):
                _take_away(self._counts, keys)

    def beyond(self, waiting: Iterable[Any]) -> list[Any]:
        """Waiting requests for which there are no rows, were all the others admitted in their order.

        Behind the first of them, only requests pass that need no new row: what becomes free is for those that waited
        longest.
        """
        counts, held = self._counts.copy(), list[Any]()
        for request in waiting:
            had, wanted = self._of.get(request.request_id, set()), row_keys(request)
            after = counts.copy() if had else counts
            _take_away(after, had)
            new = wanted - after.keys()
            if new and (held or not self._fit(after.keys() | new)):
                held.append(request)
            else:
                after.update(wanted)
                counts = after
        return held

    def _fit(self, keys: set[RowKey]) -> bool:
        routed = sum(kind == _OVERRIDE for kind, _ in keys)
        return routed <= self._overrides and len(keys) - routed <= self._capacity


def _take_away(counts: Counter[RowKey], keys: Iterable[RowKey]) -> None:
    for key in keys:
        counts[key] -= 1
        if not counts[key]:
            del counts[key]


_OWN = "steer_compile_own"
_numbers = count(1)


def own_blocks(request: Any) -> None:
    """A request of an engine with dynamic steering begins: what it generates is its alone.

    It is told by a number, as identifiers may be taken again.
    """
    vars(request)[_OWN] = str(next(_numbers))


def block_keys(request: Any, start: int, end: int) -> tuple[tuple[str, str], ...]:
    """What the key of a cached block of tokens ``start`` to ``end`` says of steering.

    A block of prompt tokens carries what is added in prefill, one of generated tokens what is added in decode, and one
    with both carries both and where the prompt ends: the same tokens as one prompt, as in the next turn of a chat, were
    steered otherwise. Steering of decoded tokens alone leaves the prompt's blocks to be shared with everyone.

    Where an engine may change the steering of generated tokens while a request runs, their blocks are the request's
    own: what acted on them is in no digest.
    """
    prefill, decode = digests_of(request)
    keys: list[tuple[str, str]] = []
    if prefill and start < request.num_prompt_tokens:
        keys.append(("steer_prefill", prefill))
    if decode and end > request.num_prompt_tokens:
        keys.append(("steer_decode", decode))
    if (prefill or decode) and start < request.num_prompt_tokens < end:
        keys.append(("steer_prompt_end", str(request.num_prompt_tokens - start)))
    own = vars(request).get(_OWN)
    if own and end > request.num_prompt_tokens:
        keys.append(("steer_dynamic", own))
    return tuple(keys)
