"""`RequestDynamics`: the control plane of dynamic steering over the requests of one model runner.

What was asked for applies where a step begins, in front of the rows of its tokens; controllers look right behind its
forward. So what they ask for behind step k holds from step k + 1 on, however far the scheduler is ahead: it is the
runner's steps that count, and they run in order. Every rank sees the same steps and runs the same controllers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from steer_compile.dynamic.actuator import Host
from steer_compile.dynamic.controller import Controller
from steer_compile.dynamic.dynamics import Dynamics
from steer_compile.dynamic.views import NO_TOKENS, RequestView, StepView
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.registry import Registry
from steer_compile.vllm.rows import Numbers, RequestRows
from steer_compile.vllm.transport import received_sets

MOST_NAMES = 256
"""Most live requests whose names a status gives."""


@dataclass(frozen=True)
class _Step:
    """The step that comes or runs, in numbers of its own: the runner changes its arrays while it schedules ahead."""

    requests: tuple[str, ...]
    starts: list[int]
    counts: list[int]
    prompts: list[int]
    token_ids: Tensor


class RequestDynamics(Host):
    """The host of vLLM's requests.

    A request decodes in a step if the first of its tokens there lies behind its prompt. One that a step leaves out is
    where controllers have seen it last.

    Attributes:
        control: actions, overrides and controllers.
    """

    def __init__(self, registry: Registry, rows: RequestRows, controllers: Iterable[Controller] = ()) -> None:
        self.control = Dynamics(registry, self)
        for controller in controllers:
            self.control.add(controller)
        self._registry = registry
        self._rows = rows
        self._conversations: dict[str, str] = {}
        self._decoding: set[str] = set()
        self._now: _Step | None = None
        self._phases: dict[str, str] | None = None

    # -- as a host ------------------------------------------------------------------------------------------------

    def phase(self, request: str) -> str | None:
        if self._phases is None and self._now is not None:
            now = self._now
            decoding = (start >= prompt for start, prompt in zip(now.starts, now.prompts, strict=True))
            self._phases = {
                name: "decode" if decodes else "prefill" for name, decodes in zip(now.requests, decoding, strict=True)
            }
        found = self._phases.get(request) if self._phases is not None else None
        return "decode" if found is None and request in self._decoding else found

    def admitted(self, request: str) -> Contents:
        return self._registry.overrides.own(self._rows.row(request))

    def row(self, request: str) -> int:
        return self._rows.row(request)

    def route(self, request: str, row: int | None) -> None:
        self._rows.route(request, row)

    # -- requests -------------------------------------------------------------------------------------------------

    def begun(self, request: str, asked: Mapping[str, Any]) -> None:
        """A request begins, with what the front end sends for its gates; or it begins again, and keeps its gates."""
        if request in self._conversations:
            self._decoding.discard(request)
            self.control.interrupt((request,))
            return
        self._conversations[request] = asked.get("conversation", "")
        self._hold(asked.get("sets", {}))
        if asked.get("gates"):
            self.control.gate(request, asked["gates"])

    def ended(self, finished: Iterable[str], preempted: Iterable[str]) -> None:
        """Requests finished or were aborted; others lost what was computed of them, and their overrides with it."""
        gone = [request for request in finished if request in self._conversations]
        for request in gone:
            del self._conversations[request]
        if gone:
            self.control.finish(gone)
        stopped = tuple(preempted)
        self._decoding.difference_update(gone, stopped)
        if stopped:
            self.control.interrupt(stopped)

    # -- steps ----------------------------------------------------------------------------------------------------

    def begin(self, requests: Sequence[str], spans: tuple[Numbers, Numbers, Numbers], token_ids: Tensor) -> None:
        """A forward follows, whose tokens' rows are not written yet: apply what was asked for.

        Args:
            spans: starts, counts and prompts, as in `RequestRows.step`.
            token_ids: of the step's tokens (T,) on the device.
        """
        starts, counts, prompts = (numbers.tolist() for numbers in spans)
        self._now, self._phases = _Step(tuple(requests), starts, counts, prompts, token_ids), None
        self.control.begin()

    def end(self) -> None:
        """The forward has been launched: let the controllers look."""
        now, self._now, self._phases = self._now, None, None
        if now is None or not self.control.controllers:
            return
        tokens, tables = sum(now.counts), self._registry.tables
        ids: Sequence[Tensor] = now.token_ids[:tokens].long().split(now.counts) if tokens else ()
        views, first = [], 0
        for i, request in enumerate(now.requests):
            start, count, prompt = now.starts[i], now.counts[i], now.prompts[i]
            view = RequestView(
                request, first, first + count, start, "decode" if start >= prompt else "prefill", prompt,
                ids[i] if ids else NO_TOKENS, self._conversations.get(request, ""),
            )  # fmt: skip
            views.append(view)
            if view.decodes_next:
                self._decoding.add(request)
            first += count
        with torch.no_grad():
            captured, scores = tables.captured(tokens), tables.captured(tokens, "score")
            self.control.end(StepView(self.control.step, captured, scores, tuple(views)))

    # -- an operator's --------------------------------------------------------------------------------------------

    def submit(self, actions: Sequence[Mapping[str, Any]], sets: Mapping[str, Any]) -> list[bool]:
        """Ask for actions in front of the next step; which of them found room. ``sets``: those that they name."""
        self._hold(sets)
        return [self.control.submit(action) for action in actions]

    def _hold(self, sets: Mapping[str, Any]) -> None:
        for name, vectors in received_sets(sets).items():
            self._registry.register_vectors(name, vectors, replace=True)

    def rename(self, data: Mapping[str, Any], gone: Sequence[str]) -> None:
        """Named sets have other content, or are no more; those that no request brought are of no interest."""
        known = self._registry.names
        self._hold({name: item for name, item in data.items() if name in known})
        for name in gone:
            if name in known:
                self._registry.named.pop(name)

    def status(self) -> dict[str, Any]:
        """That of `Dynamics`, the data of sites by digest, and names of live requests with what they belong to."""
        sites = self._registry.sites
        monitors = {
            f"layers.{layer}.{hook}": {"digest": monitor.digest, "gate_rows": rows}
            for (hook, layer), (monitor, rows) in sorted(sites.monitors.items())
        }
        return {
            **self.control.status(),
            "tier": {"digest": sites.tier.digest, "gain": sites.gain},
            "monitors": monitors,
            "requests": dict(islice(self._conversations.items(), MOST_NAMES)),
        }
