"""`Registry`: vector sets, tiers and configurations, and the rows of the tables that hold them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from steer_compile.errors import SiteNotFound, UnknownName, VectorError
from steer_compile.ir import Plan, SiteTable
from steer_compile.runtime.rows import GLOBAL_ROWS, RowAllocator, RowKey, RowPlan
from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import PHASES, SiteKey, Steering, VectorSet, finite, scaled, vector_set
from steer_compile.spec import SteerSpec

Parts: TypeAlias = tuple[tuple[VectorSet, float], ...]


@dataclass(frozen=True)
class Handle:
    """A registered configuration and the rows that it holds."""

    number: int
    config: Steering
    keys: tuple[RowKey, ...]
    plan: RowPlan

    @property
    def rows(self) -> dict[str, int]:
        """Row by phase, 0 where the configuration adds nothing in that phase."""
        return dict(zip(PHASES, self.plan.rows, strict=True))


class Registry:
    """What may be added to the stream, and in which rows it lies. Every change happens as a whole or not at all."""

    def __init__(self, spec: SteerSpec) -> None:
        self._spec = spec
        self.tables = TableSet(spec)
        self._lock = threading.RLock()
        self._partial = False
        self._rows = RowAllocator(spec.rows)
        self._contents: dict[RowKey, Parts] = {}
        self._scales: dict[int, float] = {}
        self._global: dict[str, VectorSet] = {tier: VectorSet() for tier in ("base", *PHASES)}
        self._named: dict[str, VectorSet] = {}
        self._handles: dict[int, Handle] = {}
        self._number = 0

    def bind(self, plan: Plan, table: SiteTable, device: torch.device) -> None:
        """Allocate the plan's tensors and write the rows that were set before the model was compiled.

        Raises:
            SiteNotFound, VectorError: a vector set earlier does not fit the compiled sites.
        """
        with self._lock, torch.no_grad():
            self._partial |= table.partial
            self.tables.grow(plan.banks, device)
            for parts in (*self._contents.values(), *(self._global_parts(phase) for phase in PHASES)):
                self._check(scaled(parts))
            self._write_all()

    def _check(self, vectors: Mapping[SiteKey, torch.Tensor]) -> None:
        """Every vector must be at a site of the spec; once the model is compiled, at a compiled site of its width."""
        hooks = {s.hook: s.layers for s in self._spec.steer}
        for hook, layer in vectors:
            layers = hooks.get(hook, ())
            if layers != "all" and layer not in layers and all(isinstance(n, int) and n >= 0 for n in layers):
                have = ", ".join(f"{h} at {n}" for h, n in hooks.items()) or "nothing"
                raise SiteNotFound(
                    f"the spec does not steer layers.{layer}.{hook}; it steers {have}; "
                    "add it to the spec and compile again"
                )
        if self.tables.device is not None:
            known = set(self.tables.steered()) if self._partial else set(vectors)
            self.tables.check({key: vector for key, vector in vectors.items() if key in known})

    # -- vectors --------------------------------------------------------------------------------------------------

    def register_vectors(self, name: str, vectors: object, replace: bool = False) -> str:
        """Name a vector set; returns its content digest.

        Raises:
            VectorError: the vectors are bad, or the name is taken and in use (or ``replace`` is not given).
        """
        checked = vector_set(vectors)
        with self._lock:
            old = self._named.get(name)
            if old is not None and old != checked:
                users = sum(any(n == name for n, _ in h.config.named) for h in self._handles.values())
                if users:
                    raise VectorError(f"vector set {name!r} is used by {users} live handles; release them first")
                if not replace:
                    raise VectorError(f"vector set {name!r} exists with other content; pass replace=True to change it")
            self._check(scaled([(checked, 1.0)]))
            self._named[name] = checked
            return checked.digest

    @property
    def names(self) -> dict[str, str]:
        """Registered vector sets: name to content digest."""
        with self._lock:
            return {name: vectors.digest for name, vectors in self._named.items()}

    def set_global(self, base: object = None, prefill: object = None, decode: object = None) -> None:
        """Replace the global tiers; every sequence gets them, with its own steering on top.

        Raises:
            VectorError, SiteNotFound: bad vectors; the tiers stay as they were.
        """
        tiers = {"base": vector_set(base), "prefill": vector_set(prefill), "decode": vector_set(decode)}
        with self._lock, torch.no_grad():
            for vectors in tiers.values():
                self._check(scaled([(vectors, 1.0)]))
            before, self._global = self._global, tiers
            try:
                self._write_all()
            except VectorError:
                self._global = before
                self._write_all()
                raise

    def clear_global(self) -> None:
        """Empty the global tiers."""
        self.set_global()

    # -- configurations -------------------------------------------------------------------------------------------

    def register(self, config: Steering) -> Handle:
        """Take rows for a configuration; equal content shares rows.

        Raises:
            TableFull: no free row. UnknownName: an unregistered vector set. VectorError, SiteNotFound: bad vectors.
        """
        with self._lock, torch.no_grad():
            parts = {phase: self._request_parts(config, phase) for phase in PHASES}
            for phase in PHASES:
                self._check(scaled(parts[phase]))
            keys = {phase: (phase, _digest(parts[phase])) for phase in PHASES if parts[phase]}
            acquired = self._rows.acquire(list(keys.values()))
            try:
                for phase, key in keys.items():
                    row, new = acquired[key]
                    if new:
                        self._contents[key] = parts[phase]
                        self._write_row(row, phase, parts[phase])
                        self._write_scale(row, 1.0)
            except VectorError:
                self._drop(tuple(keys.values()))
                raise
            rows = [acquired[keys[phase]][0] if phase in keys else 0 for phase in PHASES]
            self._number += 1
            handle = Handle(self._number, config, tuple(keys.values()), RowPlan((rows[0], rows[1]), config.tokens))
            self._handles[handle.number] = handle
            return handle

    def release(self, handle: Handle) -> None:
        """Give a handle's rows back.

        Raises:
            UnknownName: the handle is not live.
        """
        with self._lock:
            self._require_live(handle)
            del self._handles[handle.number]
            self._drop(handle.keys)

    def set_scale(self, handle: Handle, scale: float) -> None:
        """Multiply a handle's rows without writing vectors; handles of equal content share it.

        Raises:
            VectorError: a scale that is not finite. UnknownName: the handle is not live.
        """
        factor = finite(scale)
        with self._lock, torch.no_grad():
            self._require_live(handle)
            for row in handle.plan.rows:
                if row:
                    self._write_scale(row, factor)

    def _require_live(self, handle: Handle) -> None:
        if self._handles.get(handle.number) is not handle:
            raise UnknownName(f"handle {handle.number} is not live here; register its configuration again")

    def _drop(self, keys: tuple[RowKey, ...]) -> None:
        self._rows.release(keys)
        live = self._rows.live()
        for key in keys:
            if key not in live:
                self._contents.pop(key, None)

    # -- rows of the tables ---------------------------------------------------------------------------------------

    def _global_parts(self, phase: str) -> Parts:
        return (self._global["base"], 1.0), (self._global[phase], 1.0)

    def _request_parts(self, config: Steering, phase: str) -> Parts:
        parts = [(config.base, config.scale), (config.tier(phase), config.scale)]
        for name, scale in config.named:
            if name not in self._named:
                known = ", ".join(sorted(self._named)) or "none"
                raise UnknownName(f"no vector set is named {name!r}; registered are: {known}")
            parts.append((self._named[name], scale * config.scale))
        return tuple((v, s) for v, s in parts if v)

    def _write_scale(self, row: int, scale: float) -> None:
        self._scales[row] = scale
        if self.tables.device is not None:
            self.tables.scale[row] = scale

    def _write_row(self, row: int, phase: str, parts: Parts) -> None:
        if self.tables.device is not None:
            self.tables.write(row, scaled((*self._global_parts(phase), *parts)))

    def _write_all(self) -> None:
        for phase, row in GLOBAL_ROWS.items():
            self._write_row(row, phase, ())
        for key, row in self._rows.live().items():
            self._write_row(row, key[0], self._contents[key])
            self._write_scale(row, self._scales[row])


def _digest(parts: Parts) -> str:
    return ";".join(f"{vectors.digest}*{scale!r}" for vectors, scale in parts)
