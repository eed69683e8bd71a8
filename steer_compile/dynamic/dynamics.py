"""`Dynamics`: the control plane of one host. Between two steps it applies what was asked for; behind each it looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer_compile.dynamic.actions import Action, target_of
from steer_compile.dynamic.actuator import Actuator, Host, Outcome
from steer_compile.dynamic.controller import BUDGET_MS, Controller, Controllers
from steer_compile.dynamic.counts import Counts
from steer_compile.dynamic.declarative import DeclarativeGates
from steer_compile.dynamic.gates import Gate, gates_from_data
from steer_compile.dynamic.journal import MOST_RECORD_BYTES, RING, Journal, Replay, read_replay
from steer_compile.dynamic.overrides import OverridePool
from steer_compile.dynamic.queue import OPERATOR, ActionQueue, Given, Submitted
from steer_compile.dynamic.signature import Effective
from steer_compile.dynamic.views import StepView
from steer_compile.errors import TableFull
from steer_compile.runtime.registry import Registry

CAPACITY = 1024


@dataclass(frozen=True)
class Limits:
    """Room of a control plane: actions that wait, milliseconds of a controller in a step, events that are kept."""

    queue: int = CAPACITY
    budget_ms: float = BUDGET_MS
    ring: int = RING


class Dynamics:
    """Actions, overrides and controllers of a host.

    `submit` and `status` are for any thread; all else is for the thread that runs the model.

    Attributes:
        step: number of the step that runs, or ran last; 0 before the first.
    """

    def __init__(self, registry: Registry, host: Host, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.step = 0
        self.counts = Counts()
        self.queue = ActionQueue(limits.queue, self.counts)
        self.pool = OverridePool(registry.overrides)
        self.controllers = Controllers(self.counts, limits.budget_ms)
        self.journal = Journal(limits.ring)
        self._registry = registry
        self._host = host
        self._actuator = Actuator(registry, host, self.pool, self.counts)
        self._asked: list[Submitted] = []
        self._replay: tuple[Replay, int] | None = None
        self._gates: DeclarativeGates | None = None

    # -- for any thread -------------------------------------------------------------------------------------------

    def submit(self, action: Given, source: str = OPERATOR) -> bool:
        """Ask for an action in front of the next step; never waits. False where the queue is full."""
        return self.queue.submit(action, source)

    def status(self) -> dict[str, Any]:
        """Plain data: pool, queue, counts by source, controllers, the checksum and the last events.

        It waits for no step, and no step waits for it, so the numbers may be of two neighbouring steps.
        """
        counts = self.counts.data()
        return {
            "step": self.step,
            "rows": {"in_use": self._registry.rows_in_use, "capacity": self._registry.tables.spec.rows},
            "overrides": {"in_use": len(self.pool), "capacity": self.pool.capacity},
            "queue": {"waiting": len(self.queue), "capacity": self.queue.capacity},
            "actions": {what: counts.get(what, {}) for what in ("applied", "rejected", "dropped", "discarded")},
            "errors": counts.get("errors", {}),
            "controllers": self.controllers.status(),
            "gates": self._gates.status() if self._gates is not None else {},
            "checksum": self.journal.checksum,
            "applied": self.journal.applied,
            "events": self.journal.events(),
            "rejections": self.journal.rejections(),
        }

    # -- what an operator sets up ---------------------------------------------------------------------------------

    def add(self, controller: Controller) -> None:
        """Run a controller from the next step on.

        Raises:
            SpecError: its name is taken, or it is no `Controller`.
        """
        self.controllers.add(controller)

    def remove(self, name: str) -> None:
        """Run a controller no longer; its overrides stay until they are cleared or the requests end.

        Raises:
            UnknownName: there is none.
        """
        self.controllers.remove(name)

    def gate(self, request: str, gates: object) -> tuple[Gate, ...]:
        """Declare gates for requests of a name, from now until they are declared anew; () for none.

        Args:
            gates: a list of `Gate` or of their plain data.

        Raises:
            SpecError, VectorError, UnknownName, SiteNotFound: gates that cannot be. TableFull: no pool of overrides.
        """
        checked = gates_from_data(gates)
        if checked and not self.pool.capacity:
            raise TableFull("the spec has no rows for overrides, which gates act by; give SteerSpec(overrides=...)")
        if self._gates is None:
            self._gates = DeclarativeGates(self._registry)
            self.controllers.add(self._gates)
        self._gates.declare(request, checked)
        return checked

    def record(self, path: Path | str, most_bytes: int = MOST_RECORD_BYTES) -> None:
        """Write the actions of the steps from the next one on to a file, until `stop_recording`."""
        self.journal.record(path, self.step + 1, most_bytes)

    def stop_recording(self) -> None:
        self.journal.stop()

    def replay(self, source: Replay | Path | str | None) -> None:
        """Apply what a run recorded, at the same steps from the next one on; None ends it.

        Meanwhile nothing else is applied: what controllers and others ask for is discarded and counted.

        Raises:
            SpecError: a file that was not recorded.
        """
        found = source if isinstance(source, Replay | None) else read_replay(source)
        self._replay = None if found is None else (found, self.step + 1)

    # -- for the host ---------------------------------------------------------------------------------------------

    def begin(self) -> list[Outcome]:
        """In front of a step, whose phases the host knows already: apply what was asked for."""
        batch, self._asked = [*self._asked, *self.queue.drain()], []
        self.step += 1
        if self._replay is not None:
            for item in batch:
                self.counts.add("discarded", item.source)
            replay, first = self._replay
            batch = [Submitted(action, source) for action, source in replay.at(self.step - first)]
        if not batch:
            return []
        outcomes = self._actuator.apply(batch)
        self.journal.take(self.step, outcomes, self._registry.names)
        self.controllers.settled(outcomes)
        return outcomes

    def end(self, view: StepView) -> None:
        """Behind a step: let the controllers look; what they ask for applies in front of the next one."""
        asked, notes = self.controllers.on_step(view)
        self._asked += asked
        self.journal.note(view.step, notes)

    def ask(self, actions: Iterable[Action], source: str, group: str = "") -> None:
        """Have actions applied in front of the next step, on the thread that runs the model."""
        self._asked += [Submitted(action, source, group) for action in actions]

    def finish(self, requests: Sequence[str], keep_gates: bool = False) -> None:
        """Requests ended: their overrides and what controllers kept of them go, and their gates unless kept."""
        self._drop(requests)
        self.controllers.forget(requests)
        if self._gates is not None and not keep_gates:
            self._gates.withdraw(requests)

    def interrupt(self, requests: Sequence[str]) -> None:
        """Requests compute their tokens again, as after a preemption: overrides go until they are asked for anew."""
        self._drop(requests)
        self.controllers.interrupted(requests)

    def _drop(self, requests: Sequence[str]) -> None:
        """Take overrides away, and what controllers asked for since the last step."""
        self._actuator.drop(requests)
        gone = set(requests)
        self._asked = [i for i in self._asked if not (isinstance(i.given, Action) and target_of(i.given) in gone)]

    def effective(self, request: str) -> Effective:
        """What acts on a request's decoded tokens."""
        sites = self._registry.sites
        return Effective(
            everyone=self._registry.overrides.everyone,
            own=self._host.admitted(request),
            scale=self._registry.overrides.scale(self._host.row(request)),
            override=self.pool.get(request),
            tier=sites.tier,
            gain=sites.gain,
            monitors=sites.monitors,
        )

    def signature(self, request: str) -> str:
        """Digest of what acts on a request's decoded tokens, "" for nothing; a key for what was computed with it."""
        return self.effective(request).signature()


def as_text(status: Mapping[str, Any]) -> str:
    """A status in Prometheus' text form.

    Raises:
        ImportError: prometheus_client is not installed; it comes with the extra ``vllm``.
    """
    from steer_compile.dynamic.prometheus import exposition

    return exposition(status)
