"""What passes from the thread that empties the ring to the one that calls consumers, in one order and within bounds."""

from __future__ import annotations

import logging
import threading
from collections import deque
from dataclasses import dataclass
from typing import Literal, TypeAlias

from steer_compile.capture.results import Tracked
from steer_compile.capture.rows import Rows
from steer_compile.capture.spill import Spill, Spilled
from steer_compile.errors import CaptureError

_log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Delivery:
    """Rows and the requests that they are of, in the order of the rows' ``requests``."""

    rows: Rows | Spilled
    tracked: tuple[Tracked, ...]


@dataclass(frozen=True, eq=False)
class Event:
    """Something else than rows that consumers are told of; ``end`` of a request, or of the pipeline."""

    kind: Literal["began", "ended", "aborted", "flush", "close"]
    tracked: Tracked | None = None
    text: str = ""


Message: TypeAlias = Delivery | Event


class Handover:
    """A queue that holds at most ``most`` bytes of rows in memory; with a spill, further rows wait on the disk.

    Where there is no room in either, and where the disk fails, `put` waits.
    """

    def __init__(self, most: int, spill: Spill | None) -> None:
        self._most, self._spill = most, spill
        self._used = 0
        self._shut = False
        self._messages: deque[Message] = deque()
        self._changed = threading.Condition()
        self.spilled = 0
        self.spill_errors = 0

    @property
    def used(self) -> int:
        """Bytes of rows in memory."""
        return self._used

    def put(self, message: Message) -> bool:
        """Append a message; False where `shut` was called while it found no room."""
        if isinstance(message, Delivery) and isinstance(message.rows, Rows):
            return self._put_rows(message, message.rows)
        with self._changed:
            self._messages.append(message)
            self._changed.notify_all()
        return True

    def _put_rows(self, message: Delivery, rows: Rows) -> bool:
        with self._changed:
            fits = self._fits(rows.nbytes)
        if not fits and self._spill is not None:
            spilled = self._spill_rows(self._spill, rows)
            if spilled is not None:
                self.spilled += spilled.rows
                return self.put(Delivery(spilled, message.tracked))
        with self._changed:
            while not self._fits(rows.nbytes) and not self._shut:
                self._changed.wait()
            if self._shut:
                return False
            self._used += rows.nbytes
            self._messages.append(message)
            self._changed.notify_all()
        return True

    def _spill_rows(self, spill: Spill, rows: Rows) -> Spilled | None:
        try:
            return spill.write(rows)
        except OSError as error:
            self.spill_errors += 1
            if self.spill_errors == 1:
                _log.warning("captured rows could not be spilled, and wait for room in memory instead: %s", error)
            return None

    def _fits(self, nbytes: int) -> bool:
        return not self._used or self._used + nbytes <= self._most

    def get(self) -> Message:
        """The next message, read back from the disk where it was spilled; as it was put where that fails."""
        with self._changed:
            while not self._messages:
                self._changed.wait()
            message = self._messages.popleft()
        if not isinstance(message, Delivery) or isinstance(message.rows, Rows):
            return message
        assert self._spill is not None
        try:
            rows = self._spill.read(message.rows)
        except (CaptureError, OSError) as error:
            _log.warning("%d spilled rows are lost: %s", message.rows.rows, error)
            return message
        with self._changed:
            self._used += rows.nbytes
        return Delivery(rows, message.tracked)

    def done(self, rows: Rows) -> None:
        """Rows that were in memory have been delivered."""
        with self._changed:
            self._used -= rows.nbytes
            self._changed.notify_all()

    def shut(self) -> None:
        """Let nobody wait for room any longer."""
        with self._changed:
            self._shut = True
            self._changed.notify_all()
