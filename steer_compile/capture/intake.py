"""`Intake`: the side of a pipeline that the forward sees. It copies rows into the ring, and a thread empties it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from steer_compile.capture.handover import Delivery, Event, Handover
from steer_compile.capture.results import Ledger, Tracked
from steer_compile.capture.ring import Copier, Ring, places
from steer_compile.capture.step import Item, Limits, StepRows
from steer_compile.errors import CaptureError


class Intake:
    """Rows and events in the order in which they came. One thread at a time submits, and one runs `run`.

    Args:
        waits: where there is no room, the forward waits; else rows are dropped.

    Attributes:
        submitted, dropped: rows so far.
    """

    def __init__(self, limits: Limits, device: torch.device, waits: bool, handover: Handover, ledger: Ledger) -> None:
        self._limits, self._waits, self._handover, self._ledger = limits, waits, handover, ledger
        self.ring = Ring(limits.ring_bytes, device.type == "cuda")
        self._copier = Copier(self.ring, device)
        self._items: deque[Item | Event] = deque()
        self._changed = threading.Condition()
        self._inside = 0
        self._shut = False
        self.submitted = self.dropped = 0

    def submit(self, of: StepRows, tracked: tuple[Tracked, ...], tensors: Mapping[str, Tensor]) -> int:
        """Copy rows of a step's tensors, in pieces that fit the ring; returns how many were taken.

        Raises:
            CaptureError: one row is more than the ring holds.
        """
        _, size = places(tensors, 1)
        if size > self._limits.ring_bytes:
            raise CaptureError(
                f"one row has {size} bytes, and the ring {self._limits.ring_bytes}; raise Limits.ring_bytes"
            )
        most, count = max(1, self._limits.ring_bytes // 2 // size), len(of.rows)
        self.submitted += count
        taken = 0
        for first in range(0, count, most):
            part = of.part(first, min(count, first + most))
            taken += len(part.rows) if self._take(part, tracked, tensors) else 0
        return taken

    def _take(self, of: StepRows, tracked: tuple[Tracked, ...], tensors: Mapping[str, Tensor]) -> bool:
        wait = self._waits
        where, size = places(tensors, len(of.rows))
        with self._changed:
            while wait and self._inside >= self._limits.items and not self._shut:
                self._changed.wait()
            full = self._inside >= self._limits.items
        span = self.ring.take(size, wait) if not full else None
        if span is None:
            self.drop(tracked, np.bincount(of.request, minlength=len(tracked)).tolist())
            return False
        views: dict[str, Tensor] | None = None
        ready = None
        try:
            views, ready = self._copier.copy(tensors, torch.from_numpy(of.rows), where, span)
        finally:
            self.put(Item(of, tracked, views, ready))  # spans go back in their order, also where a copy failed
        return True

    def put(self, message: Item | Event) -> None:
        """Append rows in the ring, or something else than rows."""
        with self._changed:
            self._inside += isinstance(message, Item)
            self._items.append(message)
            self._changed.notify_all()

    def drop(self, tracked: Sequence[Tracked], counts: Sequence[int]) -> None:
        """Count rows that are lost, so many of each request."""
        for each, count in zip(tracked, counts, strict=True):
            self._ledger.drop(each, count)
        with self._changed:
            self.dropped += sum(counts)

    def run(self) -> None:
        """Hand on what comes, up to the event that closes the pipeline."""
        going = True
        while going:
            with self._changed:
                while not self._items:
                    self._changed.wait()
                message = self._items.popleft()
            if isinstance(message, Event):
                self._handover.put(message)
                going = message.kind != "close"
                continue
            rows = message.rows()
            self.ring.give()
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()
            if rows is None or not self._handover.put(Delivery(rows, message.tracked)):
                self.drop(message.tracked, message.counts())

    def shut(self) -> None:
        """Let nobody wait for room any longer."""
        with self._changed:
            self._shut = True
            self._changed.notify_all()
        self.ring.shut()
