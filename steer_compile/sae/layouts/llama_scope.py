"""Llama Scope: ``hyperparams.json`` beside ``checkpoints/final.safetensors``, as its training library reads it.

The order matters: parameters are brought to the scale of the model's rows first, then decoder rows to norm 1, and the
one threshold compares the pre-activations of the result.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from steer_compile.errors import SAEError
from steer_compile.sae.activation import Activation, JumpReLU, ReLU, TopK
from steer_compile.sae.layouts.base import (
    Config,
    Layout,
    Wanted,
    check_size,
    file_site,
    read_json,
    read_safetensors,
    unit_decoder,
)
from steer_compile.sae.model import SAE

_HARMLESS = frozenset(
    """device dtype seed expansion_factor bias_init_method decoder_exactly_fixed_norm init_decoder_norm
    init_encoder_norm init_encoder_with_decoder_transpose init_encoder_with_decoder_transpose_factor lp l1_coefficient
    l1_coefficient_warmup_steps k_warmup_steps use_batch_norm_mse use_ghost_grads tp_size ddp_size
    sae_pretrained_name_or_path strict_loading exp_name exp_series exp_result_path force_unit_decoder_norm version
    sparsity_threshold_for_triton_spmm_kernel use_triton_kernel""".split()
)
_NORMS = ("dataset-wise", "inference")


def _read(path: Path, folder: Path, wanted: Wanted) -> SAE:
    config = read_json(folder / "hyperparams.json")
    config.only("use_glu_encoder", False)
    hook = str(config.get("hook_point_in", ""))
    config.only("hook_point_out", hook)  # a transcoder writes elsewhere
    config.only("sae_type", "sae")
    tensors = read_safetensors(path)
    w_enc = tensors.matrix("encoder.weight", transposed=True)
    width, count = w_enc.shape
    check_size(path, w_enc, wanted, config.whole("d_model"), config.whole("d_sae"))
    b_enc = tensors.take("encoder.bias", (count,))
    w_dec = tensors.take("decoder.weight", (width, count), transposed=True)
    biased = config.flag("use_decoder_bias", True)
    b_dec = tensors.take("decoder.bias", (width,)) if biased else b_enc.new_zeros(width)
    factor_in, factor_out = _factors(config, width)
    if factor_in != 1.0 or factor_out != 1.0:
        b_enc, b_dec = b_enc.float() / factor_in, b_dec.float() / factor_out
        w_dec = w_dec.float() * (factor_in / factor_out)
    if config.flag("sparsity_include_decoder_norm", True):
        w_enc, b_enc, w_dec = unit_decoder(path, w_enc, b_enc, w_dec)
    activation = _activation(config, count)
    subtract = config.flag("apply_decoder_bias_to_pre_encoder", True) and biased
    config.done(_HARMLESS, wanted.ignore)
    tensors.done(
        {*wanted.ignore, *(key for key in tensors.found if key.startswith("dataset_average_activation_norm."))}
    )
    return SAE(
        W_enc=w_enc, b_enc=b_enc, W_dec=w_dec, b_dec=b_dec, activation=activation, subtract_b_dec=subtract,
        site=file_site(config.path, hook, wanted), name=wanted.name or folder.name, source=str(path),
    )  # fmt: skip


def _factors(config: Config, width: int) -> tuple[float, float]:
    """What brings rows at the input and at the output to an average norm of ``sqrt(d_model)``."""
    kind = config.get("norm_activation")
    if kind not in _NORMS:
        raise SAEError(f"{config.path}: 'norm_activation' is {kind!r}; supported are {', '.join(map(repr, _NORMS))}")
    norms = config.part("dataset_average_activation_norm")
    if kind == "inference":
        return 1.0, 1.0
    average = [norms.number(side) for side in ("in", "out")]
    if min(average) <= 0 or not math.isfinite(sum(average)):
        raise SAEError(f"{config.path}: 'dataset_average_activation_norm' is {average}; give finite numbers above 0")
    return math.sqrt(width) / average[0], math.sqrt(width) / average[1]


def _activation(config: Config, d_sae: int) -> Activation:
    kind, k = config.get("act_fn"), config.get("top_k")
    threshold = config.number("jump_relu_threshold", 0.0)
    if threshold < 0:
        raise SAEError(f"{config.path}: 'jump_relu_threshold' is {threshold}; negative features are not supported")
    per_feature: Tensor = torch.full((d_sae,), threshold, dtype=torch.float32, device="cpu")
    if kind == "jumprelu" or (kind == "topk" and threshold > 0):  # a threshold was fitted: tokens are independent
        return JumpReLU(per_feature)
    if kind == "topk":
        return TopK(k)
    if kind == "relu":
        return ReLU()
    raise SAEError(f"{config.path}: 'act_fn' is {kind!r}; supported are 'jumprelu', 'topk' and 'relu'")


LAYOUT = Layout(
    "Llama Scope",
    ("checkpoints/final.safetensors", "final.safetensors", "sae_weights.safetensors"),
    "hyperparams.json",
    _read,
)
