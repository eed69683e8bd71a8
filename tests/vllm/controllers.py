"""Controllers that engines of tests load by name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from steer_compile.dynamic.actions import Action, ClearOverride, SetOverride, SetScale, SetTier
from steer_compile.dynamic.controller import Controller
from steer_compile.dynamic.views import StepView

WIDTH = 64


def first_rank() -> bool:
    from vllm.distributed import get_tensor_model_parallel_rank

    return bool(get_tensor_model_parallel_rank() == 0)


@dataclass
class Seen:
    """One request in one step, as a controller saw it."""

    step: int
    request: str
    position: int
    count: int
    phase: str
    prompt: int
    conversation: str
    token_ids: list[int]
    values: dict[Any, torch.Tensor] = field(default_factory=dict)


class Idle(Controller):
    """Asks for nothing."""

    def on_step(self, view: StepView) -> Iterable[Action]:
        return ()


class Script(Controller):
    """Pushes requests whose conversation is ``target`` from a position on, for some steps; keeps what it saw.

    Args:
        plans: ``{conversation: [position, steps, layer, number]}``: asks when it sees the token of that position, with
            a vector of one number, and clears behind so many steps.
        tier: the number of a tier that it sets in its first step, 0 for none.
        apart: step in which the first tensor parallel rank alone asks for something, 0 for none.
    """

    seen: ClassVar[list[Seen]] = []

    def __init__(
        self, plans: dict[str, list[float]] | None = None, tier: float = 0.0, fail: bool = False, apart: int = 0
    ) -> None:
        self.plans = {name: tuple(plan) for name, plan in (plans or {}).items()}
        self.tier = tier
        self.fail = fail
        self.apart = apart

    def on_step(self, view: StepView) -> Iterable[Action]:
        if self.fail:
            raise RuntimeError("a controller of a test")
        actions: list[Action] = []
        for request in view.requests:
            span = slice(request.start, request.end)
            values: dict[Any, torch.Tensor] = {site: rows[span].clone() for site, rows in view.tensors.items()}
            values |= {("score", *site): rows[span].clone() for site, rows in view.scores.items()}
            Script.seen.append(
                Seen(
                    view.step, request.request, request.position, request.end - request.start, request.phase,
                    request.prompt, request.conversation, request.token_ids.tolist(), values,
                )
            )  # fmt: skip
            if request.conversation in self.plans:
                position, steps, layer, number = self.plans[request.conversation]
                if request.position <= position < request.position + request.end - request.start:
                    push = {"post_block": {int(layer): torch.full((WIDTH,), number)}}
                    actions.append(SetOverride(request.request, push))
                if request.position == position + steps:
                    actions.append(ClearOverride(request.request))
        if self.apart and view.step == self.apart and first_rank():
            actions.append(SetScale(0.5))
        if self.tier:
            actions.append(SetTier({"post_block": {1: torch.full((WIDTH,), self.tier)}}))
            self.tier = 0.0
        return actions
