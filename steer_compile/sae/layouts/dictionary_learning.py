"""dictionary_learning: ``config.json`` beside ``ae.pt``, one class of dictionary in each. Features are as the file has
them: decoder columns are not brought to norm 1."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from steer_compile.errors import SAEError
from steer_compile.sae.activation import Activation, BatchTopK, Gated, JumpReLU, ReLU, TopK
from steer_compile.sae.checks import whole
from steer_compile.sae.layouts.base import Layout, Tensors, Wanted, check_size, file_site, read_json, read_pt
from steer_compile.sae.model import SAE

_RESIDUAL = re.compile(r"(resid_(?:pre|mid|post))_layer_(\d{1,9})")


@dataclass(frozen=True)
class _Class:
    """Where a class of dictionary keeps its parameters.

    Attributes:
        encoder, decoder: matrices, laid out (d_sae, d_model) and (d_model, d_sae) where ``linear`` is set, and the
            other way round otherwise.
        subtract: the decoder's bias is taken off the rows first.
        activation: of the tensors, the number of features, and the k of the configuration.
    """

    b_enc: str
    b_dec: str
    subtract: bool
    activation: Callable[[Tensors, int, Any], Activation]
    encoder: str = "encoder.weight"
    decoder: str = "decoder.weight"
    linear: bool = True


def _relu(tensors: Tensors, count: int, k: Any) -> Activation:
    return ReLU()


def _k(tensors: Tensors, k: Any) -> int:
    """k of the file of tensors, or of the configuration alone, as in the library's first versions.

    Raises:
        SAEError: the two differ, or there is none.
    """
    own = int(tensors.number("k")) if "k" in tensors else k
    if own is None or k not in (None, own):
        raise SAEError(f"{tensors.path}: k is {own}, and {k} in its configuration; they have to be one number")
    return whole(str(tensors.path), "k", own)


def _topk(tensors: Tensors, count: int, k: Any) -> Activation:
    if "threshold" in tensors:
        tensors.number("threshold")  # estimated in training; encoding takes the true k largest
    return TopK(_k(tensors, k))


def _batch_topk(tensors: Tensors, count: int, k: Any) -> Activation:
    threshold = tensors.number("threshold") if "threshold" in tensors else -1.0
    return BatchTopK(_k(tensors, k), threshold if threshold >= 0 else None)  # -1: it was never estimated


def _gated(tensors: Tensors, count: int, k: Any) -> Activation:
    return Gated(tensors.take("r_mag", (count,)), tensors.take("mag_bias", (count,)))


def _jumprelu(tensors: Tensors, count: int, k: Any) -> Activation:
    return JumpReLU(tensors.take("threshold", (count,)))


_CLASSES = {
    "AutoEncoder": _Class("encoder.bias", "bias", True, _relu),
    "AutoEncoderNew": _Class("encoder.bias", "decoder.bias", False, _relu),
    "GatedAutoEncoder": _Class("gate_bias", "decoder_bias", True, _gated),
    "AutoEncoderTopK": _Class("encoder.bias", "b_dec", True, _topk),
    "BatchTopKSAE": _Class("encoder.bias", "b_dec", True, _batch_topk),
    "JumpReluAutoEncoder": _Class("b_enc", "b_dec", False, _jumprelu, "W_enc", "W_dec", linear=False),
}


def _read(path: Path, folder: Path, wanted: Wanted) -> SAE:
    config = read_json(folder / "config.json")
    trainer = config.part("trainer")
    name = trainer.get("dict_class")
    if name not in _CLASSES:
        raise SAEError(f"{config.path}: 'dict_class' is {name!r}; supported are {', '.join(_CLASSES)}")
    kind, tensors = _CLASSES[name], read_pt(path, wanted)
    w_enc = tensors.matrix(kind.encoder, transposed=kind.linear)
    width, count = w_enc.shape
    check_size(path, w_enc, wanted, trainer.whole("activation_dim", width), trainer.whole("dict_size", count))
    shape = (width, count) if kind.linear else (count, width)
    w_dec: Tensor = tensors.take(kind.decoder, shape, transposed=kind.linear)
    b_enc, b_dec = tensors.take(kind.b_enc, (count,)), tensors.take(kind.b_dec, (width,))
    activation = kind.activation(tensors, count, trainer.get("k"))
    tensors.done(wanted.ignore)
    match = _RESIDUAL.fullmatch(str(trainer.get("submodule_name", "")))
    site = file_site(config.path, f"layers.{match[2]}.{match[1]}" if match else "", wanted)
    return SAE(
        W_enc=w_enc, b_enc=b_enc, W_dec=w_dec, b_dec=b_dec, activation=activation, subtract_b_dec=kind.subtract,
        site=site, name=wanted.name or folder.name, source=str(path),
    )  # fmt: skip


LAYOUT = Layout("dictionary_learning", ("ae.pt",), "config.json", _read)
