"""Gemma Scope: ``params.npz`` (1) and ``params.safetensors`` beside ``config.json`` (2), JumpReLU without pre-bias.

The first release has no configuration, so its site is for the caller to give.
"""

from __future__ import annotations

import re
from pathlib import Path

from steer_compile.errors import SAEError
from steer_compile.runtime.vectors import SiteKey
from steer_compile.sae.activation import JumpReLU
from steer_compile.sae.layouts.base import (
    Layout,
    Tensors,
    Wanted,
    check_size,
    file_site,
    layer_output,
    read_json,
    read_npz,
    read_safetensors,
)
from steer_compile.sae.model import SAE

_HARMLESS = ("model_name", "l0", "hf_repo_id", "release")
_MLP_OUT = re.compile(r"model\.layers\.(\d{1,9})\.post_feedforward_layernorm\.output")


def _sae(tensors: Tensors, wanted: Wanted, site: SiteKey | None, d_sae: int | None, subtract: bool) -> SAE:
    w_enc = tensors.matrix("w_enc")
    width, count = w_enc.shape
    check_size(tensors.path, w_enc, wanted, d_sae=d_sae)
    threshold = tensors.take("threshold", (count,))
    b_enc, b_dec = tensors.take("b_enc", (count,)), tensors.take("b_dec", (width,))
    w_dec = tensors.take("w_dec", (count, width))
    tensors.done(wanted.ignore)
    return SAE(
        W_enc=w_enc, b_enc=b_enc, W_dec=w_dec, b_dec=b_dec, activation=JumpReLU(threshold), subtract_b_dec=subtract,
        site=site, name=wanted.name or tensors.path.parent.name, source=str(tensors.path),
    )  # fmt: skip


def _read_first(path: Path, folder: Path, wanted: Wanted) -> SAE:
    tensors = read_npz(path)
    tensors.ones("scaling_factor")
    return _sae(tensors, wanted, wanted.site, None, False)


def _read_second(path: Path, folder: Path, wanted: Wanted) -> SAE:
    config = read_json(folder / "config.json")
    if config.get("architecture") != "jump_relu":
        raise SAEError(f"{config.path}: 'architecture' is {config.get('architecture')!r}; this layout has 'jump_relu'")
    config.only("type", "sae")
    config.only("affine_connection", False)
    hook = str(config.get("hf_hook_point_in", ""))
    config.only("hf_hook_point_out", hook)  # a transcoder writes elsewhere
    count = config.whole("width") if "width" in config.found else None
    subtract = config.flag("apply_b_dec_to_input", False)
    config.done(_HARMLESS, wanted.ignore)
    mlp = _MLP_OUT.fullmatch(hook)
    own = f"layers.{mlp[1]}.mlp_out" if mlp else layer_output(hook)
    site = file_site(config.path, own or hook, wanted)
    return _sae(read_safetensors(path), wanted, site, count, subtract)


FIRST = Layout("Gemma Scope 1", ("params.npz",), "", _read_first)
SECOND = Layout("Gemma Scope 2", ("params.safetensors",), "config.json", _read_second)
