"""Gates: how far the score of a probe opens what it guards.

For a score s of one token, with the settings of its monitor (a line of `SETTINGS` numbers)::

    sigmoid   g = sigmoid(sharpness * (s - threshold))
    line      g = clip(sharpness * (s - threshold), low, high)       affine where the bounds are infinite
    step      g = 1 above threshold, 0 below low, in between what it was (0 where nothing remembers it)

    tier  *= g                                 factor of the dynamic tier's gain, of the site's monitor alone
    rows  *= rows_too and decoded   ? g : 1    factor of the row's vectors
    clamps *= clamps_too and decoded ? g : 1   factor of the clamps' strength

A monitor that is not active leaves every factor as it is. So what is computed for prompt tokens never depends on a
score, and neither do blocks of a prefix cache. Arithmetic is in fp32 (fp64 beside a stream of fp64).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

KINDS = ("sigmoid", "line", "step")
"""Decision functions, by the number that stands for each."""
SETTINGS = ("threshold", "sharpness", "kind", "low", "high", "active", "rows_too", "clamps_too")
"""What a line of a monitor's bank holds."""
FACTORS = 4
"""Numbers of a token's factors as one site hands them to the next: tier, rows, clamps, and one that is unused."""


class Factors(NamedTuple):
    """Factors of each token (...), None where nothing changes them."""

    tier: Tensor | None = None
    rows: Tensor | None = None
    clamps: Tensor | None = None

    @classmethod
    def of(cls, gates: Tensor | None) -> Factors:
        """From the tensor (..., `FACTORS`) of a site in front."""
        if gates is None:
            return cls()
        tier, rows, clamps, _ = gates.unbind(-1)
        return cls(tier, rows, clamps)


def opened(score: Tensor, settings: Tensor, was: Tensor | None = None) -> Tensor:
    """The gate of each token.

    Args:
        score: (...).
        settings: lines (..., 8) that broadcast against the scores.
        was: whether a step gate was open, 1 or 0 (...).
    """
    threshold, sharpness, kind, low, high, active, _, _ = settings.unbind(-1)
    distance = sharpness * (score - threshold)
    line = torch.where(distance < low, low, torch.where(distance > high, high, distance))
    before = torch.zeros_like(score) if was is None else was
    one, zero = torch.ones_like(score), torch.zeros_like(score)
    step = torch.where(score > threshold, one, torch.where(score < low, zero, before))
    g = torch.where(kind == 0, torch.sigmoid(distance), torch.where(kind == 1, line, step))
    return torch.where(active > 0, g, one)


def guarded(factors: Factors, g: Tensor, settings: Tensor, decode: Tensor, tier: bool) -> Factors:
    """The factors behind one more monitor.

    Args:
        g: its gate (...); settings: its lines (..., 8); decode: 1 for decoded tokens (...).
        tier: whether it guards the dynamic tier, as the monitor of a site does.
    """
    _, _, _, _, _, active, rows, clamps = settings.unbind(-1)
    one = torch.ones_like(g)
    row, clamp = (torch.where(decode * chosen * active > 0, g, one) for chosen in (rows, clamps))
    return Factors(
        _product(factors.tier, g) if tier else factors.tier,
        _product(factors.rows, row),
        _product(factors.clamps, clamp),
    )


def _product(one: Tensor | None, other: Tensor) -> Tensor:
    return other if one is None else one * other
