"""Declarative gates: when something is done to a request, for how long, and what. Data only, checked when it is made.

::

    {"when": "always" | {"site": "layers.3.post_block", "probe": [...], "threshold": 0.5, "sharpness": 4.0},
     "scope": "this_token" | "next_step" | "rest_of_request" | "rest_of_conversation",
     "apply": {"add": {"named": ["calm", ["formal", -0.5]], "vectors": {...}, "strength": 2.0}}
            | {"attenuate": 0.25}
            | {"clamp": {"layers.3.post_block": [{"direction": [...], "hi": 1.0}]}}}
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from steer_compile.dynamic.codec import (
    clamps_from_data,
    digest_of,
    fields_of,
    named_from_data,
    unpacked,
    vectors_from_data,
)
from steer_compile.errors import SpecError, VectorError
from steer_compile.runtime.gates import Clamps, Monitor
from steer_compile.runtime.vectors import SiteKey, VectorSet, finite, site_key

SCOPES = ("this_token", "next_step", "rest_of_request", "rest_of_conversation")
MOST_GATES = 16
"""Most gates of a request."""


@dataclass(frozen=True)
class Probe:
    """A gate's condition: the score ``h . probe`` at a site.

    In the graph it is a soft gate for each token. On the host it fires where the mean of a step's scores is above the
    threshold, which is where the gate is more than half open; with sharpness 0 it never is.
    """

    site: SiteKey
    monitor: Monitor

    def fires(self, score: float) -> bool:
        return self.monitor.sharpness > 0 and score > self.monitor.threshold


@dataclass(frozen=True)
class Add:
    """Add vectors to the request's decoded tokens, times ``strength``."""

    vectors: VectorSet
    named: tuple[tuple[str, float], ...]
    strength: float

    @property
    def digest(self) -> str:
        return digest_of("add", self.vectors.digest, self.named, self.strength)


@dataclass(frozen=True)
class Attenuate:
    """Multiply the vectors that the request brought for its decoded tokens, from 0 (none is left) to 1."""

    strength: float

    @property
    def digest(self) -> str:
        return digest_of("attenuate", self.strength)


@dataclass(frozen=True)
class ClampTo:
    """Clamp the request's decoded tokens."""

    clamps: Clamps

    @property
    def digest(self) -> str:
        return digest_of("clamp", tuple((site, tuple(c.digest for c in each)) for site, each in self.clamps))


Effect: TypeAlias = Add | Attenuate | ClampTo


@dataclass(frozen=True)
class Gate:
    """One gate of a request.

    Attributes:
        when: the condition, None for always.
        scope: how long it holds. ``this_token``: in the graph, in the same forward. The others hold from the next step
            on: for that step, until the request ends, or also for later requests of its conversation.
        apply: what is done.

    Raises:
        SpecError: a combination that cannot be.
    """

    when: Probe | None
    scope: str
    apply: Effect

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise SpecError(f"scope={self.scope!r} of a gate is unknown; choose one of {', '.join(SCOPES)}")
        if self.when is None and self.scope == "next_step":
            raise SpecError("a gate holds always and for the next step, which is always; give the scope this_token")
        if self.when is not None and self.scope == "this_token" and not isinstance(self.apply, Add):
            what = "attenuate" if isinstance(self.apply, Attenuate) else "clamp"
            raise SpecError(
                f"a gate of scope this_token with a probe cannot {what}: in the graph a probe gates the row's vectors; "
                "give the scope next_step, rest_of_request or rest_of_conversation"
            )
        if self.scope == "rest_of_conversation" and (isinstance(self.apply, ClampTo) or self._has_vectors):
            raise SpecError(
                "a gate of scope rest_of_conversation holds vectors or clamps of its own; later requests refer to what "
                "it adds by name: register the vectors and give add.named"
            )

    @property
    def _has_vectors(self) -> bool:
        return isinstance(self.apply, Add) and bool(self.apply.vectors)

    @property
    def on_host(self) -> bool:
        """Whether it is decided between steps, not in the graph or by the row alone."""
        return self.scope == "rest_of_conversation" or (self.when is not None and self.scope != "this_token")

    @property
    def digest(self) -> str:
        when = None if self.when is None else (self.when.site, self.when.monitor.digest)
        return digest_of("gate", when, self.scope, self.apply.digest)


def gates_from_data(given: object) -> tuple[Gate, ...]:
    """Gates of a list of plain data or of `Gate`.

    Raises:
        SpecError, VectorError: too many, data of another form, bad numbers, or combinations that cannot be.
    """
    items = given if isinstance(given, list | tuple) else None
    if items is None or len(items) > MOST_GATES:
        size = f"{len(items)} gates" if items is not None else f"a {type(given).__name__}"
        raise SpecError(f"gates are {size}; give a list of {MOST_GATES} at most")
    return tuple(item if isinstance(item, Gate) else _gate(f"gate {i}", item) for i, item in enumerate(items))


def _gate(what: str, given: object) -> Gate:
    data = fields_of(what, given, ("when", "scope", "apply"), ("apply",))
    return Gate(_when(what, data.get("when", "always")), data.get("scope", "this_token"), _apply(what, data["apply"]))


def _when(what: str, given: object) -> Probe | None:
    if given == "always":
        return None
    if not isinstance(given, Mapping):
        raise SpecError(f"{what} has when={given!r:.80}; give 'always', or an object with site and probe")
    data = fields_of(f"the condition of {what}", given, ("site", "probe", "threshold", "sharpness"), ("site", "probe"))
    site = site_key(str(data.pop("site")))
    return Probe(site, Monitor(unpacked(f"the probe of {what}", data.pop("probe")), **data))


def _apply(what: str, given: object) -> Effect:
    data = fields_of(f"what {what} applies", given, ("add", "attenuate", "clamp"))
    if len(data) != 1:
        raise SpecError(f"{what} applies {', '.join(data) or 'nothing'}; give one of add, attenuate, clamp")
    (kind, value), *_ = data.items()
    if kind == "add":
        return _add(what, value)
    if kind == "clamp":
        clamps = clamps_from_data(what, value)
        if not clamps:
            raise SpecError(f"{what} clamps nothing; give {{site: [clamps]}}")
        return ClampTo(clamps)
    factor = finite(value, f"the strength of {what}")
    if not 0.0 <= factor <= 1.0:
        raise VectorError(f"{what} attenuates by {factor}; give a factor from 0 to 1")
    return Attenuate(factor)


def _add(what: str, given: object) -> Add:
    data: Mapping[str, Any] = fields_of(f"what {what} adds", given, ("named", "vectors", "strength"))
    vectors = vectors_from_data(f"the vectors of {what}", data.get("vectors"))
    named = named_from_data(f"the named sets of {what}", data.get("named", []))
    if not (vectors or named):
        raise SpecError(f"{what} adds nothing; give named, vectors or both")
    return Add(vectors, named, finite(data.get("strength", 1.0), f"the strength of {what}"))
