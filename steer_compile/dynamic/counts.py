"""`Counts`: how often something happened, by source. Readable from any thread at any time."""

from __future__ import annotations

import threading
from collections import Counter

MOST_SOURCES = 64
OTHERS = "others"


class Counts:
    """Counters of a bounded number of sources; further sources are counted together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counter[str]] = {}

    def add(self, what: str, source: str, number: int = 1) -> None:
        with self._lock:
            counter = self._counts.setdefault(what, Counter())
            counter[source if source in counter or len(counter) < MOST_SOURCES else OTHERS] += number

    def data(self) -> dict[str, dict[str, int]]:
        """Counts by what and source."""
        with self._lock:
            return {what: dict(sorted(counter.items())) for what, counter in self._counts.items()}
