"""Monitors and clamps: checked once, frozen, with digests of their content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import torch

from steer_compile.errors import VectorError
from steer_compile.runtime.vectors import SiteKey, by_site, checked_vector, finite

SiteLike: TypeAlias = str | tuple[str, int]


@dataclass(frozen=True, init=False, eq=False)
class Monitor:
    """A probe: ``sigmoid(sharpness * (h . probe - threshold))`` on the pristine value, in fp32.

    Attributes:
        probe: direction (H,) of any length, fp32 on the CPU.
        threshold: score at which the gate is half open.
        sharpness: slope of the gate, at least 0.

    Raises:
        VectorError: a bad probe, or a threshold or sharpness that is not finite (or a negative sharpness).
    """

    probe: torch.Tensor
    threshold: float
    sharpness: float
    digest: str

    def __init__(self, probe: object, threshold: float = 0.0, sharpness: float = 1.0) -> None:
        object.__setattr__(self, "probe", checked_vector("the probe of a monitor", probe))
        object.__setattr__(self, "threshold", finite(threshold, "the threshold of a monitor"))
        object.__setattr__(self, "sharpness", finite(sharpness, "the sharpness of a monitor"))
        if self.sharpness < 0:
            raise VectorError(f"the sharpness of a monitor is {sharpness!r}, below 0; turn the probe around instead")
        object.__setattr__(self, "digest", _digest(self.probe, self.threshold, self.sharpness))

    @classmethod
    def checked(cls, probe: torch.Tensor, threshold: float, sharpness: float, digest: str) -> Self:
        """A monitor of the attributes of one that was checked."""
        made = cls.__new__(cls)
        vars(made).update(probe=probe, threshold=threshold, sharpness=sharpness, digest=digest)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Monitor) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, init=False, eq=False)
class Clamp:
    """A bound on the value's projection: ``h += strength * (clip(h.v, lo, hi) - h.v) * v`` with v of length 1.

    Args:
        value: pins the projection: ``lo = hi = value``. 0 removes the direction (ablation).

    Attributes:
        direction: v (H,), brought to length 1 in fp64 and kept in fp32 on the CPU.
        lo, hi: bounds, in units of the stream along v; None (no bound) becomes infinity.
        strength: how far towards the bound.

    Raises:
        VectorError: a bad direction (zeros have none), no bound at all, ``lo > hi``, or a number that is not finite.
    """

    direction: torch.Tensor
    lo: float
    hi: float
    strength: float
    digest: str

    def __init__(
        self,
        direction: object,
        lo: float | None = None,
        hi: float | None = None,
        strength: float = 1.0,
        value: float | None = None,
    ) -> None:
        if value is not None and (lo is not None or hi is not None):
            raise VectorError("a clamp has both a value and bounds; give value, or lo and hi")
        low, high = (lo, hi) if value is None else (value, value)
        if low is None and high is None:
            raise VectorError("a clamp has no bound and would do nothing; give lo, hi or value")
        object.__setattr__(self, "direction", _unit(direction))
        object.__setattr__(self, "lo", -math.inf if low is None else finite(low, "the lower bound of a clamp") + 0.0)
        object.__setattr__(self, "hi", math.inf if high is None else finite(high, "the upper bound of a clamp") + 0.0)
        object.__setattr__(self, "strength", finite(strength, "the strength of a clamp"))
        if self.lo > self.hi:
            raise VectorError(f"a clamp has lo={self.lo} above hi={self.hi}; exchange them")
        object.__setattr__(self, "digest", _digest(self.direction, self.lo, self.hi, self.strength))

    @classmethod
    def checked(cls, direction: torch.Tensor, lo: float, hi: float, strength: float, digest: str) -> Self:
        """A clamp of the attributes of one that was checked."""
        made = cls.__new__(cls)
        vars(made).update(direction=direction, lo=lo, hi=hi, strength=strength, digest=digest)
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Clamp) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


Monitors: TypeAlias = tuple[tuple[SiteKey, Monitor], ...]
Clamps: TypeAlias = tuple[tuple[SiteKey, tuple[Clamp, ...]], ...]


def monitors_by_site(given: object) -> Monitors:
    """Checked and sorted monitors of a configuration, from any form that `vector_set` takes.

    Raises:
        VectorError: something that is no `Monitor`, or two for a site. SpecError: a name that is no site.
    """
    found = _by_site(given, "monitor")
    for (hook, layer), monitor in found.items():
        if not isinstance(monitor, Monitor):
            kind = type(monitor).__name__
            raise VectorError(f"the monitor of layers.{layer}.{hook} is a {kind}; give Monitor(probe, threshold)")
    return tuple(sorted(found.items(), key=lambda item: item[0]))


def clamps_by_site(given: object) -> Clamps:
    """Checked and sorted clamps of a configuration or of everyone, from any form that `vector_set` takes.

    Raises:
        VectorError: something that is no `Clamp` and no list of them, or a site given twice.
        SpecError: a name that is no site.
    """
    found: dict[SiteKey, tuple[Clamp, ...]] = {}
    for (hook, layer), clamps in _by_site(given, "list of clamps").items():
        each = tuple(clamps) if isinstance(clamps, Iterable) else (clamps,)
        wrong = [type(clamp).__name__ for clamp in each if not isinstance(clamp, Clamp)]
        if wrong:
            raise VectorError(f"a clamp of layers.{layer}.{hook} is a {wrong[0]}; give [Clamp(direction, lo, hi), ...]")
        if each:
            found[hook, layer] = each
    return tuple(sorted(found.items(), key=lambda item: item[0]))


def _by_site(given: object, what: str) -> dict[SiteKey, Any]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise VectorError(f"a {what} is given as {type(given).__name__}; give {{site: {what}}}")
    return by_site(given, what)


def _unit(direction: object) -> torch.Tensor:
    vector = checked_vector("the direction of a clamp", direction, torch.float64)
    largest = vector.abs().max()
    if not bool(largest > 0):
        raise VectorError("the direction of a clamp is zeros, which point nowhere; give a direction")
    scaled: torch.Tensor = vector / largest  # the squares of very large or small numbers leave the range of fp64
    unit: torch.Tensor = (scaled / scaled.norm()).to(torch.float32) + 0.0
    return unit


def _digest(vector: torch.Tensor, *numbers: float) -> str:
    digest = hashlib.sha256(vector.numpy().tobytes())
    digest.update(repr(numbers).encode())
    return digest.hexdigest()[:32]
