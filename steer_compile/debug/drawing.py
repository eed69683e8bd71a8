"""`Drawing`: a model's graphs as lines with stations, in values that hold no tensor and no node.

::

    layer 3   o pre_attn            stations: values of the stream that have a hook
              |--[ attention ]--.   tracks: what is computed from one value and added to a later one
              o post_attn <-----'   each with the stations of its own, such as attn_in
              |--( capture )        what the plan put behind a station
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from steer_compile.errors import SiteNotFound

LEAVES = ("placeholder", "get_attr")
"""Kinds of nodes that compute nothing."""


@dataclass(frozen=True)
class Op:
    """One node of a graph.

    Attributes:
        kind: the FX kind, such as ``call_function``.
        op: bare name of its operator.
        line: its canonical line; of a parameter or buffer its path.
        source: its line as FX prints it.
        module: path of the module that computes it, or of a parameter itself.
        dtype, shape: empty where no tensor is known, as for what a pass put in.
        frames: the last two frames of its stack trace, the innermost last.
        kernels: what it became.
        origin: ``kept``, ``spliced`` by the passes, or ``removed`` by them.
        acts: ``steer`` where a spliced node changes what the model computes, ``capture`` where it only stores.
        layer: None in front of, behind and beside the layers.
        state: it is a parameter or buffer.
    """

    name: str
    kind: str
    op: str
    line: str
    source: str
    module: str = ""
    dtype: str = ""
    shape: str = ""
    frames: tuple[str, ...] = ()
    users: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    origin: str = "kept"
    acts: str = ""
    layer: int | None = None
    state: bool = False

    @property
    def computes(self) -> bool:
        return self.kind not in (*LEAVES, "output")


@dataclass(frozen=True)
class Applied:
    """What a plan does at a station.

    Attributes:
        ops: families of steering, or ``capture``.
        lowering, why: how it is lowered, and the reason.
        fusion: what a template takes over beside it; empty for other lowerings.
        nodes: names of the spliced nodes.
    """

    ops: tuple[str, ...]
    lowering: str
    why: str
    fusion: str
    nodes: tuple[str, ...]

    @property
    def captures(self) -> bool:
        return "capture" in self.ops

    @property
    def steers(self) -> bool:
        return self.ops != ("capture",)


@dataclass(frozen=True)
class Station:
    """A hook point: a hook, and the node that holds its value."""

    layer: int
    hook: str
    node: str
    dtype: str
    shape: str
    applied: tuple[Applied, ...] = ()

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.hook}"


@dataclass(frozen=True)
class Track:
    """A branch: what is computed from the node ``start`` and added to the stream in ``stop``.

    Attributes:
        kind: ``attention``, another ``mixer`` of tokens, ``mlp``, or ``skip`` for an older value of the stream.
        module: path of the module that computes it; empty where modules do not tell.
        parallel: it is added in one write with another branch.
        streams: number of parallel streams that it is placed on; 0 where there is one stream.
    """

    kind: str
    module: str
    start: str
    stop: str
    nodes: tuple[str, ...]
    parallel: bool = False
    streams: int = 0

    @property
    def label(self) -> str:
        words = ["MLP" if self.kind == "mlp" else self.kind]
        words += ["in parallel"] if self.parallel else []
        words += [f"on {self.streams} streams"] if self.streams else []
        return " ".join(words)


@dataclass(frozen=True)
class Missing:
    """A hook without a value, and why."""

    hook: str
    reason: str


@dataclass(frozen=True)
class Layer:
    """One block: stations and tracks in graph order, and the nodes that are on none of them."""

    number: int
    module: str
    stations: tuple[Station, ...]
    tracks: tuple[Track, ...]
    others: tuple[str, ...]
    misses: tuple[Missing, ...]


@dataclass(frozen=True)
class Line:
    """One graph.

    Attributes:
        before, after: names of the nodes in front of and behind the layers.
        data: names of the spliced nodes that belong to no one station, such as the buffers of the steering.
        misses: of the whole graph.
        change: number of calls that each operator has more (or less) than before the passes.
    """

    name: str
    layers: tuple[Layer, ...]
    before: tuple[str, ...]
    after: tuple[str, ...]
    data: tuple[str, ...]
    ops: tuple[Op, ...]
    misses: tuple[Missing, ...]
    calls: tuple[int, int]
    change: tuple[tuple[str, int], ...]

    @property
    def stations(self) -> tuple[Station, ...]:
        return tuple(station for layer in self.layers for station in layer.stations)

    def op(self, name: str) -> Op:
        """KeyError where there is none."""
        for op in self.ops:
            if op.name == name:
                return op
        raise KeyError(name)


@dataclass(frozen=True)
class Drawing:
    """All graphs of a model behind a pass."""

    model: str
    step: str
    lines: tuple[Line, ...]
    kernels: tuple[str, ...] = ()

    def only(self, layer: int) -> Drawing:
        """The drawing of one layer; -1 is the last.

        Raises:
            SiteNotFound: no graph has it.
        """
        have = sorted({found.number for line in self.lines for found in line.layers})
        wanted = layer if layer >= 0 or not have else layer + have[-1] + 1
        if wanted not in have:
            span = f"layers {have[0]} to {have[-1]}" if have else "no layers: `steer-compile sites` says why"
            raise SiteNotFound(f"there is no layer {layer}; the model has {span}")
        lines = [_only(line, wanted) for line in self.lines]
        return replace(self, lines=tuple(line for line in lines if line.layers))

    def summary(self) -> dict[str, Any]:
        """What the header of a page shows."""
        stations = [station for line in self.lines for station in line.stations]
        applied = [applied for station in stations for applied in station.applied]
        return {
            "model": self.model,
            "after": self.step,
            "graphs": len(self.lines),
            "layers": sum(len(line.layers) for line in self.lines),
            "sites": len(stations),
            "steered": sum(a.steers for a in applied),
            "captured": sum(a.captures for a in applied),
            "ops": [sum(line.calls[i] for line in self.lines) for i in (0, 1)],
            "kernels": len(self.kernels),
        }

    def plain(self) -> dict[str, Any]:
        """The drawing as JSON takes it."""
        return {"summary": self.summary(), **asdict(self)}


def _only(line: Line, number: int) -> Line:
    layers = tuple(layer for layer in line.layers if layer.number == number)
    shown = {name for layer in layers for name in names_of(layer)}
    ops = tuple(op for op in line.ops if op.layer == number or op.name in shown)
    return replace(line, layers=layers, before=(), after=(), data=(), ops=ops)


def names_of(layer: Layer) -> Iterator[str]:
    """Every node that is drawn in a layer."""
    for station in layer.stations:
        yield station.node
        yield from (name for applied in station.applied for name in applied.nodes)
    for track in layer.tracks:
        yield from (track.start, track.stop, *track.nodes)
    yield from layer.others


_FRAME = re.compile(r'^\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)\n(?P<code>[^\n]*)', re.M)
_PACKAGES = re.compile(r".*/(?:site|dist)-packages/")


def last_frames(trace: str | None, count: int = 2) -> tuple[str, ...]:
    """The innermost frames of a stack trace, each ``file:line in function: code``, the innermost last."""
    frames = list(_FRAME.finditer(trace or ""))[-count:]
    return tuple(
        f"{_PACKAGES.sub('', found['file'])}:{found['line']} in {found['function']}: {found['code'].strip()}"
        for found in frames
    )
