"""SAE delta: chosen features of a sparse autoencoder are clamped, and the value moves by what they changed.

For token t with row r and feature slot c, on the value x that the edits in front have left::

    p      = x . E[c]
    a      = (p - mean(x) wsum[c]) / (std(x) + eps[c])     where the autoencoder normalises rows (eps >= 0)
             factor[c] p                                   elsewhere
    f      = max(scale[c] a + magnitude[c], 0) where a + bias[c] > threshold[c], else 0
    f'     = value[r, c]  (set)   or   f + value[r, c]  (add)
    x'     = x + strength * sum_c (f' - f) step[c] D[c]    step = std(x) with a norm of rows, else its own number

A feature's code says what its clamp does: 0 nothing, 1 set, 2 add, 3 and 4 the same where ``f > 0`` only. A NaN product
is a NaN feature. Values without a code keep their bits. The error term ``x - decode(encode(x))`` is kept by
construction. Encoders without a limit of their own for each feature (TopK) are those of `kernels/sae_full.py`.

Formulas of the encoders: Bricken et al. 2023 (ReLU), Rajamanoharan et al. 2024 (JumpReLU, gated); of the clamp:
Templeton et al. 2024, with the error term kept.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SETTINGS = ("bias", "threshold", "scale", "magnitude", "factor", "wsum", "eps", "step")
"""Columns of a feature's line: bias and limit of what opens it; scale and bias of its magnitude; factor of the product,
or sum of the encoder's weights and eps (-1: none) where rows are normalised; step of the decoder."""
NO_FEATURE = (0.0, torch.inf, 1.0, 0.0, 1.0, 0.0, -1.0, 1.0)
"""Settings of a slot without a feature."""
SET, ADD, SET_ACTIVE, ADD_ACTIVE = 1, 2, 3, 4
"""Codes of clamps."""


class SaeArgs(NamedTuple):
    """Features of one site. C slots, R rows, width H."""

    features: Tensor
    """Encoder rows, then decoder rows (2C, H)."""
    settings: Tensor
    """(C, 8) fp32, see `SETTINGS`."""
    clamps: Tensor
    """Codes, then values (R, 2C) fp32."""
    rows: Tensor
    """Row of each token (...), integer."""


def sae_delta(x: Tensor, args: SaeArgs, strength: Tensor | None = None) -> Tensor:
    """Move values by their clamped features.

    Args:
        x: (..., H) of the dtype of the arithmetic (fp32 or fp64).
        strength: factor of each token (...), None for 1.

    Returns:
        Tensor like ``x``; tokens without a code, or with a factor of 0, keep their bits.
    """
    slots = args.settings.size(0)
    encoder, decoder = args.features.to(x.dtype).split(slots)
    codes, values = args.clamps[args.rows].to(x.dtype).split(slots, -1)
    settings = args.settings.to(x.dtype)
    mean, std = moments(x)
    normed = settings[:, 6] >= 0
    a = activations_in(x @ encoder.T, mean, std, settings)
    f = features_of(a, settings)
    there = (codes > 0) & ((codes < SET_ACTIVE) | (f > 0))
    changed = torch.where((codes == ADD) | (codes == ADD_ACTIVE), f + values, values)
    steps = (changed - f) * torch.where(normed, std, settings[:, 7])
    moved = torch.where(there, steps, torch.zeros_like(steps))  # no number: it has no form where the graph is traced
    acts = (codes > 0).any(-1, keepdim=True)
    if strength is not None:
        moved, acts = moved * strength.unsqueeze(-1), acts & (strength.unsqueeze(-1) != 0)
    return torch.where(acts, x + moved @ decoder, x)


def sae_delta_fp64(x: Tensor, args: SaeArgs, strength: Tensor | None = None) -> Tensor:
    """`sae_delta` in fp64."""
    return sae_delta(x.double(), args, None if strength is None else strength.double())


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased deviation (..., 1) of rows."""
    mean = x.mean(-1, keepdim=True)
    return mean, ((x - mean).square().sum(-1, keepdim=True) / (x.size(-1) - 1)).sqrt()


def activations_in(product: Tensor, mean: Tensor, std: Tensor, settings: Tensor) -> Tensor:
    """Products (..., C) as the encoder has them, behind its norm of rows."""
    normed = settings[:, 6] >= 0
    return torch.where(normed, (product - mean * settings[:, 5]) / (std + settings[:, 6]), product * settings[:, 4])


def features_of(a: Tensor, settings: Tensor) -> Tensor:
    """Features (..., C) of products ``a`` by their own limits."""
    magnitude = (settings[:, 2] * a + settings[:, 3]).relu()
    opened = torch.where(a + settings[:, 0] > settings[:, 1], magnitude, torch.zeros_like(magnitude))
    return torch.where(a.isnan(), a, opened)
