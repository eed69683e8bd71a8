"""`Ledger`: what became of the rows of each request in each consumer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from steer_compile.capture.consumer import Began, Ended
from steer_compile.errors import CaptureError, UnknownName


@dataclass(frozen=True)
class Result:
    """Of one request in one consumer.

    Attributes:
        status: ``pending``; ``ok``: all rows are where ``place`` says; ``partial``: some were dropped before they
            reached the consumer; ``error``.
        text: what went wrong, or how many rows were dropped.
        place: where the rows are, as the consumer calls it: paths (one a line), a key, or "".
    """

    status: str = "pending"
    text: str = ""
    place: str = ""


@dataclass(eq=False)
class Tracked:
    """One request from its beginning on; a later one of the same name is another."""

    begun: Began
    dropped: int = 0
    results: dict[str, Result] = field(default_factory=dict)

    @property
    def settled(self) -> bool:
        return all(result.status != "pending" for result in self.results.values())

    def end(self) -> Ended:
        return Ended(self.begun.request, self.begun.tag, self.dropped, self.begun.meta)

    def kept(self, place: str) -> Result:
        """The result where a consumer has kept all that it got."""
        if self.dropped:
            return Result("partial", f"{self.dropped} rows were dropped, as there was no room for them", place)
        return Result("ok", "", place)


class Ledger:
    """Results of requests by name: all that are not settled, and the last ``keep`` that are. Thread-safe.

    Args:
        most: most requests that are not settled.
    """

    def __init__(self, consumers: Iterable[str], most: int, keep: int) -> None:
        self._consumers, self._most, self._keep = tuple(consumers), most, keep
        self._open: dict[str, Tracked] = {}
        self._settled: dict[str, Tracked] = {}
        self._waiting: set[Tracked] = set()
        self._changed = threading.Condition()

    def begin(self, begun: Began) -> Tracked:
        """Follow a request.

        Raises:
            CaptureError: one of the name has not ended, or too many have no result yet.
        """
        with self._changed:
            if begun.request in self._open:
                raise CaptureError(f"request {begun.request!r} is captured already; end it, or give another name")
            if len(self._waiting) >= self._most:
                raise CaptureError(
                    f"{self._most} captured requests have no result yet; end or flush some, or raise Limits.requests"
                )
            tracked = Tracked(begun, 0, dict.fromkeys(self._consumers, Result()))
            self._open[begun.request] = tracked
            self._waiting.add(tracked)
            self._settled.pop(begun.request, None)
            return tracked

    def open(self, request: str) -> Tracked:
        """A request that has not ended.

        Raises:
            UnknownName: there is none of the name.
        """
        with self._changed:
            if request not in self._open:
                some = ", ".join(list(self._open)[:8]) or "none"
                raise UnknownName(f"no request {request!r} is being captured; there are {some}; begin it first")
            return self._open[request]

    @property
    def open_names(self) -> list[str]:
        with self._changed:
            return list(self._open)

    def end(self, request: str) -> Tracked:
        """No more rows of a request come; its results stay under its name."""
        tracked = self.open(request)
        with self._changed:
            del self._open[request]
            self._settled[request] = tracked
            self._trim()
            self._changed.notify_all()
        return tracked

    def drop(self, tracked: Tracked, rows: int) -> None:
        """Rows of a request were dropped."""
        with self._changed:
            tracked.dropped += rows

    def settle(self, tracked: Tracked, consumer: str, result: Result) -> bool:
        """Set a result that is pending; whether it was."""
        with self._changed:
            if tracked.results[consumer].status != "pending":
                return False
            tracked.results[consumer] = result
            if tracked.settled:
                self._waiting.discard(tracked)
                self._trim()
            self._changed.notify_all()
            return True

    def fail_waiting(self, text: str) -> None:
        """Whatever has no result has failed."""
        with self._changed:
            for tracked in self._waiting:
                for name, result in tracked.results.items():
                    if result.status == "pending":
                        tracked.results[name] = Result("error", text)
            self._waiting.clear()
            self._changed.notify_all()

    def _trim(self) -> None:
        if len(self._settled) > self._keep:
            old = (name for name, tracked in self._settled.items() if tracked.settled)
            for name in list(islice(old, len(self._settled) - self._keep)):
                del self._settled[name]

    def results(self, request: str) -> dict[str, Result]:
        """Results by consumer.

        Raises:
            UnknownName: no such request was captured, or it is too long ago.
        """
        with self._changed:
            return dict(self._named(request).results)

    def _named(self, request: str) -> Tracked:
        tracked = self._open.get(request) or self._settled.get(request)
        if tracked is None:
            raise UnknownName(
                f"no result of a captured request {request!r} is known; the last {self._keep} requests are, "
                "and those that have none yet"
            )
        return tracked

    def wait(self, request: str, timeout: float) -> dict[str, Result]:
        """Results once none is pending, or as they are after ``timeout`` seconds."""
        end = time.monotonic() + timeout
        with self._changed:
            tracked = self._named(request)
            while not tracked.settled and (left := end - time.monotonic()) > 0:
                self._changed.wait(left)
            return dict(tracked.results)
