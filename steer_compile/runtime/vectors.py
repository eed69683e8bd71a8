"""Vectors by site, checked once, and the request configurations made of them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from steer_compile.errors import SpecError, VectorError
from steer_compile.hooks import parse_hook, parse_site

SiteKey = tuple[str, int]
PHASES = ("prefill", "decode")


@dataclass(frozen=True)
class VectorSet:
    """Vectors by (hook, layer), fp32 on the CPU, with the digest of their content. Build with `vector_set`."""

    vectors: tuple[tuple[SiteKey, torch.Tensor], ...] = ()
    digest: str = ""

    def __bool__(self) -> bool:
        return bool(self.vectors)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorSet) and self.digest == other.digest

    def items(self) -> Iterable[tuple[SiteKey, torch.Tensor]]:
        return self.vectors


def vector_set(source: object) -> VectorSet:
    """Check vectors and put them into one form.

    Args:
        source: ``{hook: {layer: vector}}``, ``{(hook, layer): vector}`` or ``{"layers.3.post_block": vector}``;
            a vector is a 1-D floating tensor, array or list. None is the empty set.

    Raises:
        VectorError: a vector that is not one-dimensional, not floating, or holds NaN or infinity.
        SpecError: an unknown hook or site name.
    """
    if source is None or isinstance(source, VectorSet):
        return source or VectorSet()
    if not isinstance(source, Mapping):
        raise VectorError(f"vectors are given as {type(source).__name__}; give {{hook: {{layer: vector}}}}")
    checked: dict[SiteKey, torch.Tensor] = {}
    for key, value in _flatten(source):
        if key in checked:
            raise VectorError(f"the vector of layers.{key[1]}.{key[0]} is given twice")
        checked[key] = _vector(key, value)
    ordered = tuple(sorted(checked.items(), key=lambda item: item[0]))
    digest = hashlib.sha256()
    for (hook, layer), vector in ordered:
        digest.update(f"{hook}\0{layer}\0{vector.numel()}\0".encode())
        digest.update(vector.numpy().tobytes())
    return VectorSet(ordered, digest.hexdigest()[:32] if ordered else "")


def _flatten(source: Mapping[Any, Any]) -> Iterable[tuple[SiteKey, Any]]:
    for key, value in source.items():
        if isinstance(key, tuple) and len(key) == 2:
            yield (parse_hook(str(key[0])), int(key[1])), value
        elif isinstance(value, Mapping):
            for layer, vector in value.items():
                yield (parse_hook(str(key)), int(layer)), vector
        else:
            yield parse_site(str(key)), value


def _vector(key: SiteKey, value: Any) -> torch.Tensor:
    name = f"layers.{key[1]}.{key[0]}"
    tensor = torch.as_tensor(value)
    if not tensor.dtype.is_floating_point:
        raise VectorError(f"the vector of {name} has dtype {tensor.dtype}; give floating-point numbers")
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise VectorError(f"the vector of {name} has shape {tuple(tensor.shape)}; give one dimension of the site's width")
    tensor = tensor.detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
    if not bool(torch.isfinite(tensor).all()):
        raise VectorError(f"the vector of {name} holds NaN or infinity; fix the vector")
    return tensor


def scaled(parts: Iterable[tuple[VectorSet, float]]) -> dict[SiteKey, torch.Tensor]:
    """Sum of vector sets times their scales, in fp32."""
    total: dict[SiteKey, torch.Tensor] = {}
    for vectors, scale in parts:
        for key, vector in vectors.items():
            term = vector * scale
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
        object.__setattr__(self, "spans", tuple((a, b) for a, b in self.spans))

    def selects(self, position: int, prompt_length: int) -> bool:
        """Whether the token at absolute ``position`` of a prompt of ``prompt_length`` tokens is steered."""
        if position >= prompt_length:
            return self.generated
        if self.last_prompt and position == prompt_length - 1:
            return True
        return any(position in range(*slice(a, b).indices(prompt_length)) for a, b in self.spans)


@dataclass(frozen=True)
class Steering:
    """One request's configuration. Vectors of the tiers add: prefill uses base + prefill, decode base + decode.

    Attributes:
        base, prefill, decode: vectors (any form that `vector_set` takes).
        named: registered vector sets to add to the base tier, as ``(name, scale)``.
        scale: factor on all vectors of this configuration.
        tokens: the tokens that are steered; None is all.

    Raises:
        VectorError: bad vectors, or a scale that is not finite.
    """

    base: VectorSet = field(default_factory=VectorSet)
    prefill: VectorSet = field(default_factory=VectorSet)
    decode: VectorSet = field(default_factory=VectorSet)
    named: tuple[tuple[str, float], ...] = ()
    scale: float = 1.0
    tokens: TokenSelection | None = None

    def __post_init__(self) -> None:
        for tier in ("base", "prefill", "decode"):
            object.__setattr__(self, tier, vector_set(getattr(self, tier)))
        named = (self.named,) if isinstance(self.named, str) else self.named
        pairs = tuple((n, 1.0) if isinstance(n, str) else (str(n[0]), float(n[1])) for n in named)
        object.__setattr__(self, "named", pairs)
        for factor in (self.scale, *(s for _, s in pairs)):
            if not math.isfinite(factor):
                raise VectorError(f"scale {factor!r} is not finite; give a finite number")

    def tier(self, phase: str) -> VectorSet:
        return self.prefill if phase == "prefill" else self.decode
