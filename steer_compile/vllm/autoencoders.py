"""Autoencoders of an engine: what its operator names, and how requests ask for their features.

A request's ``features`` are declarative data::

    [{"sae": "bridge", "clamps": [{"feature": 12, "value": 8.0, "kind": "set", "only_if_active": false}],
      "mode": "delta", "phase": "both", "log": false}]

with the fields of `FeatureClamp` and `SAESteering`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeAlias

from steer_compile.errors import SpecError
from steer_compile.runtime.features import SAESteering
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.sae_tables import Attached
from steer_compile.sae.files import load
from steer_compile.sae.model import SAE
from steer_compile.sae.steer import FeatureClamp

MOST = 16
"""Most autoencoders that one request names."""
MOST_CLAMPS = 1024
"""Most clamps of each."""
_ASKED = {field.name for field in fields(SAESteering)}


@dataclass(frozen=True)
class SAESpec:
    """An autoencoder that an engine loads, when it starts or later.

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

    def read(self) -> SAE:
        """The autoencoder of its files.

        Raises:
            SAEError, SpecError: files that cannot be read.
        """
        return load(Path(self.path), name=self.sae, site=self.site, **dict(self.options))

    def put(self, registry: Registry, made: SAE) -> Attached:
        """Load what was read into a registry.

        Raises:
            SAEError: features that cannot be, or a name that is taken. SiteNotFound, VectorError, TableFull: the
                engine's sites have no room for it.
        """
        return registry.saes.attach(self.name, made, self.features, self.whole, self.site)

    def attach(self, registry: Registry) -> Attached:
        """Read its files and load them into a registry; raises as `read` and `put`."""
        return self.put(registry, self.read())


def sae_specs(given: object) -> tuple[SAESpec, ...]:
    """Autoencoders of an engine from plain data.

    Raises:
        SpecError: data of another form, or files that are not there.
    """
    if not isinstance(given, Mapping):
        raise SpecError(
            f"saes={given!r:.80} names no autoencoders; give {{name: {{'path': folder, 'features': [...]}}}}"
        )
    return tuple(_spec(str(name), item) for name, item in given.items())


def _spec(name: str, item: object) -> SAESpec:
    if not isinstance(item, Mapping) or "path" not in item or set(item) - _KEYS:
        raise SpecError(f"saes: {name!r} is {item!r:.80}; give an object with {', '.join(sorted(_KEYS))}")
    if not Path(str(item["path"])).exists():
        raise SpecError(f"saes: {name!r} has the path {item['path']}, where nothing is; give a folder or a file")
    given = {"features": (), "options": {}} | {key: value for key, value in item.items() if value is not None}
    features, options = given["features"], given["options"]
    if not isinstance(features, list | tuple) or not isinstance(options, Mapping) or set(options) - set(_OPTIONS):
        raise SpecError(
            f"saes: {name!r} has features={features!r:.80} and options={options!r:.80}; give a list of numbers, "
            f"and of {', '.join(sorted(_OPTIONS))}"
        )
    more = {key: _plain(value) for key, value in options.items() if value is not None}
    _check_kinds(name, {key: item[key] for key in _TEXTS if item.get(key) is not None} | more)
    whole = item.get("whole", False)
    if not isinstance(whole, bool):
        raise SpecError(f"saes: {name!r} has whole={whole!r:.80}; give true or false")
    texts = {key: item.get(key) for key in _TEXTS}
    return SAESpec(name, str(item["path"]), **texts, features=tuple(features), whole=whole,
                   options=tuple(sorted(more.items())))  # fmt: skip


def _plain(value: object) -> object:
    """A number of NumPy's as Python's own, which processes can send each other."""
    return float(value) if isinstance(value, float) else value


def _check_kinds(name: str, given: Mapping[str, Any]) -> None:
    """Raise `SpecError` for values of another kind than `steer_compile.sae.load` takes."""
    for key, value in given.items():
        kinds, words = _TEXTS.get(key) or _OPTIONS[key]
        plain = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
        items = value if isinstance(value, list | tuple) else ()
        infinite = isinstance(value, float) and not math.isfinite(value)
        if not plain or infinite or not all(isinstance(item, str) for item in items):
            raise SpecError(f"saes: {name!r} has {key}={value!r:.80}; give {words}")


Kinds: TypeAlias = dict[str, tuple[tuple[type, ...], str]]
_KEYS = {field.name for field in fields(SAESpec)} - {"name"}
_TEXTS: Kinds = {"sae": ((str,), "a name of the files"), "site": ((str,), "a text such as layers.3.post_block")}
_OPTIONS: Kinds = {
    "allow_pt": ((bool,), "true or false"),
    "norm_factor": ((int, float), "a finite number"),
    "k": ((int,), "a whole number"),
    "ignore": ((list, tuple), "a list of names"),
}


def features_of(given: object) -> list[SAESteering]:
    """What a request asks of autoencoders, from plain data.

    Raises:
        SpecError: data of another form. SAEError, VectorError: what cannot be meant.
    """
    if not isinstance(given, list) or len(given) > MOST:
        raise SpecError(f"features is {given!r:.80}; give a list of {MOST} autoencoders at most")
    found = []
    for item in given:
        if not isinstance(item, Mapping) or "sae" not in item or set(item) - _ASKED:
            raise SpecError(f"features has {item!r:.80}; give an object with sae, clamps, mode, phase and log")
        clamps = item.get("clamps", [])
        if not isinstance(clamps, list) or len(clamps) > MOST_CLAMPS:
            raise SpecError(f"features of {item['sae']!r:.80}: clamps is no list of {MOST_CLAMPS} at most; give one")
        made = tuple(_clamp(str(item["sae"]), clamp) for clamp in clamps)
        more = {key: item[key] for key in ("mode", "phase", "log") if key in item}
        found.append(SAESteering(item["sae"], made, **more))
    return found


def _clamp(sae: str, given: object) -> FeatureClamp:
    known = {field.name for field in fields(FeatureClamp)}
    if not isinstance(given, Mapping) or set(given) - known or not {"feature", "value"} <= set(given):
        raise SpecError(f"a clamp of {sae!r:.80} is {given!r:.80}; give an object with {', '.join(sorted(known))}")
    return FeatureClamp(**given)
