"""`SteeringController`: a controller with one method to write."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple, Self

import torch

from steer_compile.dynamic.actions import Action, ClearOverride, SetOverride, SetScale, strength, target_of
from steer_compile.dynamic.actuator import Outcome
from steer_compile.dynamic.controller import Controller, Note
from steer_compile.dynamic.latches import Latches
from steer_compile.dynamic.scores import ProbeBank
from steer_compile.dynamic.views import RequestView, StepView
from steer_compile.errors import SiteNotFound, SpecError
from steer_compile.runtime.gates import SiteLike
from steer_compile.runtime.vectors import SiteKey, site_key

LATCHES = ("no", "request", "conversation")
_LONGEST_PAUSE = 64
"""Steps after which what was rejected is asked for again, at most; the first time it is two steps."""
MOST_REQUESTS = 4096
"""Requests whose state is kept although no step has shown them lately; a host says when they finish."""


@dataclass(frozen=True, init=False)
class Decision:
    """What a request's decoded tokens are to get from the next step on.

    Attributes:
        override: what they get, for any request.
        gain: factor of the row; a change of it alone writes no vector.
        score: what the decision rests on, for the journal.
        latch: ``no``: decide again in each step. ``request``: it holds until the request ends. ``conversation``: also
            for later requests of the conversation.

    Raises:
        SpecError, VectorError: as in `SetOverride`, whose other fields are taken too (``named``, ``compose``, ...).
    """

    override: SetOverride
    gain: float
    score: float | None
    latch: str

    def __init__(
        self, vectors: object = None, gain: float = 1.0, score: float | None = None, latch: str = "no", **fields: Any
    ) -> None:
        if latch not in LATCHES:
            raise SpecError(f"latch={latch!r} is unknown; choose one of {', '.join(LATCHES)}")
        object.__setattr__(self, "override", SetOverride("*", vectors, **fields))
        object.__setattr__(self, "gain", strength(gain, "the gain of a decision"))
        object.__setattr__(self, "score", score)
        object.__setattr__(self, "latch", latch)

    def at(self, score: float | None, gain: float | None = None) -> Self:
        """The same with another score and gain; its vectors are not checked again, so this is for each step.

        Raises:
            VectorError: a bad gain.
        """
        factor = self.gain if gain is None else strength(gain, "the gain of a decision")
        made = type(self).__new__(type(self))
        vars(made).update(override=self.override, gain=factor, score=score, latch=self.latch)
        return made

    @property
    def bytes(self) -> int:
        """Memory of what it holds."""
        own = self.override
        tensors = [block for _, block in own.vectors.blocks] + [monitor.probe for _, monitor in own.monitors]
        tensors += [clamp.direction for _, each in own.clamps for clamp in each]
        return 256 + sum(t.numel() * t.element_size() for t in tensors)


@dataclass
class RequestState:
    """What is kept of a request while it runs.

    Attributes:
        data: the controller's own.
        steps: how often it was decided upon.
        latched: the decision that holds until the request ends.
        sent: content and gain of what was asked for last, None for nothing.
        refused: how often in a row that was rejected.
        resume: ``steps`` from which it is asked for again.
    """

    data: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    latched: Decision | None = None
    sent: tuple[str, float] | None = None
    refused: int = 0
    resume: int = 0
    conversation: str = ""


class Values(NamedTuple):
    """What one request shows in a step."""

    view: StepView
    request: RequestView
    means: Mapping[SiteKey, Sequence[Sequence[float]]]
    place: int

    def score(self, site: SiteLike, probe: int = 0) -> float:
        """Mean over its tokens of ``h . probe`` at a site of the controller's probes; it is on the host already.

        Raises:
            SiteNotFound: the controller has no probe there.
        """
        key = site_key(site)
        if key not in self.means or probe >= len(self.means[key]):
            raise SiteNotFound(f"layers.{key[1]}.{key[0]} has no probe of this controller; give it when you make it")
        return self.means[key][probe][self.place]

    def rows(self, site: SiteLike) -> torch.Tensor:
        """Captured values (tokens, H) of a site, on the device and not copied."""
        return self._part(self.view.tensors, site, "capture")

    def gates(self, site: SiteLike) -> torch.Tensor:
        """Scores and gates (tokens, 2) fp32 of the monitor in the graph at a site."""
        return self._part(self.view.scores, site, "score")

    def _part(self, found: Mapping[SiteKey, torch.Tensor], site: SiteLike, what: str) -> torch.Tensor:
        key = site_key(site)
        if key not in found:
            have = ", ".join(f"layers.{layer}.{hook}" for hook, layer in found) or "none"
            raise SiteNotFound(f"layers.{key[1]}.{key[0]} has no {what} in this step; there are: {have}")
        return found[key][self.request.start : self.request.end]


class SteeringController(Controller):
    """Asks for overrides by what `decide` says, and only where that changes.

    Args:
        probes: vector (H,) by site: each step brings the scores of all requests to the host in one copy.
        latches: what conversations hold on to.
    """

    def __init__(
        self, name: str, probes: Mapping[Any, torch.Tensor] | None = None, latches: Latches[Decision] | None = None
    ) -> None:
        self.name = name
        self.bank = ProbeBank({site_key(site): [probe] for site, probe in (probes or {}).items()})
        self.latches = latches if latches is not None else Latches()
        self.changed_sets = 0
        self._states: dict[str, RequestState] = {}
        self._notes: list[Note] = []

    @abstractmethod
    def decide(self, request: RequestView, values: Values, state: RequestState) -> Decision | None:
        """What a request is to get from the next step on; None for nothing beside its own steering.

        Called for each request in each step, until a decision latches. ``state.data`` lives as long as the request.
        """

    def on_step(self, view: StepView) -> Iterable[Action]:
        self._notes = []
        means = self.bank.means(view)
        decided: list[tuple[RequestView, RequestState, Decision | None]] = []
        for i, request in enumerate(view.requests):
            state = self._states.get(request.request) or self._begun(request, view)
            held = state.latched or (self.latches.get(request.conversation) if request.conversation else None)
            if held is None:
                held = self.decide(request, Values(view, request, means, i), state)
            decided.append((request, state, held))
        actions: list[Action] = []
        for request, state, decision in decided:  # only now, as `decide` may have raised
            state.steps += 1
            if decision is None and state.sent is None:
                continue
            asked = self._ask(request, state, decision)
            actions += asked
            if asked or (decision is not None and decision.score is not None):
                gain, score = (decision.gain, decision.score) if decision is not None else (0.0, None)
                self._notes.append(Note(request.request, score, gain, asked[-1].digest if asked else ""))
        return actions

    def notes(self) -> Iterable[Note]:
        return self._notes

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            request = target_of(outcome.action) if outcome.action is not None else None
            state = self._states.get(request) if request is not None else None
            if state is None:
                continue
            if outcome.applied:
                state.refused = 0
                continue
            state.sent = None
            state.refused += 1
            state.resume = state.steps + min(1 << state.refused, _LONGEST_PAUSE)
            if outcome.error == "ChangedSet":
                self.changed_sets += 1
                self.latches.drop(state.conversation)
                state.latched = None

    def forget(self, requests: Iterable[str]) -> None:
        for request in requests:
            self._states.pop(request, None)

    def interrupted(self, requests: Iterable[str]) -> None:
        for request in requests:
            if request in self._states:
                self._states[request].sent = None

    def _begun(self, request: RequestView, view: StepView) -> RequestState:
        """The state of a request that is new; the oldest of those that the step does not show make room for it."""
        state = self._states[request.request] = RequestState(conversation=request.conversation)
        beyond = len(self._states) - max(MOST_REQUESTS, 2 * len(view.requests))
        if beyond > 0:
            shown = {r.request for r in view.requests}
            for name in list(islice((name for name in self._states if name not in shown), beyond)):
                del self._states[name]
        return state

    def _ask(self, request: RequestView, state: RequestState, decision: Decision | None) -> list[Action]:
        """Actions that make it so, none where it is so."""
        if decision is not None and decision.latch != "no":
            state.latched = decision
            if decision.latch == "conversation" and request.conversation:
                self.latches.put(request.conversation, decision, decision.bytes)
        if not request.decodes_next or state.steps < state.resume:
            return []
        if decision is None:
            had, state.sent = state.sent, None
            return [ClearOverride(request.request)] if had is not None else []
        wanted = (decision.override.content, decision.gain)
        had, state.sent = state.sent, wanted
        if had == wanted:
            return []
        if had is not None and had[0] == wanted[0]:
            return [SetScale(decision.gain, request.request)]
        return [decision.override.to(request.request, decision.gain)]
