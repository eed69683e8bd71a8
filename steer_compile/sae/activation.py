"""Activations of sparse autoencoders: each formula, and beside it an independent reference in fp64.

A `product` is ``x @ W_enc`` (..., d_sae) without any bias, and `b_enc` is (d_sae,), both of the computation's dtype.
Features are never negative. NaN of a product stays NaN in its own feature and takes no part in a choice of the largest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steer_compile.errors import SAEError
from steer_compile.sae.checks import checked_tensor, whole

Wide: TypeAlias = npt.NDArray[np.float64]


def top_mask(values: Tensor, k: int) -> Tensor:
    """Which k entries of the last dimension are the largest; of equal ones those of the lowest index.

    Args:
        values: (..., n), any floating dtype; NaN counts as less than everything.

    Returns:
        bool (..., n), with exactly ``min(k, n)`` entries set in each row.
    """
    if k >= values.size(-1):
        return torch.ones_like(values, dtype=torch.bool)
    values = torch.where(values.isnan(), -math.inf, values)
    last = values.topk(k, dim=-1).values[..., -1:]
    above, equal = values > last, values == last
    room = k - above.sum(-1, keepdim=True)
    return above | (equal & (equal.cumsum(-1) <= room))


def _kept(pre: Tensor, chosen: Tensor) -> Tensor:
    """ReLU of the chosen entries, 0 elsewhere, NaN where it was."""
    return torch.where(pre.isnan(), pre, torch.where(chosen, pre.relu(), 0.0))


@dataclass(frozen=True, eq=False)
class Activation(ABC):
    """What makes features of pre-activations.

    Attributes:
        batch_dependent: a token's features depend on the other tokens of the call.
    """

    kind: ClassVar[str] = ""

    @property
    def batch_dependent(self) -> bool:
        return False

    @abstractmethod
    def features(self, product: Tensor, b_enc: Tensor) -> Tensor:
        """Features (..., d_sae) of a product, in its dtype."""

    @abstractmethod
    def reference(self, product: Wide, b_enc: Wide) -> Wide:
        """The same of a product (n, d_sae), in fp64 and feature by feature."""

    def settings(self) -> dict[str, float]:
        """Numbers beside the tensors, by field name."""
        return {}

    def tensors(self) -> dict[str, Tensor]:
        """Tensors by field name."""
        return {}

    def checked(self, where: str, d_sae: int) -> Activation:
        """A copy with checked tensors on the CPU.

        Raises:
            SAEError: a tensor of another shape or dtype, with NaN or infinity, or a number that is out of range.
        """
        own: dict[str, Any] = {name: checked_tensor(where, name, t, (d_sae,)) for name, t in self.tensors().items()}
        return replace(self, **own) if own else self


@dataclass(frozen=True, eq=False)
class ReLU(Activation):
    """``f = max(pre, 0)`` with ``pre = product + b_enc`` (Bricken et al. 2023)."""

    kind: ClassVar[str] = "relu"

    def features(self, product: Tensor, b_enc: Tensor) -> Tensor:
        return (product + b_enc).relu()

    def reference(self, product: Wide, b_enc: Wide) -> Wide:
        return np.array([[v if v > 0 or math.isnan(v) else 0.0 for v in row + b_enc] for row in product])


@dataclass(frozen=True, eq=False)
class JumpReLU(Activation):
    """``f = max(pre, 0) where pre > threshold, else 0`` (Rajamanoharan et al. 2024, JumpReLU).

    A threshold below 0 acts as 0, since no feature is negative.

    Attributes:
        threshold: of each feature (d_sae,).
    """

    threshold: Tensor
    kind: ClassVar[str] = "jumprelu"

    def features(self, product: Tensor, b_enc: Tensor) -> Tensor:
        pre = product + b_enc
        return _kept(pre, pre > self.threshold.to(pre.dtype))

    def reference(self, product: Wide, b_enc: Wide) -> Wide:
        limit = self.threshold.double().numpy()
        return np.array([[_jump(v, t) for v, t in zip(row + b_enc, limit, strict=True)] for row in product])

    def tensors(self) -> dict[str, Tensor]:
        return {"threshold": self.threshold}


def _jump(value: float, threshold: float) -> float:
    if math.isnan(value):
        return value
    return value if value > threshold and value > 0 else 0.0


@dataclass(frozen=True, eq=False)
class TopK(Activation):
    """``f = max(pre, 0)`` of the k largest pre-activations of a token, 0 elsewhere (Gao et al. 2024).

    The k are chosen among all features; of equal ones the lowest index is taken first.
    """

    k: int
    kind: ClassVar[str] = "topk"

    def features(self, product: Tensor, b_enc: Tensor) -> Tensor:
        pre = product + b_enc
        return _kept(pre, top_mask(pre, self.k))

    def reference(self, product: Wide, b_enc: Wide) -> Wide:
        return np.array([_largest(row + b_enc, self.k) for row in product])

    def settings(self) -> dict[str, float]:
        return {"k": self.k}

    def checked(self, where: str, d_sae: int) -> Activation:
        if not 1 <= whole(where, "k", self.k) <= d_sae:
            raise SAEError(f"{where}: k is {self.k} of {d_sae} features; give a number from 1 to {d_sae}")
        return self


def _largest(values: Wide, k: int) -> list[float]:
    """The k largest that are positive, by sorting."""
    order = sorted((i for i, v in enumerate(values) if not math.isnan(v)), key=lambda i: (-values[i], i))
    kept = {i for i in order[:k] if values[i] > 0}
    return [v if i in kept or math.isnan(v) else 0.0 for i, v in enumerate(values)]


@dataclass(frozen=True, eq=False)
class BatchTopK(Activation):
    """TopK over a batch (Bussmann et al. 2024): with a threshold, as at inference, or the ``k n`` largest of n tokens.

    Releases carry the threshold that training estimated, and with it ``f = max(pre, 0) where pre > threshold``: the
    features of a token are its own. Without one the ``int(k n)`` largest of the whole call are kept, of equal ones the
    lowest (token, feature) first, and a token's features depend on its batch.
    """

    k: float
    threshold: float | None = None
    kind: ClassVar[str] = "batch_topk"

    @property
    def batch_dependent(self) -> bool:
        return self.threshold is None

    def features(self, product: Tensor, b_enc: Tensor) -> Tensor:
        pre = product + b_enc
        if self.threshold is not None:
            return _kept(pre, pre > self.threshold)
        flat = pre.flatten()
        count = int(self.k * (flat.numel() // pre.size(-1)))
        chosen = top_mask(flat, count) if count else torch.zeros_like(flat, dtype=torch.bool)
        return _kept(pre, chosen.view(pre.shape))

    def reference(self, product: Wide, b_enc: Wide) -> Wide:
        pre = product + b_enc
        if self.threshold is not None:
            limit = self.threshold
            return np.array([[_jump(v, limit) for v in row] for row in pre])
        return np.array(_largest(pre.ravel(), int(self.k * len(pre)))).reshape(pre.shape)

    def settings(self) -> dict[str, float]:
        return {"k": self.k} if self.threshold is None else {"k": self.k, "threshold": self.threshold}

    def checked(self, where: str, d_sae: int) -> Activation:
        if not 0 < self.k <= d_sae:
            raise SAEError(f"{where}: k is {self.k} of {d_sae} features; give a number above 0 and up to {d_sae}")
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise SAEError(f"{where}: the threshold is {self.threshold}; give a finite number from 0 on, or None")
        return self


@dataclass(frozen=True, eq=False)
class Gated(Activation):
    """``f = max(exp(r_mag) product + b_mag, 0) where product + b_gate > 0, else 0`` (Rajamanoharan et al. 2024, gated).

    ``b_gate`` is the autoencoder's ``b_enc``.

    Attributes:
        r_mag, b_mag: log scale and bias of the magnitudes (d_sae,).
    """

    r_mag: Tensor
    b_mag: Tensor
    kind: ClassVar[str] = "gated"

    def features(self, product: Tensor, b_enc: Tensor) -> Tensor:
        magnitude = self.r_mag.to(product.dtype).exp() * product + self.b_mag.to(product.dtype)
        return _kept(magnitude, product + b_enc > 0)

    def reference(self, product: Wide, b_enc: Wide) -> Wide:
        scale, bias = self.r_mag.double().numpy(), self.b_mag.double().numpy()
        found = np.zeros_like(product)
        for row, feature in np.ndindex(*product.shape):
            value = product[row, feature]
            magnitude = math.exp(scale[feature]) * value + bias[feature]
            opened = value + b_enc[feature] > 0
            found[row, feature] = magnitude if math.isnan(value) or (opened and magnitude > 0) else 0.0
        return found

    def tensors(self) -> dict[str, Tensor]:
        return {"r_mag": self.r_mag, "b_mag": self.b_mag}


KINDS: dict[str, type[Activation]] = {cls.kind: cls for cls in (ReLU, JumpReLU, TopK, BatchTopK, Gated)}
