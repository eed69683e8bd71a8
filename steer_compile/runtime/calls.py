"""`Calls`: what happens in front of and behind each call of a compiled model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from copy import copy
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.errors import NotSteered, SpecError, TooManyTokens
from steer_compile.ir import Plan, SiteTable
from steer_compile.runtime.capture import CaptureLog, Sink
from steer_compile.runtime.packed import PackedRows, choose
from steer_compile.runtime.registry import Handle, Registry
from steer_compile.runtime.rows import PhaseTracker, RowPlan, Step, token_rows
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import SteerSpec


@dataclass
class _Batch:
    """Who the elements of the next calls are: one handle for all, or one each."""

    handles: tuple[Handle | None, ...] = ()
    everyone: Handle | None = None
    names: tuple[str, ...] = ()
    conversations: tuple[str, ...] = ()

    def holds(self, handle: Handle) -> bool:
        return any(own is handle for own in (self.everyone, *self.handles))

    def plans(self, size: int) -> list[RowPlan]:
        given = (("rows", "are assigned"), ("names", "are given"), ("conversations", "are given"))
        for (what, how), items in zip(given, (self.handles, self.names, self.conversations), strict=True):
            if items and len(items) != size:
                raise NotSteered(
                    f"{len(items)} {what} {how} but the call has {size} sequences; "
                    f"{'assign one handle or None to each' if what == 'rows' else 'give one for each'}"
                )
        if not self.handles:
            return [self.everyone.plan if self.everyone else RowPlan()] * size
        return [h.plan if h else RowPlan() for h in self.handles]

    def names_of(self, size: int) -> tuple[str, ...]:
        """Names of the elements, which count them where none are given."""
        return self.names or tuple(map(str, range(size)))


class Calls(Registry):
    """Who the elements of a call are, which rows their tokens read, and what is done behind the call."""

    def __init__(self, spec: SteerSpec) -> None:
        super().__init__(spec)
        self.phases = PhaseTracker()
        self.calls = 0
        self.functions: set[str] = set()
        """Functions whose graphs are steered (`torch_compat.compiled_function`)."""
        self._batches = [_Batch()]
        self._version = 0
        self._index_key: object = None
        self._planned: tuple[int, int, tuple[list[RowPlan], bool]] = (-1, 0, ([], False))
        self._last_layer: int | None = None
        self._continued = False
        self._logs: list[CaptureLog] = []
        self.sinks: list[Sink] = []
        self._step: Step | None = None
        self.packed = PackedRows(spec, self.tables)

    def bind(self, plan: Plan, table: SiteTable, device: torch.device) -> None:
        super().bind(plan, table, device)
        with self._lock:
            self.packed.schemas |= {(e.site.hook, e.site.layer): e.site.schema for e in plan.edits}

    def assign(
        self,
        handles: Sequence[Handle | None] | Handle | None,
        names: Sequence[str] = (),
        conversations: Sequence[str] = (),
    ) -> None:
        """Who the elements of the next calls are: one handle or None each, or one for all.

        Args:
            names: of each element, for dynamic steering; "0", "1", ... where none are given.
            conversations: what each belongs to, "" for nothing.

        Raises:
            UnknownName: a handle that is not live. SpecError: names that are no texts, or one given twice.
        """
        called = (_texts("names", names), _texts("conversations", conversations))
        if len(set(called[0])) < len(called[0]):
            raise SpecError(f"names={names!r} gives a name twice; give each sequence its own")
        with self._lock:
            if handles is None or isinstance(handles, Handle):
                batch = _Batch((), handles, *called)
            else:
                batch = _Batch(tuple(handles), None, *called)
            for handle in (batch.everyone, *batch.handles):
                if handle is not None:
                    self._require_live(handle)
            self._batches[-1] = batch
            self._version += 1

    def release(self, handle: Handle) -> None:
        """Give a handle's rows back.

        Raises:
            UnknownName: the handle is not live. NotSteered: it is still assigned.
        """
        with self._lock:
            if any(batch.holds(handle) for batch in self._batches):
                raise NotSteered(f"handle {handle.number} is assigned to the next calls; assign other rows first")
            super().release(handle)

    # -- calls ----------------------------------------------------------------------------------------------------

    def before_call(self, first_layer: int, batch: int, length: int) -> None:
        """Called in front of each compiled graph: set the rows of its tokens.

        Raises:
            TooManyTokens: more tokens than the spec has room for. NotSteered: the batch does not fit the assignment.
            TableFull: more tokens are chosen for packed captures than they have rows. SiteNotFound: for a site that is
                not captured.
        """
        last, shape = self._last_layer, (batch, length)
        self._continued = last is not None and first_layer > last and shape == self.shape
        self._last_layer = first_layer
        if self._continued:
            with self._lock, torch.no_grad():
                self.packed.refresh()
            return
        self._last_layer = None  # a call that is refused here is none that a later graph could continue
        with self._lock, torch.no_grad():
            count = batch * length
            if count > self._spec.max_tokens:
                raise TooManyTokens(
                    f"the call has {batch} x {length} = {count} tokens but the spec has "
                    f"max_tokens={self._spec.max_tokens}; raise it and compile again, or split the call"
                )
            if count:
                self._set_rows(batch, length)
            else:
                self.packed.write(None)
            self.calls += 1
            self._last_layer, self.shape = first_layer, shape

    def _plans(self, batch: int) -> tuple[list[RowPlan], bool]:
        """Plan of each element, and whether one steers some tokens only; made once for an assignment."""
        if self._planned[:2] != (self._version, batch):
            plans = self._batches[-1].plans(batch)
            self._planned = (self._version, batch, (plans, any(p.tokens is not None for p in plans)))
        return self._planned[2]

    def _set_rows(self, batch: int, length: int) -> None:
        """Write the row of every token, unless the tables hold just these."""
        self._plans(batch)  # refused before the phase moves on
        self.patches.check_batch(batch)
        demands = [log.demand for log in self._logs if log.demand is not None]
        demands += [sink.demand for sink in self.sinks] if self._spec.capture_rows else []
        before, phases = self.phases, copy(self.phases)  # a call that is refused does not move the phase on
        step = phases.advance(batch, length)
        for one in demands:
            self.packed.check(one, whole=not self._scope.partial)
        chosen = choose(step, demands, self._spec.capture_rows) if demands else None
        self.phases, self._step = phases, step
        self._begin(step)
        plans, selective = self._plans(batch)
        padded = self.phases.prompts is not None and step.phase == "prefill"
        moving = padded or selective
        key = (self._version, step) if moving else (self._version, step.phase, batch, length)
        key = (*key, self._rows.decodings)
        if key != self._index_key:
            rows = token_rows(step, plans)
            try:
                self._check_decoded(rows)
            except TooManyTokens:
                self.phases = before
                raise
            self.tables.index(rows)
            self._index_key = key
        for sink in self.sinks:
            sink.begin(step, self._batches[-1].names_of(batch), self.calls)
        self.sites.before_call(batch, length, step.phase == "decode")
        self.patches.before_call(step)
        self.packed.write(chosen)

    def _check_decoded(self, rows: npt.NDArray[np.int32]) -> None:
        """Raise `TooManyTokens` for more tokens that are decoded from features than there is room for."""
        for (hook, layer), decoded in self._rows.decoded().items():
            count = int(decoded[rows].sum())
            if count > self._spec.sae_tokens:
                raise TooManyTokens(
                    f"the call has {count} tokens that are decoded from features at layers.{layer}.{hook} but the spec "
                    f"has sae_tokens={self._spec.sae_tokens}; raise it and compile again, or split the call"
                )

    def after_call(self, captured: Collection[SiteKey], token_ids: torch.Tensor | None = None) -> None:
        """Called behind each compiled graph: let open capture logs and sinks take the sites that it stored.

        Args:
            token_ids: ids of the call's tokens (batch, length), where the graph has them.
        """
        if self._spec.capture_rows:
            self._take_packed(captured, token_ids)
        else:
            self._take_dense(captured, token_ids)
        self._end(captured, token_ids)

    def _take_dense(self, captured: Collection[SiteKey], token_ids: torch.Tensor | None) -> None:
        batch, length = self.shape
        values = self.tables.captured(batch * length) if captured and (self._logs or self.sinks) else {}
        for log in list(self._logs):
            log.take({key: values[key] for key in captured}, self.shape, self._continued, self._step)
        if not self.sinks:
            return
        rows = {key: values[key].unflatten(-1, self.packed.schemas[key].logical_shape) for key in captured}
        for sink in self.sinks:
            sink.take(rows, token_ids, not self._scope.partial)

    def _take_packed(self, captured: Collection[SiteKey], token_ids: torch.Tensor | None) -> None:
        if self.packed.chosen is None:
            return
        values = self.packed.stored(captured)
        ids = token_ids.reshape(-1).clone() if token_ids is not None else None
        names = self._batches[-1].names_of(self.shape[0])
        for log in list(self._logs):
            begun = self.packed.call(log.demand, names, self.calls - 1) if log.demand is not None else None
            if begun is not None:
                log.take_packed(begun, self._continued).add(values, ids)
        for sink in self.sinks:
            begun = self.packed.call(sink.demand, names, self.calls - 1)
            if begun is not None:
                sink.take_packed(begun, self._continued).add(values, ids)

    def _begin(self, step: Step) -> None:
        """In front of a call, when its phase is known and its rows are not written."""

    def _end(self, captured: Collection[SiteKey], token_ids: torch.Tensor | None) -> None:
        """Behind each compiled graph."""

    def _leave(self) -> None:
        """On leaving a `steer` block, while its rows are assigned."""


def _texts(what: str, given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not all(isinstance(item, str) for item in given):
        raise SpecError(f"{what}={given!r} is no list of texts; give one text for each sequence")
    return tuple(given)
