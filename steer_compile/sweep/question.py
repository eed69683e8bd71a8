"""`Question`: two prompts of one length, the answer that is asked about, and how it is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steer_compile.errors import SpecError

METRICS = ("logprob", "logit_diff", "recovered")


@dataclass(frozen=True)
class Question:
    """What a sweep measures at the last position.

    ::

        logprob     log p(answer)
        logit_diff  logit(answer) - logit(foil)
        recovered   (m - m_corrupted) / (m_clean - m_corrupted), m being logit_diff where there is a foil, else logprob

    Attributes:
        clean, corrupted: token ids of both prompts.
        answer, foil: token ids.

    Raises:
        SpecError: prompts of different lengths or without tokens, an unknown metric, ``logit_diff`` without a foil,
            an id that is no whole number from 0 on.
    """

    clean: tuple[int, ...]
    corrupted: tuple[int, ...]
    answer: int
    foil: int | None = None
    metric: str = "recovered"

    def __post_init__(self) -> None:
        for name in ("clean", "corrupted"):
            object.__setattr__(self, name, tuple(vars(self)[name]))
        if len(self.clean) != len(self.corrupted) or not self.clean:
            raise SpecError(
                f"the clean prompt has {len(self.clean)} tokens and the corrupted one {len(self.corrupted)}; give two "
                "prompts of one length, so that positions correspond"
            )
        if self.metric not in METRICS:
            raise SpecError(f"metric={self.metric!r} is unknown; choose one of {', '.join(METRICS)}")
        if self.metric == "logit_diff" and self.foil is None:
            raise SpecError("the metric logit_diff compares the answer with a foil, and none is given; give a foil")
        for token in self.ids:
            if isinstance(token, bool) or not isinstance(token, int) or token < 0:
                raise SpecError(f"{token!r} is no token id; give whole numbers from 0 on")

    @property
    def ids(self) -> tuple[int, ...]:
        """All token ids in it."""
        return (*self.clean, *self.corrupted, self.answer, *(() if self.foil is None else (self.foil,)))

    @property
    def measure(self) -> str:
        """What is read off the logits: ``logprob`` or ``logit_diff``."""
        if self.metric != "recovered":
            return self.metric
        return "logprob" if self.foil is None else "logit_diff"

    def check_vocabulary(self, size: int) -> None:
        """Raise `SpecError` for an id that a model of ``size`` tokens does not have."""
        beyond = [token for token in self.ids if token >= size]
        if beyond:
            raise SpecError(f"token {beyond[0]} is unknown: the model has {size} tokens; give ids below that")

    def measured(self, logits: Tensor) -> list[float]:
        """The measure of each row of logits (batch, vocabulary), in fp64."""
        wide = logits.to(torch.float64)
        if self.measure == "logprob":
            wide = torch.log_softmax(wide, -1)
        values = wide[:, self.answer]
        if self.measure == "logit_diff" and self.foil is not None:
            values = values - wide[:, self.foil]
        return [float(value) for value in values]

    def value(self, measured: float, clean: float, corrupted: float) -> float:
        """The metric of a cell from what was measured there and in both runs."""
        return (measured - corrupted) / (clean - corrupted) if self.metric == "recovered" else measured
