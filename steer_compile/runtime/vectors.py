"""Vectors by site, checked once, and the request configurations made of them."""

from __future__ import annotations

import hashlib
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from steer_compile.errors import SpecError, VectorError
from steer_compile.hooks import MULTI_STREAM_HOOKS, parse_hook, parse_site

SiteKey: TypeAlias = tuple[str, int]
PHASES = ("prefill", "decode")
_LAYER = re.compile(r"-?[0-9]{1,9}")
_LARGEST = torch.finfo(torch.float32).max


Block: TypeAlias = tuple[tuple[SiteKey, ...], torch.Tensor]


@dataclass(frozen=True)
class VectorSet:
    """Vectors by (hook, layer), fp32 on the CPU, with the digest of their content. Build with `vector_set`.

    Attributes:
        blocks: sites and their vectors ``(sites, H)``, one block for each width.
    """

    blocks: tuple[Block, ...] = ()
    digest: str = ""

    def __bool__(self) -> bool:
        return bool(self.blocks)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorSet) and self.digest == other.digest

    def items(self) -> Iterable[tuple[SiteKey, torch.Tensor]]:
        for sites, block in self.blocks:
            yield from zip(sites, block.unbind(), strict=True)


def vector_set(source: object) -> VectorSet:
    """Check vectors and put them into one form.

    Args:
        source: ``{hook: {layer: vector}}``, ``{(hook, layer): vector}`` or ``{"layers.3.post_block": vector}``;
            a vector is a 1-D floating tensor, array or list, of parallel streams also (streams, H). None is the empty
            set.

    Raises:
        VectorError: a vector that is not one-dimensional, not floating, or holds NaN or infinity.
        SpecError: an unknown hook or site name, or a layer that is no number.
    """
    if source is None or isinstance(source, VectorSet):
        return source or VectorSet()
    if not isinstance(source, Mapping):
        raise VectorError(f"vectors are given as {type(source).__name__}; give {{hook: {{layer: vector}}}}")
    by_width: dict[int, list[tuple[SiteKey, torch.Tensor]]] = {}
    for key, value in sorted(by_site(source, "vector").items(), key=lambda item: item[0]):
        vector = _one_dimensional(_name(key), value, rows=key[0] in MULTI_STREAM_HOOKS)
        by_width.setdefault(vector.numel(), []).append((key, vector))
    blocks = tuple(_block(pairs) for _, pairs in sorted(by_width.items()))
    digest = hashlib.sha256()
    for sites, block in blocks:
        digest.update(f"{sites}\0{block.size(1)}\0".encode())
        digest.update(block.numpy().data)
    return VectorSet(blocks, digest.hexdigest()[:32] if blocks else "")


def _name(site: SiteKey) -> str:
    return f"the vector of layers.{site[1]}.{site[0]}"


def _block(pairs: Sequence[tuple[SiteKey, torch.Tensor]]) -> Block:
    """Vectors of one width, checked and copied together, as `checked_vector` does with one."""
    with torch.inference_mode(False):
        block = torch.stack([vector.detach().to("cpu", torch.float32) for _, vector in pairs]) + 0.0
    if not np.isfinite(block.numpy()).all():  # on one thread: an engine's others are busy
        bad = next(site for (site, _), row in zip(pairs, block, strict=True) if not bool(torch.isfinite(row).all()))
        raise VectorError(f"{_name(bad)} holds NaN or infinity; fix the vector")
    return tuple(site for site, _ in pairs), block


def by_site(source: Mapping[Any, Any], what: str) -> dict[SiteKey, Any]:
    """Values by site, from any of the forms that `vector_set` takes.

    Raises:
        VectorError: a site has two values. SpecError: an unknown hook or site name, or a layer that is no number.
    """
    found: dict[SiteKey, Any] = {}
    for key, value in _flatten(source):
        if key in found:
            raise VectorError(f"the {what} of layers.{key[1]}.{key[0]} is given twice; give each site once")
        found[key] = value
    return found


def _flatten(source: Mapping[Any, Any]) -> Iterable[tuple[SiteKey, Any]]:
    for key, value in source.items():
        if isinstance(value, Mapping) and not isinstance(key, tuple):
            for layer, item in value.items():
                yield _site(key, layer), item
        else:
            yield site_key(key), value


def site_key(site: object) -> SiteKey:
    """``("post_block", 3)`` of itself or of ``"layers.3.post_block"``.

    Raises:
        SpecError: it names no site.
    """
    return _site(*site) if isinstance(site, tuple) and len(site) == 2 else parse_site(str(site))


def _site(hook: object, layer: object) -> SiteKey:
    if isinstance(layer, bool) or not _LAYER.fullmatch(str(layer)):
        raise SpecError(f"layer {layer!r} of {hook!r} is no layer number; give {{hook: {{layer: vector}}}}")
    return parse_hook(str(hook)), int(str(layer))


def checked_vector(name: str, value: Any, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The checked vector: a copy on the CPU, with 0.0 for -0.0 so that equal vectors have equal bytes.

    Args:
        name: what the error texts call it.
        dtype: dtype of the copy, in which it must be finite.

    Raises:
        VectorError: it is not one-dimensional, not floating, or holds NaN or infinity.
    """
    tensor = _one_dimensional(name, value)
    with torch.inference_mode(False):
        tensor = tensor.detach().to(device="cpu", dtype=dtype, copy=True).contiguous() + 0.0
    if not bool(torch.isfinite(tensor).all()):
        raise VectorError(f"{name} holds NaN or infinity; fix the vector")
    return tensor


def _one_dimensional(name: str, value: Any, rows: bool = False) -> torch.Tensor:
    """The value as a floating vector; ``rows``: it may be the vectors of parallel streams (streams, H)."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        text = f"{name} is a {type(value).__name__} that is no tensor ({error}); give a 1-D tensor"
        raise VectorError(text) from error
    if not tensor.dtype.is_floating_point:
        raise VectorError(f"{name} has dtype {tensor.dtype}; give floating-point numbers")
    if rows and tensor.dim() == 2:
        tensor = tensor.reshape(-1)
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise VectorError(f"{name} has shape {tuple(tensor.shape)}; give one dimension of the site's width")
    return tensor


def scaled(parts: Iterable[tuple[VectorSet, float]]) -> dict[SiteKey, torch.Tensor]:
    """Sum of vector sets times their scales, in fp32."""
    total: dict[SiteKey, torch.Tensor] = {}
    for vectors, scale in parts:
        for sites, block in vectors.blocks:
            for key, term in zip(sites, (block if scale == 1.0 else block * scale).unbind(), strict=True):
                total[key] = total[key] + term if key in total else term
    return total


@dataclass(frozen=True)
class TokenSelection:
    """Which tokens of a request a configuration steers. The default is all of them.

    Attributes:
        spans: half-open spans of prompt positions; negative bounds count from the end of the prompt, None is open.
        last_prompt: the last prompt token.
        generated: every generated token.
    """

    spans: tuple[tuple[int | None, int | None], ...] = ()
    last_prompt: bool = False
    generated: bool = False

    def __post_init__(self) -> None:
        if not (self.spans or self.last_prompt or self.generated):
            raise SpecError("the token selection selects nothing; give spans, last_prompt=True or generated=True")
        object.__setattr__(self, "spans", tuple(_span(span) for span in self.spans))

    def mask(self, first: int, length: int, prompt_length: int) -> npt.NDArray[np.bool_]:
        """Which of ``length`` tokens from position ``first`` on are steered, after a prompt of ``prompt_length``."""
        positions = np.arange(first, first + length)
        chosen = (positions >= prompt_length) & self.generated
        if self.last_prompt:
            chosen |= positions == prompt_length - 1
        for span in self.spans:
            start, stop, _ = slice(*span).indices(prompt_length)
            chosen |= (positions >= start) & (positions < stop)
        return chosen


def _span(span: object) -> tuple[int | None, int | None]:
    if isinstance(span, tuple | list) and len(span) == 2:
        start, stop = span
        if all(bound is None or (isinstance(bound, int) and not isinstance(bound, bool)) for bound in span):
            return start, stop
    raise SpecError(f"{span!r} is no span of prompt positions; give pairs such as (0, 5), (-3, None)")


def named_set(item: object) -> tuple[str, float]:
    """Name and scale of a registered vector set.

    Raises:
        VectorError: it names none.
    """
    if isinstance(item, str):
        return item, 1.0
    if isinstance(item, tuple | list) and len(item) == 2 and isinstance(item[0], str):
        return item[0], finite(item[1])
    raise VectorError(f"{item!r} names no vector set; give a name or a pair (name, scale)")


def finite(value: object, name: str = "scale") -> float:
    """The value as a number that is finite in fp32, the dtype of the tables.

    Raises:
        VectorError: it is no such number.
    """
    number: Any = value
    if isinstance(value, (float, numbers.Real)) and -_LARGEST <= number <= _LARGEST:
        return float(number)
    raise VectorError(f"{name} {value!r} is not finite; give a finite number")
