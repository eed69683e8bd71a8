"""EleutherAI's sparsify: ``cfg.json`` beside ``sae.safetensors``, TopK with the decoder's bias taken off first."""

from __future__ import annotations

from pathlib import Path

from steer_compile.sae.activation import TopK
from steer_compile.sae.layouts.base import (
    Layout,
    Wanted,
    check_size,
    file_site,
    layer_output,
    read_json,
    read_safetensors,
)
from steer_compile.sae.model import SAE

_HARMLESS = ("expansion_factor", "normalize_decoder", "multi_topk", "encoder_init", "init_b_dec_as_zeros")


def _read(path: Path, folder: Path, wanted: Wanted) -> SAE:
    config, tensors = read_json(folder / "cfg.json"), read_safetensors(path)
    config.only("activation", "topk")
    for key in ("signed", "skip_connection", "transcode"):
        config.only(key, False)
    w_enc = tensors.matrix("encoder.weight", transposed=True)
    width, count = w_enc.shape
    said = config.whole("num_latents", 0) or None  # 0: by the expansion factor
    check_size(path, w_enc, wanted, config.whole("d_in"), said)
    k = config.whole("k")
    b_enc, b_dec = tensors.take("encoder.bias", (count,)), tensors.take("b_dec", (width,))
    w_dec = tensors.take("W_dec", (count, width))
    config.done(_HARMLESS, wanted.ignore)
    tensors.done(wanted.ignore)
    site = file_site(path, layer_output(folder.name), wanted)  # a folder has the name of the module whose output it is
    return SAE(
        W_enc=w_enc, b_enc=b_enc, W_dec=w_dec, b_dec=b_dec, activation=TopK(k), subtract_b_dec=True,
        site=site, name=wanted.name or folder.name, source=str(path),
    )  # fmt: skip


LAYOUT = Layout("sparsify", ("sae.safetensors",), "cfg.json", _read)
