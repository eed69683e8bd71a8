"""`DeclarativeGates`: the controller that decides the gates of requests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from steer_compile.dynamic.actions import Action, target_of
from steer_compile.dynamic.actuator import Outcome
from steer_compile.dynamic.codec import site_name
from steer_compile.dynamic.gate_program import GateProgram, Held, compile_gates
from steer_compile.dynamic.gates import MOST_GATES, Gate
from steer_compile.dynamic.latches import Latches
from steer_compile.dynamic.queue import DECLARATIVE
from steer_compile.dynamic.scores import ProbeBank
from steer_compile.dynamic.steering_controller import Decision, RequestState, SteeringController, Values
from steer_compile.dynamic.views import RequestView, StepView
from steer_compile.errors import SiteNotFound, VectorError
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.vectors import SiteKey

_EMPTY = GateProgram((), ())
_HELD_BYTES = 4096
"""What an effect that a conversation holds counts as: names, digests and numbers."""


class DeclarativeGates(SteeringController):
    """Gates of requests by name. A request's override is its own contents with all effects that hold.

    Attributes:
        held: effects that hold for conversations, by name and digest.
        fired: how often a gate's condition held.
    """

    def __init__(self, registry: Registry, latches: Latches[tuple[Held, ...]] | None = None) -> None:
        super().__init__(DECLARATIVE)
        self.held: Latches[tuple[Held, ...]] = latches if latches is not None else Latches()
        self.fired = 0
        self._registry = registry
        self._programs: dict[str, GateProgram] = {}
        self._places: dict[tuple[SiteKey, str], int] = {}
        self._stale_bank = False

    def declare(self, request: str, gates: Sequence[Gate]) -> GateProgram:
        """Set the gates of a request, () for none.

        Raises:
            UnknownName: a name that is not registered. SpecError: gates that cannot be together.
            SiteNotFound, VectorError: what the spec or the sites do not take; a probe on the host needs its site among
                the spec's captures.
        """
        program = compile_gates(gates, self._registry.named, self._registry.tables.spec.cross_layer)
        self._check(program)
        self._programs.pop(request, None)
        if gates:
            self._programs[request] = program
        self._stale_bank = True
        return program

    def withdraw(self, requests: Iterable[str]) -> None:
        """Requests have no gates any more."""
        for request in requests:
            gone = self._programs.pop(request, None)
            self._stale_bank |= gone is not None and bool(gone.host)

    def status(self) -> dict[str, Any]:
        """Requests with gates, conversations that hold something, and how often gates fired or named sets changed."""
        return {
            "requests": len(self._programs),
            "conversations": len(self.held),
            "held_bytes": self.held.bytes,
            "evicted": self.held.evicted,
            "fired": self.fired,
            "changed_sets": self.changed_sets,
        }

    def on_step(self, view: StepView) -> Iterable[Action]:
        if not (self._programs or len(self.held) or self._states):
            return ()
        if self._stale_bank:
            self._gather()
        return super().on_step(view)

    def decide(self, request: RequestView, values: Values, state: RequestState) -> Decision | None:
        program = self._programs.get(request.request, _EMPTY)
        latched: tuple[Held, ...] = state.data.get("latched", ())
        held = self.held.get(request.conversation) or () if request.conversation else ()
        pulse: list[Held] = []
        best: float | None = None
        for gate, effect in program.host:
            score = self._score(gate, values)
            if gate.when is not None and (score is None or not gate.when.fires(score)):
                continue
            best = score if best is None else max(best, score or best)
            self.fired += 1
            if gate.scope == "next_step":
                pulse.append(effect)
            elif gate.scope == "rest_of_request" or not request.conversation:
                latched = latched if effect in latched else (*latched, effect)
            elif effect not in held and len(held) < MOST_GATES:
                held = (*held, effect)
                self.held.put(request.conversation, held, _HELD_BYTES * len(held))
        state.data["latched"] = latched
        more = (*held, *(effect for effect in (*latched, *pulse) if effect not in held))
        made = state.data.get("made")
        if made is None or made[0] is not program or made[1] != more:
            made = state.data["made"] = (program, more, program.decision(more))
        found: Decision | None = made[2]
        return found if found is None or best is None else found.at(best)

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        super().settled(outcomes)
        for outcome in outcomes:
            request = target_of(outcome.action) if outcome.action is not None else None
            if outcome.error != "ChangedSet" or request is None:
                continue
            state = self._states.get(request)
            if state is not None:
                self.held.drop(state.conversation)
                state.data.clear()
            self.withdraw((request,))  # its gates were about another content

    def _check(self, program: GateProgram) -> None:
        """Raise for effects that no row could hold, and for probes that the host cannot see."""
        tables = self._registry.tables
        if tables.device is not None:
            whole = GateProgram((*program.row, *program.host), ())
            self._registry.check(whole.contents(Contents(), self._registry.named))
        for gate in program.probes:
            if gate.when is not None:
                self._check_probe(gate.when.site, gate.when.monitor.probe.numel())

    def _check_probe(self, site: SiteKey, numbers: int) -> None:
        """One bad probe would end the step's scores of all requests, so none comes in."""
        tables = self._registry.tables
        seen, hooks = tables.sites("capture"), [selection.hook for selection in tables.spec.capture]
        absent = site[0] not in hooks or (tables.device is not None and site not in seen)
        if absent or tables.spec.capture_rows:
            have = ", ".join(map(site_name, seen)) or ", ".join(hooks) or "nothing"
            raise SiteNotFound(
                f"a gate's probe at {site_name(site)} is read between steps, and the spec captures {have}; capture "
                "the site (without capture_rows), or give the scope this_token"
            )
        width = tables.view("capture", site).size(-1) if tables.device is not None else numbers
        if numbers != width:
            raise VectorError(
                f"a gate's probe at {site_name(site)} has {numbers} numbers but the site is {width} wide; give one "
                "number for each"
            )

    def _gather(self) -> None:
        """Probes of all gates, each once."""
        probes: dict[SiteKey, list[Any]] = {}
        self._places = {}
        for gate in (gate for program in self._programs.values() for gate in program.probes):
            if gate.when is not None and (gate.when.site, gate.when.monitor.digest) not in self._places:
                site = gate.when.site
                self._places[site, gate.when.monitor.digest] = len(probes.setdefault(site, []))
                probes[site].append(gate.when.monitor.probe)
        self.bank = ProbeBank(probes)
        self._stale_bank = False

    def _score(self, gate: Gate, values: Values) -> float | None:
        if gate.when is None:
            return None
        return values.score(gate.when.site, self._places[gate.when.site, gate.when.monitor.digest])
