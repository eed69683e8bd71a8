"""`OverridePool`: rows apart from those of configurations, to which requests are routed while they decode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from steer_compile.errors import TableFull
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.override_rows import OverrideRows


@dataclass(frozen=True)
class Override:
    """What a request's decoded tokens get instead of its own row.

    Attributes:
        number: rises with each request that gets an override, and stays while it is replaced.
        row: row of the tables.
        contents: what the row holds beside everyone's.
        gain: factor of the row.
        source: who asked for it.
    """

    number: int
    request: str
    row: int
    contents: Contents
    gain: float
    source: str

    def digest(self) -> str:
        return f"{self.contents.digest()}@{self.gain!r}"


class OverridePool:
    """Overrides by request. Every change happens as a whole or not at all."""

    def __init__(self, rows: OverrideRows) -> None:
        self._rows = rows
        self._free = list(reversed(rows.rows))
        self._live: dict[str, Override] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._live)

    @property
    def capacity(self) -> int:
        return len(self._rows.rows)

    def get(self, request: str) -> Override | None:
        """The override of a request."""
        return self._live.get(request)

    def live(self) -> dict[str, Override]:
        """Overrides by request."""
        return dict(self._live)

    def install(self, request: str, contents: Contents, gain: float, source: str) -> Override:
        """Give a request an override, in the row that it has or in a free one.

        Raises:
            TableFull: no free row, or none at all. VectorError, SiteNotFound: contents that do not fit; the former
                override stays.
        """
        old = self._live.get(request)
        if old is None and not self._free:
            raise TableFull(self._full())
        row = old.row if old is not None else self._free[-1]
        if old is None or old.contents != contents:
            self._rows.put(row, contents)
        if old is None or old.gain != gain:
            self._rows.set_scale(row, gain)
        if old is None:
            self._free.pop()
            self._number += 1
        number = old.number if old is not None else self._number
        made = Override(number, request, row, contents, gain, source)
        self._live[request] = made
        return made

    def set_gain(self, request: str, gain: float, source: str) -> Override:
        """Change the factor of a live override's row; its vectors are not written."""
        old = self._live[request]
        if old.gain != gain:
            self._rows.set_scale(old.row, gain)
        made = Override(old.number, request, old.row, old.contents, gain, source)
        self._live[request] = made
        return made

    def restore(self, request: str, former: Override | None) -> None:
        """Bring back what a request had before the last change."""
        if former is None:
            self.clear(request)
        elif request in self._live:
            self.install(request, former.contents, former.gain, former.source)
        else:
            self._free.remove(former.row)
            self._rows.put(former.row, former.contents)
            self._rows.set_scale(former.row, former.gain)
        if former is not None:
            self._live[request] = former

    def clear(self, request: str) -> bool:
        """Take a request's override away; whether there was one."""
        old = self._live.pop(request, None)
        if old is not None:
            self._rows.drop(old.row)
            self._free.append(old.row)
        return old is not None

    def drop(self, requests: Iterable[str]) -> list[str]:
        """Take the overrides of requests away that finished, were preempted or compute their prompt again."""
        return [request for request in requests if self.clear(request)]

    def _full(self) -> str:
        if not self.capacity:
            return "the spec has no rows for overrides; give SteerSpec(overrides=...) and compile again"
        return (
            f"all {self.capacity} rows for overrides are in use; clear one, or raise overrides in the spec and compile "
            "again"
        )
