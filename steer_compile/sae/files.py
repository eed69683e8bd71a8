"""Reading and writing autoencoders: the layout of a folder or file is told from the files that are there."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from steer_compile.errors import SAEError
from steer_compile.runtime.vectors import SiteKey, site_key
from steer_compile.sae.layouts import (
    dictionary_learning,
    gemma_scope,
    llama_scope,
    manifest,
    qwen_scope,
    sae_lens,
    sparsify,
)
from steer_compile.sae.layouts.base import Layout, Wanted
from steer_compile.sae.layouts.manifest import save
from steer_compile.sae.model import SAE

__all__ = ["LAYOUTS", "load", "load_all", "save"]

LAYOUTS: tuple[Layout, ...] = (
    manifest.LAYOUT,
    sae_lens.LAYOUT,
    gemma_scope.FIRST,
    gemma_scope.SECOND,
    llama_scope.LAYOUT,
    dictionary_learning.LAYOUT,
    sparsify.LAYOUT,
    qwen_scope.LAYOUT,
)


def load(
    path: str | Path,
    name: str | None = None,
    site: SiteKey | str | None = None,
    width: int | None = None,
    allow_pt: bool = False,
    norm_factor: float | None = None,
    k: int | None = None,
    ignore: Collection[str] = (),
) -> SAE:
    """An autoencoder of a folder or file in one of the `LAYOUTS`.

    Args:
        path: the folder, or its file of tensors where the folder holds several.
        name: which one of a manifest; for the other layouts the name that it gets, in place of its folder's.
        site: hook and layer, for files that do not say, or that name a hook which is none here.
        width: the model's, which it must have.
        allow_pt: read PyTorch files, which are pickles, with the weights-only loader. They are refused otherwise.
        norm_factor: for SAELens' ``expected_average_only_in``: ``sqrt(d_model)`` by the average norm, which is not in
            the file.
        k: of Qwen-Scope, where no folder says it; for other layouts, what it has to be.
        ignore: configuration keys and tensors that change nothing and may be left out.

    Raises:
        SAEError: no layout or several, a missing, truncated or changed file, a tensor that is missing, of the wrong
            shape, or with NaN or infinity, another width, an activation, normalisation or key that is not known.
        SpecError: ``site`` is none.
    """
    own = None if site is None else site_key(site)
    wanted = Wanted(name, own, width, allow_pt, norm_factor, k, _names(ignore))
    layout, file, folder = detect(Path(path))
    sae = layout.read(file, folder, wanted)
    has = {**sae.activation.settings(), **_factor(sae)}
    for key, value in (("k", k), ("norm_factor", norm_factor)):
        if value is not None and has.get(key) != value:
            found = f"has {key}={has[key]}" if key in has else f"takes no {key}"
            raise SAEError(f"{file} {found}, and {value} was asked for; leave out {key}=...")
    return sae


def _factor(sae: SAE) -> dict[str, float]:
    settings = sae.normalisation.settings()
    return {"norm_factor": settings["factor"]} if "factor" in settings else {}


def load_all(path: str | Path, width: int | None = None) -> dict[str, SAE]:
    """All autoencoders of a manifest, by name and in its order.

    Args:
        path: the manifest or its folder.
        width: the model's, which each must have.

    Raises:
        SAEError: it is no manifest, or one of them cannot be read; see `load`.
    """
    layout, file, folder = detect(Path(path))
    if layout is not manifest.LAYOUT:
        raise SAEError(f"{path} is laid out as {layout}, which holds one autoencoder; call load(path)")
    wanted = Wanted(width=width)
    return {name: layout.read(file, folder, replace(wanted, name=name)) for name in manifest.names(file)}


def _names(ignore: Collection[str]) -> frozenset[str]:
    if isinstance(ignore, str):
        raise SAEError(f"ignore is the text {ignore!r}; give a list of keys")
    return frozenset(ignore)


def detect(path: Path) -> tuple[Layout, Path, Path]:
    """Layout, file of tensors and folder of a path.

    Raises:
        SAEError: nothing is there, or nothing in a known layout, or several things.
    """
    if not path.exists():
        raise SAEError(f"{path} is not there; give a folder or file of an autoencoder")
    folders = [path] if path.is_dir() else [path.parent, path.parent.parent]  # checkpoints/ has its keys above
    found = [
        (layout, file, folder)
        for folder in folders
        for layout in LAYOUTS
        for file in layout.found(folder)
        if path.is_dir() or file == path
    ]
    if not found:
        have = sorted(item.name for item in folders[0].iterdir())[:12]
        known = "; ".join(map(str, LAYOUTS))
        raise SAEError(f"{path} is in no known layout: the folder has {', '.join(have) or 'nothing'}; known: {known}")
    if len(found) > 1:
        said = ", ".join(f"{file.name} as {layout.name}" for layout, file, _ in found)
        raise SAEError(
            f"{path} can be read in {len(found)} ways: {said}; give the path of one file, alone in its layout"
        )
    return found[0]
