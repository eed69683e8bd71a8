"""`Journal`: what was applied, as a checksum that ranks compare, a ring of the last events, and a file to replay."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

from steer_compile.dynamic.actions import Action, SetOverride, action_from_data
from steer_compile.dynamic.actuator import Outcome
from steer_compile.dynamic.controller import Note
from steer_compile.errors import SpecError

RING = 256
MOST_RECORD_BYTES = 1 << 30
_FORMAT = "steer_compile dynamic record 1"


@dataclass(frozen=True)
class Event:
    """What a controller saw and chose for a request in a step."""

    step: int
    request: str
    score: float | None
    gain: float
    action: str


@dataclass(frozen=True)
class Rejection:
    """An action that was not applied."""

    step: int
    source: str
    reason: str


class Journal:
    """Keeps account of actions. What it holds in memory is bounded.

    Attributes:
        applied: how many actions the checksum is of.
    """

    def __init__(self, ring: int = RING) -> None:
        self.applied = 0
        self._state = b""
        self._events: deque[Event] = deque(maxlen=ring)
        self._rejections: deque[Rejection] = deque(maxlen=ring)
        self._recorder: Recorder | None = None

    @property
    def checksum(self) -> str:
        """Digest of all actions applied so far, with their steps, order, sources and contents; "" for none.

        Processes that applied the same actions have the same one, whatever their hash seeds are.
        """
        return self._state.hex()

    def take(self, step: int, outcomes: Sequence[Outcome], names: Mapping[str, str]) -> None:
        """Account for what became of the actions in front of a step; ``names`` are the digests of named sets."""
        ordinal = 0
        for outcome in outcomes:
            source = outcome.submitted.source
            if not outcome.applied:
                self._rejections.append(Rejection(step, source, outcome.reason[:500]))
                continue
            head = repr((step, ordinal, source, outcome.digest)).encode()
            self._state = hashlib.sha256(self._state + head).digest()[:16]
            ordinal += 1
            self.applied += 1
            if self._recorder is not None and outcome.action is not None:
                self._recorder.write(step, source, _pinned(outcome.action, names), self.checksum)

    def note(self, step: int, notes: Iterable[Note]) -> None:
        """Keep what controllers noted in a step."""
        self._events.extend(Event(step, note.request, note.score, note.gain, note.action) for note in notes)

    def events(self) -> list[dict[str, Any]]:
        """The last events, as plain data."""
        return [asdict(event) for event in self._events.copy()]

    def rejections(self) -> list[dict[str, Any]]:
        """The last rejected actions, as plain data."""
        return [asdict(rejection) for rejection in self._rejections.copy()]

    def record(self, path: Path | str, step: int, most_bytes: int = MOST_RECORD_BYTES) -> None:
        """Write each applied action to a file of JSON lines, from the step that comes next on.

        Raises:
            SpecError: a file is written already. OSError: this one cannot be.
        """
        if self._recorder is not None:
            raise SpecError(f"{self._recorder.path} is written already; stop that first")
        self._recorder = Recorder(Path(path), step, most_bytes)

    def stop(self) -> None:
        """Close the file of `record`, if there is one."""
        if self._recorder is not None:
            self._recorder.close()
            self._recorder = None


def _pinned(action: Action, names: Mapping[str, str]) -> Action:
    """The action, with the digests that its names have now."""
    if isinstance(action, SetOverride) and action.named:
        return action.to(action.request, expect={name: names[name] for name, _ in action.named})
    return action


class Recorder:
    """A file of applied actions, bounded in bytes: the last line says whether some are missing."""

    def __init__(self, path: Path, step: int, most_bytes: int) -> None:
        self.path = path
        self._first = step
        self._left = most_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file: TextIO | None = path.open("w", encoding="utf-8")
        self._line({"format": _FORMAT})

    def write(self, step: int, source: str, action: Action, checksum: str) -> None:
        if self._file is None:
            return
        data = {"step": step - self._first, "source": source, "action": action.to_data(), "checksum": checksum}
        if not self._line(data):
            self._left = 64
            self._line({"truncated": True})
            self.close()

    def _line(self, data: Mapping[str, Any]) -> bool:
        line = json.dumps(data) + "\n"
        self._left -= len(line)
        if self._left < 0 or self._file is None:
            return False
        self._file.write(line)
        self._file.flush()
        return True

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(frozen=True)
class Replay:
    """A recorded run: actions and their sources by step, counted from where the recording began."""

    steps: Mapping[int, Sequence[tuple[Action, str]]]

    def at(self, step: int) -> Sequence[tuple[Action, str]]:
        """What was applied in front of a step."""
        return self.steps.get(step, ())

    @property
    def last(self) -> int:
        """The last step with an action, -1 without any."""
        return max(self.steps, default=-1)


def read_replay(path: Path | str) -> Replay:
    """A file of `Journal.record`.

    Raises:
        SpecError: it is none, or was cut off when it became too large. VectorError: a damaged action.
    """
    steps: dict[int, list[tuple[Action, str]]] = {}
    with Path(path).open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                data = json.loads(line)
            except ValueError as error:
                raise SpecError(
                    f"line {number} of {path} is not JSON ({error}); give a file that was recorded"
                ) from error
            if number == 1:
                if data != {"format": _FORMAT}:
                    raise SpecError(f"{path} begins with {line[:80]!r}; give a file that was recorded by this version")
            elif not isinstance(data, dict) or not {"step", "source", "action"} <= set(data):
                raise SpecError(f"{path} ends at line {number}, as it became too large; record with more most_bytes")
            else:
                steps.setdefault(int(data["step"]), []).append((action_from_data(data["action"]), str(data["source"])))
    return Replay(steps)
