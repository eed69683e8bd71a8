"""What is done to a row before the encoder, and undone behind the decoder."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from steer_compile.errors import SAEError


@dataclass(frozen=True)
class Normalisation(ABC):
    """Rows (..., d_model) to and from the space in which the autoencoder was trained, in their own dtype."""

    kind: ClassVar[str] = ""

    @abstractmethod
    def normalised(self, h: Tensor) -> Tensor:
        """Rows as the encoder takes them."""

    @abstractmethod
    def restored(self, y: Tensor, h: Tensor | None) -> Tensor:
        """Rows of the decoder as the model has them. ``h`` is what was normalised, where the inverse needs it."""

    @abstractmethod
    def step(self, y: Tensor, h: Tensor) -> Tensor:
        """Differences of decoded rows as differences of the model's rows."""

    def settings(self) -> dict[str, float]:
        """Its numbers by field name."""
        return {}

    @abstractmethod
    def check(self, where: str, d_model: int) -> None:
        """Raises `SAEError` for numbers that are out of range."""


@dataclass(frozen=True)
class NoNorm(Normalisation):
    """Rows as they are."""

    kind: ClassVar[str] = "none"

    def normalised(self, h: Tensor) -> Tensor:
        return h

    def restored(self, y: Tensor, h: Tensor | None) -> Tensor:
        return y

    def step(self, y: Tensor, h: Tensor) -> Tensor:
        return y

    def check(self, where: str, d_model: int) -> None:
        pass


@dataclass(frozen=True)
class FactorNorm(Normalisation):
    """``x = factor h`` and ``h = y / factor``.

    The factor that brings a data set's average norm to ``sqrt(d_model)`` is ``sqrt(d_model) / average``.
    """

    factor: float
    kind: ClassVar[str] = "factor"

    def normalised(self, h: Tensor) -> Tensor:
        return h * self.factor

    def restored(self, y: Tensor, h: Tensor | None) -> Tensor:
        return y / self.factor

    def step(self, y: Tensor, h: Tensor) -> Tensor:
        return y / self.factor

    def settings(self) -> dict[str, float]:
        return {"factor": self.factor}

    def check(self, where: str, d_model: int) -> None:
        if not 0 < self.factor < math.inf:
            raise SAEError(f"{where}: the norm factor is {self.factor}; give a finite number above 0")


@dataclass(frozen=True)
class LayerNorm(Normalisation):
    """``x = (h - mean) / (std + eps)`` and ``h = y std + mean``, with the unbiased std of each row, as in SAELens."""

    eps: float = 1e-5
    kind: ClassVar[str] = "layer_norm"

    def normalised(self, h: Tensor) -> Tensor:
        centred = h - h.mean(-1, keepdim=True)
        return centred / (centred.std(-1, keepdim=True) + self.eps)

    def restored(self, y: Tensor, h: Tensor | None) -> Tensor:
        if h is None:
            raise SAEError("layer norm is undone with the mean and std of the rows; give decode(features, h)")
        return self.step(y, h) + h.mean(-1, keepdim=True)

    def step(self, y: Tensor, h: Tensor) -> Tensor:
        return y * h.std(-1, keepdim=True)

    def settings(self) -> dict[str, float]:
        return {"eps": self.eps}

    def check(self, where: str, d_model: int) -> None:
        if d_model < 2 or not 0 <= self.eps < math.inf:
            raise SAEError(f"{where}: layer norm with eps {self.eps} over width {d_model}; it takes a width from 2 on")


KINDS: dict[str, type[Normalisation]] = {cls.kind: cls for cls in (NoNorm, FactorNorm, LayerNorm)}
