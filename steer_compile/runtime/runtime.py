"""`Runtime`: what a compiled model's owner talks to. Vectors, rows, scales and captures change here, never graphs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from steer_compile import torch_compat
from steer_compile.errors import NotSteered, SiteNotFound, SpecError
from steer_compile.runtime.calls import Calls
from steer_compile.runtime.capture import CaptureLog
from steer_compile.runtime.demand import Demand, demand
from steer_compile.runtime.patches import Patch
from steer_compile.runtime.registry import Handle
from steer_compile.runtime.rows import PhaseTracker
from steer_compile.runtime.steering import Steering
from steer_compile.runtime.tables import KINDS
from steer_compile.runtime.vectors import PHASES, vector_set
from steer_compile.spec import SteerSpec

__all__ = ["Handle", "Runtime"]

Log = TypeVar("Log", bound=CaptureLog)


class Runtime(Calls):
    """Vectors, rows, phases and captures of one compiled model. Thread-safe for changes between calls."""

    @property
    def spec(self) -> SteerSpec:
        """What is compiled in."""
        return self._spec

    @contextmanager
    def steer(
        self,
        vectors: object = None,
        *,
        rows: Sequence[Steering | Handle | None] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        padding: str = "left",
        phase: str | None = None,
        names: Sequence[str] = (),
        conversations: Sequence[str] = (),
        **config: Any,
    ) -> Iterator[list[Handle | None]]:
        """Steer the calls inside the block.

        Args:
            vectors: vectors for all sequences (base tier); further fields of `Steering` as keywords.
            rows: instead: one `Steering`, handle or None for each sequence of the batch.
            prompt_lengths: tokens of each prompt where prompts are padded on the side ``padding``.
            phase: ``prefill`` or ``decode`` where the shape of the calls does not tell.
            names, conversations: of each sequence, for dynamic steering, as in `assign`.

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
            self.assign(handles if rows is not None else handles[0], names, conversations)
            self.phases, self._last_layer = tracker, None
            yield handles
            self._prove(calls, "steered")
            self.check_complete()
        finally:
            if self.calls != calls:
                self._leave()
            self._batches.pop()
            self.phases = outside
            self._last_layer = None
            self._version += 1
            for handle in own:
                self.release(handle)

    @contextmanager
    def capture(self, tokens: object = None, sites: object = None) -> Iterator[CaptureLog]:
        """Collect what the calls inside the block store, as ``log["post_block", 3]`` of shape (batch, tokens, width).

        With ``capture_rows`` in the spec, only chosen tokens are stored, and ``log.packed`` has the rows of each call.

        Args:
            tokens: the tokens to store, a `TokenSelection` or one for each sequence; None is every token, and in a list
                no token of that sequence. Padding is never stored.
            sites: hooks and sites to store, or a list of them for each sequence; None is all that the spec captures.

        Raises:
            SpecError: the spec captures nothing, or captures densely and tokens or sites are chosen. SiteNotFound: a
                site that is not captured. NotSteered: on leaving, if no compiled graph ran inside.
        """
        with self._collect(CaptureLog(self._demand(tokens, sites))) as log:
            yield log

    def _demand(self, tokens: object, sites: object) -> Demand | None:
        """What a packed capture is asked for, None where captures are dense."""
        if not self._spec.capture:
            raise SpecError("the spec captures nothing; give SteerSpec(capture=('post_block',), ...) and compile again")
        if self._spec.capture_rows:
            wanted = demand(tokens, sites)
            self.packed.check(wanted, whole=False)
            return wanted
        if tokens is not None or sites is not None:
            raise SpecError(
                "tokens or sites of a capture are chosen, and the spec captures every token at every site; give "
                "SteerSpec(capture_rows=...) and compile again, or choose from log[hook, layer]"
            )
        return None

    @contextmanager
    def _collect(self, log: Log) -> Iterator[Log]:
        """Let a log take what the calls inside the block store."""
        calls = self.calls
        self._logs.append(log)
        try:
            yield log
            self._prove(calls, "captured")
            if log.demand is not None:
                self.packed.check(log.demand, whole=True)
        finally:
            self._logs[:] = [other for other in self._logs if other is not log]

    @contextmanager
    def patch(
        self,
        patches: Iterable[Patch] = (),
        *,
        rows: Sequence[Iterable[Patch]] | None = None,
        prompt_lengths: Sequence[int] | None = None,
        padding: str = "left",
        phase: str | None = None,
    ) -> Iterator[None]:
        """Patch the calls inside the block: put captured or other rows in place of values, token by token.

        Args:
            patches: for every sequence of the batch.
            rows: instead: patches of each sequence, none in an empty list.
            prompt_lengths, padding, phase: as in `steer`; inside of a `steer` block that block's hold unless given.

        Raises:
            SpecError: a block inside of another, or two patches of one value. SiteNotFound: a site without the family
                ``patch``, or that was not captured. VectorError: another width, NaN, infinity. CaptureError: a position
                that was not captured. TableFull: more rows at a site than the spec has ``patches``; nothing is patched
                then. NotSteered: on leaving, if no compiled graph ran inside, or a position was never reached.
        """
        tracker = _tracker(prompt_lengths, padding, phase)
        outside, calls = self.phases, self.calls
        inner = len(self._batches) > 1 and prompt_lengths is None and phase is None
        with self._lock:
            self.patches.begin(patches, rows)
        try:
            self.phases, self._last_layer = (outside if inner else tracker), None
            yield
            self._prove(calls, "patched")
            self.patches.check_reached()
            self.check_complete()
        finally:
            with self._lock:
                self.patches.end()
            self.phases, self._last_layer = outside, None
            self._version += 1

    def _prove(self, calls: int, what: str) -> None:
        if self.calls == calls:
            raise NotSteered(
                f"nothing was {what}: no compiled graph ran inside the block; compile the module in place with "
                "model.compile(backend=...), since torch.compile(model).generate(...) runs the original model, "
                "and remove graph breaks inside of blocks"
            )

        for reason in filter(None, map(torch_compat.gave_up, self.functions)):
            raise NotSteered(
                f"some calls may not have been {what}: Dynamo has given up recompiling the model's forward, or that of "
                f"another model of its class ({reason}), and runs the original code for other sizes; compile with "
                "dynamic=True, pad to a few sizes, or raise torch._dynamo.config.recompile_limit, and call "
                "torch.compiler.reset()"
            )

    def check_complete(self) -> None:
        """Raise `SiteNotFound` when a site that the spec or live data names was in no compiled graph."""
        wanted = [("packed" if self._spec.capture_rows else "capture", s) for s in self._spec.capture]
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
            self.patches.check_all(whole=True)

    def status(self) -> dict[str, Any]:
        """Rows in use, named sets, calls and bytes of device memory, as plain data."""
        with self._lock:
            tensors = [*self.tables.tensors, self.tables.rows, self.tables.scale, self.tables.gain, self.tables.decode]
            tensors += [self.tables.chosen]
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
