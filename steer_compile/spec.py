"""`SteerSpec`: what a compiled graph may do and where. Static only; vectors, rows and gains are run-time data."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypedDict, Unpack

import tomli_w
import torch

from steer_compile.errors import SpecError
from steer_compile.hooks import COEFFICIENT_HOOKS, parse_hook

Layers: TypeAlias = str | tuple[int, ...]
LayersLike: TypeAlias = str | int | Iterable[int]
OP_FAMILIES = (
    "patch", "add", "tier", "monitor", "row_monitor", "clamp", "sae", "sae_full", "sae_log", "score", "memory", "mlp",
)  # fmt: skip
NEEDS = {
    "sae_log": ("sae_full",),
    "score": ("monitor", "row_monitor"),
    "memory": ("monitor", "row_monitor"),
    "mlp": ("monitor",),
}
"""Op families that add to another one: one of these must be there."""
LOWERINGS = ("auto", "compiler", "template")
PLACEMENTS = ("before_norm", "after_norm")
RESERVED_ROWS = 3
"""Row 0 is zeros, row 1 the global prefill tier, row 2 the global decode tier."""
SEQUENCES = 256
"""Requests with gates of their own memory, where the spec does not say how many."""
HIDDEN = 16
"""Hidden units of a probe, where the spec does not say how many."""
PATCHES = 64
"""Rows that a site can be patched with at once, where the spec does not say how many."""
FEATURES = 64
"""Features that may be clamped at a site, where the spec does not say how many."""
MAX_TOP_FEATURES = 1024
"""Most features of a token that are put in order."""
SAES = {"saes": 1, "sae_features": 16384, "sae_tokens": 256, "top_features": 16}
"""Room for whole autoencoders at a site, where the spec does not say how much."""
CAPTURE_GROUPS = 64
"""Distinct sets of sites that packed captures of one call may have."""
_SPAN = re.compile(r"(-?\d+)(?:-(-?\d+))?")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)(?::(\d+))?")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def parse_layers(value: object) -> Layers:
    """``"all"`` or a tuple of layer numbers, negative ones counting from the end.

    Accepts ``"all"``, an int, a list, a ``range`` and strings such as ``"0-3,7,-1"`` or ``"2:8:2"``.

    Raises:
        SpecError: the value selects nothing or cannot be read.
    """
    if value == "all":
        return "all"
    numbers: list[int] = []
    if isinstance(value, bool | Mapping) or not isinstance(value, int | Iterable):
        raise SpecError(f"layers={value!r} is not a layer selection; use 'all', a number, a list or '0-3,7'")
    if isinstance(value, int):
        numbers = [value]
    elif isinstance(value, str):
        for part in value.split(","):
            numbers += _parse_part(part.strip(), value)
    else:
        for item in value:
            if isinstance(item, bool) or not isinstance(item, int):
                raise SpecError(f"layers={value!r} holds {item!r}, which is no layer number; give whole numbers")
            numbers.append(item)
    if not numbers:
        raise SpecError(f"layers={value!r} selects no layer; use 'all', a number, a list or '0-3,7'")
    return tuple(dict.fromkeys(numbers))


def parse_ops(value: object, where: str) -> tuple[str, ...]:
    """Op families, each once, in the order in which they act.

    Raises:
        SpecError: an unknown family, or none.
    """
    given = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, Iterable) else (value,)
    unknown = [op for op in given if op not in OP_FAMILIES]
    if unknown or not given:
        raise SpecError(f"{where}: unknown op family {unknown or '()'}; the families are {', '.join(OP_FAMILIES)}")
    for op, needed in NEEDS.items():
        if op in given and not set(needed) & set(given):
            what = "a probe" if "monitor" in needed else "another one"
            raise SpecError(f"{where}: the op family {op!r} needs {what}; add {' or '.join(map(repr, needed))}")
    return tuple(op for op in OP_FAMILIES if op in given)


def _one_of(name: str, value: object, known: tuple[str, ...]) -> str:
    if value not in known:
        raise SpecError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}")
    return str(value)


def _capacity(name: str, value: object, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SpecError(f"{name}={value!r} is no capacity; give a whole number of at least {least}")
    return value


def _capacities(rows: object, max_tokens: object, options: Mapping[str, Any]) -> dict[str, Any]:
    """How much room there is, by field."""
    none = {"overrides": 0, "capture_rows": 0}
    some = {"clamps": 4, "sequences": SEQUENCES, "hidden": HIDDEN, "patches": PATCHES, "features": FEATURES, **SAES}
    found = {"rows": _capacity("rows", rows), "max_tokens": _capacity("max_tokens", max_tokens)}
    found |= {name: _capacity(name, options.get(name, default)) for name, default in some.items()}
    if found["top_features"] > MAX_TOP_FEATURES:
        raise SpecError(
            f"top_features={found['top_features']} is more than {MAX_TOP_FEATURES}, the most that are ordered"
        )
    return found | {name: _capacity(name, options.get(name, default), 0) for name, default in none.items()}


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SpecError(f"{name}={value!r} is neither true nor false; give one of them")
    return value


def _check_steered(hook: str) -> None:
    if hook in COEFFICIENT_HOOKS:
        raise SpecError(
            f"{hook} holds weights by which streams are mixed, and is captured only; name it in capture, or steer "
            "mhc_streams_pre_attn, mhc_streams_pre_mlp or mhc_streams_final"
        )


def _parse_part(part: str, whole: str) -> list[int]:
    """Numbers of ``7``, ``0-3`` (both ends included) or ``2:8:2`` (as in Python)."""
    span, cut = _SPAN.fullmatch(part), _SLICE.fullmatch(part)
    numbers: list[int] = []
    if span is not None:
        numbers = list(range(int(span[1]), int(span[2] or span[1]) + 1))
    elif cut is not None and int(cut[3] or 1):
        numbers = list(range(int(cut[1] or 0), int(cut[2]), int(cut[3] or 1)))
    if not numbers or numbers[0] < 0 <= numbers[-1]:
        raise SpecError(f"layers={whole!r} cannot be read at {part!r}; write for example '0-3,7,-1' or '2:8:2'")
    return numbers


@dataclass(frozen=True, init=False)
class HookSelection:
    """One hook at some layers. ``ops`` are the op families that a steered hook may use.

    Raises:
        SpecError: an unknown hook or op family, or layers that `parse_layers` cannot read.
    """

    hook: str
    layers: Layers
    ops: tuple[str, ...]

    def __init__(self, hook: str, layers: LayersLike = "all", ops: str | Iterable[str] = ("add",)) -> None:
        object.__setattr__(self, "hook", parse_hook(hook))
        object.__setattr__(self, "layers", parse_layers(layers))
        object.__setattr__(self, "ops", parse_ops(ops, self.hook))

    def to_dict(self) -> dict[str, Any]:
        layers: Any = self.layers if isinstance(self.layers, str) else list(self.layers)
        return {"hook": self.hook, "layers": layers, "ops": list(self.ops)}


Selections: TypeAlias = str | HookSelection | Iterable[str | HookSelection | Mapping[str, Any]]


class SpecOptions(TypedDict, total=False):
    """The rarer fields of `SteerSpec`, given by keyword."""

    dtype: str | torch.dtype | None
    placement: str
    ops: str | Iterable[str]
    clamps: int
    lowering: str
    overrides: int
    sequences: int
    cross_layer: bool
    hidden: int
    patches: int
    capture_rows: int
    features: int
    saes: int
    sae_features: int
    sae_tokens: int
    top_features: int


@dataclass(frozen=True, init=False)
class SteerSpec:
    """Which hook points are steered and captured, and how much room there is. Frozen and hashable.

    Attributes:
        steer: hooks that may be steered: names, or `HookSelection` with layers and op families of their own; a layer in
            several selections of a hook has the families of all of them.
        capture: hooks whose pristine value is stored in every call.
        layers: layers of hooks given by name: ``"all"``, a list, a range, ``"0-3,-1"``.
        rows: distinct request configurations (content and phase) that may be active at once.
        max_tokens: most tokens (batch times length) of one call.
        dtype: dtype of the vector tables; None is the stream's own.
        placement: ``before_norm``: a steer at a stream hook changes all that reads the value. ``after_norm``: at
            ``pre_attn`` and ``post_attn`` it changes the skip path only, not the branch that follows.
        ops: op families of hooks given by name: ``patch`` (rows in place of values), ``add`` (vectors), ``tier`` (a
            dynamic vector of each site, decoded tokens only), ``monitor`` (a probe of each site), ``row_monitor`` (a
            probe of each row and site), ``clamp``, ``sae`` (features of sparse autoencoders are clamped), ``sae_full``
            (values are decoded from all features, those of TopK autoencoders too) and beside it ``sae_log`` (each
            token's largest features are stored); beside a monitor ``score`` (each token's scores are stored),
            ``memory`` (step gates remember, for each sequence, whether they are open) and ``mlp`` (the site's probe
            has hidden units).
        clamps: clamp directions of each row at a site.
        lowering: ``compiler``: plain operators, which Inductor fuses. ``template``: one Triton kernel a site.
            ``auto``: the one that costs less, site by site (`Edit.why` says which and why).
        overrides: rows of a pool apart from ``rows``, to which controllers route requests while they decode.
        sequences: requests that are told apart by gates with a memory (`Monitor`, kind ``step``).
        cross_layer: gates of a monitor hold at its site and at all sites behind it in the same call. Memory and
            hidden units need it.
        hidden: most hidden units of a probe (`Hidden`).
        patches: distinct rows that one site can be patched with at once.
        capture_rows: most tokens of one call that are stored, where captures are packed: which tokens, and at which
            sites, is then run-time data. 0: captures are dense, every token of a call at every site.
        features: features that may be clamped at one site, of all its autoencoders together.
        saes: autoencoders that one site has room for as a whole (``sae_full``).
        sae_features: features of each of them at most.
        sae_tokens: most tokens of one call that are decoded from features at one site.
        top_features: features that are stored of each token (``sae_log``).

    Raises:
        SpecError: an unknown hook, layer selection, dtype, placement, op family or lowering, or a capacity below one.
    """

    steer: tuple[HookSelection, ...]
    capture: tuple[HookSelection, ...]
    layers: Layers
    rows: int
    max_tokens: int
    dtype: str | None
    placement: str
    ops: tuple[str, ...]
    clamps: int
    lowering: str
    overrides: int
    sequences: int
    cross_layer: bool
    hidden: int
    patches: int
    capture_rows: int
    features: int
    saes: int
    sae_features: int
    sae_tokens: int
    top_features: int

    def __init__(
        self,
        steer: Selections = (),
        capture: Selections = (),
        layers: LayersLike = "all",
        rows: int = 8,
        max_tokens: int = 8192,
        **options: Unpack[SpecOptions],
    ) -> None:
        unknown = sorted(set(options) - set(SpecOptions.__annotations__))
        if unknown:
            raise SpecError(f"unknown key {unknown[0]!r} in the spec; the keys are {', '.join(sorted(KEYS))}")
        dtype = options.get("dtype")
        name = str(dtype).removeprefix("torch.") if dtype is not None else None
        if name is not None and name not in _DTYPES:
            raise SpecError(f"dtype={dtype!r} is no table dtype; choose one of {', '.join(_DTYPES)} or None")
        object.__setattr__(self, "ops", parse_ops(options.get("ops", ("add",)), "ops"))
        object.__setattr__(self, "layers", parse_layers(layers))
        object.__setattr__(self, "steer", self._selections(steer, "steer"))
        object.__setattr__(self, "capture", self._selections(capture, "capture"))
        if not self.steer and not self.capture:
            raise SpecError("the spec names no hook; give steer=('post_block',) or capture=('post_block',)")
        fields = {"dtype": name, **_capacities(rows, max_tokens, options)}
        fields |= {
            "placement": _one_of("placement", options.get("placement", "before_norm"), PLACEMENTS),
            "lowering": _one_of("lowering", options.get("lowering", "auto"), LOWERINGS),
            "cross_layer": _flag("cross_layer", options.get("cross_layer", False)),
        }
        for field, value in fields.items():
            object.__setattr__(self, field, value)
        if self.capture_rows and not self.capture:
            raise SpecError(
                f"capture_rows={self.capture_rows} and the spec captures nothing; give capture=('post_block',), or "
                "leave it out"
            )
        alone = [s for s in self.steer if {"memory", "mlp"} & set(s.ops)]
        if alone and not self.cross_layer:
            raise SpecError(
                f"{alone[0].hook} has the op families {', '.join(alone[0].ops)}: gates with a memory or with hidden "
                "units are computed once for the sites behind them; set cross_layer=True"
            )

    def _selections(self, given: object, what: str) -> tuple[HookSelection, ...]:
        items = (given,) if isinstance(given, str | HookSelection | Mapping) else given
        if not isinstance(items, Iterable):
            raise SpecError(f"{what}={given!r} is no list of hooks; give for example {what}=('post_block',)")
        chosen: dict[object, HookSelection] = {}
        for item in items:
            selection = self._selection(item)
            if what == "steer":
                _check_steered(selection.hook)
            place = (selection.hook, selection.layers) if what == "steer" else selection.hook
            if place in chosen:
                raise SpecError(f"{what} names the hook {selection.hook} twice; merge the two layer selections")
            chosen[place] = selection
        return tuple(chosen.values())

    def _selection(self, item: object) -> HookSelection:
        if isinstance(item, HookSelection):
            return item
        if isinstance(item, str):
            return HookSelection(item, self.layers, self.ops)
        if isinstance(item, Mapping) and set(item) <= {"hook", "layers", "ops"} and "hook" in item:
            return HookSelection(item["hook"], item.get("layers", self.layers), item.get("ops", self.ops))
        raise SpecError(f"{item!r} is no hook selection; give a hook name or HookSelection(hook, layers)")

    @property
    def all_rows(self) -> int:
        """Rows of the tables: reserved ones, those of configurations, and those of overrides."""
        return RESERVED_ROWS + self.rows + self.overrides

    def table_dtype(self, stream: torch.dtype) -> torch.dtype:
        """Dtype of the vector table beside a stream of dtype ``stream``."""
        return _DTYPES[self.dtype] if self.dtype is not None else stream

    def with_capture(self, *hooks: str) -> SteerSpec:
        """The same spec that also captures ``hooks``."""
        return replace(self, capture=(*self.capture, *(HookSelection(h, self.layers) for h in hooks)))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: strings, numbers, lists."""
        data: dict[str, Any] = {
            "steer": [s.to_dict() for s in self.steer],
            "capture": [s.to_dict() for s in self.capture],
            "layers": self.layers if isinstance(self.layers, str) else list(self.layers),
            "rows": self.rows,
            "max_tokens": self.max_tokens,
            "placement": self.placement,
            "ops": list(self.ops),
            "clamps": self.clamps,
            "lowering": self.lowering,
        }
        rarer = {"dtype": None, "overrides": 0, "sequences": SEQUENCES, "cross_layer": False, "hidden": HIDDEN}
        rarer |= {"patches": PATCHES}
        rarer |= {"capture_rows": 0, "features": FEATURES, **SAES}
        return data | {key: vars(self)[key] for key, default in rarer.items() if vars(self)[key] != default}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SteerSpec:
        """Inverse of `to_dict`.

        Raises:
            SpecError: unknown keys or values.
        """
        unknown = sorted(set(data) - KEYS)
        if unknown:
            raise SpecError(f"unknown key {unknown[0]!r} in the spec; the keys are {', '.join(sorted(KEYS))}")
        return cls(**dict(data))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SteerSpec:
        """Raises `SpecError` for text that is not a JSON object of spec keys."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise SpecError(f"the spec is not JSON: {error}; write what SteerSpec.to_json gives") from error
        if not isinstance(data, dict):
            raise SpecError(
                f'the spec is a JSON {type(data).__name__}; give an object such as {{"steer": ["post_block"]}}'
            )
        return cls.from_dict(data)

    def to_toml(self) -> str:
        return tomli_w.dumps(self.to_dict())

    @classmethod
    def from_toml(cls, text: str) -> SteerSpec:
        """Raises `SpecError` for text that is not a TOML table of spec keys."""
        try:
            return cls.from_dict(tomllib.loads(text))
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"the spec is not TOML: {error}; write what SteerSpec.to_toml gives") from error


KEYS = {"steer", "capture", "layers", "rows", "max_tokens", *SpecOptions.__annotations__}
"""Keys of a spec as plain data."""
