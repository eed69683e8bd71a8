"""`ActionQueue`: how actions of other threads reach the next step."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from steer_compile.dynamic.actions import Action
from steer_compile.dynamic.counts import Counts
from steer_compile.errors import SpecError

OPERATOR, DECLARATIVE = "operator", "declarative"
"""Sources: whoever holds the process, and what requests themselves declared."""

Given: TypeAlias = Action | Mapping[str, Any]
"""An action, or plain data that is read as one when the queue is drained."""


@dataclass(frozen=True)
class Submitted:
    """Something to do at the next step boundary.

    Attributes:
        given: an action or its plain data; it is checked when it is applied.
        source: who asks; ``declarative`` yields to all others.
        group: actions of one group apply together or not at all; "" for none.
    """

    given: object
    source: str = OPERATOR
    group: str = ""


class ActionQueue:
    """A bounded queue between any threads and the step. `submit` never waits: the newest is dropped when it is full."""

    def __init__(self, capacity: int, counts: Counts) -> None:
        if capacity < 1:
            raise SpecError(f"the action queue has capacity={capacity}; give at least 1")
        self.capacity = capacity
        self._counts = counts
        self._lock = threading.Lock()  # held for one append or one exchange
        self._waiting: list[Submitted] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def submit(self, action: Given, source: str = OPERATOR) -> bool:
        """Ask for an action at the next step boundary; False where the queue is full and the action is dropped."""
        item = Submitted(action, source)
        with self._lock:
            room = len(self._waiting) < self.capacity
            if room:
                self._waiting.append(item)
        if not room:
            self._counts.add("dropped", source)
        return room

    def submit_all(self, actions: Iterable[Given], source: str = OPERATOR, group: str = "") -> bool:
        """The same for several, all or none; with a ``group`` they also apply together or not at all."""
        items = [Submitted(action, source, group) for action in actions]
        with self._lock:
            room = len(self._waiting) + len(items) <= self.capacity
            if room:
                self._waiting += items
        if not room:
            self._counts.add("dropped", source, len(items))
        return room

    def drain(self) -> list[Submitted]:
        """Everything that was submitted, in order."""
        if not self._waiting:
            return []
        with self._lock:
            taken, self._waiting = self._waiting, []
        return taken
