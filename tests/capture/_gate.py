"""`Gate`: a consumer that waits until it is opened."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from steer_compile.capture.consumer import Began, Consumer, Ended
from steer_compile.capture.rows import Rows


class Gate(Consumer):
    """Waits in `rows` until it is opened, and remembers what came."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.entered = threading.Event()
        self.seen: list[tuple[str, int, int]] = []
        self.told: list[str] = []

    def began(self, begun: Began) -> None:
        self.told.append(f"began {begun.request}")

    def rows(self, rows: Rows) -> None:
        self.entered.set()
        assert self.open.wait(20)
        self.seen += [
            (rows.requests[r], p, s)
            for r, p, s in zip(rows.request.tolist(), rows.positions.tolist(), rows.steps.tolist(), strict=True)
        ]

    def ended(self, end: Ended) -> None:
        self.told.append(f"ended {end.request} {end.dropped}")

    def forget(self, request: str) -> None:
        self.told.append(f"forgot {request}")

    def close(self) -> None:
        self.told.append("closed")


def until(holds: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)
