"""Data that belongs to a site and not to a row: the dynamic tier and the site's monitor."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.errors import NotSteered, TooManyTokens, VectorError
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
        self._call = (1, 0, False)
        self._written: tuple[int, int, float, bool] | None = None

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
            if monitor is not None:
                self._check_parts(key, monitor)
            if monitor is None:
                self._monitors.pop(key, None)
            else:
                self._monitors[key] = (monitor, bool(gate_rows))
            self.write()

    def _check_parts(self, site: SiteKey, monitor: Monitor, whole: bool = False) -> None:
        """Raise for hidden units or a memory that the site has no room for, and for a gate that could not act."""
        self._scope.check_gate(site, monitor)
        if monitor.remembers:
            self._scope.check("memory", site, None, whole)
        if monitor.hidden is not None:
            units, width = monitor.hidden.weight.shape
            self._scope.check("mlp", site, width, whole)
            if units > self._tables.spec.hidden:
                raise VectorError(
                    f"the probe of layers.{site[1]}.{site[0]} has {units} hidden units and the spec has "
                    f"hidden={self._tables.spec.hidden}; raise it and compile again"
                )

    def scores(self, site: SiteLike) -> torch.Tensor:
        """Scores of the last call's tokens at a site with the op family ``score``, in front of any gate.

        Returns:
            A view (batch, length, 2) in fp32 on the model's device, which the next call overwrites: score of the site's
            monitor, and of the monitor of the token's row; 0 where there is none.

        Raises:
            SiteNotFound: no such site, or without ``score``. NotSteered: no call yet.
        """
        key, (batch, length, _) = site_key(site), self._call
        self._tables.check("score", key)
        if not length:
            raise NotSteered("no compiled graph ran yet, so there are no scores; call the model")
        return self._tables.captured(batch * length, "score")[key].view(batch, length, 2)

    def check_all(self, whole: bool = False) -> None:
        """Raise for what is set and does not fit (``whole``: all parts of the model ran).

        Raises:
            VectorError, SiteNotFound: as in `set_tier` and `set_monitor`.
        """
        for site, vector in self._tier.items():
            self._scope.check("tier", site, vector.numel(), whole)
        for site, (monitor, _) in self._monitors.items():
            self._scope.check("monitor", site, monitor.probe.numel(), whole)
            self._check_parts(site, monitor, whole)

    def write(self) -> None:
        """Write the tier and the monitors of all compiled sites."""
        self._tables.put("tier", (0,), 1, dict(self._tier.items()))
        self._tables.put("probe", (0,), 1, {site: monitor.probe for site, (monitor, _) in self._monitors.items()})
        settings = {
            site: numbers(monitor.settings(rows=gate_rows)) for site, (monitor, gate_rows) in self._monitors.items()
        }
        self._tables.put("probe_set", (0,), 1, settings)
        hidden = {s: m.hidden for s, (m, _) in self._monitors.items() if m.hidden is not None}
        most = self._tables.spec.hidden
        self._tables.put("mlp", (0,), most, {site: units.weight for site, units in hidden.items()})
        ends = {site: torch.stack([units.bias, units.output], 1) for site, units in hidden.items()}
        self._tables.put("mlp_set", (0,), most, ends)

    def bind(self) -> None:
        """Write everything into tables that have grown, in the middle of a call if need be."""
        self.write()
        self._written = None
        self._fill()

    def before_call(self, batch: int, length: int, decode: bool) -> None:
        """Set gain, decode mask and memory line of the call's tokens, where a graph reads them and they changed.

        Raises:
            TooManyTokens: more sequences than the spec has memory for.
        """
        if self._remembers and batch > self._tables.spec.sequences:
            raise TooManyTokens(
                f"the call has {batch} sequences and the spec has sequences={self._tables.spec.sequences}; raise it "
                "and compile again, or split the call"
            )
        self._call = (batch, length, decode)
        self._fill()

    @property
    def _remembers(self) -> bool:
        return any(bank.kind == "state" for bank in self._tables.banks)

    def before_step(self, decoded: npt.NDArray[np.bool_], lines: npt.NDArray[np.int32] | None = None) -> None:
        """The same for a call whose tokens are in either phase: gain where a token is decoded, 0 where it is not.

        Args:
            lines: memory line of each token, 0 for none; None where nothing remembers.
        """
        if lines is not None:
            self._tables.slots(lines)
        if any(bank.kind in TOKEN_KINDS for bank in self._tables.banks):
            self._written = None
            self._tables.mask(decoded, self._gain)

    def _fill(self) -> None:
        batch, length, decode = self._call
        tokens, wanted = batch * length, (batch, length, self._gain, decode)
        if wanted == self._written:
            return
        self._written = wanted
        if any(bank.kind in TOKEN_KINDS for bank in self._tables.banks):
            self._tables.gain[:tokens].fill_(self._gain if decode else 0.0)
            self._tables.decode[:tokens].fill_(float(decode))
        if self._remembers and tokens:
            slots = np.zeros((batch, length), np.int32)
            slots[:, -1] = np.arange(1, batch + 1)
            self._tables.slots(slots)
