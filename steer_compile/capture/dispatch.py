"""`Dispatch`: calls consumers, so that none harms the others, and keeps account of what became of each request."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from steer_compile.capture.consumer import Consumer
from steer_compile.capture.handover import Event
from steer_compile.capture.results import Ledger, Result, Tracked
from steer_compile.capture.rows import Rows

_log = logging.getLogger(__name__)
_MOST_TEXT = 500


@dataclass(frozen=True)
class Failure:
    """What a consumer raised."""

    text: str


class Dispatch:
    """Consumers by name. All methods are called in one thread."""

    def __init__(self, consumers: Mapping[str, Consumer], ledger: Ledger) -> None:
        self._consumers = dict(consumers)
        self._ledger = ledger
        self._runner: asyncio.Runner | None = None
        self.delivered = 0
        self.nbytes = 0
        self.errors = dict.fromkeys(self._consumers, 0)

    def rows(self, rows: Rows, tracked: Sequence[Tracked]) -> None:
        """Give rows to every consumer, those of requests that failed in it left out."""
        for name, consumer in self._consumers.items():
            going = [t.results[name].status == "pending" for t in tracked]
            own, live = rows, list(tracked)
            if not all(going):
                own = _of_some(rows, going)
                live = [t for t, goes in zip(tracked, going, strict=True) if goes]
            if not live:
                continue
            failed = self._guarded(name, partial(consumer.rows, own))
            if isinstance(failed, Failure):
                for each in live:
                    self._fail(name, each, failed.text)
        self.delivered += len(rows)
        self.nbytes += rows.nbytes

    def event(self, event: Event) -> None:
        """Tell every consumer of something else than rows."""
        for name, consumer in self._consumers.items():
            if event.kind == "flush":
                self._guarded(name, consumer.flush)
            elif event.kind == "close":
                self._guarded(name, consumer.close)
            elif event.tracked is not None and event.tracked.results[name].status == "pending":
                self._of_request(name, consumer, event, event.tracked)
        if event.kind == "close" and self._runner is not None:
            self._runner.close()
            self._runner = None

    def _of_request(self, name: str, consumer: Consumer, event: Event, tracked: Tracked) -> None:
        if event.kind == "aborted":
            self._fail(name, tracked, event.text)
            return
        if event.kind == "began":
            made = self._guarded(name, lambda: consumer.began(tracked.begun))
        else:
            made = self._guarded(name, lambda: consumer.ended(tracked.end()))
        if isinstance(made, Failure):
            self._fail(name, tracked, made.text)
        elif event.kind == "ended" and isinstance(made, Future):
            made.add_done_callback(lambda kept: self._kept_later(name, tracked, kept))
        elif event.kind == "ended":
            self._ledger.settle(tracked, name, tracked.kept(str(made or "")))

    def _kept_later(self, name: str, tracked: Tracked, kept: Future[str]) -> None:
        error = "it was cancelled" if kept.cancelled() else kept.exception()
        if error is not None:
            self._count(name, str(error))
            self._ledger.settle(tracked, name, Result("error", str(error)[:_MOST_TEXT]))
        else:
            self._ledger.settle(tracked, name, tracked.kept(str(kept.result() or "")))

    def _fail(self, name: str, tracked: Tracked, text: str) -> None:
        if self._ledger.settle(tracked, name, Result("error", text)):
            self._guarded(name, lambda: self._consumers[name].forget(tracked.begun.request))

    def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
        """What foreign code returns, awaited where it is a coroutine, or a `Failure` with what it raises."""
        try:
            made = call()
            if inspect.isawaitable(made):
                made = self._awaited(made)
        except (Exception, asyncio.CancelledError) as error:
            text = f"{type(error).__name__}: {error}"[:_MOST_TEXT]
            self._count(name, text)
            return Failure(text)
        return made

    def _awaited(self, made: Any) -> Any:
        async def whole() -> Any:
            return await made

        if self._runner is None:
            self._runner = asyncio.Runner()
        return self._runner.run(whole())

    def _count(self, name: str, text: str) -> None:
        self.errors[name] += 1
        if self.errors[name] == 1:
            _log.warning("the capture consumer %r failed, and requests have no rows there: %s", name, text)


def _of_some(rows: Rows, going: Sequence[bool]) -> Rows:
    """The rows of some of the requests, which alone are named."""
    kept = torch.tensor(going)
    number = torch.cumsum(kept, 0, dtype=torch.int32) - 1
    part = rows.take(kept[rows.request.long()])
    names = tuple(name for name, goes in zip(rows.requests, going, strict=True) if goes)
    request = number.to(torch.int32)[part.request.long()]
    return Rows(names, request, part.positions, part.token_ids, part.steps, part.values)
