"""``memory``: rows stay in this process, as tensors, arrays or a table, within a bound."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import numpy.typing as npt
from torch import Tensor

from steer_compile.capture.consumer import Began, Consumer, Ended
from steer_compile.capture.copies import widened
from steer_compile.capture.parting import parted
from steer_compile.capture.rows import Rows, joined
from steer_compile.errors import CaptureError, UnknownName


class MemoryConsumer(Consumer):
    """Keeps the rows of requests by name until they are taken. Thread-safe.

    When there is no room, requests that have ended are let go of, the oldest first; if that is not enough, the request
    whose rows found no room fails.

    Args:
        max_bytes: most bytes of rows, labels included.

    Raises:
        CaptureError: ``max_bytes`` below one.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        if max_bytes < 1:
            raise CaptureError(f"max_bytes={max_bytes} is no size; give a number above 0")
        self._most = max_bytes
        self._lock = threading.Lock()
        self._live: dict[str, list[Rows]] = {}
        self._failed: set[str] = set()
        self._done: OrderedDict[str, list[Rows]] = OrderedDict()
        self._used = 0
        self.evicted = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all rows that are here."""
        return self._used

    @property
    def requests(self) -> list[str]:
        """Requests that have ended and are here."""
        with self._lock:
            return list(self._done)

    # -- as a consumer --------------------------------------------------------------------------------------------

    def began(self, begun: Began) -> None:
        with self._lock:
            self._live[begun.request] = []

    def rows(self, rows: Rows) -> None:
        with self._lock:
            for part in parted(rows):
                (name,) = part.requests
                if name not in self._failed and not self._keep(name, part):
                    self._failed.add(name)
                    self._used -= sum(r.nbytes for r in self._live[name])
                    self._live[name] = []

    def _keep(self, name: str, part: Rows) -> bool:
        while self._done and self._used + part.nbytes > self._most:
            _, gone = self._done.popitem(last=False)
            self._used -= sum(r.nbytes for r in gone)
            self.evicted += 1
        if self._used + part.nbytes > self._most:
            return False
        self._live[name].append(part)
        self._used += part.nbytes
        return True

    def ended(self, end: Ended) -> str:
        with self._lock:
            parts = self._live.pop(end.request)
            if end.request in self._failed:
                self._failed.discard(end.request)
                raise CaptureError(f"the rows are more than max_bytes={self._most}; raise it, or take rows earlier")
            self._used -= sum(r.nbytes for r in self._done.pop(end.request, []))
            self._done[end.request] = parts
        return end.request

    def forget(self, request: str) -> None:
        with self._lock:
            self._used -= sum(r.nbytes for r in self._live.pop(request, []))
            self._failed.discard(request)

    def close(self) -> None:
        """Keep what has ended, for `get`."""

    # -- for its owner --------------------------------------------------------------------------------------------

    def get(self, request: str) -> Rows:
        """The rows of a request that has ended.

        Raises:
            UnknownName: no such request has ended, or it was let go of. CaptureError: it has no rows.
        """
        with self._lock:
            if request not in self._done:
                have = ", ".join(self._done) or "none"
                raise UnknownName(f"no captured request {request!r} has ended and is here; there are {have}")
            return joined(self._done[request])

    def take(self, request: str) -> Rows:
        """`get`, and let go of it."""
        rows = self.get(request)
        with self._lock:
            self._used -= sum(r.nbytes for r in self._done.pop(request, []))
        return rows

    def tensors(self, request: str) -> dict[str, Tensor]:
        """Values (n, \\*row shape) by site, and ``positions``, ``token_ids``, ``steps`` (n,) int64."""
        rows = self.get(request)
        return {"positions": rows.positions, "token_ids": rows.token_ids, "steps": rows.steps, **rows.values}

    def arrays(self, request: str) -> dict[str, npt.NDArray[Any]]:
        """`tensors` as NumPy arrays; bfloat16 becomes float32."""
        return {name: widened(tensor) for name, tensor in self.tensors(request).items()}

    def frame(self, request: str) -> Any:
        """A pandas table: ``request``, ``position``, ``token_id``, ``step``, and an array in each row for each site.

        Raises:
            CaptureError: pandas is not there.
        """
        try:
            import pandas
        except ImportError as error:
            raise CaptureError(
                f"frame needs pandas ({error}); install steer-compile[capture], or use arrays"
            ) from error
        arrays = self.arrays(request)
        labels = {"position": arrays.pop("positions"), "token_id": arrays.pop("token_ids"), "step": arrays.pop("steps")}
        values = {name: list(array) for name, array in arrays.items()}
        return pandas.DataFrame({"request": request, **labels, **values})
