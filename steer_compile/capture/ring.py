"""`Ring`: memory on the host in which rows wait, handed out and given back in one order; and the copies into it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from steer_compile.capture.copies import gather

ALIGNMENT = 64


class Span(NamedTuple):
    """A piece of a ring.

    Attributes:
        start, stop: its bytes.
        held: bytes that it takes, with those at the end of the ring that were skipped for it.
    """

    start: int
    stop: int
    held: int


class Ring:
    """One buffer, pinned where a GPU copies into it. Spans are given back in the order in which they were taken."""

    def __init__(self, size: int, pinned: bool) -> None:
        self.size = size
        self.buffer = torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pinned)
        self._head = self._used = 0
        self._shut = False
        self._room = threading.Condition()
        self._taken: deque[Span] = deque()

    @property
    def used(self) -> int:
        """Bytes that are taken."""
        return self._used

    def take(self, nbytes: int, wait: bool) -> Span | None:
        """A span of so many bytes, at most `size`; None where there is no room, or, waiting, once `shut` was called."""
        with self._room:
            span = self._fit(nbytes)
            while span is None and wait and not self._shut:
                self._room.wait()
                span = self._fit(nbytes)
            if span is not None:
                self._head, self._used = span.stop, self._used + span.held
                self._taken.append(span)
            return span

    def _fit(self, nbytes: int) -> Span | None:
        if not self._used:
            self._head = 0
        wraps = self._head + nbytes > self.size
        skipped = self.size - self._head if wraps else 0
        if self._used + skipped + nbytes > self.size:
            return None
        start = 0 if wraps else self._head
        return Span(start, start + nbytes, nbytes + skipped)

    def give(self) -> None:
        """Give the oldest span back."""
        with self._room:
            self._used -= self._taken.popleft().held
            self._room.notify_all()

    def shut(self) -> None:
        """Let nobody wait for room any longer."""
        with self._room:
            self._shut = True
            self._room.notify_all()


class Place(NamedTuple):
    """Where the rows of tensors of one kind are in a span: one tensor behind the other, from ``start`` on."""

    names: tuple[str, ...]
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def places(tensors: Mapping[str, Tensor], count: int) -> tuple[list[Place], int]:
    """Where ``count`` rows of tensors (T, \\*row shape) go, by dtype, shape and device; and bytes."""
    kinds: dict[tuple[torch.dtype, tuple[int, ...], torch.device], list[str]] = {}
    for name, tensor in tensors.items():
        kinds.setdefault((tensor.dtype, tuple(tensor.shape[1:]), tensor.device), []).append(name)
    found, at = [], 0
    for (dtype, shape, _), names in kinds.items():
        found.append(Place(tuple(names), dtype, shape, at))
        size = len(names) * count * dtype.itemsize * torch.Size(shape).numel()
        at += size + -size % ALIGNMENT
    return found, at


class Copier:
    """Copies rows of tensors into a ring: at once from the CPU, on a stream of its own from a GPU."""

    def __init__(self, ring: Ring, device: torch.device) -> None:
        self._ring = ring
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def copy(
        self, tensors: Mapping[str, Tensor], rows: Tensor, where: Sequence[Place], span: Span
    ) -> tuple[dict[str, Tensor], torch.cuda.Event | None]:
        """Rows by number (n,) of each tensor, as views of the ring that hold them once the event has passed.

        The rows are gathered on the current stream, so what is written to the tensors later is not seen.
        """
        views: dict[str, Tensor] = {}
        gathered: list[tuple[Tensor, Tensor]] = []
        on_device: Tensor | None = None
        for place in where:
            size = len(place.names) * rows.numel() * place.dtype.itemsize * torch.Size(place.shape).numel()
            flat = self._ring.buffer[span.start + place.start :][:size]
            block = flat.view(place.dtype).view(len(place.names), rows.numel(), *place.shape)
            views |= dict(zip(place.names, block.unbind(), strict=True))
            sources = [tensors[name] for name in place.names]
            if not sources[0].is_cuda:
                for source, view in zip(sources, block.unbind(), strict=True):
                    gather(source, rows.numpy(), view)
                continue
            if on_device is None:
                on_device = rows.pin_memory().to(sources[0].device, non_blocking=True)
            staged = torch.empty_like(block, device=sources[0].device, pin_memory=False)
            for source, part in zip(sources, staged.unbind(), strict=True):
                torch.index_select(source, 0, on_device, out=part)
            gathered.append((block, staged))
        return views, self._send(gathered)

    def _send(self, gathered: Sequence[tuple[Tensor, Tensor]]) -> torch.cuda.Event | None:
        """Copy what was gathered to the host, beside the current stream."""
        if not gathered or self._stream is None:
            return None
        self._stream.wait_stream(torch.cuda.current_stream(gathered[0][1].device))
        with torch.cuda.stream(self._stream):
            for block, staged in gathered:
                block.copy_(staged, non_blocking=True)
                staged.record_stream(self._stream)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event
