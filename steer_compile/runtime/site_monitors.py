"""Data that belongs to a site and not to a row: the dynamic tier and the site's monitor."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.runtime.gates import Monitor, SiteLike
from steer_compile.runtime.scope import Scope
from steer_compile.runtime.tables import TableSet, numbers
from steer_compile.runtime.vectors import SiteKey, VectorSet, finite, site_key, vector_set

TOKEN_KINDS = ("tier", "probe", "rowprobe")
"""Kinds of banks beside which a graph reads the gain or the decode mask of each token."""


class SiteMonitors:
    """Tier and monitors of each site. Every change happens as a whole or not at all."""

    def __init__(self, tables: TableSet, scope: Scope, lock: threading.RLock) -> None:
        self._tables = tables
        self._scope = scope
        self._lock = lock
        self._tier = VectorSet()
        self._gain = 1.0
        self._monitors: dict[SiteKey, tuple[Monitor, bool]] = {}
        self._call = (0, False)
        self._written: tuple[int, float, bool] | None = None

    def set_tier(self, vectors: object = None, gain: float = 1.0) -> None:
        """Replace the dynamic tier: a vector of each site, times ``gain``, added to decoded tokens only.

        Raises:
            VectorError, SiteNotFound: bad vectors, or a site without the op family ``tier``.
        """
        checked, factor = vector_set(vectors), finite(gain, "the gain of the dynamic tier")
        with self._lock, torch.no_grad():
            for site, vector in checked.items():
                self._scope.check("tier", site, vector.numel())
            self._tier, self._gain = checked, factor
            self.write()

    def set_monitor(self, site: SiteLike, monitor: Monitor | None, gate_rows: bool = False) -> None:
        """Put a monitor at a site, or take it away (None). It gates the dynamic tier there.

        Args:
            gate_rows: it also gates the rows' vectors at decoded tokens.

        Raises:
            VectorError, SiteNotFound: another width, or a site without the op family ``monitor``.
        """
        key = site_key(site)
        with self._lock, torch.no_grad():
            self._scope.check("monitor", key, None if monitor is None else monitor.probe.numel())
            if monitor is None:
                self._monitors.pop(key, None)
            else:
                self._monitors[key] = (monitor, bool(gate_rows))
            self.write()

    def check_all(self, whole: bool = False) -> None:
        """Raise for what is set and does not fit (``whole``: all parts of the model ran).

        Raises:
            VectorError, SiteNotFound: as in `set_tier` and `set_monitor`.
        """
        for site, vector in self._tier.items():
            self._scope.check("tier", site, vector.numel(), whole)
        for site, (monitor, _) in self._monitors.items():
            self._scope.check("monitor", site, monitor.probe.numel(), whole)

    def write(self) -> None:
        """Write the tier and the monitors of all compiled sites."""
        self._tables.put("tier", (0,), 1, dict(self._tier.items()))
        self._tables.put("probe", (0,), 1, {site: monitor.probe for site, (monitor, _) in self._monitors.items()})
        settings = {
            site: numbers([monitor.threshold, monitor.sharpness, float(gate_rows), 1.0])
            for site, (monitor, gate_rows) in self._monitors.items()
        }
        self._tables.put("probe_set", (0,), 1, settings)

    def bind(self) -> None:
        """Write everything into tables that have grown, in the middle of a call if need be."""
        self.write()
        self._written = None
        self._fill()

    def before_call(self, tokens: int, decode: bool) -> None:
        """Set the gain and the decode mask of the call's tokens, where a graph reads them and they changed."""
        self._call = (tokens, decode)
        self._fill()

    def before_step(self, decoded: npt.NDArray[np.bool_]) -> None:
        """The same for a call whose tokens are in either phase: gain where a token is decoded, 0 where it is not."""
        if any(bank.kind in TOKEN_KINDS for bank in self._tables.banks):
            self._written = None
            self._tables.mask(decoded, self._gain)

    def _fill(self) -> None:
        tokens, decode = self._call
        wanted = (tokens, self._gain, decode)
        if wanted == self._written:
            return
        self._written = wanted
        if any(bank.kind in TOKEN_KINDS for bank in self._tables.banks):
            self._tables.gain[:tokens].fill_(self._gain if decode else 0.0)
            self._tables.decode[:tokens].fill_(float(decode))
