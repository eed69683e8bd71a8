"""Qwen-Scope: ``layer{n}.sae.pt``, TopK with both matrices transposed; k is in the release's name (``...-L0_50``)."""

from __future__ import annotations

import re
from pathlib import Path

from steer_compile.errors import SAEError
from steer_compile.sae.activation import TopK
from steer_compile.sae.layouts.base import Layout, Wanted, check_size, file_site, read_pt
from steer_compile.sae.model import SAE

_FILE = re.compile(r"layer(\d{1,9})\.sae\.pt")
_RELEASE = re.compile(r"SAE-Res-.*-L0_(\d{1,6})")


def _read(path: Path, folder: Path, wanted: Wanted) -> SAE:
    release = next((found for part in reversed(path.absolute().parts[:-1]) if (found := _RELEASE.search(part))), None)
    k = int(release[1]) if release else wanted.k
    if k is None or wanted.k not in (None, k):
        said = "no folder is named like SAE-Res-...-L0_50" if k is None else f"its folder says k={k}, not {wanted.k}"
        raise SAEError(f"{path}: k is not in the file, and {said}; give k=... as the release says")
    tensors = read_pt(path, wanted)
    w_enc = tensors.matrix("W_enc", transposed=True)
    width, count = w_enc.shape
    check_size(path, w_enc, wanted)
    w_dec = tensors.take("W_dec", (width, count), transposed=True)
    b_enc, b_dec = tensors.take("b_enc", (count,)), tensors.take("b_dec", (width,))
    tensors.done(wanted.ignore)
    layer = _FILE.fullmatch(path.name)
    site = file_site(path, f"layers.{layer[1]}.post_block" if layer and release else "", wanted)
    return SAE(
        W_enc=w_enc, b_enc=b_enc, W_dec=w_dec, b_dec=b_dec, activation=TopK(k),
        site=site, name=wanted.name or path.name.removesuffix(".sae.pt"), source=str(path),
    )  # fmt: skip


LAYOUT = Layout("Qwen-Scope", ("layer*.sae.pt",), "", _read)
