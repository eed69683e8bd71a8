"""`Parts`: files that hold the rows of many requests, one open at a time for each tag and kind of rows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steer_compile.capture.consumer import Began, Consumer, Ended
from steer_compile.capture.rows import Rows
from steer_compile.errors import CaptureError

Signature: TypeAlias = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""Key, dtype and row shape of each value."""


def signature_of(rows: Rows) -> Signature:
    """What rows have to have in common to be in one file."""
    return tuple((key, value.dtype, tuple(value.shape[1:])) for key, value in sorted(rows.values.items()))


class Part(ABC):
    """A file that grows. It holds nothing under a final name before `seal`."""

    @abstractmethod
    def append(self, rows: Rows, request: Tensor, first: int) -> int:
        """Take rows from number ``first`` on, as many as there is room for; returns the number of the next one.

        Args:
            request: number of each row's request in the part (n,) int32.
        """

    @abstractmethod
    def seal(self, requests: Sequence[Mapping[str, Any]]) -> str:
        """Publish the file with what is known of its requests, in the order of their numbers; returns where it is."""

    @abstractmethod
    def discard(self) -> None:
        """Remove what is there, unless it was published."""


@dataclass(eq=False)
class _Request:
    """A request that began, until the last file with rows of it is published."""

    begun: Began
    last: tuple[str, Signature] | None = None
    end: Ended | None = None
    parts: list[_Open] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    failed: str = ""
    done: Future[str] = field(default_factory=Future)

    def info(self, rows: int) -> dict[str, Any]:
        """What a file says of it, which holds so many rows of it."""
        end = self.end
        meta = (end or self.begun).meta
        return {
            "request": self.begun.request, "tag": self.begun.tag, "model": meta.model, "spec": meta.spec,
            "prompt_length": meta.prompt_length, "rows": rows, "ended": end is not None,
            "dropped": end.dropped if end is not None else 0,
        }  # fmt: skip

    def settle(self) -> None:
        """Say where the rows are, once all of them are published."""
        if self.end is None or self.parts or self.done.done():
            return
        if self.failed:
            self.done.set_exception(CaptureError(self.failed))
        else:
            self.done.set_result("\n".join(self.places))


@dataclass(eq=False)
class _Open:
    """A part and the requests with rows in it, by number, and how many."""

    part: Part
    numbers: dict[_Request, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)

    def add(self, request: _Request) -> int:
        """Number of a request in the part."""
        if request not in self.numbers:
            self.numbers[request] = len(self.numbers)
            self.counts.append(0)
            request.parts.append(self)
        return self.numbers[request]


class Parts(Consumer):
    """Writes rows to parts as they arrive, so it holds no more than the part's own buffers whatever a request's length.

    A request's rows are durable once all parts that hold some are sealed: when they are full, on `flush`, and on
    `close`. A part that fails takes the requests in it with it; the next rows begin another.

    Args:
        open_part: makes the part for a tag and a kind of rows.
    """

    def __init__(self, open_part: Callable[[str, Signature], Part]) -> None:
        self._open_part = open_part
        self._live: dict[str, _Request] = {}
        self._open: dict[tuple[str, Signature], _Open] = {}

    def began(self, begun: Began) -> None:
        self._live[begun.request] = _Request(begun)

    def rows(self, rows: Rows) -> None:
        live = [self._live[name] for name in rows.requests]
        tags = {request.begun.tag for request in live}
        signature = signature_of(rows)
        for tag in sorted(tags):
            if len(tags) == 1:
                self._append((tag, signature), live, rows)
            else:
                own = torch.tensor([request.begun.tag == tag for request in live])
                self._append((tag, signature), live, rows.take(own[rows.request.long()]))

    def ended(self, end: Ended) -> Future[str]:
        request = self._live.pop(end.request)
        request.end = end
        if request.last is not None and not request.parts and not request.failed:
            self._note(request, request.last)
        request.settle()
        return request.done

    def _note(self, request: _Request, key: tuple[str, Signature]) -> None:
        """Let a file say that a request has ended whose rows are all in files that were sealed before."""
        if key not in self._open:
            self._open[key] = _Open(self._open_part(*key))
        self._open[key].add(request)

    def forget(self, request: str) -> None:
        gone = self._live.pop(request, None)
        if gone is not None:
            gone.failed = "given up"

    def flush(self) -> None:
        """Seal all parts.

        Raises:
            CaptureError: one could not be published; the others were sealed nevertheless.
        """
        failed = []
        for key in list(self._open):
            try:
                self._seal(key)
            except CaptureError as error:
                failed.append(str(error))
        if failed:
            raise CaptureError("; ".join(failed))

    def close(self) -> None:
        self.flush()

    def _append(self, key: tuple[str, Signature], live: Sequence[_Request], rows: Rows) -> None:
        first = 0
        while first < len(rows):
            if key not in self._open:
                self._open[key] = _Open(self._open_part(*key))
            now = self._open[key]
            present = rows.request[first:].bincount(minlength=len(live)).nonzero().flatten().tolist()
            table = torch.full((len(live),), -1, dtype=torch.int32)
            for i in present:
                table[i] = now.add(live[i])
                live[i].last = key
            request = table[rows.request.long()]
            try:
                stop = now.part.append(rows, request, first)
            except (OSError, CaptureError, MemoryError, RuntimeError, ValueError) as error:
                raise self._failed(key, error) from error
            for number, count in enumerate(request[first:stop].bincount(minlength=len(now.counts)).tolist()):
                now.counts[number] += count
            if stop < len(rows):
                self._seal(key)
            first = stop

    def _seal(self, key: tuple[str, Signature]) -> None:
        now = self._open[key]
        requests = [r for r in now.numbers]
        infos = [r.info(count) for r, count in zip(requests, now.counts, strict=True)]
        try:
            place = now.part.seal(infos)
        except (OSError, CaptureError, MemoryError, RuntimeError, ValueError) as error:
            raise self._failed(key, error) from error
        del self._open[key]
        for request, count in zip(requests, now.counts, strict=True):
            request.parts.remove(now)
            request.places += [place] if count else []
            request.settle()

    def _failed(self, key: tuple[str, Signature], error: Exception) -> CaptureError:
        """Give a part up, with the requests in it."""
        now = self._open.pop(key)
        text = f"{type(error).__name__}: {error}"
        now.part.discard()
        for request in now.numbers:
            request.parts.remove(now)
            request.failed = text
            request.settle()
        return CaptureError(text)
