"""`Steering`: one request's configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypedDict, Unpack

from steer_compile.errors import SpecError
from steer_compile.runtime.features import SAESteering, sae_steering
from steer_compile.runtime.gates import Clamps, Monitors, clamps_by_site, monitors_by_site
from steer_compile.runtime.vectors import TokenSelection, VectorSet, finite, named_set, vector_set


class SteeringOptions(TypedDict, total=False):
    """The rarer fields of `Steering`, given by keyword."""

    monitors: object
    clamps: object
    features: Iterable[SAESteering] | SAESteering


@dataclass(frozen=True, init=False)
class Steering:
    """One request's configuration. Vectors of the tiers add: prefill uses base + prefill, decode base + decode.

    Attributes:
        base, prefill, decode: vectors (any form that `vector_set` takes).
        named: registered vector sets to add to the base tier: names, or pairs ``(name, scale)``.
        scale: factor on all vectors of this configuration; monitors and clamps have no part in it.
        tokens: the tokens that are steered; None is all.
        monitors: ``{site: Monitor}``: it gates the row's vector there (global tiers included), at decoded tokens.
        clamps: ``{site: [Clamp, ...]}``, in both phases. Sites are written in any form that `vector_set` takes.
        features: what attached autoencoders do (`SAESteering`).

    Raises:
        VectorError: bad vectors, monitors or clamps, or a scale that is not finite. SpecError: a name that is no site.
    """

    base: VectorSet
    prefill: VectorSet
    decode: VectorSet
    named: tuple[tuple[str, float], ...]
    scale: float
    tokens: TokenSelection | None
    monitors: Monitors
    clamps: Clamps
    features: tuple[SAESteering, ...]

    def __init__(
        self,
        base: object = None,
        prefill: object = None,
        decode: object = None,
        named: str | Iterable[str | tuple[str, float]] = (),
        scale: float = 1.0,
        tokens: TokenSelection | None = None,
        **options: Unpack[SteeringOptions],
    ) -> None:
        for tier, vectors in (("base", base), ("prefill", prefill), ("decode", decode)):
            object.__setattr__(self, tier, vector_set(vectors))
        names = (named,) if isinstance(named, str) else named
        object.__setattr__(self, "named", tuple(named_set(item) for item in names))
        object.__setattr__(self, "scale", finite(scale))
        object.__setattr__(self, "tokens", tokens)
        unknown = sorted(set(options) - set(SteeringOptions.__annotations__))
        if unknown:
            raise SpecError(f"steering has no {unknown[0]!r}; its fields are {', '.join(self.__annotations__)}")
        object.__setattr__(self, "monitors", monitors_by_site(options.get("monitors")))
        object.__setattr__(self, "clamps", clamps_by_site(options.get("clamps")))
        object.__setattr__(self, "features", sae_steering(options.get("features", ())))

    def tier(self, phase: str) -> VectorSet:
        return self.prefill if phase == "prefill" else self.decode
