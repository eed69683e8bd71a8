"""`Selection`: which tokens of a request are captured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.errors import SpecError, VectorError
from steer_compile.runtime.vectors import SiteKey, TokenSelection, checked_vector, site_key

EVERYTHING = TokenSelection(((None, None),), generated=True)
MOST_TOP = 1024
"""Most tokens that a selection by score keeps."""


class Chooses(Protocol):
    """What says by its positions whether a token is chosen: `Selection`, `TokenSelection`."""

    def mask(self, first: int, length: int, prompt_length: int) -> npt.NDArray[np.bool_]:
        """Which of ``length`` tokens from position ``first`` on are chosen, after a prompt of ``prompt_length``."""


@dataclass(frozen=True, eq=False)
class Top:
    """The tokens whose value at one site has the largest scores, ``h . probe`` in fp32.

    Attributes:
        count: how many tokens are kept, fewer where fewer are chosen. Equal scores: the earlier tokens.
        site: where the score is taken; one of the captured sites.
        probe: (H,) fp32 on the CPU.

    Raises:
        SpecError: a count below 1 or above `MOST_TOP`, or a site that is none. VectorError: a bad probe.
    """

    count: int
    site: SiteKey
    probe: torch.Tensor

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, int) or not 1 <= self.count <= MOST_TOP:
            raise SpecError(f"top has count={self.count!r}; give a whole number from 1 to {MOST_TOP}")
        object.__setattr__(self, "site", site_key(self.site))
        object.__setattr__(self, "probe", checked_vector("the probe of top", self.probe))

    def check(self, widths: Mapping[SiteKey, int]) -> None:
        """Raise unless the scores can be taken, given the captured sites and how many numbers their rows have.

        Raises:
            SpecError: its site is not captured. VectorError: the probe has another width.
        """
        name, width = f"layers.{self.site[1]}.{self.site[0]}", widths.get(self.site)
        if width is None:
            raise SpecError(f"top scores the tokens at {name}, which is not captured; name it in sites")
        if self.probe.numel() != width:
            raise VectorError(f"the probe of top has {self.probe.numel()} numbers and {name} {width}; give {width}")


@dataclass(frozen=True)
class Selection:
    """Which tokens of a request are captured. The default is all of them.

    Attributes:
        tokens: by spans of the prompt, its last token, and whether they are generated; None: only ``positions``.
        every: of those that ``tokens`` chooses, the ones at positions that are multiples of this number.
        positions: absolute positions beside these, in the prompt or behind it.
        top: of all these, the ones with the largest scores.

    Raises:
        SpecError: ``every`` below 1, positions that are no whole numbers from 0 on, or nothing chosen.
    """

    tokens: TokenSelection | None = EVERYTHING
    every: int = 1
    positions: tuple[int, ...] = ()
    top: Top | None = None

    def __post_init__(self) -> None:
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise SpecError(f"every={self.every!r} is no whole number above 0; give 1 for each token")
        wrong = [p for p in self.positions if isinstance(p, bool) or not isinstance(p, int) or p < 0]
        if wrong:
            raise SpecError(f"positions holds {wrong[0]!r}; give absolute positions, whole numbers from 0 on")
        if self.tokens is None and not self.positions:
            raise SpecError("the selection chooses no token; give tokens, or positions")
        object.__setattr__(self, "positions", tuple(sorted(set(self.positions))))

    def mask(self, first: int, length: int, prompt_length: int) -> npt.NDArray[np.bool_]:
        """Which of ``length`` tokens from position ``first`` on are chosen, after a prompt of ``prompt_length``.

        Raises:
            SpecError: there is a ``top``, which needs the tokens' values.
        """
        if self.top is not None:
            raise SpecError(
                f"the selection has a top of {self.top.count} tokens, which needs their values; give it to capture_to "
                "or to a request of vLLM, or leave top out"
            )
        return self.candidates(first, length, prompt_length)

    def candidates(self, first: int, length: int, prompt_length: int) -> npt.NDArray[np.bool_]:
        """The same where ``top`` has no part in it: the tokens whose scores it compares."""
        places = np.arange(first, first + length)
        chosen = np.isin(places, self.positions)
        if self.tokens is not None:
            chosen |= self.tokens.mask(first, length, prompt_length) & (places % self.every == 0)
        return chosen

    def may_choose(self, first: int, prompt_length: int) -> bool:
        """Whether it could choose a token at position ``first`` or behind it."""
        generated = self.tokens is not None and self.tokens.generated
        in_prompt = first < prompt_length and self.tokens is not None
        return generated or in_prompt or bool(self.positions) and self.positions[-1] >= first

    @property
    def in_prompt(self) -> bool:
        """Whether it could choose a prompt token."""
        return bool(self.positions) or self.tokens is not None and bool(self.tokens.spans or self.tokens.last_prompt)
