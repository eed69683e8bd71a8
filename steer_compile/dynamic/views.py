"""What a controller sees of a step: views of what the graphs stored, and whose rows are whose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from steer_compile.runtime.vectors import SiteKey

NO_TOKENS = torch.empty(0, dtype=torch.int64, device="cpu")


class RequestView(NamedTuple):
    """One request in one step.

    Attributes:
        request: its name.
        start, end: its rows in the tensors of the step, half open; padding is left out.
        position: position of the first of these tokens in the request.
        phase: ``prefill`` or ``decode``.
        prompt: tokens of its prompt.
        token_ids: ids of these tokens, (end - start,) int64 on the device where the host has them; empty where it
            does not know them.
        conversation: name of what it belongs to, "" for nothing.
    """

    request: str
    start: int
    end: int
    position: int
    phase: str
    prompt: int
    token_ids: torch.Tensor = NO_TOKENS
    conversation: str = ""

    @property
    def decodes_next(self) -> bool:
        """Whether the next token that is computed is a decoded one, so that an override could be for it."""
        return self.phase == "decode" or self.position + self.end - self.start >= self.prompt


@dataclass(frozen=True, eq=False)
class StepView:
    """One step, right after the forward. The tensors are not copied: the next forward overwrites them.

    Attributes:
        step: number of the step.
        tensors: the values that the graphs captured in front of any steering, (n, H) by site.
        scores: scores and gates of the monitors in the graph, (n, 2) fp32 by site; may be empty.
        requests: who the rows belong to.
    """

    step: int
    tensors: Mapping[SiteKey, torch.Tensor] = field(repr=False)
    scores: Mapping[SiteKey, torch.Tensor] = field(repr=False)
    requests: tuple[RequestView, ...]
