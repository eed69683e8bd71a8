"""`Runtime`: what a compiled model's owner talks to. Vectors, rows, scales and captures change here, never graphs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from steer_compile.errors import NotSteered, SiteNotFound, SpecError, TooManyTokens
from steer_compile.runtime.capture import CaptureLog
from steer_compile.runtime.registry import Handle, Registry
from steer_compile.runtime.rows import PhaseTracker, RowPlan, token_rows
from steer_compile.runtime.steering import Steering
from steer_compile.runtime.tables import KINDS
from steer_compile.runtime.vectors import PHASES, SiteKey, vector_set
from steer_compile.spec import SteerSpec

__all__ = ["Handle", "Runtime"]


@dataclass
class _Batch:
    """Who the elements of the next calls are: one handle for all, or one each."""

    handles: tuple[Handle | None, ...] = ()
    everyone: Handle | None = None

    def holds(self, handle: Handle) -> bool:
        return any(own is handle for own in (self.everyone, *self.handles))

    def plans(self, size: int) -> list[RowPlan]:
        if not self.handles:
            return [self.everyone.plan if self.everyone else RowPlan()] * size
        if len(self.handles) != size:
            raise NotSteered(
                f"{len(self.handles)} rows are assigned but the call has {size} sequences; "
                "assign one handle or None to each"
            )
        return [h.plan if h else RowPlan() for h in self.handles]


class Runtime(Registry):
    """Vectors, rows, phases and captures of one compiled model. Thread-safe for changes between calls."""

    def __init__(self, spec: SteerSpec) -> None:
        super().__init__(spec)
        self.phases = PhaseTracker()
        self.calls = 0
        self._batches = [_Batch()]
        self._version = 0
        self._index_key: object = None
        self._planned: tuple[int, int, tuple[list[RowPlan], bool]] = (-1, 0, ([], False))
        self._last_layer: int | None = None
        self._continued = False
        self._shape = (0, 0)
        self._logs: list[CaptureLog] = []

    def assign(self, handles: Sequence[Handle | None] | Handle | None) -> None:
        """Who the elements of the next calls are: one handle or None each, or one for all.

        Raises:
            UnknownName: a handle that is not live.
        """
        with self._lock:
            if handles is None or isinstance(handles, Handle):
                batch = _Batch(everyone=handles)
            else:
                batch = _Batch(tuple(handles))
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
        """
        last, shape = self._last_layer, (batch, length)
        self._continued = last is not None and first_layer > last and shape == self._shape
        self._last_layer = first_layer
        if self._continued:
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
            self.calls += 1
            self._last_layer, self._shape = first_layer, shape

    def _plans(self, batch: int) -> tuple[list[RowPlan], bool]:
        """Plan of each element, and whether one steers some tokens only; made once for an assignment."""
        if self._planned[:2] != (self._version, batch):
            plans = self._batches[-1].plans(batch)
            self._planned = (self._version, batch, (plans, any(p.tokens is not None for p in plans)))
        return self._planned[2]

    def _set_rows(self, batch: int, length: int) -> None:
        """Write the row of every token, unless the tables hold just these."""
        plans, selective = self._plans(batch)
        step = self.phases.advance(batch, length)
        padded = self.phases.prompts is not None and step.phase == "prefill"
        moving = padded or selective
        key = (self._version, step) if moving else (self._version, step.phase, batch, length)
        if key != self._index_key:
            self.tables.index(token_rows(step, plans))
            self._index_key = key
        self.sites.before_call(batch, length, step.phase == "decode")

    def after_call(self, captured: Collection[SiteKey]) -> None:
        """Called behind each compiled graph: let open capture logs take the sites that it stored."""
        batch, length = self._shape
        values = self.tables.captured(batch * length) if captured and self._logs else {}
        for log in list(self._logs):
            log.take({key: values[key] for key in captured}, self._shape, self._continued)

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
        if rows is not None and (vectors is not None or config):
            raise SpecError("both vectors for all sequences and rows are given; give one of them")
        tracker = _tracker(prompt_lengths, padding, phase)
        wanted = list(rows) if rows is not None else [Steering(vector_set(vectors), **config)]
        own: list[Handle] = []
        outside, calls = self.phases, self.calls
        self._batches.append(self._batches[-1])
        try:
            handles: list[Handle | None] = []
            for item in wanted:
                if not isinstance(item, Steering | Handle | None):
                    raise SpecError(f"rows holds {item!r}; give a Steering, a Handle or None for each sequence")
                handles.append(self.register(item) if isinstance(item, Steering) else item)
                own += [h for h in handles[-1:] if h is not None and h is not item]
            self.assign(handles if rows is not None else handles[0])
            self.phases, self._last_layer = tracker, None
            yield handles
            self._prove(calls, "steered")
            self.check_complete()
        finally:
            self._batches.pop()
            self.phases = outside
            self._last_layer = None
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
            self._logs[:] = [other for other in self._logs if other is not log]

    def _prove(self, calls: int, what: str) -> None:
        if self.calls == calls:
            raise NotSteered(
                f"nothing was {what}: no compiled graph ran inside the block; compile the module in place with "
                "model.compile(backend=...), since torch.compile(model).generate(...) runs the original model, "
                "and remove graph breaks inside of blocks"
            )

    def check_complete(self) -> None:
        """Raise `SiteNotFound` when a site that the spec or live data names was in no compiled graph."""
        wanted = [("capture", s) for s in self._spec.capture]
        wanted += [(KINDS[op], s) for s in self._spec.steer for op in s.ops]
        for kind, selection in wanted:
            named = selection.layers if isinstance(selection.layers, tuple) else ()
            have = self.tables.sites(kind)
            missing = [n for n in named if isinstance(n, int) and n >= 0 and (selection.hook, n) not in have]
            if missing:
                raise SiteNotFound(f"layers.{missing[0]}.{selection.hook} was in none of the compiled graphs")
        with self._lock:
            self._rows.check_all(whole=True)
            self.sites.check_all(whole=True)

    def status(self) -> dict[str, Any]:
        """Rows in use, named sets, calls and bytes of device memory, as plain data."""
        with self._lock:
            tensors = [*self.tables.tensors, self.tables.rows, self.tables.scale, self.tables.gain, self.tables.decode]
            return {
                "rows": self._rows.in_use,
                "rows_capacity": self._spec.rows,
                "handles": len(self._handles),
                "named": self.names,
                "calls": self.calls,
                "sites": [f"layers.{layer}.{hook}" for hook, layer in self.tables.steered()],
                "bytes": sum(t.numel() * t.element_size() for t in tensors),
            }


def _tracker(prompts: Sequence[int] | None, padding: str, phase: str | None) -> PhaseTracker:
    if phase not in (None, *PHASES):
        raise SpecError(f"phase={phase!r} is unknown; choose prefill, decode or None")
    if padding not in ("left", "right"):
        raise SpecError(f"padding={padding!r} is unknown; choose left or right")
    lengths = tuple(int(n) for n in prompts) if prompts is not None else None
    if lengths is not None and min(lengths, default=0) < 0:
        raise SpecError(f"prompt_lengths={lengths!r} holds a negative number; give the tokens of each prompt")
    return PhaseTracker(told=phase, prompts=lengths, padding=padding)
