"""`Registry`: vector sets, tiers and configurations, and the rows of the tables that hold them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import torch

from steer_compile.errors import UnknownName
from steer_compile.ir import Bank, Plan, SiteTable
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.features import SAESteering, sae_steering
from steer_compile.runtime.gates import Monitor, SiteLike, clamps_by_site
from steer_compile.runtime.named import NamedVectors
from steer_compile.runtime.override_rows import OverrideRows
from steer_compile.runtime.patching import SitePatches
from steer_compile.runtime.row_store import RowStore
from steer_compile.runtime.rows import RowKey, RowPlan
from steer_compile.runtime.sae_store import SAEStore
from steer_compile.runtime.scope import Scope
from steer_compile.runtime.site_state import SiteState
from steer_compile.runtime.steering import Steering
from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import PHASES, SiteKey, TokenSelection, finite, vector_set
from steer_compile.spec import SteerSpec


@dataclass(frozen=True)
class Handle:
    """A registered configuration and the rows that it holds."""

    number: int
    names: frozenset[str]
    keys: tuple[RowKey, ...]
    plan: RowPlan

    @property
    def rows(self) -> dict[str, int]:
        """Row by phase, 0 where the configuration adds nothing in that phase."""
        return dict(zip(PHASES, self.plan.rows, strict=True))


class Registry:
    """What may be added to the stream, and in which rows it lies. Every change happens as a whole or not at all.

    ``elsewhere`` tells sites of another process of the same model: rows are taken for them, and hold nothing here.
    """

    def __init__(self, spec: SteerSpec, elsewhere: Callable[[SiteKey], bool] = lambda site: False) -> None:
        self._spec = spec
        self.tables = TableSet(spec)
        self._lock = threading.RLock()
        self._scope = Scope(spec, self.tables, elsewhere)
        self._rows = RowStore(spec, self.tables, self._scope)
        self.overrides = OverrideRows(spec, self._rows, self._lock)
        self.sites = SiteState(self.tables, self._scope, self._lock)
        self.patches = SitePatches(self.tables, self._scope)
        self.saes = SAEStore(spec, self.tables, self._scope, self._lock, self._rows.users, lambda: self.shape)
        self.named = NamedVectors()
        self._handles: dict[int, Handle] = {}
        self._numbers = count(1)
        self.shape = (0, 0)
        """Sequences and tokens of each in the last call."""

    def bind(self, plan: Plan, table: SiteTable, device: torch.device) -> None:
        """Allocate the plan's tensors and write what was set before the model was compiled.

        Raises:
            SiteNotFound, VectorError: something set earlier does not fit the compiled sites.
        """
        with self._lock:
            self._scope.partial |= table.partial
            self.reserve(plan.banks, device)

    def reserve(self, banks: tuple[Bank, ...], device: torch.device) -> None:
        """Allocate tensors, also for sites that a graph yet to come will have, and write what is set already.

        Raises:
            SiteNotFound, VectorError: something set earlier does not fit the sites.
        """
        with self._lock, torch.no_grad():
            self.tables.grow(banks, device)
            self._rows.check_all()
            self.sites.check_all()
            self.patches.check_all()
            self.saes.check_all()
            self.saes.bind()
            self._rows.write_all()
            self.sites.bind()
            self.patches.bind()

    # -- vectors --------------------------------------------------------------------------------------------------

    def register_vectors(self, name: str, vectors: object, replace: bool = False) -> str:
        """Name a vector set; returns its content digest.

        Raises:
            VectorError: the vectors are bad, or the name is taken and in use (or ``replace`` is not given).
        """
        checked = vector_set(vectors)
        with self._lock:
            self.named.check(name, checked, replace, sum(name in h.names for h in self._handles.values()))
            self._rows.check(Contents(((checked, 1.0),)))
            self.named.put(name, checked)
            return checked.digest

    @property
    def rows_in_use(self) -> int:
        """Rows that live handles hold; for any thread, without waiting."""
        return self._rows.in_use

    @property
    def names(self) -> dict[str, str]:
        """Registered vector sets: name to content digest."""
        with self._lock:
            return self.named.digests()

    def set_global(
        self, base: object = None, prefill: object = None, decode: object = None, clamps: object = None,
        features: Sequence[SAESteering] = (),
    ) -> None:  # fmt: skip
        """Replace the global tiers, clamps and features; every sequence gets them, with its own steering on top.

        Args:
            base, prefill, decode: vectors (any form that `vector_set` takes).
            clamps: lists of `Clamp` by site, in front of a configuration's own. features: others than its own.

        Raises:
            VectorError, SiteNotFound, SAEError, UnknownName: what does not fit, alone or together with a live
                configuration's own; all stays as it was.
        """
        both, shared = (vector_set(base), 1.0), clamps_by_site(clamps)
        tiers = {"prefill": vector_set(prefill), "decode": vector_set(decode)}
        with self._lock:
            found = {phase: self.saes.resolve(sae_steering(features), phase) for phase in PHASES}
            made = {p: Contents((both, (tiers[p], 1.0)), (), shared, found[p]) for p in PHASES}
            self._rows.check_features(made)
            self.adopt_global(made)

    def adopt_global(self, everyone: Mapping[str, Contents]) -> None:
        """Replace the global tiers and clamps by contents, by phase.

        Raises:
            VectorError, SiteNotFound: they do not fit; all stays as it was.
        """
        with self._lock, torch.no_grad():
            self._rows.set_everyone(everyone)

    def clear_global(self) -> None:
        """Empty the global tiers and take the global clamps away."""
        self.set_global()

    def set_tier(self, vectors: object = None, gain: float = 1.0) -> None:
        """Replace the dynamic tier; see `SiteMonitors.set_tier`. Sites that it does not name get nothing."""
        self.sites.set_tier(vectors, gain)

    def set_monitor(
        self, site: SiteLike, probe: object = None, threshold: float = 0.0, sharpness: float = 1.0,
        gate_rows: bool = False,
    ) -> None:  # fmt: skip
        """Put a monitor at a site: ``sigmoid(sharpness * (h . probe - threshold))`` gates the dynamic tier.

        Args:
            probe: direction (H,), or a `Monitor` of its own settings; None takes the site's away. ``site`` and
                ``gate_rows`` are those of `SiteMonitors.set_monitor`, and so are the errors.
        """
        given = probe if probe is None or isinstance(probe, Monitor) else Monitor(probe, threshold, sharpness)
        self.sites.set_monitor(site, given, gate_rows)

    # -- configurations -------------------------------------------------------------------------------------------

    def register(self, config: Steering) -> Handle:
        """Take rows for a configuration; equal content shares rows.

        Raises:
            TableFull: no free row. UnknownName: an unregistered set. VectorError, SiteNotFound: what does not fit.
        """
        with self._lock:
            made = {phase: self.contents(config, phase) for phase in PHASES}
            self._rows.check_features(self._rows.everyone, made)
            return self.adopt(made, config.tokens, frozenset(name for name, _ in config.named))

    def adopt(
        self, made: Mapping[str, Contents], tokens: TokenSelection | None, names: frozenset[str] = frozenset()
    ) -> Handle:
        """Take rows for contents by phase; ``names`` are of the vector sets among them.

        Raises:
            TableFull: no free row. VectorError, SiteNotFound: contents that do not fit.
        """
        with self._lock, torch.no_grad():
            taken = self._rows.take(made)
            keys = tuple(key for key, _ in taken.values())
            prefill, decode = (taken[phase][1] if phase in taken else 0 for phase in PHASES)
            handle = Handle(next(self._numbers), names, keys, RowPlan((prefill, decode), tokens))
            self._handles[handle.number] = handle
            return handle

    def check(self, contents: Contents, share: float = 1.0) -> None:
        """Raise as `adopt` does for contents that no row can hold; they may use a share of the tables' range."""
        with self._lock:
            self._rows.check(contents)
            contents.check_room(self._spec)
            contents.check_range(self.tables, share)

    def release(self, handle: Handle) -> None:
        """Give a handle's rows back.

        Raises:
            UnknownName: the handle is not live.
        """
        with self._lock:
            self._require_live(handle)
            del self._handles[handle.number]
            self._rows.drop(handle.keys)

    def set_scale(self, handle: Handle, scale: float) -> None:
        """Multiply the vectors of a handle's rows without writing vectors; handles of equal content share it.

        Raises:
            VectorError: a scale that is not finite. UnknownName: the handle is not live.
        """
        factor = finite(scale)
        with self._lock, torch.no_grad():
            self._require_live(handle)
            for row in filter(None, handle.plan.rows):
                self._rows.set_scale(row, factor)

    def _require_live(self, handle: Handle) -> None:
        if self._handles.get(handle.number) is not handle:
            raise UnknownName(f"handle {handle.number} is not live here; register its configuration again")

    def contents(self, config: Steering, phase: str) -> Contents:
        """What a configuration puts into a row of a phase.

        Raises:
            UnknownName: an unregistered vector set.
        """
        parts = [(config.base, config.scale), (config.tier(phase), config.scale)]
        parts += [(self.named.get(name), scale * config.scale) for name, scale in config.named]
        found = self.saes.resolve(config.features, phase)
        return Contents(tuple((v, s) for v, s in parts if v), config.monitors, config.clamps, found)
