"""``callback``: rows as they arrive, to a function."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from steer_compile.capture.consumer import Consumer, Ended, Kept
from steer_compile.capture.rows import Rows


class CallbackConsumer(Consumer):
    """Calls functions, which may be ``async def``; nothing is kept.

    Args:
        on_rows: called with the `Rows` of each step.
        on_ended: called with `Ended`; what it returns is the place that the request's result names.
    """

    def __init__(
        self, on_rows: Callable[[Rows], Awaitable[None] | None], on_ended: Callable[[Ended], Any] | None = None
    ) -> None:
        self._on_rows, self._on_ended = on_rows, on_ended

    def rows(self, rows: Rows) -> Awaitable[None] | None:
        return self._on_rows(rows)

    def ended(self, end: Ended) -> Kept | Awaitable[Kept]:
        kept: Kept | Awaitable[Kept] = self._on_ended(end) if self._on_ended is not None else None
        return kept
