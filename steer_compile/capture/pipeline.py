"""`Pipeline`: from the tensors of a step to consumers, beside the forward and within bounds.

::

    submit: rows --copy--> ring --thread--> Rows --queue, or files--> thread --> consumers --> results

The forward waits for nothing but the copy's place in the ring, and for that only with the policy ``block``, and with
``spill`` once the ring, the queue and the files are full.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steer_compile.capture.consumer import Began, Consumer, Meta
from steer_compile.capture.dispatch import Dispatch
from steer_compile.capture.handover import Delivery, Event, Handover
from steer_compile.capture.results import Ledger, Result, Tracked
from steer_compile.capture.ring import Copier, Ring, places
from steer_compile.capture.rows import Rows
from steer_compile.capture.spill import Spill, Spilled
from steer_compile.errors import CaptureError

POLICIES = ("block", "drop", "spill")
_POSITIONS, _TOKEN_IDS = "\0positions", "\0token_ids"


@dataclass(frozen=True)
class Limits:
    """How much a pipeline holds.

    Attributes:
        ring_bytes: rows whose copy is under way.
        queue_bytes: rows that wait for consumers.
        items: pieces of steps in the ring.
        requests: requests that have no result yet.
        results: requests whose results are remembered.
        spill_bytes: rows that wait on the disk.
    """

    ring_bytes: int = 256 << 20
    queue_bytes: int = 256 << 20
    items: int = 1024
    requests: int = 65536
    results: int = 4096
    spill_bytes: int = 16 << 30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise CaptureError(f"{name}={value} is no limit; give a number above 0")


@dataclass(frozen=True, eq=False)
class StepRows:
    """Which rows of a step are whose.

    Attributes:
        requests: names of the requests, all of which have begun.
        request: index in ``requests`` of each row (n,).
        rows: number of each row in the step's tensors (n,).
        step: number of the forward.
    """

    requests: Sequence[str]
    request: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int64]
    step: int

    def __post_init__(self) -> None:
        if self.request.shape != self.rows.shape or self.rows.ndim != 1:
            raise CaptureError(f"{self.request.shape} requests are given for {self.rows.shape} rows; give one for each")

    def check(self, tokens: int) -> None:
        """Raise `CaptureError` for rows beyond the tokens of the step, or requests that are not named."""
        for what, index, most in (("row", self.rows, tokens), ("request", self.request, len(self.requests))):
            if len(index) and not 0 <= index.min() <= index.max() < most:
                raise CaptureError(f"{what} {index.max()} is asked for of {most}; number them from 0")

    def part(self, first: int, stop: int) -> StepRows:
        """Some of the rows that follow one another."""
        return StepRows(self.requests, self.request[first:stop], self.rows[first:stop], self.step)


@dataclass(eq=False)
class _Item:
    """Rows in the ring, there once ``ready`` has passed."""

    of: StepRows
    tracked: tuple[Tracked, ...]
    views: dict[str, Tensor] | None
    ready: torch.cuda.Event | None

    def rows(self) -> Rows | None:
        """A copy outside of the ring; None where there is no memory for one, or the device failed."""
        if self.views is None:
            return None
        try:
            if self.ready is not None:
                self.ready.synchronize()
            values = {key: view.clone() for key, view in self.views.items()}
        except (MemoryError, RuntimeError):
            return None
        count = len(self.of.rows)
        ids = values.pop(_TOKEN_IDS, None)
        return Rows(
            tuple(self.of.requests),
            torch.from_numpy(np.array(self.of.request, np.int32)),
            values.pop(_POSITIONS),
            ids if ids is not None else torch.full((count,), -1, dtype=torch.int64),
            torch.full((count,), self.of.step, dtype=torch.int64),
            values,
        )

    def counts(self) -> list[int]:
        """Rows of each request."""
        counts: list[int] = np.bincount(self.of.request, minlength=len(self.tracked)).tolist()
        return counts


_Message: TypeAlias = _Item | Event


class Pipeline:
    """Takes rows of steps, and gives them to consumers in the order of the steps. Thread-safe.

    Args:
        consumers: by the name under which results name them.
        device: where the tensors of steps are; with a GPU the ring is pinned, and copies have a stream of their own.
        policy: what happens where there is no room. ``block``: the forward waits. ``drop``: rows are dropped, and
            counted for their requests, which end as ``partial``. ``spill``: rows go to files in ``spill``, are read
            back in order, and beyond ``limits.spill_bytes``, or where the disk fails, it is ``block``.
        spill: a folder for these files; each process has one of its own in it.

    Raises:
        CaptureError: no consumer, an unknown policy, ``spill`` without a folder, or a folder that cannot be written.
    """

    def __init__(
        self,
        consumers: Mapping[str, Consumer],
        device: torch.device | str = "cpu",
        policy: str = "block",
        limits: Limits | None = None,
        spill: str | Path | None = None,
    ) -> None:
        limits = limits or Limits()
        if not consumers or not all(isinstance(each, Consumer) for each in consumers.values()):
            raise CaptureError("a pipeline needs consumers by name; give {'files': make_consumer('files', root=...)}")
        if policy not in POLICIES:
            raise CaptureError(f"policy={policy!r} is unknown; choose one of {', '.join(POLICIES)}")
        if (policy == "spill") != (spill is not None):
            raise CaptureError("policy='spill' needs a folder, and no other policy does; give spill=<folder> with it")
        self.policy, self.limits = policy, limits
        target = torch.device(device)
        self._ring = Ring(limits.ring_bytes, target.type == "cuda")
        self._copier = Copier(self._ring, target)
        self._ledger = Ledger(consumers, limits.requests, limits.results)
        self._spill = Spill(Path(spill), limits.spill_bytes) if spill is not None else None
        self._handover = Handover(limits.queue_bytes, self._spill)
        self._dispatch = Dispatch(consumers, self._ledger)
        self._intake = threading.RLock()
        self._items: deque[_Message] = deque()
        self._changed = threading.Condition()
        self._inside = 0
        self._submitted = self._dropped = 0
        self._closing = self._shut = False
        self._threads = [
            threading.Thread(target=run, name=f"steer_compile capture {name}", daemon=True)
            for name, run in (("ring", self._empty_ring), ("consumers", self._deliver))
        ]
        for thread in self._threads:
            thread.start()
        atexit.register(self.close)

    # -- requests -------------------------------------------------------------------------------------------------

    def begin(self, request: str, tag: str = "", meta: Meta = Meta()) -> None:  # noqa: B008
        """Follow a request from now on.

        Raises:
            CaptureError: one of the name has not ended, too many have no result yet, or the pipeline is closed.
        """
        with self._intake:
            self._require_open()
            self._put(Event("began", self._ledger.begin(Began(request, tag, meta))))

    def end(self, request: str) -> None:
        """No more rows of a request come.

        Raises:
            UnknownName: it has not begun, or has ended.
        """
        with self._intake:
            self._put(Event("ended", self._ledger.end(request)))

    def abort(self, request: str, text: str) -> None:
        """Give a request up: its result is an error with this text, and consumers forget what they have of it.

        Raises:
            UnknownName: it has not begun, or has ended.
        """
        with self._intake:
            self._put(Event("aborted", self._ledger.end(request), text))

    def results(self, request: str) -> dict[str, Result]:
        """Results of the last request of a name by consumer, as they are now.

        Raises:
            UnknownName: no such request was captured, or it is too long ago.
        """
        return self._ledger.results(request)

    def wait(self, request: str, timeout: float = 60.0) -> dict[str, Result]:
        """Results of the last request of a name once none is ``pending``, or as they are after ``timeout`` seconds.

        Consumers that collect requests publish when a file is full: `flush` before, where that may be far away.

        Raises:
            UnknownName: no such request was captured, or it is too long ago.
        """
        return self._ledger.wait(request, timeout)

    # -- rows -----------------------------------------------------------------------------------------------------

    def submit(
        self, of: StepRows, positions: Tensor, values: Mapping[str, Tensor], token_ids: Tensor | None = None
    ) -> int:
        """Copy rows of a step; returns how many were taken, which is all of them unless the policy is ``drop``.

        The tensors may be written to as soon as this returns: by work on the current stream, where they are on a GPU.

        Args:
            of: which rows.
            positions: absolute position of each token of the step (T,).
            values: by key, ``layers.3.post_block``, (T, \\*row shape).
            token_ids: of the step's tokens (T,).

        Raises:
            UnknownName: a request has not begun. CaptureError: the pipeline is closed, tensors or numbers that do not
                fit each other, or one row is more than the ring holds.
        """
        count = len(of.rows)
        of.check(positions.size(0))
        tensors = {_POSITIONS: positions.to(torch.int64), **values}
        if token_ids is not None:
            tensors[_TOKEN_IDS] = token_ids.to(torch.int64)
        for key, tensor in tensors.items():
            if tensor.size(0) != positions.size(0):
                raise CaptureError(
                    f"{key.strip(chr(0))} has shape {tuple(tensor.shape)} and positions {positions.size(0)} tokens; "
                    "give tensors with an entry for each token of the step"
                )
        with self._intake, torch.no_grad():
            self._require_open()
            tracked = tuple(self._ledger.open(name) for name in of.requests)
            _, size = places(tensors, 1)
            if size > self.limits.ring_bytes:
                raise CaptureError(
                    f"one row has {size} bytes, and the ring {self.limits.ring_bytes}; raise Limits.ring_bytes"
                )
            most = max(1, self.limits.ring_bytes // 2 // size)
            self._submitted += count
            taken = 0
            for first in range(0, count, most):
                part = of.part(first, min(count, first + most))
                if self._take(part, tracked, tensors):
                    taken += len(part.rows)
        return taken

    def _take(self, of: StepRows, tracked: tuple[Tracked, ...], tensors: Mapping[str, Tensor]) -> bool:
        wait = self.policy != "drop"
        where, size = places(tensors, len(of.rows))
        with self._changed:
            while wait and self._inside >= self.limits.items and not self._shut:
                self._changed.wait()
            full = self._inside >= self.limits.items
        span = self._ring.take(size, wait) if not full else None
        if span is None:
            self._drop(tracked, np.bincount(of.request, minlength=len(tracked)).tolist())
            return False
        views: dict[str, Tensor] | None = None
        ready = None
        try:
            views, ready = self._copier.copy(tensors, torch.from_numpy(np.array(of.rows, np.int64)), where, span)
        finally:
            self._put(_Item(of, tracked, views, ready))  # spans go back in their order, also where a copy failed
        return True

    def _put(self, message: _Message) -> None:
        with self._changed:
            self._inside += isinstance(message, _Item)
            self._items.append(message)
            self._changed.notify_all()

    def _drop(self, tracked: Sequence[Tracked], counts: Sequence[int]) -> None:
        for each, count in zip(tracked, counts, strict=True):
            self._ledger.drop(each, count)
        with self._changed:
            self._dropped += sum(counts)

    def _require_open(self) -> None:
        if self._closing:
            raise CaptureError("the capture pipeline is closed; make a new one")

    # -- threads --------------------------------------------------------------------------------------------------

    def _empty_ring(self) -> None:
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
            self._ring.give()
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()
            if rows is None or not self._handover.put(Delivery(rows, message.tracked)):
                self._drop(message.tracked, message.counts())

    def _deliver(self) -> None:
        while True:
            message, failed = self._handover.get()
            if isinstance(message, Event):
                self._dispatch.event(message)
                if message.kind == "close":
                    return
            elif isinstance(message.rows, Spilled):
                self._drop(message.tracked, message.rows.counts)
            else:
                self._dispatch.rows(message.rows, message.tracked)
                self._handover.done(message.rows)

    # -- the whole ------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Let consumers publish what has ended, once they have got all that was submitted so far."""
        with self._intake:
            self._require_open()
            self._put(Event("flush"))

    def status(self) -> dict[str, Any]:
        """Rows submitted, delivered, dropped and spilled, bytes, errors by consumer, and what is held; plain data."""
        return {
            "policy": self.policy,
            "submitted": self._submitted,
            "delivered": self._dispatch.delivered,
            "dropped": self._dropped,
            "spilled": self._handover.spilled,
            "spill_errors": self._handover.spill_errors,
            "bytes": self._dispatch.nbytes,
            "errors": dict(self._dispatch.errors),
            "ring_bytes": self._ring.used,
            "queue_bytes": self._handover.used,
            "spill_bytes": self._spill.used if self._spill is not None else 0,
            "open": len(self._ledger.open_names),
        }

    def close(self, timeout: float = 30.0) -> bool:
        """Deliver what was submitted, close the consumers and end the threads; what takes longer is given up.

        Requests that have not ended get the result ``error``. A second call does nothing.

        Returns:
            Whether everything was delivered in time.
        """
        end = time.monotonic() + timeout
        if self._closing:
            return not any(thread.is_alive() for thread in self._threads)
        self._closing = True
        atexit.unregister(self.close)
        if not self._intake.acquire(timeout=timeout):
            self._give_up()
            self._intake.acquire()
        try:
            for name in self._ledger.open_names:
                self.abort(name, "the capture pipeline was closed before the request ended")
            self._put(Event("close"))
        finally:
            self._intake.release()
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        drained = not any(thread.is_alive() for thread in self._threads)
        if not drained:
            self._give_up()
        self._ledger.fail_waiting(f"the capture pipeline was closed and its rows were not kept within {timeout} s")
        if self._spill is not None and drained:
            self._spill.close()
        return drained

    def _give_up(self) -> None:
        with self._changed:
            self._shut = True
            self._changed.notify_all()
        self._ring.shut()
        self._handover.shut()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
