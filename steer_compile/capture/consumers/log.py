"""``log``: a line for each request in the log of the process."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from steer_compile.capture.consumer import Began, Consumer, Ended
from steer_compile.capture.rows import Rows
from steer_compile.errors import CaptureError

_log = logging.getLogger(__name__)


@dataclass
class _Sums:
    rows: int = 0
    nbytes: int = 0
    norms: dict[str, float] = field(default_factory=dict)


class LogConsumer(Consumer):
    """Logs rows, bytes and the mean norm of each site when a request has ended. Nothing is kept.

    Args:
        level: level of the lines, ``INFO`` or another name that `logging` knows.

    Raises:
        CaptureError: an unknown level.
    """

    def __init__(self, level: str = "INFO") -> None:
        known = logging.getLevelNamesMapping()
        if level not in known:
            raise CaptureError(f"level={level!r} is no level of logging; choose one of {', '.join(known)}")
        self._level = known[level]
        self._live: dict[str, _Sums] = {}

    def began(self, begun: Began) -> None:
        self._live[begun.request] = _Sums()

    def rows(self, rows: Rows) -> None:
        for i, name in enumerate(rows.requests):
            own, sums = rows.request == i, self._live[name]
            part = rows.take(own)
            sums.rows += len(part)
            sums.nbytes += part.nbytes
            for key, value in part.values.items():
                norm = float(value.reshape(len(part), -1).float().norm(dim=1).sum())
                sums.norms[key] = sums.norms.get(key, 0.0) + norm

    def ended(self, end: Ended) -> None:
        sums = self._live.pop(end.request)
        norms = ", ".join(f"{key} {total / max(sums.rows, 1):.4g}" for key, total in sums.norms.items())
        _log.log(
            self._level, "captured %r (tag %r): %d rows, %d bytes, %d dropped; mean norms: %s",
            end.request, end.tag, sums.rows, sums.nbytes, end.dropped, norms or "none",
        )  # fmt: skip

    def forget(self, request: str) -> None:
        self._live.pop(request, None)
