"""The layout of this package: ``manifest.json`` beside one safetensors file for each autoencoder, all with digests."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from steer_compile.errors import SAEError
from steer_compile.hooks import parse_site
from steer_compile.sae import activation as activations
from steer_compile.sae import normalise
from steer_compile.sae.layouts.base import (
    Config,
    Layout,
    Tensors,
    Wanted,
    check_size,
    file_site,
    read_json,
    read_safetensors,
)
from steer_compile.sae.model import SAE

FORMAT, VERSION = "steer_compile.sae", 1
_CHUNK = 1 << 24


def save(saes: SAE | Sequence[SAE], folder: str | Path) -> Path:
    """Write autoencoders into a new folder, which appears whole or not at all.

    Args:
        saes: one or several, each with a name of its own.
        folder: where; nothing may be there yet.

    Returns:
        The path of the manifest.

    Raises:
        SAEError: nothing to write, a name that is given twice, or something is there already.
        OSError: the disk is full or fails; no folder appears then.
    """
    each, folder = [saes] if isinstance(saes, SAE) else list(saes), Path(folder)
    names = [sae.name for sae in each]
    if not names or len(set(names)) < len(names):
        raise SAEError(f"{folder}: the autoencoders are named {names}; give at least one, and each a name of its own")
    if folder.exists():
        raise SAEError(f"{folder} is there already; take another name or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = folder.parent / f".{folder.name}.{uuid.uuid4().hex}.part"
    part.mkdir()
    try:
        entries = [_written(sae, part, f"{number}.safetensors") for number, sae in enumerate(each)]
        manifest = part / "manifest.json"
        manifest.write_text(json.dumps({"format": FORMAT, "version": VERSION, "saes": entries}, indent=1) + "\n")
        _sync(manifest)
        _sync(part)
        os.rename(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # nothing is there after the rename
    _sync(folder.parent)
    return folder / "manifest.json"


def _written(sae: SAE, folder: Path, file: str) -> dict[str, Any]:
    """Write the tensors of one, and return what the manifest says of it."""
    path = folder / file
    save_file(sae.tensors(), str(path))
    _sync(path)
    size = {"d_model": sae.d_model, "d_sae": sae.d_sae}
    return {"name": sae.name, **size, **sae.header(), "digest": sae.digest, "file": file, "sha256": _sha256(path)}


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def names(path: Path) -> list[str]:
    """Names of the autoencoders of a manifest, in its order.

    Raises:
        SAEError: it is no manifest of this version.
    """
    return [str(entry.get("name", "")) for entry in _entries(path)]


def _entries(path: Path) -> list[Config]:
    config = read_json(path)
    said = (config.get("format"), config.get("version"))
    if said != (FORMAT, VERSION):
        raise SAEError(f"{path} is {said[0]} version {said[1]}, not {FORMAT} version {VERSION}; save it anew")
    entries = config.get("saes")
    config.done((), ())
    if not isinstance(entries, list) or not entries or not all(isinstance(each, dict) for each in entries):
        raise SAEError(f"{path}: 'saes' is {str(entries)[:80]}, not a list of autoencoders; save it anew")
    return [Config(path, entry) for entry in entries]


def _read(path: Path, folder: Path, wanted: Wanted) -> SAE:
    entries = {str(entry.get("name", "")): entry for entry in _entries(path)}
    if wanted.name is None and len(entries) > 1:
        raise SAEError(f"{path} has {len(entries)} autoencoders; give name=... of {', '.join(entries)}, or load_all")
    name = next(iter(entries)) if wanted.name is None else wanted.name
    if name not in entries:
        raise SAEError(f"{path} has no autoencoder {name!r}; it has {', '.join(entries)}")
    return _of_entry(entries[name], name, folder, wanted)


def _of_entry(entry: Config, name: str, folder: Path, wanted: Wanted) -> SAE:
    file = str(entry.get("file", ""))
    if not file or os.path.basename(file) != file:
        raise SAEError(f"{entry.path}: {name!r} has its tensors in {file!r}, which is no file of its folder")
    tensors = _verified(folder / file, str(entry.get("sha256", "")))
    w_enc = tensors.matrix("W_enc")
    width, count = w_enc.shape
    check_size(tensors.path, w_enc, wanted, entry.whole("d_model"), entry.whole("d_sae"))
    own = {"b_enc": (count,), "W_dec": (count, width), "b_dec": (width,)}
    extra = {key: tensors.take(key, (count,)) for key in tensors.found if key not in ("W_enc", *own)}
    activation = _of_kind(entry, "activation", activations.KINDS, extra)
    normalisation = _of_kind(entry, "normalisation", normalise.KINDS, {})
    subtract, digest = entry.flag("subtract_b_dec", False), str(entry.get("digest", ""))
    said = str(entry.get("site", ""))
    site = file_site(entry.path, said, wanted)
    entry.done(("name",), wanted.ignore)
    taken = {key: tensors.take(key, shape) for key, shape in own.items()}
    sae = SAE(
        W_enc=w_enc, **taken, activation=activation, normalisation=normalisation, subtract_b_dec=subtract,
        site=site, name=name, source=str(tensors.path),
    )  # fmt: skip
    if replace(sae, site=parse_site(said) if said else None).digest != digest:  # the caller may have given the site
        raise SAEError(f"{entry.path}: {name!r} has the digest {sae.digest}, not {digest}; the manifest was changed")
    return sae


def _verified(path: Path, expected: str) -> Tensors:
    """The tensors of a file whose digest is as expected."""
    try:
        found = _sha256(path)
    except OSError as error:
        raise SAEError(f"{path} cannot be read ({error}); copy the whole folder") from error
    if found != expected:
        raise SAEError(f"{path} has the sha256 {found}, not {expected}; it was changed or truncated, copy it again")
    return read_safetensors(path)


def _of_kind(entry: Config, key: str, kinds: dict[str, Any], tensors: dict[str, Any]) -> Any:
    """An activation or a normalisation, of its kind, numbers and tensors."""
    settings = dict(entry.part(key).found)
    kind = settings.pop("kind", None)
    if kind not in kinds:
        raise SAEError(f"{entry.path}: the {key} {kind!r} is unknown; known are {', '.join(kinds)}")
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SAEError(f"{entry.path}: {name!r} of the {key} is {value!r}, not a number; save it anew")
    try:
        return kinds[kind](**settings, **tensors)
    except TypeError as error:
        raise SAEError(f"{entry.path}: the {key} {kind!r} does not fit its numbers or tensors ({error})") from error


LAYOUT = Layout("manifest", ("manifest.json",), "", _read)
