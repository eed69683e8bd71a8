"""What a request may ask to be captured, and how that crosses to the engine.

{"sites": {"post_block": [3, 5]},        or names such as "layers.3.post_block", and "layers.3.post_block.features"
                                         for logged features; all sites, and all that is logged, where left out
 "tokens": {"spans": [[0, 5]], "last_prompt": true, "generated": true,
            "every": 4, "positions": [7, 90],
            "top": {"count": 5, "site": "layers.3.post_block", "probe": [...]}},
 "reduce": ["norm", "project"],          some of rows (what is kept where left out), norm, project, or mean alone
 "directions": {"layers.3.post_block": [[...], ...]},
 "to": "acts",                           one of the engine's consumers; a file where left out
 "tag": "train",                         for consumers that sort requests by tags
 "name": "run 7"}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steer_compile.capture.reduce import MOST_DIRECTIONS, Reduction
from steer_compile.capture.selection import Selection, Top
from steer_compile.errors import SpecError
from steer_compile.runtime.vectors import SiteKey, TokenSelection, site_key
from steer_compile.vllm.logged import capture_key
from steer_compile.vllm.requests import object_of, tokens_of, vector_of

MOST_POSITIONS = 4096
"""Most explicit positions of a request."""
_FIELDS = {"sites", "tokens", "reduce", "directions", "to", "tag", "name"}
_MORE = {"every", "positions", "top"}
"""Fields of the captured tokens that those of steered ones do not have."""


@dataclass(frozen=True)
class CaptureAsked:
    """What a request's ``capture`` says: sites (None for all that the engine has), tokens, what is kept of them, the
    consumer and a tag for it, and a name."""

    sites: tuple[SiteKey, ...] | None = None
    tokens: Selection = Selection()
    keep: Reduction = Reduction()
    to: str = ""
    tag: str = ""
    name: str = ""

    @classmethod
    def of(cls, asked: object) -> CaptureAsked:
        """Raises `SpecError` or `VectorError` for data of another form."""
        fields = object_of("capture", asked)
        unknown = sorted(set(fields) - _FIELDS)
        if unknown:
            raise SpecError(f"capture has the unknown field {unknown[0]!r}; give {', '.join(sorted(_FIELDS))}")
        texts = {field: fields.get(field, "") for field in ("to", "tag", "name")}
        for field, text in texts.items():
            if not isinstance(text, str):
                raise SpecError(f"capture has {field}={text!r:.80}; give text")
        given = fields.get("tokens")
        tokens = Selection() if given is None else _selection(given)
        keep = _reduction(fields.get("reduce"), fields.get("directions"))
        keep.check_top(tokens.top)
        return cls(_sites(fields.get("sites")), tokens, keep, **texts)


@dataclass(frozen=True)
class CaptureRequest:
    """What the engine keeps for one request: some sites at some of its tokens, for a file or consumer, by a name."""

    name: str
    sites: tuple[SiteKey, ...]
    tokens: Selection = Selection()
    keep: Reduction = Reduction()
    to: str = ""
    tag: str = ""

    def to_data(self) -> list[Any]:
        """Plain data that crosses processes."""
        tokens, top = self.tokens.tokens, self.tokens.top
        spans = None if tokens is None else [[list(s) for s in tokens.spans], tokens.last_prompt, tokens.generated]
        more = None if top is None else [top.count, list(top.site), _bytes(top.probe)]
        directions = [[list(site), len(rows), _bytes(rows)] for site, rows in self.keep.directions.items()]
        return [
            self.name,
            [list(site) for site in self.sites],
            [spans, self.tokens.every, list(self.tokens.positions), more],
            [list(self.keep.kinds), directions],
            self.to,
            self.tag,
        ]

    @classmethod
    def of_data(cls, data: Sequence[Any]) -> CaptureRequest:
        """The request of `to_data`."""
        name, sites, (spans, every, positions, more), (kinds, directions), to, tag = data
        tokens = None if spans is None else TokenSelection(tuple(tuple(s) for s in spans[0]), spans[1], spans[2])
        top = None if more is None else Top(more[0], (more[1][0], more[1][1]), _numbers(more[2]))
        given = {(site[0], site[1]): _numbers(packed).view(count, -1) for site, count, packed in directions}
        selection = Selection(tokens, every, tuple(positions), top)
        return cls(name, tuple((hook, layer) for hook, layer in sites), selection, Reduction(kinds, given), to, tag)


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().astype("<f4").tobytes()


def _numbers(data: bytes) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(data, "<f4").astype(np.float32))


def _selection(given: object) -> Selection:
    fields = object_of("tokens of a capture", given)
    more = {name: fields.pop(name) for name in sorted(_MORE) if name in fields}
    positions, top = more.pop("positions", []), more.pop("top", None)
    if not isinstance(positions, list) or len(positions) > MOST_POSITIONS:
        raise SpecError(f"positions={positions!r:.80} is no list of up to {MOST_POSITIONS} positions; give such a list")
    tokens = Selection().tokens if not positions else None
    if fields or not (more or positions or top is not None):
        tokens = tokens_of(fields)
    return Selection(tokens, **more, positions=tuple(positions), top=None if top is None else _top(top))


def _top(given: object) -> Top:
    fields = object_of("top", given)
    if set(fields) != {"count", "site", "probe"}:
        raise SpecError(f"top has the fields {', '.join(sorted(fields)) or 'none'}; give count, site and probe")
    return Top(fields["count"], site_key(fields["site"]), vector_of("the probe of top", fields["probe"]))


def _reduction(kinds: object, directions: object) -> Reduction:
    if kinds is None:
        kinds = "rows" if directions is None else "project"
    names = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SpecError(f"reduce={kinds!r:.80} is no reduction; give a name, or a list of names")
    given = object_of("directions", {} if directions is None else directions)
    found: dict[str, list[Any]] = {}
    for site, rows in given.items():
        if not isinstance(rows, list) or len(rows) > MOST_DIRECTIONS:
            raise SpecError(f"directions of {site} are no list of up to {MOST_DIRECTIONS} vectors; give such a list")
        found[site] = [vector_of(f"a direction of {site}", row) for row in rows]
    return Reduction(names, found)


def _sites(given: object) -> tuple[SiteKey, ...] | None:
    if given is None or given == "all":
        return None
    if isinstance(given, Mapping):
        pairs = [(hook, layers) for hook, layers in given.items()]
        if not all(isinstance(layers, list) for _, layers in pairs):
            raise SpecError(f"capture has sites={given!r}; give {{hook: [layers]}}, names such as layers.3.post_block")
        found = [capture_key((hook, layer)) for hook, layers in pairs for layer in layers]
    elif isinstance(given, list):
        found = [capture_key(name) for name in given]
    else:
        raise SpecError(f"capture has sites={given!r}; give {{hook: [layers]}}, names such as layers.3.post_block")
    if not found:
        raise SpecError("capture names no site; give some, or leave sites out for all")
    return tuple(dict.fromkeys(found))
