"""`Controller`: looks at a step right behind the forward; its actions apply before the next one.

`Controllers` runs them, so that none harms the model: what one raises is reported and counted, and its actions of that
step are discarded.
"""

from __future__ import annotations

import logging
import time
import traceback
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch

from steer_compile.dynamic.actions import Action
from steer_compile.dynamic.actuator import Outcome
from steer_compile.dynamic.counts import Counts
from steer_compile.dynamic.queue import Submitted
from steer_compile.dynamic.views import StepView
from steer_compile.errors import SpecError, UnknownName

_log = logging.getLogger(__name__)
BUDGET_MS = 5.0
MOST_ACTIONS = 4096
"""Most actions of a controller in one step."""
_ERRORS = 16


@dataclass(frozen=True)
class Note:
    """What a controller saw and chose for a request in a step; ``action`` is the digest of what it asked for, or ""."""

    request: str
    score: float | None
    gain: float
    action: str = ""


class Controller(ABC):
    """Decides from what a step captured. A pure function of its views and its own state runs alike on all ranks.

    Attributes:
        name: tells it from other controllers, and is the source of its actions.
    """

    name: str = "controller"

    @abstractmethod
    def on_step(self, view: StepView) -> Iterable[Action]:
        """What to do before the next step. The view's tensors live until the next forward."""

    def notes(self) -> Iterable[Note]:
        """What the last step's decisions rested on, for the journal."""
        return ()

    def settled(self, outcomes: Sequence[Outcome]) -> None:  # noqa: B027
        """What became of the actions of the last step; called before the next one."""

    def forget(self, requests: Iterable[str]) -> None:  # noqa: B027
        """Requests ended, and their overrides with them."""

    def interrupted(self, requests: Iterable[str]) -> None:  # noqa: B027
        """Requests go on, but their overrides are gone, as after a preemption."""


@dataclass
class Timing:
    """Wall time of one controller.

    Attributes:
        fired: steps in which it asked for something.
        late: steps beyond the budget.
    """

    steps: int = 0
    seconds: float = 0.0
    longest: float = 0.0
    late: int = 0
    fired: int = 0
    errors: int = 0
    last_errors: deque[str] = field(default_factory=lambda: deque(maxlen=_ERRORS))

    def data(self) -> dict[str, Any]:
        """Plain data, times in milliseconds."""
        mean = self.seconds / self.steps if self.steps else 0.0
        return {
            "steps": self.steps,
            "mean_ms": round(1e3 * mean, 4),
            "max_ms": round(1e3 * self.longest, 4),
            "late": self.late,
            "fired": self.fired,
            "fire_rate": self.fired / self.steps if self.steps else 0.0,
            "errors": self.errors,
            "last_errors": list(self.last_errors),
        }


class Controllers:
    """The controllers of a host, in the order in which they were added."""

    def __init__(self, counts: Counts, budget_ms: float = BUDGET_MS) -> None:
        self.budget_ms = budget_ms
        self._counts = counts
        self._all: dict[str, Controller] = {}
        self._timings: dict[str, Timing] = {}

    def __bool__(self) -> bool:
        return bool(self._all)

    def add(self, controller: Controller) -> None:
        """Run a controller from the next step on.

        Raises:
            SpecError: it is no `Controller`, or its name is taken.
        """
        if not isinstance(controller, Controller):
            raise SpecError(
                f"a {type(controller).__name__} is no controller; subclass Controller or SteeringController"
            )
        if controller.name in self._all:
            raise SpecError(f"a controller named {controller.name!r} runs already; remove it, or give another name")
        self._timings[controller.name] = Timing()
        self._all = {**self._all, controller.name: controller}

    def remove(self, name: str) -> Controller:
        """Run a controller no longer; what it did stays.

        Raises:
            UnknownName: there is none of the name.
        """
        if name not in self._all:
            raise UnknownName(f"no controller is named {name!r}; there are: {', '.join(self._all) or 'none'}")
        gone = self._all[name]
        self._all = {other: c for other, c in self._all.items() if other != name}
        self._timings.pop(name)
        return gone

    def on_step(self, view: StepView) -> tuple[list[Submitted], list[Note]]:
        """What all of them ask for, and what they noted."""
        wanted: list[Submitted] = []
        notes: list[Note] = []
        for name, controller in self._all.items():
            actions = self._run(name, controller, view)
            if actions is not None:
                wanted += [Submitted(action, name) for action in actions]
                self._guarded(name, lambda c=controller: notes.extend(c.notes()))
        return wanted, notes

    def settled(self, outcomes: Sequence[Outcome]) -> None:
        """Tell each what became of its actions."""
        for name, controller in self._all.items():
            own = [outcome for outcome in outcomes if outcome.submitted.source == name]
            if own:
                self._guarded(name, lambda c=controller, o=own: c.settled(o))

    def forget(self, requests: Sequence[str]) -> None:
        """Tell each that requests are gone."""
        for name, controller in self._all.items():
            self._guarded(name, lambda c=controller: c.forget(requests))

    def interrupted(self, requests: Sequence[str]) -> None:
        """Tell each that requests go on without their overrides."""
        for name, controller in self._all.items():
            self._guarded(name, lambda c=controller: c.interrupted(requests))

    def status(self) -> dict[str, dict[str, Any]]:
        """Times, errors and fire rates, by name."""
        return {name: timing.data() for name, timing in dict(self._timings).items()}

    def _run(self, name: str, controller: Controller, view: StepView) -> list[Action] | None:
        timing, begun = self._timings[name], time.perf_counter()
        made: list[Action] = []

        def run() -> None:
            with torch.no_grad():
                made.extend(islice(controller.on_step(view), MOST_ACTIONS + 1))

        done = self._guarded(name, run)
        spent = time.perf_counter() - begun
        timing.steps += 1
        timing.seconds += spent
        timing.longest = max(timing.longest, spent)
        if spent > self.budget_ms / 1e3:
            timing.late += 1
            if timing.late == 1:
                _log.warning("controller %r took %.1f ms of its %.1f", name, 1e3 * spent, self.budget_ms)
        if len(made) > MOST_ACTIONS:
            self._report(name, f"it asks for more than {MOST_ACTIONS} actions in one step")
            done = False
        if not done:
            self._counts.add("discarded", name, len(made))
            return None
        timing.fired += bool(made)
        return made

    def _guarded(self, name: str, call: Any) -> bool:
        """Run foreign code; whether it returned. Whatever it raises is reported, and the step goes on."""
        try:
            call()
        except Exception as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            self._report(name, f"{type(error).__name__}: {error} ({where.name}, line {where.lineno})")
            return False
        return True

    def _report(self, name: str, text: str) -> None:
        timing = self._timings[name]
        timing.errors += 1
        timing.last_errors.append(text[:500])
        self._counts.add("errors", name)
        if timing.errors == 1:
            _log.warning("controller %r failed, and its actions of the step are discarded: %s", name, text)
