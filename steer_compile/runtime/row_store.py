"""`RowStore`: the rows of the tables and what lies in them, everyone's data included."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from steer_compile.errors import SteerError
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.rows import GLOBAL_ROWS, RowAllocator, RowKey
from steer_compile.runtime.scope import Scope
from steer_compile.runtime.tables import TableSet, numbers
from steer_compile.runtime.vectors import PHASES, SiteKey
from steer_compile.spec import SteerSpec


class RowStore:
    """Rows by phase and content. Every change happens as a whole or not at all; the caller holds the lock."""

    def __init__(self, spec: SteerSpec, tables: TableSet, scope: Scope) -> None:
        self._spec = spec
        self._tables = tables
        self._scope = scope
        self._rows = RowAllocator(spec.rows)
        self._contents: dict[RowKey, Contents] = {}
        self._scales: dict[int, float] = {}
        self._pinned: dict[int, Contents] = {}
        self.decodings = 0
        """Counts changes of who is decoded from features, other than by taking rows."""
        self._everyone: dict[str, Contents] = {phase: Contents() for phase in PHASES}

    @property
    def in_use(self) -> int:
        return self._rows.in_use

    def live(self) -> dict[RowKey, int]:
        """Rows in use by key."""
        return self._rows.live()

    def check_features(self, everyone: Mapping[str, Contents], own: Mapping[str, Contents] | None = None) -> None:
        """Raise `SAEError` where everyone and a row clamp one feature; ``own``: by phase, None for the rows in use.

        An engine, which cannot hold requests back that wait already, gives rows theirs instead (`Contents.under`).
        """
        rows = [(phase, held) for (phase, _), held in self._contents.items()] if own is None else list(own.items())
        for phase, held in rows:
            everyone[phase].features.check_apart(held.features)

    def users(self, sae: str) -> int:
        """Rows that use an autoencoder, those of everyone included."""
        held = (*self._everyone.values(), *self._contents.values(), *self._pinned.values())
        return sum(sae in contents.features.names for contents in held)

    def decoded(self) -> dict[SiteKey, npt.NDArray[np.bool_]]:
        """Which rows are decoded from features, by site; ``(R,)`` of each."""
        rows = [(row, phase, Contents()) for phase, row in GLOBAL_ROWS.items()]
        rows += [(row, key[0], self._contents[key]) for key, row in self._rows.live().items()]
        rows += [(row, "decode", own) for row, own in self._pinned.items()]
        found: dict[SiteKey, npt.NDArray[np.bool_]] = {}
        for row, phase, own in rows:
            for site, _ in (*self._everyone[phase].features.decodings, *own.features.decodings):
                found.setdefault(site, np.zeros(self._spec.all_rows, np.bool_))[row] = True
        return found

    def check(self, contents: Contents, whole: bool = False) -> None:
        """Raise for what the spec or a compiled site cannot take (``whole``: all parts of the model ran).

        Raises:
            SiteNotFound: no such site, or not with this op family. VectorError: another width, or a gate that would
                not reach what it is to scale.
        """
        for family, site, width in contents.needs():
            self._scope.check(family, site, width, whole)
        for site, monitor in contents.monitors:
            self._scope.check_gate(site, monitor)

    def check_all(self, whole: bool = False) -> None:
        """`check` for everything that is set."""
        for contents in (*self._everyone.values(), *self._contents.values(), *self._pinned.values()):
            self.check(contents, whole)

    def take(self, made: Mapping[str, Contents]) -> dict[str, tuple[RowKey, int]]:
        """Rows for contents by phase, shared with equal ones; phases without content get none.

        Raises:
            TableFull: no free row. VectorError, SiteNotFound: contents that do not fit.
        """
        keys = {phase: (phase, contents.digest()) for phase, contents in made.items() if contents}
        live = self._rows.live()
        for contents in {key[1]: made[phase] for phase, key in keys.items() if key not in live}.values():
            self.check(contents)
        for phase, contents in made.items():
            self._everyone[phase].under(contents).check_room(self._spec)
        acquired = self._rows.acquire(list(keys.values()))
        try:
            self._fill({phase: acquired[key][0] for phase, key in keys.items() if acquired[key][1]}, made)
        except SteerError:
            self.drop(tuple(keys.values()))
            raise
        return {phase: (key, acquired[key][0]) for phase, key in keys.items()}

    def _fill(self, rows: Mapping[str, int], made: Mapping[str, Contents]) -> None:
        """Write new rows; phases with the same content, everyone's included, are written together."""
        together: dict[str, tuple[Contents, list[int]]] = {}
        for phase, row in rows.items():
            self._contents[phase, made[phase].digest()] = made[phase]
            whole = self._everyone[phase].under(made[phase])
            together.setdefault(whole.digest(), (whole, []))[1].append(row)
        if self._tables.device is not None:
            for whole, places in together.values():
                whole.write(self._tables, places)
        for row in rows.values():
            self.set_scale(row, 1.0)

    def drop(self, keys: tuple[RowKey, ...]) -> None:
        """Give one reference of each row back."""
        self._rows.release(keys)
        live = self._rows.live()
        for key in keys:
            if key not in live:
                self._contents.pop(key, None)

    def set_everyone(self, everyone: Mapping[str, Contents]) -> None:
        """Replace what every row holds beside its own, by phase.

        Raises:
            VectorError, SiteNotFound: it does not fit, alone or together with a live row's own.
        """
        for contents in everyone.values():
            self.check(contents)
            contents.check_room(self._spec)
        for (phase, _), own in self._contents.items():
            everyone[phase].under(own).check_room(self._spec)
        for own in self._pinned.values():
            everyone["decode"].under(own).check_room(self._spec)
        before, self._everyone = self._everyone, dict(everyone)
        self.decodings += 1
        try:
            self.write_all()
        except SteerError:
            self._everyone = before
            self.write_all()
            raise

    def set_scale(self, row: int, scale: float) -> None:
        """Factor on the vectors of a row."""
        self._scales[row] = scale
        if self._tables.device is not None:
            self._tables.scale[row] = scale

    def set_scales(self, scales: Mapping[int, float]) -> None:
        """Factors on the vectors of some rows, in one copy to the device."""
        self._scales.update(scales)
        if self._tables.device is not None and scales:
            values = numbers([self.scale(row) for row in range(self._tables.scale.numel())])
            source = values.pin_memory() if self._tables.scale.is_cuda else values
            self._tables.scale.copy_(source, non_blocking=True)

    def scale(self, row: int) -> float:
        """Factor on the vectors of a row."""
        return self._scales.get(row, 1.0)

    @property
    def everyone(self) -> dict[str, Contents]:
        """What every row holds beside its own, by phase."""
        return self._everyone

    def own(self, row: int) -> Contents:
        """What a row of a configuration holds beside everyone's, with its factor; nothing for any other row."""
        key = next((key for key, taken in self._rows.live().items() if taken == row), None)
        if key is None:
            return Contents()
        contents, scale = self._contents[key], self.scale(row)
        return contents if scale == 1.0 else contents.scaled(scale)

    def pin(self, row: int, contents: Contents) -> None:
        """Write a row of the pool of overrides, and keep it up to date with everyone's decode data.

        Raises:
            VectorError, SiteNotFound: contents that do not fit; the row stays as it was.
        """
        self.check(contents)
        self._everyone["decode"].under(contents).check_room(self._spec)
        before = self._pinned.get(row)
        try:
            self._write(row, "decode", contents)
        except SteerError:
            if before is not None:
                self._write(row, "decode", before)
            raise
        self._pinned[row] = contents
        self.decodings += bool(contents.features.decodings or (before and before.features.decodings))

    def unpin(self, row: int) -> None:
        """Forget a row of the pool of overrides."""
        self._pinned.pop(row, None)
        self._scales.pop(row, None)

    def write_all(self) -> None:
        """Write every row that is in use, and those of tokens without one."""
        for phase, row in GLOBAL_ROWS.items():
            self._write(row, phase, Contents())
        for key, row in self._rows.live().items():
            self._write(row, key[0], self._contents[key])
            self.set_scale(row, self._scales[row])
        for row, own in self._pinned.items():
            self._write(row, "decode", own)
            self.set_scale(row, self._scales.get(row, 1.0))
        for row in set(GLOBAL_ROWS.values()) & self._scales.keys():
            self.set_scale(row, self._scales[row])

    def _write(self, row: int, phase: str, own: Contents) -> None:
        if self._tables.device is not None:
            self._everyone[phase].under(own).write(self._tables, [row])
