"""`DynamicRuntime`: the runtime of plain PyTorch with the control plane of dynamic steering."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from steer_compile.capture.log import RowLog
from steer_compile.dynamic.dynamics import Dynamics
from steer_compile.dynamic.views import NO_TOKENS, RequestView, StepView
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.rows import GLOBAL_ROWS, RowPlan, Step
from steer_compile.runtime.runtime import Runtime
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import SteerSpec


class DynamicRuntime(Runtime):
    """`Runtime` whose calls are the steps of dynamic steering, and whose batch elements are its requests.

    Requests have the names that `steer` or `assign` gave them, or else "0", "1", ... in the order of the batch. A call
    that begins new prompts ends the requests before it. As long as `dynamic` is not used, nothing is done in a call.
    """

    def __init__(self, spec: SteerSpec) -> None:
        super().__init__(spec)
        self._dynamic: Dynamics | None = None
        self._routes: dict[str, int] = {}
        self._now: tuple[Step, tuple[str, ...], tuple[str, ...]] | None = None
        self._running = False  # a step began that the controllers have not seen
        self._unseen: tuple[Collection[SiteKey], torch.Tensor | None] | None = None

    @property
    def dynamic(self) -> Dynamics:
        """Actions, overrides and controllers of this model."""
        if self._dynamic is None:
            self._dynamic = Dynamics(self, self)
        return self._dynamic

    @contextmanager
    def capture(self, tokens: object = None, sites: object = None) -> Iterator[RowLog]:
        """As `Runtime.capture`; with ``capture_rows`` in the spec, ``log.rows`` are the chosen rows with labels."""
        with self._collect(RowLog(self._demand(tokens, sites))) as log:
            yield log

    # -- as a host ------------------------------------------------------------------------------------------------

    def phase(self, request: str) -> str | None:
        return self._now[0].phase if self._now is not None and request in self._now[1] else None

    def admitted(self, request: str) -> Contents:
        return self._rows.own(self.row(request))

    def row(self, request: str) -> int:
        plan = self._plan_of(request)
        steers = plan.tokens is None or plan.tokens.generated
        return plan.row("decode") if steers else GLOBAL_ROWS["decode"]

    def route(self, request: str, row: int | None) -> None:
        if row is None:
            self._routes.pop(request, None)
        else:
            self._routes[request] = row
        self._version += 1

    def _plan_of(self, request: str) -> RowPlan:
        if self._now is None or request not in self._now[1]:
            return RowPlan()
        names = self._now[1]
        return self._batches[-1].plans(len(names))[names.index(request)]

    def _plans(self, batch: int) -> tuple[list[RowPlan], bool]:
        if not self._routes or self._now is None or len(self._now[1]) != batch:
            return super()._plans(batch)
        if self._planned[:2] != (self._version, batch):
            own = self._batches[-1].plans(batch)
            routed = [self._routes.get(name, 0) for name in self._now[1]]
            plans = [RowPlan((plan.rows[0], row)) if row else plan for plan, row in zip(own, routed, strict=True)]
            self._planned = (self._version, batch, (plans, any(p.tokens is not None for p in plans)))
        return self._planned[2]

    # -- calls ----------------------------------------------------------------------------------------------------

    def _begin(self, step: Step) -> None:
        if self._dynamic is None:
            return
        self._look()
        former, names = self._now, self._batches[-1].names_of(step.batch)
        conversations = self._batches[-1].conversations or ("",) * step.batch
        before = former[1] if former is not None else ()
        self._now = (step, names, conversations)
        if step.phase == "prefill" and step.start == 0:
            self._dynamic.finish(tuple(dict.fromkeys((*before, *names))), keep_gates=True)
        elif step.phase == "prefill" and former is not None and former[0].phase == "decode":
            self._dynamic.interrupt(names)
        elif names != before:
            self._dynamic.finish([name for name in before if name not in names], keep_gates=True)
        self._running = True
        self._dynamic.begin()

    def _end(self, captured: Collection[SiteKey], token_ids: torch.Tensor | None) -> None:
        if self._dynamic is None or not self._dynamic.controllers or not self._running:
            return
        if token_ids is None and self._unseen is not None:
            token_ids = self._unseen[1]  # of the part of the model that has them
        self._unseen = (captured, token_ids)
        if not self._scope.partial:  # else a later part of the model may still run in this call
            self._look()

    def _look(self) -> None:
        """Show the last step to the controllers, if they have not seen it."""
        if self._unseen is None or self._now is None or self._dynamic is None:
            return
        (captured, token_ids), self._unseen, self._running = self._unseen, None, False
        step, names, conversations = self._now
        values = self.tables.captured(step.batch * step.length)
        tensors = values if self._scope.partial else {site: values[site] for site in captured if site in values}
        ids = token_ids.reshape(-1) if token_ids is not None else None
        requests = _requests(step, names, conversations, ids)
        scores = self.tables.captured(step.batch * step.length, "score")
        self._dynamic.end(StepView(self._dynamic.step, tensors, scores, requests))

    def _leave(self) -> None:
        if self._dynamic is not None and self._now is not None:
            self._look()
            self._dynamic.finish(self._now[1])
            self._now = None


def _requests(
    step: Step, names: tuple[str, ...], conversations: tuple[str, ...], ids: torch.Tensor | None
) -> tuple[RequestView, ...]:
    """The batch elements of a step; in decoding their token ids are parted in one go."""
    if step.length > 1 or step.phase == "prefill":
        views = (_span(step, b, name, conversations[b]) for b, name in enumerate(names))
        return tuple(v if ids is None else v._replace(token_ids=ids[v.start : v.end]) for v in views)
    parts = [NO_TOKENS] * step.batch if ids is None else ids.unsqueeze(1).unbind(0)
    return tuple(
        RequestView(name, b, b + 1, max(step.start - pad, 0), step.phase, prompt, part, conversation)
        for b, (name, pad, prompt, part, conversation) in enumerate(
            zip(names, step.pads, step.prompts, parts, conversations, strict=True)
        )
    )


def _span(step: Step, b: int, name: str, conversation: str) -> RequestView:
    """The tokens of one batch element, padding left out."""
    first = step.start - step.pads[b]
    begin = min(max(0, -first), step.length)
    end = min(step.length, max(begin, step.prompts[b] - first)) if step.phase == "prefill" else step.length
    base = b * step.length
    return RequestView(
        name, base + begin, base + end, max(first, 0), step.phase, step.prompts[b], NO_TOKENS, conversation
    )  # fmt: skip
