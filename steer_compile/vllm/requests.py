"""What a request may ask for: ``SamplingParams(extra_args={"steer": {...}})``, or ``vllm_xargs`` over HTTP.

Declarative data only::

    {"named": ["calm", ["formal", -0.5]],               registered vector sets, with factors
     "base": {"post_block": {"3": [0.1, ...]}},         vectors for all tokens; also "prefill" and "decode"
     "decode": {"post_block": {"3": {"dtype": "float16", "shape": [64], "data": "<base64>"}},
                "post_attn": {"layers": [0, 1], "dtype": "float16", "shape": [2, 64], "data": "<base64>"}},
     "scale": 2.0,
     "tokens": {"spans": [[0, 5]], "last_prompt": true, "generated": true},
     "monitors": {"layers.3.post_block": {"probe": [...], "threshold": 0.5, "sharpness": 4.0}},
     "clamps": {"layers.3.post_block": [{"direction": [...], "lo": -1.0, "hi": 1.0}]},
     "features": [{"sae": "bridge", "clamps": [{"feature": 12, "value": 8.0}]}],    as in `autoencoders`
     "gates": [{"when": ..., "scope": ..., "apply": ...}],    as in `steer_compile.dynamic.gates`
     "conversation": "chat 12",                         what the request belongs to
     "capture": {"sites": {"post_block": [3, 5]}, "tokens": {"last_prompt": true}, "name": "run 7"}}

A capture's fields are those of `steer_compile.vllm.capture_requests`.
"""

from __future__ import annotations

import binascii
import json
import math
from collections.abc import Mapping
from typing import Any

import pybase64
import torch

from steer_compile.errors import SpecError, VectorError
from steer_compile.runtime.gates import Clamp, Monitor
from steer_compile.runtime.steering import Steering
from steer_compile.runtime.vectors import TokenSelection
from steer_compile.vllm.autoencoders import features_of
from steer_compile.vllm.request_gates import GatesAsked

KEY = "steer"
"""Key of a request's steering in ``extra_args`` and ``vllm_xargs``."""
CAPTURE = "steer_capture"
"""Key under which the front end puts where a request's captured rows will be."""
DIGESTS = "steer_digests"
"""Key under which the front end puts the digest of a request's steering in each phase, "" for none."""
SAES = "steer_saes"
"""Key under which the front end puts the numbers of the autoencoders that a request uses."""
OVERRIDE = "override"
"""Key beside these: whether the request may need a row for overrides."""
MAX_NUMBERS = 1 << 26
"""Most numbers of one packed piece."""
MOST_NAMES, MOST_SPANS = 16, 64
"""Most named sets and spans of a request: the engine handles each in every step or row."""

_FIELDS = {"named", "base", "prefill", "decode", "scale", "tokens", "monitors", "clamps", "features"}
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


def parse(given: object) -> Steering:
    """A request's steering from plain data or its JSON text.

    Raises:
        SpecError: unknown fields, or data of another form. VectorError: bad vectors or numbers.
    """
    data = object_of("steer", _decoded(given))
    unknown = sorted(set(data) - _FIELDS)
    if unknown:
        raise SpecError(f"steer has the unknown field {unknown[0]!r}; the fields are {', '.join(sorted(_FIELDS))}")
    tiers = {tier: _vectors(tier, data[tier]) for tier in ("base", "prefill", "decode") if tier in data}
    return Steering(
        **tiers,
        named=_named(data.get("named", ())),
        scale=data.get("scale", 1.0),
        tokens=tokens_of(data["tokens"]) if data.get("tokens") is not None else None,
        monitors={site: _monitor(item) for site, item in object_of("monitors", data.get("monitors", {})).items()},
        clamps={site: _clamps(items) for site, items in object_of("clamps", data.get("clamps", {})).items()},
        features=features_of(data.get("features", [])),
    )


def parts(given: object) -> tuple[dict[str, Any], GatesAsked | None, object]:
    """A request's steering without its gates and ``capture``, for `parse`, and these; None for no capture.

    Raises:
        SpecError, VectorError: data of another form, or gates that cannot be.
    """
    data = object_of("steer", _decoded(given))
    asked, gates = data.pop("capture", None), GatesAsked.taken(data)
    return data, gates, asked


def digests(extra_args: object) -> tuple[str, str]:
    """Digests of a request that the front end let in, in prefill and in decode; "" for nothing of its own."""
    given = extra_args.get(DIGESTS) if isinstance(extra_args, Mapping) and KEY in extra_args else None
    return (str(given["prefill"]), str(given["decode"])) if isinstance(given, Mapping) else ("", "")


def overrides(extra_args: object) -> bool:
    """Whether a request that the front end let in may need a row of the pool of overrides for what it declares."""
    given = extra_args.get(DIGESTS) if isinstance(extra_args, Mapping) and KEY in extra_args else None
    return isinstance(given, Mapping) and bool(given.get(OVERRIDE))


def used_saes(extra_args: object) -> frozenset[int]:
    """Numbers of the autoencoders of a request that the front end let in."""
    given = extra_args.get(SAES) if isinstance(extra_args, Mapping) and KEY in extra_args else None
    return frozenset(given) if isinstance(given, list) else frozenset()


def _decoded(given: object) -> object:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, and lists in lists
        raise SpecError(
            f"steer is text that is not JSON ({error}); give an object such as {{'named': [...]}}"
        ) from error


def object_of(name: str, given: object) -> dict[str, Any]:
    """The fields of an object, `SpecError` where it is none."""
    if not isinstance(given, Mapping):
        raise SpecError(f"{name} is a {type(given).__name__}; give an object")
    return {str(key): value for key, value in given.items()}


def _named(given: object) -> list[str | tuple[str, float]]:
    items = [given] if isinstance(given, str) else given
    if not isinstance(items, list | tuple):
        raise SpecError(f"named is a {type(given).__name__}; give names or pairs of a name and a factor")
    if len(items) > MOST_NAMES:
        raise SpecError(f"named has {len(items)} vector sets, and {MOST_NAMES} are the most; add some up beforehand")
    return [tuple(item) if isinstance(item, list) else item for item in items]


def _vectors(tier: str, given: object) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for hook, by_layer in object_of(tier, given).items():
        if isinstance(by_layer, Mapping) and "layers" in by_layer:
            found[hook] = _layers(f"{tier} of {hook}", by_layer)
        elif isinstance(by_layer, Mapping) and "data" not in by_layer:
            found[hook] = {layer: vector_of(f"{tier} of {hook} at {layer}", v) for layer, v in by_layer.items()}
        else:
            found[hook] = vector_of(f"{tier} of {hook}", by_layer)
    return found


def _layers(name: str, given: Mapping[str, Any]) -> dict[Any, torch.Tensor]:
    """Vectors of several layers that are packed in one piece."""
    layers = given["layers"]
    rows = unpacked(name, {key: value for key, value in given.items() if key != "layers"}, 2)
    if not isinstance(layers, list) or len(layers) != len(rows):
        raise VectorError(f"{name} has layers={layers!r} for {len(rows)} packed vectors; give one layer for each")
    if len({str(layer) for layer in layers}) != len(layers):
        raise VectorError(f"{name} gives a layer twice in layers={layers!r}; give each once")
    return dict(zip(map(str, layers), rows.unbind(), strict=True))


def vector_of(name: str, given: object) -> Any:
    """Numbers, or a packed vector unpacked; `vector_set` checks them."""
    return unpacked(name, given, 1) if isinstance(given, Mapping) else given


def unpacked(name: str, given: Mapping[str, Any], dims: int) -> torch.Tensor:
    if set(given) != {"dtype", "shape", "data"} or str(given["dtype"]) not in _DTYPES:
        raise VectorError(
            f"{name} is no packed vector; give dtype ({', '.join(_DTYPES)}), shape and data (base64, little-endian)"
        )
    shape, dtype = given["shape"], _DTYPES[str(given["dtype"])]
    whole = isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in shape)
    if not whole or len(shape) != dims:
        raise VectorError(f"{name} has the packed shape {shape!r}; give {dims} dimension{'s' if dims > 1 else ''}")
    numbers = math.prod(shape)
    if numbers > MAX_NUMBERS:
        raise VectorError(f"{name} has {numbers} numbers; {MAX_NUMBERS} are the most")
    packed = given["data"]
    try:
        data = packed if isinstance(packed, bytes) else pybase64.b64decode(str(packed), validate=True)
    except (binascii.Error, ValueError) as error:
        raise VectorError(f"{name} holds data that is not base64: {error}") from error
    if len(data) != numbers * dtype.itemsize:
        raise VectorError(f"{name} holds {len(data)} bytes for {numbers} numbers of {given['dtype']}; give all")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def tokens_of(given: object) -> TokenSelection:
    """The steered tokens of plain data, `SpecError` where they cannot be."""
    data = object_of("tokens", given)
    unknown = sorted(set(data) - {"spans", "last_prompt", "generated"})
    if unknown:
        raise SpecError(f"tokens has the unknown field {unknown[0]!r}; give spans, last_prompt, generated")
    spans = data.get("spans", [])
    if not isinstance(spans, list):
        raise SpecError(f"tokens has spans={spans!r}; give pairs such as [[0, 5]]")
    if len(spans) > MOST_SPANS:
        raise SpecError(f"tokens has {len(spans)} spans, and {MOST_SPANS} are the most; join some")
    flags = [data.get(name, False) for name in ("last_prompt", "generated")]
    if not all(isinstance(flag, bool) for flag in flags):
        raise SpecError(f"tokens has last_prompt={flags[0]!r} and generated={flags[1]!r}; give true or false")
    return TokenSelection(tuple(spans), *flags)


def _monitor(given: object) -> Monitor:
    data = _arguments("a monitor", given, {"probe", "threshold", "sharpness", "kind", "low", "high", "clamps"}, "probe")
    return Monitor(vector_of("the probe of a monitor", data.pop("probe")), **data)


def _clamps(given: object) -> list[Clamp]:
    if not isinstance(given, list):
        raise SpecError(f"clamps of a site are a {type(given).__name__}; give a list")
    made = []
    for item in given:
        data = _arguments("a clamp", item, {"direction", "lo", "hi", "value", "strength"}, "direction")
        made.append(Clamp(vector_of("the direction of a clamp", data.pop("direction")), **data))
    return made


def _arguments(name: str, given: object, known: set[str], needed: str) -> dict[str, Any]:
    data = object_of(name, given)
    unknown = sorted(set(data) - known)
    if unknown or needed not in data:
        raise SpecError(f"{name} has the fields {', '.join(sorted(data)) or 'none'}; give {', '.join(sorted(known))}")
    return data
