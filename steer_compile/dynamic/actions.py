"""Actions: what a controller or an operator asks for between two steps. Frozen values, checked when they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self, TypeAlias

from steer_compile.dynamic.codec import (
    Data,
    clamp_to_data,
    clamps_from_data,
    digest_of,
    fields_of,
    monitor_from_data,
    monitor_to_data,
    monitors_from_data,
    named_from_data,
    site_name,
    text_of,
    vectors_from_data,
    vectors_to_data,
)
from steer_compile.errors import SpecError, VectorError
from steer_compile.runtime.gates import Clamps, Monitor, Monitors, SiteLike, clamps_by_site, monitors_by_site
from steer_compile.runtime.vectors import SiteKey, VectorSet, finite, named_set, site_key, vector_set


def strength(value: object, name: str) -> float:
    """A factor: finite and at least 0.

    Raises:
        VectorError: it is not.
    """
    factor = finite(value, name)
    if factor < 0:
        raise VectorError(f"{name} is {value!r}, below 0; turn the vectors around instead")
    return factor


@dataclass(frozen=True, init=False)
class SetTier:
    """Replace the dynamic tier: a vector of each site, times ``gain``, added to decoded tokens only.

    Args:
        phase: ``decode``. Prompts' tokens lie in caches whose keys do not know of actions, so no other is taken.

    Raises:
        VectorError: bad vectors or gain. SpecError: another phase.
    """

    vectors: VectorSet
    gain: float

    def __init__(self, vectors: object = None, gain: float = 1.0, phase: str = "decode") -> None:
        if phase != "decode":
            raise SpecError(
                f"an action cannot change the tier {phase!r}, since cached prompts were computed with it; "
                "give phase='decode', or use set_global between requests"
            )
        object.__setattr__(self, "vectors", vector_set(vectors))
        object.__setattr__(self, "gain", finite(gain, "the gain of the dynamic tier"))

    @cached_property
    def digest(self) -> str:
        return digest_of("set_tier", self.vectors.digest, self.gain)

    def to_data(self) -> Data:
        return {"kind": "set_tier", "vectors": vectors_to_data(self.vectors), "gain": self.gain}

    @classmethod
    def from_data(cls, given: Mapping[str, Any]) -> Self:
        data = fields_of("set_tier", given, ("kind", "vectors", "gain", "phase"))
        data.pop("kind", None)
        return cls(vectors_from_data("the vectors of set_tier", data.pop("vectors", None)), **data)


@dataclass(frozen=True, init=False)
class SetOverride:
    """From the next step on, a request's decoded tokens get these contents, and everyone's, instead of its own.

    It replaces a former override of the request as a whole.

    Attributes:
        request: name of the request.
        vectors: any form that `vector_set` takes.
        named: registered vector sets with factors; they are resolved when the action is applied.
        scale: factor on ``vectors`` and ``named``.
        monitors, clamps: as in `Steering`.
        compose: the request's own decode contents stay beside these.
        admitted: factor on the vectors among them.
        expect: content digests by name; the action is rejected where a named set has another by then.
        gain: factor of the row, as `SetScale` changes it.

    Raises:
        VectorError: bad vectors, monitors, clamps or factors. SpecError: a bad name or site.
    """

    request: str
    vectors: VectorSet
    named: tuple[tuple[str, float], ...]
    scale: float
    monitors: Monitors
    clamps: Clamps
    compose: bool
    admitted: float
    expect: tuple[tuple[str, str], ...]
    gain: float

    def __init__(self, request: str, vectors: object = None, **fields: Any) -> None:
        unknown = sorted(set(fields) - set(self.__annotations__))
        if unknown:
            raise SpecError(
                f"set_override has the unknown field {unknown[0]!r}; give {', '.join(self.__annotations__)}"
            )
        named = fields.get("named", ())
        names = (named,) if isinstance(named, str) else named
        made = {
            "request": text_of("the request of set_override", request),
            "vectors": vector_set(vectors),
            "named": tuple(named_set(item) for item in names),
            "scale": finite(fields.get("scale", 1.0), "the scale of an override"),
            "monitors": monitors_by_site(fields.get("monitors")),
            "clamps": clamps_by_site(fields.get("clamps")),
            "compose": _flag("compose", fields.get("compose", False)),
            "admitted": strength(fields.get("admitted", 1.0), "the factor on admitted vectors"),
            "expect": tuple(
                sorted((str(name), str(digest)) for name, digest in dict(fields.get("expect", ())).items())
            ),
            "gain": strength(fields.get("gain", 1.0), "the gain of an override"),
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @cached_property
    def content(self) -> str:
        """Digest of all but the request and the gain."""
        monitors = tuple((site, monitor.digest) for site, monitor in self.monitors)
        clamps = tuple((site, tuple(clamp.digest for clamp in each)) for site, each in self.clamps)
        factors = (self.scale, self.compose, self.admitted)
        return digest_of(self.vectors.digest, self.named, factors, monitors, clamps, self.expect)

    @cached_property
    def digest(self) -> str:
        return digest_of("set_override", self.request, self.content, self.gain)

    def to(self, request: str, gain: float | None = None, expect: Mapping[str, str] | None = None) -> Self:
        """The same for another request, with another gain or other expected digests; nothing is checked again."""
        made = type(self).__new__(type(self))
        changes: dict[str, Any] = {"request": request}
        if gain is not None:
            changes["gain"] = strength(gain, "the gain of an override")
        if expect is not None:
            changes["expect"] = tuple(sorted(expect.items()))
        vars(made).update({name: vars(self)[name] for name in self.__annotations__} | changes)
        if expect is None and "content" in vars(self):
            vars(made)["content"] = self.content
        return made

    def to_data(self) -> Data:
        return {
            "kind": "set_override",
            "request": self.request,
            "vectors": vectors_to_data(self.vectors),
            "named": [list(item) for item in self.named],
            "scale": self.scale,
            "monitors": {site_name(site): monitor_to_data(monitor) for site, monitor in self.monitors},
            "clamps": {site_name(site): [clamp_to_data(c) for c in each] for site, each in self.clamps},
            "compose": self.compose,
            "admitted": self.admitted,
            "expect": dict(self.expect),
            "gain": self.gain,
        }

    @classmethod
    def from_data(cls, given: Mapping[str, Any]) -> Self:
        data = fields_of("set_override", given, ("kind", *cls.__annotations__), ("request",))
        data.pop("kind", None)
        expect = data.pop("expect", {})
        return cls(
            data.pop("request"),
            vectors_from_data("the vectors of set_override", data.pop("vectors", None)),
            named=named_from_data("the named sets of set_override", data.pop("named", [])),
            monitors=dict(monitors_from_data("monitors of set_override", data.pop("monitors", {}))),
            clamps=dict(clamps_from_data("set_override", data.pop("clamps", {}))),
            expect=fields_of("expect", expect, list(map(str, expect)) if isinstance(expect, Mapping) else ()),
            **data,
        )


@dataclass(frozen=True)
class ClearOverride:
    """From the next step on, a request's decoded tokens get its own contents again. Without an override, nothing."""

    request: str

    def __post_init__(self) -> None:
        text_of("the request of clear_override", self.request)

    @cached_property
    def digest(self) -> str:
        return digest_of("clear_override", self.request)

    def to_data(self) -> Data:
        return {"kind": "clear_override", "request": self.request}

    @classmethod
    def from_data(cls, given: Mapping[str, Any]) -> Self:
        return cls(fields_of("clear_override", given, ("kind", "request"), ("request",))["request"])


@dataclass(frozen=True)
class SetScale:
    """Multiply the vectors of a row, or the dynamic tier, without writing any.

    Attributes:
        scale: finite and at least 0.
        request: the row that its decoded tokens read. A request without an override gets one of its own contents, as
            rows are shared by requests of equal content.
        gain: the gain of the dynamic tier. With neither, the row of decoded tokens without steering of their own.

    Raises:
        VectorError: a bad scale. SpecError: both a request and the gain.
    """

    scale: float
    request: str | None = None
    gain: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", strength(self.scale, "the scale of set_scale"))
        _flag("gain", self.gain)
        if self.request is not None:
            text_of("the request of set_scale", self.request)
            if self.gain:
                raise SpecError("set_scale names a request and the tier's gain; give one of them, or neither")

    @cached_property
    def digest(self) -> str:
        return digest_of("set_scale", self.scale, self.request, self.gain)

    def to_data(self) -> Data:
        return {"kind": "set_scale", "scale": self.scale, "request": self.request, "gain": self.gain}

    @classmethod
    def from_data(cls, given: Mapping[str, Any]) -> Self:
        data = fields_of("set_scale", given, ("kind", "scale", "request", "gain"), ("scale",))
        data.pop("kind", None)
        return cls(**data)


@dataclass(frozen=True, init=False)
class SetMonitor:
    """Put a monitor at a site for everyone, or take it away (None). It gates the dynamic tier, and rows if wanted.

    Raises:
        VectorError: something that is no monitor. SpecError: no site.
    """

    site: SiteKey
    monitor: Monitor | None
    gate_rows: bool

    def __init__(self, site: SiteLike, monitor: Monitor | None = None, gate_rows: bool = False) -> None:
        if monitor is not None and not isinstance(monitor, Monitor):
            raise VectorError(f"the monitor of set_monitor is a {type(monitor).__name__}; give Monitor(probe) or None")
        object.__setattr__(self, "site", site_key(site))
        object.__setattr__(self, "monitor", monitor)
        object.__setattr__(self, "gate_rows", _flag("gate_rows", gate_rows))

    @cached_property
    def digest(self) -> str:
        content = self.monitor.digest if self.monitor is not None else None
        return digest_of("set_monitor", self.site, content, self.gate_rows)

    def to_data(self) -> Data:
        monitor = monitor_to_data(self.monitor) if self.monitor is not None else None
        return {"kind": "set_monitor", "site": site_name(self.site), "monitor": monitor, "gate_rows": self.gate_rows}

    @classmethod
    def from_data(cls, given: Mapping[str, Any]) -> Self:
        data = fields_of("set_monitor", given, ("kind", "site", "monitor", "gate_rows"), ("site",))
        found = data.get("monitor")
        monitor = None if found is None else monitor_from_data("the monitor of set_monitor", found)
        return cls(str(data["site"]), monitor, data.get("gate_rows", False))


Action: TypeAlias = SetTier | SetOverride | ClearOverride | SetScale | SetMonitor

_KINDS: dict[str, Callable[[Mapping[str, Any]], Action]] = {
    "set_tier": SetTier.from_data,
    "set_override": SetOverride.from_data,
    "clear_override": ClearOverride.from_data,
    "set_scale": SetScale.from_data,
    "set_monitor": SetMonitor.from_data,
}


def action_from_data(given: object) -> Action:
    """The action of plain data, which says its ``kind``; an action is itself.

    Raises:
        SpecError, VectorError: it is no action.
    """
    if isinstance(given, Action):
        return given
    kind = given.get("kind") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(kind, str) or kind not in _KINDS:
        found = f"kind {kind!r:.80}" if isinstance(given, Mapping) else type(given).__name__
        raise SpecError(f"{found} is no action; give one of {', '.join(_KINDS)}")
    return _KINDS[kind](given)


def target_of(action: Action) -> str | None:
    """The request that an action is about, None for everyone."""
    return None if isinstance(action, SetTier | SetMonitor) else action.request


def names_of(actions: Iterable[Action]) -> set[str]:
    """Requests that actions are about."""
    return {target for action in actions if (target := target_of(action)) is not None}


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{name}={value!r} is neither true nor false; give one of them")
    return value
