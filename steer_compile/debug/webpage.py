"""A drawing as one page: its SVG, its values as JSON, and the script and style that are packed with it."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from html import escape
from importlib.resources import files
from typing import Any

from steer_compile.debug.drawing import Drawing, Layer, Line, Op, Station
from steer_compile.debug.metro import WIDTH, Numbering, Section, sections

OPEN_LAYERS = 3
"""Layers that are expanded at first."""
OWN = ("name", "line", "source", "module")
TRAITS = ("kind", "op", "dtype", "shape", "origin", "acts", "frames", "kernels", "state")
"""What the page knows of a node: texts of its own, and what it has in common with others."""
_GAP = "\t"
_NUMBER = re.compile(r"(?<!\d)(0|[1-9]\d{0,8})(?!\d)")
"""Numbers that are written in one way alone."""
LEGEND = {
    "attention": "attention", "mixer": "other mixer", "mlp": "MLP", "skip": "skip", "other": "other ops",
    "parallel": "in parallel", "multi": "on several streams", "steer": "steering", "capture": "capture",
    "fused": "fused by a template", "removed": "removed", "kernel": "kernels",
    "miss": "missing hooks",
}  # fmt: skip


def page(drawing: Drawing) -> str:
    """HTML that needs no network and no other file."""
    packer = _Packer()
    parts: list[str] = []
    numbering = Numbering()
    for line in drawing.lines:
        numbering.ops = packer.add_ops(line)
        boxes = len(numbering.boxes)
        if len(drawing.lines) > 1:
            parts.append(f"<h2>graph {escape(line.name)}</h2>")
        parts += [_details(section, len(line.layers) < 2) for section in sections(line, numbering)]
        packer.add_boxes(numbering, boxes)
        packer.add_sites(line)
    body = "\n".join(parts)
    many = any(track.streams for line in drawing.lines for layer in line.layers for track in layer.tracks)
    fields = {
        "title": escape(drawing.model),
        "style": _file("metro.css") + _file("page.css"),
        "facts": _facts(drawing),
        "legend": "".join(_legend(body)),
        "streams": "many" if many else "one" if any(line.layers for line in drawing.lines) else "none",
        "sections": body,
        "data": _embedded(packer.packed()),
        "script": _file("page.js"),
    }
    first, *rest = _file("page.html").split("{{")
    pieces = [piece.partition("}}") for piece in rest]
    return first + "".join(fields[name] + tail for name, _, tail in pieces)


def _file(name: str) -> str:
    return files("steer_compile.debug").joinpath("page", name).read_text(encoding="utf-8")


def _embedded(value: Any) -> str:
    """JSON that cannot end the element that it stands in."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _facts(drawing: Drawing) -> str:
    found = drawing.summary()
    before, after = found["ops"]
    pairs = [(found[name], name) for name in ("layers", "sites", "steered", "captured", "graphs")]
    pairs += [(found["kernels"], "kernels")] if found["kernels"] else []
    shown = [
        f"<span><b>{count}</b> {noun[:-1] if count == 1 and noun[-1] == 's' else noun}</span>" for count, noun in pairs
    ]
    changed = f"{before} \u2192 {after}" if before != after else str(after)
    more = Counter[str]()
    for line in drawing.lines:
        more.update(dict(line.change))
    by_operator = ", ".join(f"{name} {count:+d}" for name, count in more.items())
    return "".join(
        [
            *shown,
            f'<span title="{escape(by_operator)}"><b>{changed}</b> ops</span>',
            f"<span>after {escape(drawing.step)}</span>",
        ]
    )


def _details(section: Section, alone: bool) -> str:
    layer = section.layer
    opened = " open" if alone or (layer is not None and layer.number < OPEN_LAYERS) else ""
    number = "" if layer is None else f' data-layer="{layer.number}"'
    drawn = (
        f'<svg width="{WIDTH}" height="{section.height}" viewBox="0 0 {WIDTH} {section.height}">{section.body}</svg>'
    )
    marks = section.body.count('<g class="op ')
    rest = f"<span>{marks} ops</span>" if layer is None else "".join(_tags(layer))
    return (
        f'<details{number}{opened}><summary><span class="name">{escape(section.title)}</span>'
        f'<span class="rest">{rest}</span></summary>{drawn}</details>'
    )


def _tags(layer: Layer) -> Iterator[str]:
    applied = [applied for station in layer.stations for applied in station.applied]
    steered, captured = sum(a.steers for a in applied), sum(a.captures for a in applied)
    if layer.module:
        yield f"<span>{escape(layer.module)}</span>"
    yield f"<span>{len(layer.stations)} sites</span>"
    yield f'<span class="tag steer">{steered} steered</span>' if steered else ""
    yield f'<span class="tag capture">{captured} captured</span>' if captured else ""


def _legend(body: str) -> Iterator[str]:
    """One button for each kind that is drawn."""
    drawn = {name for names in re.findall(r'class="([^"]*)"', body) for name in names.split()}
    for kind, label in LEGEND.items():
        if kind in drawn:
            yield f'<button type="button" data-kind="{kind}" aria-pressed="true">{_sample(kind)}{label}</button>'


def _sample(kind: str) -> str:
    shapes = {
        "steer": '<g class="op spliced steer"><path d="M11 0l7 7l-7 7l-7 -7z"/></g>',
        "capture": '<g class="op spliced capture"><rect x="5" y="1" width="12" height="12"/></g>',
        "removed": '<g class="other"><g class="op removed"><circle cx="11" cy="7" r="6"/></g></g>',
        "kernel": '<g class="kernel"><rect x="1" y="1" width="20" height="12" rx="3"/></g>',
        "miss": '<text class="miss" x="11" y="11" text-anchor="middle">?</text>',
    }
    shapes |= {
        name: f'<g class="box {name} {colour}"><rect x="1" y="1" width="20" height="12" rx="3"/></g>'
        for name, colour in (("parallel", "mlp"), ("multi", "mlp"), ("fused", "steer"))
    }
    line = f'<path class="rail {kind}" d="M0 7H22"/>'
    return f'<svg aria-hidden="true">{shapes.get(kind, line)}</svg>'


class _Packer:
    """The drawing for the script: texts by their number in one table, nodes by theirs.

    Texts of one layer are those of another but for their numbers, so each is kept as a pattern and its numbers.
    """

    def __init__(self) -> None:
        self.strings: dict[str, int] = {}
        self.patterns: dict[str, int] = {}
        self.traits: dict[str, int] = {}
        self.ops: list[list[Any]] = []
        self.sites: list[dict[str, Any]] = []
        self.boxes: list[list[Any]] = []
        self.numbers: dict[str, int] = {}

    def add_ops(self, line: Line) -> dict[str, int]:
        start = len(self.ops)
        self.numbers = {op.name: start + i for i, op in enumerate(line.ops)}
        self.ops += [self._row(op) for op in line.ops]
        return self.numbers

    def _row(self, op: Op) -> list[Any]:
        """What a node alone has, and the number of what it shares with others."""
        given = op.__dict__
        traits = json.dumps([self._given(given[name]) for name in TRAITS], separators=(",", ":"))
        users = [self.numbers[user] for user in op.users if user in self.numbers]
        shared = self.traits.setdefault(traits, len(self.traits))
        return [*(self._text(given[name]) for name in OWN), op.layer, shared, users]

    def _given(self, value: Any) -> Any:
        """A value by the numbers of its texts; yes and no stay as they are."""
        if isinstance(value, str):
            return self._text(value)
        return [self._text(one) for one in value] if isinstance(value, tuple) else [value]

    def _text(self, text: str) -> int:
        return self.strings.setdefault(text, len(self.strings))

    def _packed_text(self, text: str) -> str | list[int]:
        """The text itself, or the number of its pattern and what stands in the gaps."""
        pieces = _NUMBER.split(text)
        if len(pieces) == 1 or _GAP in text:
            return text
        pattern = self.patterns.setdefault(_GAP.join(pieces[::2]), len(self.patterns))
        return [pattern, *map(int, pieces[1::2])]

    def add_boxes(self, numbering: Numbering, first: int) -> None:
        self.boxes += [
            [label, note, [self.numbers[n] for n in names]] for label, note, names in numbering.boxes[first:]
        ]

    def add_sites(self, line: Line) -> None:
        self.sites += [self._site(station) for station in line.stations]

    def _site(self, station: Station) -> dict[str, Any]:
        applied = [{"ops": a.ops, "lowering": a.lowering, "why": a.why, "fusion": a.fusion} for a in station.applied]
        return {
            "name": station.name, "op": self.numbers[station.node], "dtype": station.dtype, "shape": station.shape,
            "applied": applied,
        }  # fmt: skip

    def packed(self) -> dict[str, Any]:
        strings = [self._packed_text(text) for text in self.strings]
        return {
            "patterns": list(self.patterns), "strings": strings, "own": OWN, "shared": TRAITS,
            "traits": [json.loads(traits) for traits in self.traits], "ops": self.ops, "sites": self.sites,
            "boxes": self.boxes,
        }  # fmt: skip
