"""Autoencoders of an engine: what its operator names, and how requests ask for their features.

A request's ``features`` are declarative data::

    [{"sae": "bridge", "clamps": [{"feature": 12, "value": 8.0, "kind": "set", "only_if_active": false}],
      "mode": "delta", "phase": "both"}]

with the fields of `FeatureClamp` and `SAESteering`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from steer_compile.errors import SpecError
from steer_compile.runtime.features import SAESteering
from steer_compile.runtime.registry import Registry
from steer_compile.sae.files import load
from steer_compile.sae.steer import FeatureClamp

MOST = 16
"""Most autoencoders that one request names."""
MOST_CLAMPS = 1024
"""Most clamps of each."""


@dataclass(frozen=True)
class SAESpec:
    """An autoencoder that an engine loads when it starts.

    Attributes:
        path, sae: its files, and its name among several of a folder.
        features: features that requests may clamp; ``whole``: all, and values may be decoded.
        site: hook and layer, where its files do not say.
        options: ``allow_pt``, ``norm_factor``, ``k`` and ``ignore``, as `steer_compile.sae.load` takes them.
    """

    name: str
    path: str
    sae: str | None = None
    features: tuple[int, ...] = ()
    whole: bool = False
    site: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def to_data(self) -> dict[str, Any]:
        """Plain data; ``name`` is its key."""
        given = {"path": self.path, "sae": self.sae, "features": list(self.features), "whole": self.whole}
        return {**given, "site": self.site, "options": dict(self.options)}

    def attach(self, registry: Registry) -> None:
        """Load it into a registry.

        Raises:
            SAEError, SpecError: files that cannot be read, or features that cannot be. SiteNotFound, VectorError,
                TableFull: the engine's sites have no room for it.
        """
        made = load(Path(self.path), name=self.sae, site=self.site, **dict(self.options))
        registry.saes.attach(self.name, made, self.features, self.whole, self.site)


def sae_specs(given: object) -> tuple[SAESpec, ...]:
    """Autoencoders of an engine from plain data.

    Raises:
        SpecError: data of another form, or files that are not there.
    """
    if not isinstance(given, Mapping):
        raise SpecError(
            f"saes={given!r:.80} names no autoencoders; give {{name: {{'path': folder, 'features': [...]}}}}"
        )
    found = []
    for name, item in given.items():
        if not isinstance(item, Mapping) or "path" not in item or set(item) - _KEYS:
            raise SpecError(f"saes: {name!r} is {item!r:.80}; give an object with {', '.join(sorted(_KEYS))}")
        if not Path(str(item["path"])).exists():
            raise SpecError(f"saes: {name!r} has the path {item['path']}, where nothing is; give a folder or a file")
        features, options = item.get("features") or (), item.get("options") or {}
        if not isinstance(features, list | tuple) or not isinstance(options, Mapping) or set(options) - _OPTIONS:
            raise SpecError(
                f"saes: {name!r} has features={features!r:.80} and options={options!r:.80}; give a list of numbers, "
                f"and of {', '.join(sorted(_OPTIONS))}"
            )
        rest = {key: item.get(key) for key in ("sae", "site")}
        more = tuple(sorted(options.items()))
        found.append(SAESpec(str(name), str(item["path"]), **rest, features=tuple(features),
                             whole=item.get("whole", False) is True, options=more))  # fmt: skip
    return tuple(found)


_KEYS = {field.name for field in fields(SAESpec)} - {"name"}
_OPTIONS = {"allow_pt", "norm_factor", "k", "ignore"}


def features_of(given: object) -> list[SAESteering]:
    """What a request asks of autoencoders, from plain data.

    Raises:
        SpecError: data of another form. SAEError, VectorError: what cannot be meant.
    """
    if not isinstance(given, list) or len(given) > MOST:
        raise SpecError(f"features is {given!r:.80}; give a list of {MOST} autoencoders at most")
    found = []
    for item in given:
        if not isinstance(item, Mapping) or "sae" not in item or set(item) - {"sae", "clamps", "mode", "phase"}:
            raise SpecError(f"features has {item!r:.80}; give an object with sae, clamps, mode and phase")
        clamps = item.get("clamps", [])
        if not isinstance(clamps, list) or len(clamps) > MOST_CLAMPS:
            raise SpecError(f"features of {item['sae']!r:.80}: clamps is no list of {MOST_CLAMPS} at most; give one")
        made = tuple(_clamp(str(item["sae"]), clamp) for clamp in clamps)
        found.append(SAESteering(item["sae"], made, item.get("mode", "delta"), item.get("phase", "both")))
    return found


def _clamp(sae: str, given: object) -> FeatureClamp:
    known = {field.name for field in fields(FeatureClamp)}
    if not isinstance(given, Mapping) or set(given) - known or not {"feature", "value"} <= set(given):
        raise SpecError(f"a clamp of {sae!r:.80} is {given!r:.80}; give an object with {', '.join(sorted(known))}")
    return FeatureClamp(**given)
