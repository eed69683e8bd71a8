"""`Actuator`: applies a batch of actions between two steps."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from steer_compile.dynamic.actions import (
    Action,
    ClearOverride,
    SetMonitor,
    SetOverride,
    SetScale,
    SetTier,
    action_from_data,
    target_of,
)
from steer_compile.dynamic.codec import digest_of
from steer_compile.dynamic.counts import Counts
from steer_compile.dynamic.overrides import Override, OverridePool
from steer_compile.dynamic.queue import DECLARATIVE, Submitted
from steer_compile.errors import ChangedSet, NotSteered, SteerError, UnknownName
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.rows import GLOBAL_ROWS
from steer_compile.runtime.vectors import VectorSet

Undo: TypeAlias = Callable[[], None]


class Host(Protocol):
    """What runs the model, between two steps."""

    def phase(self, request: str) -> str | None:
        """Phase of a request in the coming step: ``prefill``, ``decode``, or None for one that is not known."""

    def admitted(self, request: str) -> Contents:
        """What a request adds of its own to decoded tokens, without overrides and everyone's data."""

    def row(self, request: str) -> int:
        """Row that its decoded tokens read without an override."""

    def route(self, request: str, row: int | None) -> None:
        """From the coming step on, decoded tokens of a request read this row; None: the row of its own contents."""


@dataclass(frozen=True)
class Outcome:
    """What became of an action.

    Attributes:
        submitted: the action, as it was given.
        action: the action as it was read, None where it could not be.
        reason: why it was rejected, "" where it was applied.
        error: name of the class of the error.
        digest: of the action and of the content that its names stood for.
    """

    submitted: Submitted
    action: Action | None
    reason: str = ""
    error: str = ""
    digest: str = ""

    @property
    def applied(self) -> bool:
        return not self.reason


class Actuator:
    """Applies actions to a registry and a pool. Each applies as a whole or not at all, and so does each group.

    It is for the thread that runs the model, between two steps; other threads have the queue.
    """

    def __init__(self, registry: Registry, host: Host, pool: OverridePool, counts: Counts) -> None:
        self._registry = registry
        self._host = host
        self._pool = pool
        self._counts = counts

    def apply(self, batch: Iterable[Submitted]) -> list[Outcome]:
        """Apply actions in order; returns what became of each.

        An action that is rejected changes nothing, and what its group applied before it is undone.
        """
        outcomes: list[Outcome] = []
        undos: dict[str, list[tuple[int, Undo]]] = {}
        failed: dict[str, str] = {}
        for item in batch:
            outcome, undo = self._one(item, failed.get(item.group, "") if item.group else "")
            outcomes.append(outcome)
            if item.group and outcome.applied:
                undos.setdefault(item.group, []).append((len(outcomes) - 1, undo))
            elif item.group and item.group not in failed:
                failed[item.group] = outcome.reason
                for place, back in reversed(undos.pop(item.group, [])):
                    back()
                    reason = f"undone, as an action of its group was rejected: {outcome.reason}"
                    outcomes[place] = replace(outcomes[place], reason=reason, error=outcome.error, digest="")
        self._registry.overrides.flush()
        found = Counter(("applied" if o.applied else "rejected", o.submitted.source) for o in outcomes)
        for (what, source), number in found.items():
            self._counts.add(what, source, number)
        return outcomes

    def drop(self, requests: Iterable[str]) -> None:
        """Take the overrides of requests away that finished, were preempted or compute their prompt again."""
        for request in self._pool.drop(requests):
            self._host.route(request, None)

    def _one(self, item: Submitted, failed: str) -> tuple[Outcome, Undo]:
        action: Action | None = None
        try:
            action = action_from_data(item.given)
            if failed:
                raise NotSteered(f"an action of its group was rejected: {failed}")
            self._check_rank(action, item.source)
            undo, digest = self._do(action, item.source)
        except (SteerError, TypeError) as error:  # TypeError: fields of plain data that are of another type
            return Outcome(item, action, str(error), type(error).__name__), _nothing
        return Outcome(item, action, digest=digest), undo

    def _check_rank(self, action: Action, source: str) -> None:
        """What requests declare is about themselves, and yields to what others did to them."""
        if source != DECLARATIVE:
            return
        request = target_of(action)
        if request is None:
            raise NotSteered("a request's own gates change nothing of other requests; leave that to the operator")
        old = self._pool.get(request)
        if old is not None and old.source != DECLARATIVE:
            raise NotSteered(f"request {request!r} has an override of {old.source!r}, before which its gates yield")

    def _do(self, action: Action, source: str) -> tuple[Undo, str]:
        """Apply one action; returns how to undo it and its digest with the content that its names stood for."""
        if isinstance(action, SetOverride):
            contents = self.contents_of(action)
            undo = self._install(action.request, contents, action.gain, source)
            return undo, digest_of(action.digest, contents.digest())
        if isinstance(action, ClearOverride):
            return self._clear(action), action.digest
        if isinstance(action, SetScale):
            return self._scale(action, source), action.digest
        if isinstance(action, SetTier):
            return self._tier(action), action.digest
        return self._monitor(action), action.digest

    # -- requests -------------------------------------------------------------------------------------------------

    def contents_of(self, action: SetOverride) -> Contents:
        """What a row of an override holds beside everyone's.

        Raises:
            UnknownName: no such set. ChangedSet: one that has other content than expected. NotSteered: no such request.
        """
        named = self._registry.named
        found: dict[str, VectorSet] = {name: named.get(name) for name, _ in action.named}
        for name, digest in action.expect:
            if name not in found or found[name].digest != digest:
                have = found[name].digest if name in found else "none"
                raise ChangedSet(
                    f"vector set {name!r} had the digest {digest} and has {have} now; decide again with what it holds"
                )
        parts = [(action.vectors, action.scale)] if action.vectors else []
        parts += [(found[name], factor * action.scale) for name, factor in action.named]
        own = Contents(tuple(parts), action.monitors, action.clamps)
        if not action.compose:
            return own
        return self._host.admitted(action.request).scaled(action.admitted) + own

    def _require_decode(self, request: str) -> None:
        phase = self._host.phase(request)
        if phase is None:
            raise UnknownName(f"no request {request!r} runs; overrides are for requests that decode")
        if phase != "decode":
            raise NotSteered(
                f"request {request!r} is in prefill, whose tokens no override reaches; wait until it decodes"
            )

    def _install(self, request: str, contents: Contents, gain: float, source: str) -> Undo:
        self._require_decode(request)
        old = self._pool.get(request)
        made = self._pool.install(request, contents, gain, source)
        if old is None:
            self._host.route(request, made.row)
        return lambda: self._restore(request, old)

    def _restore(self, request: str, former: Override | None) -> None:
        self._pool.restore(request, former)
        self._host.route(request, None if former is None else former.row)

    def _clear(self, action: ClearOverride) -> Undo:
        old = self._pool.get(action.request)
        if old is None:
            return _nothing
        self.drop((action.request,))
        return lambda: self._restore(action.request, old)

    def _scale(self, action: SetScale, source: str) -> Undo:
        if action.gain:
            return self._gain(action.scale)
        if action.request is None:
            rows, decode = self._registry.overrides, GLOBAL_ROWS["decode"]
            former = rows.scale(decode)
            rows.set_scale(decode, action.scale)
            return lambda: rows.set_scale(decode, former)
        self._require_decode(action.request)
        old = self._pool.get(action.request)
        if old is None:
            return self._install(action.request, self._host.admitted(action.request), action.scale, source)
        self._pool.set_gain(action.request, action.scale, source)
        request = action.request
        return lambda: self._restore(request, old)

    # -- everyone -------------------------------------------------------------------------------------------------

    def _gain(self, gain: float) -> Undo:
        sites, former = self._registry.sites, self._registry.sites.gain
        sites.set_gain(gain)
        return lambda: sites.set_gain(former)

    def _tier(self, action: SetTier) -> Undo:
        sites = self._registry.sites
        former = sites.tier, sites.gain
        sites.set_tier(action.vectors, action.gain)
        return lambda: sites.set_tier(*former)

    def _monitor(self, action: SetMonitor) -> Undo:
        sites = self._registry.sites
        former = sites.monitors.get(action.site, (None, False))
        sites.set_monitor(action.site, action.monitor, action.gate_rows)
        return lambda: sites.set_monitor(action.site, *former)


def _nothing() -> None:
    """There is nothing to undo."""
