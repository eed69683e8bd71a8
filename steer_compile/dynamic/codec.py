"""Vectors, monitors and clamps as plain data: what JSON holds, with vectors as lists of numbers or packed in base64."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from steer_compile.errors import SpecError, VectorError
from steer_compile.runtime.gates import Clamp, Clamps, Monitor, Monitors, clamps_by_site, monitors_by_site
from steer_compile.runtime.vectors import SiteKey, VectorSet, named_set, site_key, vector_set

MOST_NUMBERS = 1 << 24
"""Most numbers of one packed vector."""
MOST_SITES, MOST_NAMES = 1024, 16
"""Most sites and named sets of one action or gate."""

Data = dict[str, Any]


def site_name(site: SiteKey) -> str:
    """``layers.3.post_block`` of ``("post_block", 3)``."""
    return f"layers.{site[1]}.{site[0]}"


def fields_of(what: str, given: object, known: Iterable[str], needed: Iterable[str] = ()) -> Data:
    """The fields of an object of plain data.

    Raises:
        SpecError: it is no object, has unknown fields or lacks needed ones.
    """
    names = list(known)
    if not isinstance(given, Mapping):
        raise SpecError(f"{what} is a {type(given).__name__}; give an object with {', '.join(names)}")
    data = {str(key): value for key, value in given.items()}
    unknown, absent = sorted(set(data) - set(names)), [name for name in needed if name not in data]
    if unknown or absent:
        wrong = f"has the unknown field {unknown[0]!r}" if unknown else f"lacks the field {absent[0]!r}"
        raise SpecError(f"{what} {wrong}; the fields are {', '.join(names)}")
    return data


def text_of(what: str, given: object, most: int = 512) -> str:
    """Raise `SpecError` for what is no text, empty, too long, or with half a character, which no encoding has."""
    if not isinstance(given, str) or not 0 < len(given) <= most or any("\ud800" <= c <= "\udfff" for c in given):
        raise SpecError(f"{what} is {given!r:.80}; give a text of 1 to {most} characters")
    return given


def plain_text_of(what: str, given: object, most: int = 1 << 20) -> str:
    """An object of plain data as JSON text of at most ``most`` characters.

    Raises:
        SpecError: it is no such object.
    """
    if not isinstance(given, Mapping) or not all(isinstance(key, str) for key in given):
        raise SpecError(f"{what} are no object; give {{name: plain data}}")
    try:
        text = json.dumps(given, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise SpecError(f"{what} are no plain data ({error}); give what JSON has") from error
    if len(text) > most:
        raise SpecError(f"{what} have {len(text)} characters; {most} are the most")
    return text


def digest_of(*parts: object) -> str:
    """Digest of texts, numbers and tuples of them, whose ``repr`` tells each from its neighbours."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def packed(vector: torch.Tensor) -> Data:
    """A 1-D fp32 tensor as ``{"dtype", "shape", "data"}`` with little-endian base64."""
    data = vector.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes()
    return {"dtype": "float32", "shape": [vector.numel()], "data": base64.b64encode(data).decode()}


_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def unpacked(what: str, given: object) -> Any:
    """A vector of `packed`; anything else is left for the checks of `vector_set`, `Monitor` and `Clamp`.

    Raises:
        SpecError, VectorError: packed data of another form.
    """
    if not isinstance(given, Mapping):
        return given
    data = fields_of(what, given, ("dtype", "shape", "data"), ("dtype", "shape", "data"))
    shape, dtype = data["shape"], _DTYPES.get(str(data["dtype"]))
    whole = isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int) and not isinstance(shape[0], bool)
    if dtype is None or not whole or not 0 < shape[0] <= MOST_NUMBERS:
        raise VectorError(
            f"{what} has dtype {data['dtype']!r} and shape {shape!r:.80}; give one of {', '.join(_DTYPES)} and one "
            f"dimension of at most {MOST_NUMBERS}"
        )
    try:
        raw = base64.b64decode(str(data["data"]), validate=True)
    except (binascii.Error, ValueError) as error:
        raise VectorError(f"{what} holds data that is not base64: {error}; give little-endian base64") from error
    if len(raw) != shape[0] * dtype.itemsize:
        raise VectorError(f"{what} holds {len(raw)} bytes for {shape[0]} numbers of {data['dtype']}; give all")
    with torch.inference_mode(False):
        return torch.frombuffer(bytearray(raw), dtype=dtype)


def vectors_to_data(vectors: VectorSet) -> Data:
    return {site_name(site): packed(vector) for site, vector in vectors.items()}


def vectors_from_data(what: str, given: object) -> VectorSet:
    """Vectors of ``{"layers.3.post_block": vector}`` or ``{hook: {layer: vector}}``.

    Raises:
        SpecError, VectorError: data of another form, or bad vectors.
    """
    if given is None or isinstance(given, VectorSet):
        return given or VectorSet()
    found: dict[Any, Any] = {}
    for key, value in _bounded(what, given).items():
        if isinstance(value, Mapping) and "data" not in value:
            layers = _bounded(f"{what} of {key}", value)
            found[key] = {layer: unpacked(f"{what} of {key} at {layer}", item) for layer, item in layers.items()}
        else:
            found[key] = unpacked(f"{what} of {key}", value)
    return vector_set(found)


def _bounded(what: str, given: object) -> dict[str, Any]:
    if not isinstance(given, Mapping) or len(given) > MOST_SITES:
        size = f" of {len(given)}" if isinstance(given, Mapping) else ""
        raise SpecError(f"{what} is a {type(given).__name__}{size}; give an object by site, of {MOST_SITES} at most")
    return {str(key): value for key, value in given.items()}


def named_from_data(what: str, given: object) -> tuple[tuple[str, float], ...]:
    """Names of vector sets and factors: a name, or a list of names and pairs.

    Raises:
        SpecError, VectorError: data of another form.
    """
    items = [given] if isinstance(given, str) else given
    if not isinstance(items, list | tuple) or len(items) > MOST_NAMES:
        raise SpecError(f"{what} is {given!r:.80}; give up to {MOST_NAMES} names, or pairs of a name and a factor")
    return tuple(named_set(tuple(item) if isinstance(item, list) else item) for item in items)


def monitor_to_data(monitor: Monitor) -> Data:
    """Raises `SpecError` for hidden units, which are no plain data of an action."""
    if monitor.hidden is not None:
        raise SpecError("a monitor with hidden units cannot be sent as data; set it with set_monitor")
    found: Data = {"probe": packed(monitor.probe), "threshold": monitor.threshold, "sharpness": monitor.sharpness}
    if (monitor.kind, monitor.clamps) == ("sigmoid", False):
        return found
    names = {"line": ("low", "high"), "step": ("low",), "sigmoid": ()}[monitor.kind]
    bounds = {name: vars(monitor)[name] for name in names}
    plain = {name: bound if math.isfinite(bound) else str(bound) for name, bound in bounds.items()}  # as JSON has none
    return {**found, "kind": monitor.kind, "clamps": monitor.clamps, **plain}


def monitor_from_data(what: str, given: object) -> Monitor:
    """Raises `SpecError` or `VectorError` for data that is no monitor."""
    if isinstance(given, Monitor):
        return given
    data = fields_of(what, given, ("probe", "threshold", "sharpness", "kind", "low", "high", "clamps"), ("probe",))
    return Monitor(unpacked(f"the probe of {what}", data.pop("probe")), **data)


def monitors_from_data(what: str, given: object) -> Monitors:
    """Raises `SpecError` or `VectorError` for data that is no monitors by site."""
    found = _bounded(what, given or {})
    return monitors_by_site({site_key(site): monitor_from_data(f"{what} at {site}", m) for site, m in found.items()})


def clamp_to_data(clamp: Clamp) -> Data:
    bounds = {"lo": clamp.lo, "hi": clamp.hi}
    data = {name: bound for name, bound in bounds.items() if math.isfinite(bound)}
    return {"direction": packed(clamp.direction), **data, "strength": clamp.strength}


def clamps_from_data(what: str, given: object) -> Clamps:
    """Raises `SpecError` or `VectorError` for data that is no lists of clamps by site."""
    found: dict[SiteKey, list[Clamp]] = {}
    for site, items in _bounded(what, given or {}).items():
        if not isinstance(items, list | tuple) or len(items) > MOST_NAMES:
            raise SpecError(f"{what} at {site} is {items!r:.80}; give a list of {MOST_NAMES} clamps at most")
        found[site_key(site)] = [_clamp(f"a clamp of {what} at {site}", item) for item in items]
    return clamps_by_site(found)


def _clamp(what: str, given: object) -> Clamp:
    if isinstance(given, Clamp):
        return given
    data = fields_of(what, given, ("direction", "lo", "hi", "value", "strength"), ("direction",))
    return Clamp(unpacked(f"the direction of {what}", data.pop("direction")), **data)
