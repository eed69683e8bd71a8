"""Monitors and clamps: checked once, frozen, with digests of their content."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self, TypeAlias, TypedDict, Unpack

import torch

from steer_compile.errors import VectorError
from steer_compile.runtime.vectors import SiteKey, by_site, checked_vector, finite

SiteLike: TypeAlias = str | tuple[str, int]
MAPS = ("sigmoid", "line", "step")
"""Decision functions of monitors, in the order of `kernels.gates.KINDS`."""


@dataclass(frozen=True, init=False, eq=False)
class Hidden:
    """One hidden layer of a probe: ``sum_j output[j] * relu(h . weight[j] + bias[j])``, in fp32.

    Attributes:
        weight: (M, H); bias, output: (M,). fp32 on the CPU.

    Raises:
        VectorError: shapes that do not fit, or numbers that are not finite.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    output: torch.Tensor
    digest: str

    def __init__(self, weight: object, bias: object, output: object) -> None:
        units = torch.as_tensor(weight, dtype=torch.float32, device="cpu").detach()
        if units.dim() != 2 or not units.numel():
            raise VectorError(f"the hidden units of a probe have shape {list(units.shape)}; give (units, width)")
        rows = [checked_vector("a hidden unit of a probe", unit) for unit in units]
        ends = [checked_vector(f"the {name} of hidden units", v) for name, v in (("bias", bias), ("output", output))]
        if any(end.numel() != len(rows) for end in ends):
            raise VectorError(f"a probe has {len(rows)} hidden units; give a bias and an output weight for each")
        for name, value in zip(("weight", "bias", "output"), (torch.stack(rows), *ends), strict=True):
            object.__setattr__(self, name, value)
        whole = torch.cat([self.weight.flatten(), *ends])
        object.__setattr__(self, "digest", _digest(whole, len(rows)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Hidden) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)


class MonitorOptions(TypedDict, total=False):
    """The rarer fields of `Monitor`, given by keyword."""

    low: float | None
    high: float | None
    clamps: bool
    hidden: Hidden | None


@dataclass(frozen=True, init=False, eq=False)
class Monitor:
    """A probe and a decision function of its score ``s = h . probe`` on the pristine value, in fp32.

    ==========  ====================================================================================================
    kind        gate
    ==========  ====================================================================================================
    sigmoid     ``sigmoid(sharpness * (s - threshold))``
    line        ``clip(sharpness * (s - threshold), low, high)``; affine with infinite bounds
    step        1 above ``threshold``, 0 below ``low``; in between what it was for this sequence, where the site has
                the op family ``memory`` (hysteresis), and else 0
    ==========  ====================================================================================================

    Attributes:
        probe: direction (H,) of any length, fp32 on the CPU.
        threshold: score at which the gate is half open, begins to open, or opens.
        sharpness: slope of the gate, at least 0.
        kind: decision function.
        low, high: bounds of a line (0 and 1); ``low`` of a step is the score below which it closes (the threshold).
        clamps: it guards the strength of clamps as well.
        hidden: hidden units whose weighted outputs the score has in addition, for a monitor of a site.

    Raises:
        VectorError: a bad probe, an unknown kind, bounds that do not fit it, or a number that is not finite (or a
            negative sharpness).
    """

    probe: torch.Tensor
    threshold: float
    sharpness: float
    kind: str
    low: float
    high: float
    clamps: bool
    hidden: Hidden | None
    digest: str

    def __init__(
        self, probe: object, threshold: float = 0.0, sharpness: float = 1.0, kind: str = "sigmoid",
        **options: Unpack[MonitorOptions],
    ) -> None:  # fmt: skip
        if set(options) - set(MonitorOptions.__annotations__):
            raise VectorError(f"a monitor has no {sorted(set(options) - set(MonitorOptions.__annotations__))[0]!r}")
        start, slope = finite(threshold, "the threshold of a monitor"), finite(sharpness, "the sharpness of a monitor")
        if slope < 0:
            raise VectorError(f"the sharpness of a monitor is {sharpness!r}, below 0; turn the probe around instead")
        if kind not in MAPS:
            raise VectorError(f"a monitor of kind {kind!r} is unknown; choose one of {', '.join(MAPS)}")
        low, high = _bounds(kind, start, options.get("low"), options.get("high"))
        clamps = options.get("clamps", False)
        if not isinstance(clamps, bool):
            raise VectorError(f"a monitor has clamps={clamps!r}; give true or false")
        found = {
            "probe": checked_vector("the probe of a monitor", probe), "threshold": start, "sharpness": slope,
            "kind": kind, "low": low, "high": high, "clamps": clamps,
            "hidden": options.get("hidden"),
        }  # fmt: skip
        for name, value in found.items():
            object.__setattr__(self, name, value)
        object.__setattr__(self, "digest", self._digest())

    def _digest(self) -> str:
        more = () if self.hidden is None else (self.hidden.digest,)
        kind = (self.kind, self.low, self.high, self.clamps) if (self.kind, self.clamps) != ("sigmoid", False) else ()
        return _digest(self.probe, self.threshold, self.sharpness, *kind, *more)

    def settings(self, rows: bool) -> tuple[float, ...]:
        """Its line of a bank (`kernels.gates.SETTINGS`); ``rows``: it guards the rows' vectors."""
        kind = float(MAPS.index(self.kind))
        return (self.threshold, self.sharpness, kind, self.low, self.high, 1.0, float(rows), float(self.clamps))

    @property
    def remembers(self) -> bool:
        """Whether it closes at another score than it opens at."""
        return self.kind == "step" and self.low < self.threshold

    @property
    def numbers(self) -> tuple[Any, ...]:
        """What makes the same monitor of its probe, for `checked`."""
        return self.threshold, self.sharpness, self.kind, self.low, self.high, self.clamps, self.digest

    @classmethod
    def checked(cls, probe: torch.Tensor, *given: Any) -> Self:
        """A monitor of a row of the `numbers` of one that was checked."""
        made = cls.__new__(cls)
        names = ("threshold", "sharpness", "kind", "low", "high", "clamps", "digest")
        vars(made).update(zip(names, given, strict=True), probe=probe, hidden=None)
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


_UNBOUNDED = {"inf": math.inf, "-inf": -math.inf}
"""Bounds that are none; as text, since JSON has no such numbers."""


def _bounds(kind: str, threshold: float, low: float | None, high: float | None) -> tuple[float, float]:
    """Bounds of a decision function, with those that are left out.

    Raises:
        VectorError: a bound that the kind does not have, or bounds in the wrong order.
    """
    given = [
        None
        if b is None
        else _UNBOUNDED[str(b)]
        if str(b) in _UNBOUNDED
        else finite(b, f"the bound {name!r} of a monitor")
        for name, b in (("low", low), ("high", high))
    ]
    if kind == "sigmoid" and given != [None, None]:
        raise VectorError("a monitor of kind 'sigmoid' has no bounds; leave low and high out, or take kind='line'")
    if kind == "step" and given[1] is not None:
        raise VectorError("a monitor of kind 'step' has no high; it opens at threshold and closes below low")
    least = given[0] if given[0] is not None else threshold if kind == "step" else 0.0
    most = given[1] if given[1] is not None else 1.0
    if (kind == "step" and least > threshold) or (kind == "line" and least > most):
        raise VectorError(f"a monitor has low={low!r} above {'its threshold' if kind == 'step' else f'high={most}'}")
    return least, most


def _digest(vector: torch.Tensor, *numbers: object) -> str:
    digest = hashlib.sha256(vector.numpy().tobytes())
    digest.update(repr(numbers).encode())
    return digest.hexdigest()[:32]
