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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steer_compile.capture.consumer import Began, Consumer, Meta
from steer_compile.capture.dispatch import Dispatch
from steer_compile.capture.handover import Event, Handover
from steer_compile.capture.intake import Intake
from steer_compile.capture.results import Ledger, Result
from steer_compile.capture.spill import Spill, Spilled
from steer_compile.capture.step import Limits, StepRows
from steer_compile.errors import CaptureError

__all__ = ["Limits", "Pipeline", "Result", "StepRows"]
POLICIES = ("block", "drop", "spill")


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
        if not consumers or not all(isinstance(each, Consumer) for each in consumers.values()):
            raise CaptureError("a pipeline needs consumers by name; give {'files': make_consumer('files', root=...)}")
        if policy not in POLICIES:
            raise CaptureError(f"policy={policy!r} is unknown; choose one of {', '.join(POLICIES)}")
        if (policy == "spill") != (spill is not None):
            raise CaptureError("policy='spill' needs a folder, and no other policy does; give spill=<folder> with it")
        self.policy, self.limits = policy, (limits := limits or Limits())
        self._ledger = Ledger(consumers, limits.requests, limits.results)
        self._spill = Spill(Path(spill), limits.spill_bytes) if spill is not None else None
        self._handover = Handover(limits.queue_bytes, self._spill)
        self._dispatch = Dispatch(consumers, self._ledger)
        self._intake = Intake(limits, torch.device(device), policy != "drop", self._handover, self._ledger)
        self._lock = threading.RLock()
        self._closing = False
        self._threads = [
            threading.Thread(target=run, name=f"steer_compile capture {name}", daemon=True)
            for name, run in (("ring", self._intake.run), ("consumers", self._deliver))
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
        with self._lock:
            self._require_open()
            self._intake.put(Event("began", self._ledger.begin(Began(request, tag, meta))))

    def end(self, request: str, lost: int = 0) -> None:
        """No more rows of a request come. ``lost``: rows that its host had no room for, which make it ``partial``.

        Raises:
            UnknownName: it has not begun, or has ended.
        """
        with self._lock:
            self._ledger.drop(self._ledger.open(request), lost)
            self._intake.put(Event("ended", self._ledger.end(request)))

    def abort(self, request: str, text: str) -> None:
        """Give a request up: its result is an error with this text, and consumers forget what they have of it.

        Raises:
            UnknownName: it has not begun, or has ended.
        """
        with self._lock:
            self._intake.put(Event("aborted", self._ledger.end(request), text))

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
        tensors = of.tensors(positions, values, token_ids)
        with self._lock, torch.no_grad():
            self._require_open()
            tracked = tuple(self._ledger.open(name) for name in of.requests)
            return self._intake.submit(of, tracked, tensors)

    def _require_open(self) -> None:
        if self._closing:
            raise CaptureError("the capture pipeline is closed; make a new one")

    # -- threads --------------------------------------------------------------------------------------------------

    def _deliver(self) -> None:
        while True:
            message = self._handover.get()
            if isinstance(message, Event):
                self._dispatch.event(message)
                if message.kind == "close":
                    return
            elif isinstance(message.rows, Spilled):
                self._intake.drop(message.tracked, message.rows.counts)
            else:
                self._dispatch.rows(message.rows, message.tracked)
                self._handover.done(message.rows)

    # -- the whole ------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Let consumers publish what has ended, once they have got all that was submitted so far."""
        with self._lock:
            self._require_open()
            self._intake.put(Event("flush"))

    def status(self) -> dict[str, Any]:
        """Rows submitted, delivered, dropped and spilled, bytes, errors by consumer, and what is held; plain data."""
        return {
            "policy": self.policy,
            "submitted": self._intake.submitted,
            "delivered": self._dispatch.delivered,
            "dropped": self._intake.dropped,
            "spilled": self._handover.spilled,
            "spill_errors": self._handover.spill_errors,
            "bytes": self._dispatch.nbytes,
            "errors": dict(self._dispatch.errors),
            "ring_bytes": self._intake.ring.used,
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
        if self._closing:
            return not any(thread.is_alive() for thread in self._threads)
        end, self._closing = time.monotonic() + timeout, True
        atexit.unregister(self.close)
        if not self._lock.acquire(timeout=timeout):
            self._intake.shut()
            self._lock.acquire()
        try:
            for name in self._ledger.open_names:
                self.abort(name, "the capture pipeline was closed before the request ended")
            self._intake.put(Event("close"))
        finally:
            self._lock.release()
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))
        drained = not any(thread.is_alive() for thread in self._threads)
        if not drained:
            self._intake.shut()
            self._handover.shut()
        self._ledger.fail_waiting(f"the capture pipeline was closed and its rows were not kept within {timeout} s")
        if self._spill is not None and drained:
            self._spill.close()
        return drained

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
