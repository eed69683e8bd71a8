"""A drawing as SVG: the stream as a vertical line with stations, branches as tracks beside it.

::

       hooks  o  node bf16[2, 9, 256]
              |--+--------------------------------+
              |  | attention  model.layers.0.attn |   one mark for each op
              |--+--------------------------------+
       hooks  o  node bf16[2, 9, 256]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from itertools import groupby
from textwrap import wrap

from steer_compile.debug.drawing import Drawing, Layer, Line, Op, Station, Track

WIDTH, SPINE = 850, 190
_BOX, _BOX_WIDTH, _PAD = 250, 590, 12
_MARK, _ROW, _LETTER = 15, 22, 6.7
_GAP = 4
_HEAVY = frozenset(
    "linear matmul bmm einsum addmm conv1d conv2d embedding softmax silu gelu relu scaled_dot_product_attention "
    "flex_attention layer_norm rms_norm cumsum site steer_rows store_rows store_packed patch_rows copy".split()
)
"""Operators that are drawn by name; all others are dots."""
_SHORT = {"scaled_dot_product_attention": "attention"}


@dataclass(frozen=True)
class Section:
    """A part of the drawing that is shown and hidden as one.

    Attributes:
        layer: None in front of and behind the layers.
        body: SVG elements, from y 0 to ``height``.
    """

    title: str
    layer: Layer | None
    body: str
    height: int


@dataclass
class Numbering:
    """Numbers by which a page knows what an element stands for: those of nodes and of boxes."""

    ops: dict[str, int] = field(default_factory=dict)
    boxes: list[tuple[str, str, tuple[str, ...]]] = field(default_factory=list)
    """Label, note and nodes of each box."""


def svg(drawing: Drawing) -> str:
    """The whole drawing as a file of its own."""
    parts, y = [], 0
    for line in drawing.lines:
        heading = f"{drawing.model}, graph {line.name}" if len(drawing.lines) > 1 else drawing.model
        parts.append(f'<text class="title" x="20" y="{y + 28}">{escape(heading)}</text>')
        y += 46
        for section in sections(line, Numbering()):
            parts.append(f'<text class="part" x="20" y="{y + 20}">{escape(section.title)}</text>')
            parts.append(f'<g transform="translate(0 {y})">{section.body}</g>')
            y += section.height
    style = files("steer_compile.debug").joinpath("page", "metro.css").read_text(encoding="utf-8")
    size = f'width="{WIDTH}" height="{y}" viewBox="0 0 {WIDTH} {y}"'
    ground = f'<rect class="ground" width="{WIDTH}" height="{y}"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{ground}{"".join(parts)}</svg>\n'


def sections(line: Line, numbering: Numbering) -> Iterator[Section]:
    """The parts of one graph, from its inputs to its outputs."""
    streams = max((track.streams for layer in line.layers for track in layer.tracks), default=0)
    pen = _Pen(line, numbering, streams)
    if line.before or line.data or line.misses:
        yield pen.outside("before the layers" if line.layers else "no layers", line.before, line.data)
    for layer in line.layers:
        yield pen.layer(layer)
    if line.after:
        yield pen.outside("behind the layers", line.after, ())


class _Pen:
    """Draws the sections of a graph."""

    def __init__(self, line: Line, numbering: Numbering, streams: int) -> None:
        self.ops = {op.name: op for op in line.ops}
        self.order = {op.name: i for i, op in enumerate(line.ops)}
        self.numbering = numbering
        self.misses = line.misses
        self.spine = bool(line.layers)
        self.tracks = max(1, min(streams, 4))
        self.parts: list[str] = []
        self.y = 0
        self.hooks: dict[str, str] = {}

    def outside(self, title: str, names: Sequence[str], data: Sequence[str]) -> Section:
        self._start()
        if names:
            self._box("other", title, "", names)
        if data:
            self._box("steer data", "data of the passes", "buffers that the spliced operations read", data)
        for miss in self.misses if title != "behind the layers" else ():
            self._note(f"{miss.hook}: {miss.reason}")
        return self._section(title, None)

    def layer(self, layer: Layer) -> Section:
        """Stops in graph order, each behind the tracks that end in it and in front of what is applied there."""
        self._start()
        inside = {name for track in layer.tracks for name in track.nodes}
        self.hooks = {s.node: s.hook for s in layer.stations if s.node in inside and not s.hook.startswith("write_")}
        stations: dict[str, list[Station]] = {}
        for station in layer.stations:
            stations.setdefault(station.node, []).append(station)
        tracks = sorted(layer.tracks, key=lambda t: self.order[t.stop])
        by_stop = {stop: list(group) for stop, group in groupby(tracks, key=lambda t: t.stop)}
        stops = [*by_stop, *(node for node in stations if node not in inside)]
        for stop in sorted(dict.fromkeys(stops), key=self.order.__getitem__):
            self._tracks(by_stop.get(stop, []), stations)
            self._stop(stop, stations.get(stop, []))
            for station in stations.get(stop, []):
                self._applied(station)
        if layer.others:
            self._box("other", "beside the tracks", "", layer.others)
        for miss in layer.misses:
            self._note(f"no {miss.hook}: {miss.reason}")
        return self._section(f"layer {layer.number}", layer)

    def _start(self) -> None:
        self.parts, self.y = [], 10

    def _section(self, title: str, layer: Layer | None) -> Section:
        height = self.y + 6
        offsets = [(i - (self.tracks - 1) / 2) * 5 for i in range(self.tracks)]
        kind = "spine" if self.tracks == 1 else "spine many"
        lines = [f'<path class="{kind}" d="M{SPINE + dx} 0V{height}"/>' for dx in offsets]
        return Section(title, layer, "".join([*(lines if self.spine else ()), *self.parts]), height)

    def _stop(self, name: str, stations: Sequence[Station]) -> None:
        """A stop on the spine: a station where the value has hooks, else a mere write."""
        y = self.y + 14
        steered = " steered" if any(a.steers for s in stations for a in s.applied) else ""
        captured = " captured" if any(a.captures for s in stations for a in s.applied) else ""
        hooks = sorted((s.hook for s in stations), key=lambda hook: hook.startswith("write_"))
        shape = f"{stations[0].dtype}{stations[0].shape}" if stations else "a write without a hook"
        label = f"{' and '.join(hooks) or 'write'} at {name}"
        said = (
            f'<text class="hook" x="{SPINE - 18}" y="{y + 4}">{escape(hooks[0])}</text>'
            f'<text class="also" x="{SPINE - 18}" y="{y + 17}">{escape(", ".join(hooks[1:]))}</text>'
            if hooks
            else ""
        )
        self.parts.append(
            f'<g class="station{steered}{captured}{"" if hooks else " bare"}" tabindex="0" role="button"'
            f'{self._number(name)} aria-label="{escape(label)}"><title>{escape(label)}</title>'
            f'<rect class="reach" x="{SPINE - 180}" y="{y - 13}" width="560" height="{32 if hooks[1:] else 26}"/>'
            f'<circle cx="{SPINE}" cy="{y}" r="{8 if hooks else 5}"/>{said}'
            f'<text class="value" x="{SPINE + 22}" y="{y + 4}">{escape(name)}'
            f'<tspan class="shape" dx="10">{escape(shape)}</tspan></text></g>'
        )
        self.y += 36

    def _number(self, name: str) -> str:
        number = self.numbering.ops.get(name)
        return "" if number is None else f' data-i="{number}"'

    def _tracks(self, tracks: Sequence[Track], stations: Mapping[str, Sequence[Station]]) -> None:
        """Tracks into one stop: they leave the spine in front of the first and join it behind the last."""
        edges: list[tuple[int, int, str]] = []
        for track in tracks:
            top = self.y
            kind = f"{track.kind}{' parallel' if track.parallel else ''}{' multi' if track.streams else ''}"
            self._box(f"track {kind}", track.label, track.module, track.nodes)
            edges.append((top + 14, self.y - _PAD - 12, kind))
            for station in (s for name in track.nodes for s in stations.get(name, ())):
                self._applied(station, on_track=True)
        if not edges:
            return
        first, last = edges[0][0], self.y - 2
        for enters, leaves, kind in edges:
            out, back = SPINE + 18, SPINE + 36
            self.parts.append(
                f'<path class="rail {kind}" d="M{SPINE} {first - 18}L{out} {first}V{enters}H{_BOX}'
                f'M{_BOX} {leaves}H{back}V{last - 8}L{SPINE} {last + 10}"/>'
            )

    def _applied(self, station: Station, on_track: bool = False) -> None:
        """What the plan does at a station, on a way of its own from the spine, or hung on the box of the track."""
        for one in station.applied:
            kind = "capture" if not one.steers else "steer captured" if one.captures else "steer"
            top, what = self.y, " + ".join(one.ops)
            label = what if what == "capture" else f"steer: {what}"
            label += f" at {station.hook}" if on_track else ""
            self._box(kind + (" fused" if one.fusion else ""), label, one.fusion or f"by the {one.lowering}", one.nodes)
            way = f"M{SPINE} {top + 14}H{_BOX}"
            way += f"M{_BOX} {self.y - _PAD - 10}H{SPINE}" if one.steers else ""
            way = f"M{_BOX + 30} {top - _PAD}V{top}" if on_track else way
            self.parts.append(f'<path class="rail {kind}" d="{way}"/>')

    def _box(self, kind: str, label: str, note: str, names: Sequence[str]) -> None:
        """A box of marks, one for each node."""
        top, right = self.y, _BOX + _BOX_WIDTH
        number = len(self.numbering.boxes)
        self.numbering.boxes.append((label, note, tuple(names)))
        marks, bottom = self._marks(names, top + 28)
        kernels = list(dict.fromkeys(kernel for name in names for kernel in self.ops[name].kernels))
        chips, bottom = self._kernels(kernels, bottom)
        count = f"{len(names)} op{'' if len(names) == 1 else 's'}"
        wide = round(len(label) * 7.4) + 20
        self.parts.append(
            f'<g class="box {kind}"><rect x="{_BOX}" y="{top}" width="{_BOX_WIDTH}" height="{bottom - top}" rx="7"/>'
            f'<g class="head" tabindex="0" role="button" data-b="{number}" aria-label="{escape(f"{label} {note}")}">'
            f'<rect class="hit" x="{_BOX}" y="{top}" width="{_BOX_WIDTH}" height="24" rx="7"/>'
            f'<text class="label" x="{_BOX + _PAD}" y="{top + 18}">{escape(label)}</text>'
            f'<text class="note" x="{_BOX + _PAD + wide}" y="{top + 18}">{escape(_cut(note, 78 - len(label)))}</text>'
            f'<text class="count" x="{right - _PAD}" y="{top + 18}">{count}</text></g>{marks}{chips}</g>'
        )
        self.y = bottom + _PAD

    def _marks(self, names: Sequence[str], top: int) -> tuple[str, int]:
        """Marks in rows, and where the last row ends."""
        x, y, right = float(_BOX + _PAD), top, _BOX + _BOX_WIDTH - _PAD
        parts = []
        for name in names:
            op, hook = self.ops[name], self.hooks.get(name, "")
            text = hook or (_SHORT.get(op.op, op.op) if op.op in _HEAVY or not op.computes else "")
            wide = len(text) * (_LETTER + 0.4 * bool(hook)) + (28 if hook else 16) if text else _MARK
            if x + wide > right:
                x, y = float(_BOX + _PAD), y + _ROW
            parts.append(self._mark(op, hook, text, (x, y, wide)))
            x += wide + _GAP
        return "".join(parts), y + _ROW + 6 if names else top + 2

    def _mark(self, op: Op, hook: str, text: str, place: tuple[float, int, float]) -> str:
        x, y, wide = place
        kind = " ".join(["op", op.origin, *([op.acts] if op.acts else []), *(["hooked"] if hook else [])])
        number = self._number(op.name)  # a page says the rest by its script
        title = "" if number else f"<title>{escape(f'{op.name}: {op.op}{op.shape}')}</title>"
        if text:
            start = f'<circle cx="{x + 11:.0f}" cy="{y + 9}" r="4.5"/>' if hook else ""
            shape = f'<rect x="{x:.0f}" y="{y}" width="{wide:.0f}" height="18" rx="9"/>{start}'
            at = x + wide / 2 + (6 if hook else 0)
            shape += f'<text x="{at:.0f}" y="{y + 13}">{escape(text)}</text>'
        else:
            shape = _SHAPES[op.acts](x + _MARK / 2, y + 9)
        return f'<g class="{kind}"{number}>{title}{shape}</g>'

    def _kernels(self, kernels: Sequence[str], top: int) -> tuple[str, int]:
        """Names of kernels, as many as two rows hold."""
        x, y, right = float(_BOX + _PAD), top, _BOX + _BOX_WIDTH - _PAD
        parts = []
        for i, name in enumerate(kernels):
            text = _cut(name, 40)
            wide = len(text) * 6.1 + 14
            if x + wide > right:
                x, y = float(_BOX + _PAD), y + 19
            if y > top + 19:
                parts.append(f'<text class="more" x="{_BOX + _PAD}" y="{y + 11}">and {len(kernels) - i} more</text>')
                break
            parts.append(
                f'<g class="kernel" tabindex="-1" role="button" data-k="{escape(name)}"><title>{escape(name)}</title>'
                f'<rect x="{x:.0f}" y="{y}" width="{wide:.0f}" height="16" rx="3"/>'
                f'<text x="{x + 7:.0f}" y="{y + 12}">{escape(text)}</text></g>'
            )
            x += wide + _GAP
        return "".join(parts), y + 24 if kernels else top

    def _note(self, text: str) -> None:
        for part in wrap(text, 96):
            self.parts.append(f'<text class="miss" x="{_BOX}" y="{self.y + 12}">{escape(part)}</text>')
            self.y += 16
        self.y += 4


def _dot(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.0f}" r="5.5"/>'


def _diamond(x: float, y: float) -> str:
    return f'<path d="M{x:.1f} {y - 7:.0f}l7 7l-7 7l-7 -7z"/>'


def _square(x: float, y: float) -> str:
    return f'<rect x="{x - 5.5:.1f}" y="{y - 5.5:.1f}" width="11" height="11"/>'


_SHAPES: dict[str, Callable[[float, float], str]] = {"": _dot, "steer": _diamond, "capture": _square}


def _cut(text: str, length: int) -> str:
    """A text with its middle left out where it is long."""
    half = max(length // 2 - 1, 4)
    return text if len(text) <= length else f"{text[:half]}\u2026{text[-half:]}"
