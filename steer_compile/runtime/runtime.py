"""`Runtime`: what a compiled model's owner talks to. Vectors, rows, scales and captures change here, never graphs."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from steer_compile.errors import NotSteered, SiteNotFound, SpecError, TooManyTokens, UnknownName, VectorError
from steer_compile.ir import Plan, SiteTable
from steer_compile.runtime.capture import CaptureLog
from steer_compile.runtime.rows import GLOBAL_ROWS, PhaseTracker, RowAllocator, RowKey, RowPlan, token_rows
from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import PHASES, SiteKey, Steering, VectorSet, scaled, vector_set
from steer_compile.spec import SteerSpec

Parts = tuple[tuple[VectorSet, float], ...]


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


@dataclass
class _Batch:
    """Who the elements of the next calls are: one handle for all, or one each."""

    handles: tuple[Handle | None, ...] = ()
    everyone: Handle | None = None

    def plans(self, size: int) -> list[RowPlan]:
        if not self.handles:
            return [self.everyone.plan if self.everyone else RowPlan()] * size
        if len(self.handles) != size:
            raise NotSteered(
                f"{len(self.handles)} rows are assigned but the call has {size} sequences; assign one handle or None to each"
            )
        return [h.plan if h else RowPlan() for h in self.handles]


class Runtime:
    """Vectors, rows, phases and captures of one compiled model. Thread-safe for changes between calls."""

    def __init__(self, spec: SteerSpec) -> None:
        self._spec = spec
        self.tables = TableSet(spec)
        self.phases = PhaseTracker()
        self.calls = 0
        self._partial = False
        self._rows = RowAllocator(spec.rows)
        self._contents: dict[RowKey, Parts] = {}
        self._global: dict[str, VectorSet] = {tier: VectorSet() for tier in ("base", *PHASES)}
        self._named: dict[str, VectorSet] = {}
        self._handles: dict[int, Handle] = {}
        self._batch = _Batch()
        self._version = 0
        self._number = 0
        self._index_key: object = None
        self._last_layer: int | None = None
        self._shape = (0, 0)
        self._logs: list[CaptureLog] = []
        self._lock = threading.RLock()

    # -- compile time ---------------------------------------------------------------------------------------------

    def bind(self, plan: Plan, table: SiteTable, device: torch.device) -> None:
        """Allocate the plan's tensors and write the rows that were set before the model was compiled.

        Raises:
            SiteNotFound, VectorError: a vector set earlier does not fit the compiled sites.
        """
        with self._lock, torch.no_grad():
            self._partial |= table.partial
            self.tables.grow(plan.banks, device)
            for parts in (*self._contents.values(), *self._tier_parts()):
                self._check(scaled(parts))
            self._write_all()

    def _tier_parts(self) -> list[Parts]:
        return [tuple((self._global[tier], 1.0) for tier in ("base", phase)) for phase in PHASES]

    def _check(self, vectors: Mapping[SiteKey, torch.Tensor]) -> None:
        """Every vector must be at a site of the spec; once the model is compiled, at a compiled site of its width."""
        hooks = {s.hook: s.layers for s in self._spec.steer}
        for hook, layer in vectors:
            layers = hooks.get(hook)
            if layers is None or (layers != "all" and layer not in layers and min(layers, default=0) >= 0):  # type: ignore[type-var]
                raise SiteNotFound(
                    f"the spec does not steer layers.{layer}.{hook}; it steers "
                    f"{', '.join(f'{h} at {n}' for h, n in hooks.items()) or 'nothing'}; add it to the spec and compile again"
                )
        if self.tables.device is None:
            return
        known = set(self.tables.steered())
        late = {k: v for k, v in vectors.items() if k not in known}
        self.tables.check({k: v for k, v in vectors.items() if k in known} if self._partial else vectors)
        if not self._partial and late:
            self.tables.check(late)

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

    def register(self, config: Steering) -> Handle:
        """Take rows for a configuration; equal content shares rows.

        Raises:
            TableFull: no free row. UnknownName: an unregistered vector set. VectorError, SiteNotFound: bad vectors.
        """
        with self._lock, torch.no_grad():
            parts = {phase: self._request_parts(config, phase) for phase in PHASES}
            for phase in PHASES:
                self._check(scaled(parts[phase]))
            keys = {phase: (phase, _digest(parts[phase])) for phase in PHASES if scaled(parts[phase])}
            acquired = self._rows.acquire(list(keys.values()))
            try:
                for phase, key in keys.items():
                    self._contents[key] = parts[phase]
                    if acquired[key][1]:
                        self._write_row(acquired[key][0], phase, parts[phase])
                        self._set_scale(acquired[key][0], 1.0)
            except VectorError:
                self._drop(tuple(keys.values()))
                raise
            rows = tuple(acquired[keys[p]][0] if p in keys else 0 for p in PHASES)
            self._number += 1
            handle = Handle(self._number, config, tuple(keys.values()), RowPlan((rows[0], rows[1]), config.tokens))
            self._handles[handle.number] = handle
            return handle

    def release(self, handle: Handle) -> None:
        """Give a handle's rows back.

        Raises:
            UnknownName: the handle is not live. NotSteered: it is still assigned.
        """
        with self._lock:
            if handle.number not in self._handles:
                raise UnknownName(f"handle {handle.number} is not live; it was released before")
            if handle is self._batch.everyone or handle in self._batch.handles:
                raise NotSteered(f"handle {handle.number} is assigned to a running batch; assign other rows first")
            del self._handles[handle.number]
            self._drop(handle.keys)

    def _drop(self, keys: tuple[RowKey, ...]) -> None:
        self._rows.release(keys)
        live = self._rows.live()
        for key in keys:
            if key not in live:
                self._contents.pop(key, None)

    def set_scale(self, handle: Handle, scale: float) -> None:
        """Multiply a handle's rows without writing vectors; handles of equal content share it.

        Raises:
            VectorError: a scale that is not finite. UnknownName: the handle is not live.
        """
        if not np.isfinite(scale):
            raise VectorError(f"scale {scale!r} is not finite; give a finite number")
        with self._lock, torch.no_grad():
            if handle.number not in self._handles:
                raise UnknownName(f"handle {handle.number} is not live; it was released before")
            for row in handle.plan.rows:
                if row:
                    self._set_scale(row, float(scale))

    def _set_scale(self, row: int, scale: float) -> None:
        if self.tables.device is not None:
            self.tables.scale[row] = scale

    def _request_parts(self, config: Steering, phase: str) -> Parts:
        parts = [(config.base, config.scale), (config.tier(phase), config.scale)]
        for name, scale in config.named:
            if name not in self._named:
                known = ", ".join(sorted(self._named)) or "none"
                raise UnknownName(f"no vector set is named {name!r}; registered are: {known}")
            parts.append((self._named[name], scale * config.scale))
        return tuple((v, s) for v, s in parts if v)

    def _write_row(self, row: int, phase: str, parts: Parts) -> None:
        if self.tables.device is not None:
            tiers = ((self._global["base"], 1.0), (self._global[phase], 1.0))
            self.tables.write(row, scaled((*tiers, *parts)))

    def _write_all(self) -> None:
        for phase, row in GLOBAL_ROWS.items():
            self._write_row(row, phase, ())
        for key, row in self._rows.live().items():
            self._write_row(row, key[0], self._contents[key])

    # -- rows -----------------------------------------------------------------------------------------------------

    def assign(self, handles: Sequence[Handle | None] | Handle | None) -> None:
        """Who the elements of the next calls are: one handle or None each, or one for all.

        Raises:
            UnknownName: a handle that is not live.
        """
        with self._lock:
            batch = _Batch(everyone=handles) if handles is None or isinstance(handles, Handle) else _Batch(tuple(handles))
            for handle in (batch.everyone, *batch.handles):
                if handle is not None and handle.number not in self._handles:
                    raise UnknownName(f"handle {handle.number} is not live; register its configuration again")
            self._batch = batch
            self._version += 1

    def before_call(self, first_layer: int, batch: int, length: int) -> None:
        """Called in front of each compiled graph: set the rows of its tokens.

        Raises:
            TooManyTokens: more tokens than the spec has room for. NotSteered: the batch does not fit the assignment.
        """
        if self._last_layer is not None and first_layer > self._last_layer and (batch, length) == self._shape:
            self._last_layer = first_layer
            return
        with self._lock, torch.no_grad():
            count = batch * length
            if count > self._spec.max_tokens:
                raise TooManyTokens(
                    f"the call has {batch} x {length} = {count} tokens but the spec has max_tokens={self._spec.max_tokens}; "
                    "raise it and compile again, or split the call"
                )
            plans = self._batch.plans(batch)
            step = self.phases.advance(batch, length)
            self.calls += 1
            self._last_layer, self._shape = first_layer, (batch, length)
            moving = any(p.tokens is not None for p in plans) or any(step.pads)
            key = (self._version, step.phase, batch, length, step.start if moving else 0, step.pads)
            if key != self._index_key:
                self.tables.index(token_rows(step, plans))
                self._index_key = key

    def after_call(self, last: bool) -> None:
        """Called behind each compiled graph: let open capture logs take what it stored."""
        if last:
            for log in self._logs:
                log.take(self.tables.captured(self._shape[0] * self._shape[1]), *self._shape)

    # -- the common case ------------------------------------------------------------------------------------------

    @contextmanager
    def steer(
        self,
        vectors: object = None,
        *,
        rows: Sequence[Steering | Handle | None] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        padding: str = "left",
        phase: str | None = None,
        **config: Any,
    ) -> Iterator[list[Handle | None]]:
        """Steer the calls inside the block.

        Args:
            vectors: vectors for all sequences (base tier); further fields of `Steering` as keywords.
            rows: instead: one `Steering`, handle or None for each sequence of the batch.
            prompt_lengths: tokens of each prompt where prompts are padded on the side ``padding``.
            phase: ``prefill`` or ``decode`` where the shape of the calls does not tell.

        Raises:
            NotSteered: on leaving, if no compiled graph ran inside. SiteNotFound: a vector's site never ran.
        """
        if phase not in (None, *PHASES) or padding not in ("left", "right"):
            raise SpecError(f"phase={phase!r}, padding={padding!r}: phase is prefill or decode, padding is left or right")
        if rows is not None and (vectors is not None or config):
            raise SpecError("give either vectors for all sequences or rows for each, not both")
        wanted: list[Steering | Handle | None] = list(rows) if rows is not None else [Steering(vector_set(vectors), **config)]
        own: list[Handle] = []
        before, tracker, calls = self._batch, self.phases, self.calls
        try:
            handles: list[Handle | None] = []
            for item in wanted:
                handles.append(self.register(item) if isinstance(item, Steering) else item)
                own += [handles[-1]] if isinstance(item, Steering) and handles[-1] is not None else []
            self.assign(handles if rows is not None else handles[0])
            prompts = tuple(int(n) for n in prompt_lengths) if prompt_lengths is not None else None
            self.phases = PhaseTracker(told=phase, prompts=prompts, padding=padding)
            self._last_layer = None
            yield handles
            self._prove(calls, "steered")
            self.check_complete()
        finally:
            self._batch, self.phases = before, tracker
            self._version += 1
            for handle in own:
                self.release(handle)

    @contextmanager
    def capture(self) -> Iterator[CaptureLog]:
        """Collect what the calls inside the block store, as ``log["post_block", 3]`` of shape (batch, tokens, width).

        Raises:
            SpecError: the spec captures nothing. NotSteered: on leaving, if no compiled graph ran inside.
        """
        if not self._spec.capture:
            raise SpecError("the spec captures nothing; give SteerSpec(capture=('post_block',), ...) and compile again")
        log, calls = CaptureLog(), self.calls
        self._logs.append(log)
        try:
            yield log
            self._prove(calls, "captured")
        finally:
            self._logs.remove(log)

    def _prove(self, calls: int, what: str) -> None:
        if self.calls == calls:
            raise NotSteered(
                f"nothing was {what}: no compiled graph ran inside the block; compile the module in place with "
                "model.compile(backend=...), since torch.compile(model).generate(...) runs the original model"
            )

    def check_complete(self) -> None:
        """Raise `SiteNotFound` when a site that the spec or a live vector names was in no compiled graph."""
        have = {(b.kind, *site) for b in self.tables.banks for site in b.sites}
        for kind, selections in (("table", self._spec.steer), ("capture", self._spec.capture)):
            for selection in selections:
                named = selection.layers if isinstance(selection.layers, tuple) else ()
                missing = [n for n in named if n >= 0 and (kind, selection.hook, n) not in have]
                if missing:
                    raise SiteNotFound(f"layers.{missing[0]}.{selection.hook} was in none of the compiled graphs")
        for parts in self._contents.values():
            self.tables.check(scaled(parts))

    def status(self) -> dict[str, Any]:
        """Rows in use, named sets, calls and bytes of device memory, as plain data."""
        tensors = [*self.tables.tensors, self.tables.rows, self.tables.scale]
        return {
            "rows": self._rows.in_use,
            "rows_capacity": self._spec.rows,
            "handles": len(self._handles),
            "named": self.names,
            "calls": self.calls,
            "sites": [f"layers.{layer}.{hook}" for hook, layer in self.tables.steered()],
            "bytes": sum(t.numel() * t.element_size() for t in tensors),
        }


def _digest(parts: Parts) -> str:
    return ";".join(f"{vectors.digest}*{scale!r}" for vectors, scale in parts)
