"""Steering by features, as reference functions: what a compiled graph has to reproduce.

With ``f = encode(h)`` and ``f'`` the clamped features::

 delta             h' = h + step(sum_i (f'_i - f_i) W_dec[i])       over the clamped features alone
 reconstruction    h' = decode(f')                                  the error term h - decode(f) is dropped
                   h' = decode(f') + (h - decode(f))                or kept, and then it equals delta up to rounding

``step`` undoes the scale of the normalisation (`steer_compile.sae.normalise`). The decomposition of a row into features
and an error term is that of Bricken et al. 2023.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer_compile.errors import SAEError
from steer_compile.runtime.vectors import finite
from steer_compile.sae.model import SAE

KINDS = ("set", "add")


@dataclass(frozen=True)
class FeatureClamp:
    """What becomes of one feature.

    Attributes:
        feature: its index.
        value: what it is set to, or what is added to it.
        kind: ``set`` or ``add``.
        only_if_active: only in tokens in which it is above 0.

    Raises:
        SAEError: another kind, or an index that is none. VectorError: a value that is not finite.
    """

    feature: int
    value: float
    kind: str = "set"
    only_if_active: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SAEError(
                f"feature {self.feature} has a clamp of kind {self.kind!r}; the kinds are {', '.join(KINDS)}"
            )
        if isinstance(self.feature, bool) or not isinstance(self.feature, int) or self.feature < 0:
            raise SAEError(f"{self.feature!r} is no feature; give its index, a whole number from 0 on")
        if not isinstance(self.only_if_active, bool):
            raise SAEError(
                f"the clamp of feature {self.feature} has only_if_active={self.only_if_active!r}; give true or false"
            )
        object.__setattr__(self, "value", finite(self.value, f"the clamp of feature {self.feature}"))


def checked_clamps(sae: SAE, clamps: Sequence[FeatureClamp]) -> Tensor:
    """Indices (c,) int64 of the clamped features.

    Raises:
        SAEError: a feature that the autoencoder does not have, one that is clamped twice, or features that depend on
            the batch.
    """
    if sae.activation.batch_dependent:
        raise SAEError(
            f"{sae.name}: its features are the largest of a whole batch, so a token's steering would depend on other "
            "tokens; give BatchTopK(k, threshold=...)"
        )
    seen: set[int] = set()
    for clamp in clamps:
        if clamp.feature >= sae.d_sae:
            raise SAEError(f"{sae.name} has no feature {clamp.feature}; its features are 0 to {sae.d_sae - 1}")
        if clamp.feature in seen:
            raise SAEError(f"{sae.name}: feature {clamp.feature} is clamped twice; give one clamp for each feature")
        seen.add(clamp.feature)
    return torch.tensor([clamp.feature for clamp in clamps], dtype=torch.int64, device=sae.W_enc.device)


def clamped(f: Tensor, clamps: Sequence[FeatureClamp]) -> Tensor:
    """Columns ``f'`` of clamped features, of their columns ``f`` (..., c)."""
    value = torch.tensor([clamp.value for clamp in clamps], dtype=f.dtype, device=f.device)
    add = torch.tensor([clamp.kind == "add" for clamp in clamps], dtype=torch.bool, device=f.device)
    always = torch.tensor([not clamp.only_if_active for clamp in clamps], dtype=torch.bool, device=f.device)
    return torch.where(always | (f > 0), torch.where(add, f + value, value), f)


def steered_delta(h: Tensor, sae: SAE, clamps: Sequence[FeatureClamp]) -> Tensor:
    """Rows with the clamped features moved and everything else kept, the error term included.

    Args:
        h: (..., d_model) of any floating dtype, on the CPU.

    Returns:
        Rows in the dtype of ``h``, computed in fp32 (fp64 for fp64 rows) and rounded once. Rows in which no feature
        changes are those of ``h``, bit by bit.

    Raises:
        SAEError: see `checked_clamps`; rows of another width.
    """
    index, wide = checked_clamps(sae, clamps), sae.rows(h)
    f = sae.encode(h)[..., index]
    moved = clamped(f, clamps) - f
    step = sae.normalisation.step(moved @ sae.W_dec[index].to(moved.dtype), wide)
    return torch.where((moved != 0).any(-1, keepdim=True), (wide + step).to(h.dtype), h)


def steered_reconstruction(
    h: Tensor, sae: SAE, clamps: Sequence[FeatureClamp] = (), keep_error: bool = False
) -> Tensor:
    """Rows decoded from all features, with the clamped ones changed.

    Args:
        h: (..., d_model) of any floating dtype, on the CPU.
        keep_error: add ``h - decode(encode(h))``.

    Returns:
        Rows in the dtype of ``h``, computed in fp32 (fp64 for fp64 rows) and rounded once.

    Raises:
        SAEError: see `checked_clamps`; rows of another width.
    """
    index = checked_clamps(sae, clamps)
    f = sae.encode(h)
    changed = f.clone()
    changed[..., index] = clamped(f[..., index], clamps)
    decoded = sae.decode(changed, h)
    return (decoded + (sae.rows(h) - sae.decode(f, h)) if keep_error else decoded).to(h.dtype)
