"""Autoencoders as kernels read them: rows of their matrices, and a line of settings for each feature.

What is done to a row before the encoder goes into the settings (`kernels/sae_delta.py`), in fp64 and rounded once, so
that the matrices stay those of the file: a bias that is taken off moves the encoder's bias, a factor is a number of its
own, and layer norm needs the sum of the encoder's weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steer_compile.errors import SAEError
from steer_compile.sae.activation import BatchTopK, Gated, JumpReLU
from steer_compile.sae.model import SAE
from steer_compile.sae.normalise import FactorNorm, LayerNorm


def encoder_rows(sae: SAE, index: Tensor) -> Tensor:
    """Encoder weights (c, d_model) of features ``index`` (c,), in the dtype of the file."""
    return sae.W_enc[:, index].T.contiguous()


def decoder_rows(sae: SAE, index: Tensor) -> Tensor:
    """Decoder weights (c, d_model) of features ``index`` (c,), in the dtype of the file."""
    return sae.W_dec[index]


def feature_settings(sae: SAE, index: Tensor) -> Tensor:
    """Settings (c, 8) fp32 of features ``index`` (c,).

    Features of TopK have no limit of their own: theirs is 0, and the choice of the largest comes on top.

    Raises:
        SAEError: features that depend on the batch.
    """
    activation, norm = sae.activation, sae.normalisation
    if activation.batch_dependent:
        raise SAEError(f"{sae.source or sae.name}: its features depend on the batch; give BatchTopK(k, threshold=...)")
    columns = sae.W_enc[:, index].double()
    bias = sae.b_enc[index].double()
    shift = sae.b_dec.double() @ columns if sae.subtract_b_dec else torch.zeros_like(bias)
    scale, magnitude = torch.ones_like(bias), bias - shift
    opening = bias - shift
    if isinstance(activation, Gated):
        scale = activation.r_mag[index].double().exp()
        magnitude = activation.b_mag[index].double() - scale * shift
    threshold = torch.zeros_like(bias)
    if isinstance(activation, JumpReLU):
        threshold = activation.threshold[index].double().clamp(min=0)
    elif isinstance(activation, BatchTopK):
        threshold += activation.threshold or 0.0
    factor = norm.factor if isinstance(norm, FactorNorm) else 1.0
    eps = norm.eps if isinstance(norm, LayerNorm) else -1.0
    ones = torch.ones_like(bias)
    lines = (opening, threshold, scale, magnitude, factor * ones, columns.sum(0), eps * ones, ones / factor)
    return torch.stack(lines, -1).float()
