"""`OverrideRows`: the rows behind those of configurations, which hold everyone's decode data and an override's."""

from __future__ import annotations

import threading

import torch

from steer_compile.runtime.contents import Contents
from steer_compile.runtime.row_store import RowStore
from steer_compile.spec import RESERVED_ROWS, SteerSpec


class OverrideRows:
    """Writes rows that their user keeps account of. Every change happens as a whole or not at all."""

    def __init__(self, spec: SteerSpec, store: RowStore, lock: threading.RLock) -> None:
        first = RESERVED_ROWS + spec.rows
        self.rows = range(first, first + spec.overrides)
        self._store = store
        self._lock = lock
        self._late: dict[int, float] = {}

    def put(self, row: int, contents: Contents) -> None:
        """Write contents beside everyone's decode data; a change of everyone's writes the row again.

        Raises:
            VectorError, SiteNotFound: contents that do not fit; the row stays as it was.
        """
        with self._lock, torch.no_grad():
            self._store.pin(row, contents)

    def set_scale(self, row: int, scale: float) -> None:
        """Factor on the vectors of a row, everyone's included; `flush` writes it."""
        self._late[row] = scale

    def flush(self) -> None:
        """Write all factors that were set since, in one copy."""
        if self._late:
            with self._lock, torch.no_grad():
                self._store.set_scales(self._late)
            self._late = {}

    def drop(self, row: int) -> None:
        """Keep a row no longer up to date; no token may read it."""
        self._late.pop(row, None)
        with self._lock:
            self._store.unpin(row)

    def scale(self, row: int) -> float:
        """The factor of a row."""
        return self._late.get(row, self._store.scale(row))

    def own(self, row: int) -> Contents:
        """What a row of a configuration holds beside everyone's, with its factor."""
        return self._store.own(row)

    @property
    def everyone(self) -> Contents:
        """What every decoded token gets."""
        return self._store.everyone["decode"]
