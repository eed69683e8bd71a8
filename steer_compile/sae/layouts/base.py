"""What layouts share: readers of tensors and configurations that account for every key, and the parts of an `SAE`."""

from __future__ import annotations

import json
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from steer_compile.errors import SAEError, SpecError
from steer_compile.hooks import parse_site
from steer_compile.runtime.vectors import SiteKey
from steer_compile.sae.model import SAE


@dataclass(frozen=True)
class Wanted:
    """What the caller of `load` says beside the path; see there."""

    name: str | None = None
    site: SiteKey | None = None
    width: int | None = None
    allow_pt: bool = False
    norm_factor: float | None = None
    k: int | None = None
    ignore: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Layout:
    """A layout of files.

    Attributes:
        weights: patterns, relative to its folder, of the file of tensors.
        beside: the configuration that has to be in the folder, empty where there is none.
        read: reads the file of tensors, with the folder and what the caller wants.
    """

    name: str
    weights: tuple[str, ...]
    beside: str
    read: Callable[[Path, Path, Wanted], SAE]

    def found(self, folder: Path) -> list[Path]:
        """Files of tensors in a folder that are laid out like this."""
        if self.beside and not (folder / self.beside).is_file():
            return []
        return sorted({file for pattern in self.weights for file in folder.glob(pattern) if file.is_file()})

    def __str__(self) -> str:
        return f"{self.name} ({self.weights[0]}{f' + {self.beside}' if self.beside else ''})"


@dataclass
class Tensors:
    """The tensors of a file; each is taken once, and what is left over is an error."""

    path: Path
    found: Mapping[str, Tensor]
    _taken: set[str] = field(default_factory=set)

    def __contains__(self, name: str) -> bool:
        return name in self.found

    def take(self, name: str, shape: tuple[int, ...] | None = None, transposed: bool = False) -> Tensor:
        """A tensor.

        Args:
            shape: what it must be in the file.
            transposed: give it the other way round.

        Raises:
            SAEError: it is missing, has another shape, no floating dtype, or NaN or infinity.
        """
        if name not in self.found:
            have = ", ".join(self.found) or "none"
            raise SAEError(f"{self.path} has no tensor {name!r}; it has {have}; get the whole file or name its layout")
        tensor = self.found[name]
        self._taken.add(name)
        if shape is not None and tuple(tensor.shape) != shape:
            raise SAEError(f"{self.path}: {name} has shape {tuple(tensor.shape)}, not {shape}; the file does not fit")
        if not tensor.dtype.is_floating_point:
            raise SAEError(f"{self.path}: {name} has dtype {tensor.dtype}, not floating-point numbers")
        if not bool(torch.isfinite(tensor).all()):
            raise SAEError(f"{self.path}: {name} holds NaN or infinity; get the file again")
        return tensor.T if transposed else tensor

    def matrix(self, name: str, transposed: bool = False) -> Tensor:
        """A tensor of two dimensions, as `take` gives it."""
        tensor = self.take(name)
        if tensor.dim() != 2:
            raise SAEError(f"{self.path}: {name} has shape {tuple(tensor.shape)}, not two dimensions")
        return tensor.T if transposed else tensor

    def number(self, name: str) -> float:
        """A scalar, of any dtype.

        Raises:
            SAEError: it is missing or has several elements.
        """
        tensor = self.found.get(name)
        if tensor is None or tensor.numel() != 1:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise SAEError(f"{self.path}: {name} is {found}, not one number")
        self._taken.add(name)
        return float(tensor)

    def ones(self, *names: str) -> None:
        """Take scale factors that do nothing; raises `SAEError` for any that does something."""
        for name in names:
            if name in self and not bool((self.found[name] == 1).all()):
                raise SAEError(f"{self.path}: {name} is not 1 everywhere; fold it into W_dec and save the file anew")
            self._taken.add(name)

    def done(self, ignore: Collection[str]) -> None:
        """Raises `SAEError` where tensors are left over that might change the mathematics."""
        rest = sorted(set(self.found) - self._taken - set(ignore))
        if rest:
            raise SAEError(
                f"{self.path} has tensors whose meaning is unknown: {', '.join(rest)}; "
                f"expected are {', '.join(sorted(self._taken))}; give ignore=[...] to leave them out"
            )


@dataclass
class Config:
    """The keys of a JSON file; each is taken once, and what is left over is an error."""

    path: Path
    found: Mapping[str, Any]
    _taken: set[str] = field(default_factory=set)

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key, ``default`` where it is missing or null."""
        self._taken.add(key)
        value = self.found.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number; raises `SAEError` for another value, or where it is missing without a default."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise SAEError(f"{self.path}: {key!r} is {value!r}, not a whole number; correct the file")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; raises `SAEError` for another value, or where it is missing without a default."""
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SAEError(f"{self.path}: {key!r} is {value!r}, not a number; correct the file")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A truth value; raises `SAEError` for another value."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise SAEError(f"{self.path}: {key!r} is {value!r}, not true or false; correct the file")
        return value

    def only(self, key: str, *allowed: object) -> None:
        """Raises `SAEError` where a key is there with a value that asks for other mathematics."""
        value = self.get(key)
        if value is not None and value not in allowed:
            said = ", ".join([*map(repr, allowed), "null or no such key"])
            raise SAEError(f"{self.path}: {key!r} is {value!r}, which is not supported; supported: {said}")

    def part(self, key: str) -> Config:
        """A mapping inside; empty where it is missing."""
        value = self.get(key, {})
        if not isinstance(value, dict):
            raise SAEError(f"{self.path}: {key!r} is {value!r}, not a mapping; correct the file")
        return Config(self.path, value)

    def done(self, harmless: Collection[str], ignore: Collection[str]) -> None:
        """Raises `SAEError` where keys are left over that might change the mathematics."""
        rest = sorted(set(self.found) - self._taken - set(harmless) - set(ignore))
        if rest:
            said = ", ".join(f"{key}={self.found[key]!r}" for key in rest)
            raise SAEError(
                f"{self.path} has keys whose meaning is unknown: {said[:400]}; "
                "give ignore=[...] to leave out those that change nothing"
            )


def read_json(path: Path) -> Config:
    """A JSON file of one mapping.

    Raises:
        SAEError: it is missing, or something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SAEError(f"{path} cannot be read as JSON ({error}); get the file again") from error
    if not isinstance(found, dict):
        raise SAEError(f"{path} holds a {type(found).__name__}, not a mapping; it is no configuration of this layout")
    return Config(path, found)


def read_safetensors(path: Path) -> Tensors:
    """The tensors of a safetensors file.

    Raises:
        SAEError: it is missing, truncated or none.
    """
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            return Tensors(path, {name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SAEError(f"{path} cannot be read as safetensors, it is truncated or another format ({error})") from error


def read_npz(path: Path) -> Tensors:
    """The arrays of an npz file; pickled objects are refused.

    Raises:
        SAEError: it is missing, truncated, pickled or none.
    """
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:  # np.load leaves a bad file open
            return Tensors(path, {name: torch.from_numpy(np.ascontiguousarray(file[name])) for name in file.files})
    except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise SAEError(f"{path} cannot be read as npz, it is truncated, pickled or another format ({error})") from error


def read_pt(path: Path, wanted: Wanted) -> Tensors:
    """The tensors of a PyTorch file, without running what it may carry.

    Raises:
        SAEError: it is not allowed, missing, truncated, or holds something else than a mapping of tensors.
    """
    if not wanted.allow_pt:
        raise SAEError(
            f"{path} is a pickle, which can run code when it is read; give allow_pt=True to read it with PyTorch's "
            "weights-only loader, or save it as safetensors"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise SAEError(f"{path} cannot be read as a PyTorch file of weights ({str(error)[:300]})") from error
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise SAEError(f"{path} holds {type(found).__name__} with other things than tensors; give a state dict")
    return Tensors(path, {str(name): value.detach() for name, value in found.items()})


def check_size(path: Path, w_enc: Tensor, wanted: Wanted, d_model: int | None = None, d_sae: int | None = None) -> None:
    """Compare the encoder (d_model, d_sae) with what the configuration and the caller say.

    Raises:
        SAEError: another width or number of features.
    """
    width, count = w_enc.shape
    if wanted.width is not None and width != wanted.width:
        raise SAEError(f"{path}: W_enc takes rows of width {width}, not {wanted.width}; it belongs to another model")
    if d_model not in (None, width):
        raise SAEError(f"{path}: W_enc takes rows of width {width}, the configuration says {d_model}")
    if d_sae not in (None, count):
        raise SAEError(f"{path}: W_enc has {count} features, the configuration says {d_sae}")


def file_site(path: Path, text: str, wanted: Wanted) -> SiteKey | None:
    """The site that a file names, as TransformerLens or this package writes it; the caller's where it names none.

    Raises:
        SAEError: it is no site of this package and the caller gives none, or the caller gives another.
    """
    if not text:
        return wanted.site
    try:
        own = parse_site(text)
    except SpecError as error:
        if wanted.site is not None:
            return wanted.site
        raise SAEError(
            f"{path}: its hook {text!r} is no hook point here ({error}); give site=(hook, layer) if it is one of them"
        ) from error
    if wanted.site not in (None, own):
        raise SAEError(f"{path} belongs to layers.{own[1]}.{own[0]}, not to {wanted.site!r}; leave out site=...")
    return own


def layer_output(text: str) -> str:
    """``layers.3.post_block`` of Hugging Face's ``model.layers.3``; empty for anything else."""
    match = re.fullmatch(r"(?:model\.)?layers\.(\d{1,9})(?:\.output)?", text)
    return f"layers.{match[1]}.post_block" if match else ""


def unit_decoder(path: Path, w_enc: Tensor, b_enc: Tensor, w_dec: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same autoencoder with decoder rows of norm 1, in fp32: features are multiplied by the former norms.

    Raises:
        SAEError: a decoder row is zero.
    """
    norm = w_dec.float().norm(dim=1)
    if not bool((norm > 0).all()):
        raise SAEError(f"{path}: row {int((norm == 0).nonzero()[0])} of the decoder is zero; its norm divides features")
    return w_enc.float() * norm, b_enc.float() * norm, w_dec.float() / norm[:, None]
