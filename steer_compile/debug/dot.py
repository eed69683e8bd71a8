"""A drawing as Graphviz text: stations as circles, branches and what was spliced in as boxes."""

from __future__ import annotations

from collections.abc import Iterator

import networkx as nx

from steer_compile.debug.drawing import Drawing, Layer, Line, Station

_COLOURS = {"attention": "#2563c9", "mixer": "#8044b8", "mlp": "#2e8540", "skip": "#7a7f88", "steer": "#d4470f",
            "capture": "#00808a", "fused": "#d4470f"}  # fmt: skip


def dot(drawing: Drawing) -> str:
    """Text for ``dot -Tsvg``."""
    lines = ["digraph model {", f"  label={_quoted(drawing.model)}; labelloc=t; rankdir=TB;"]
    lines += ['  node [fontname="sans-serif", fontsize=10, shape=circle, width=0.15, fixedsize=false];']
    for number, line in enumerate(drawing.lines):
        lines += [f"  {text}" for text in _graph(number, line)]
    return "\n".join([*lines, "}"]) + "\n"


def _graph(number: int, line: Line) -> Iterator[str]:
    """The statements of one graph, with a cluster for each layer."""
    graph = structure(line)
    inside: dict[object, list[str]] = {}
    for name, given in graph.nodes(data=True):
        inside.setdefault(given.get("layer"), []).append(name)
    for layer, names in inside.items():
        if layer is not None:
            yield f"subgraph cluster_{number}_{layer} {{ label={_quoted(f'layer {layer}')};"
        for name in names:
            given = graph.nodes[name]
            colour = _COLOURS.get(given.get("kind", ""), "#20242b")
            shape = "circle" if given.get("kind") in (None, "station") else "box"
            style = ", style=dashed" if given.get("kind") == "fused" else ""
            label = _quoted(given.get("label", name))
            yield f"  {_quoted(f'{number}/{name}')} [label={label}, shape={shape}, color={_quoted(colour)}{style}];"
        if layer is not None:
            yield "}"
    for start, stop in graph.edges():
        yield f"{_quoted(f'{number}/{start}')} -> {_quoted(f'{number}/{stop}')};"


def structure(line: Line) -> nx.DiGraph:
    """Stops and boxes of a graph, and the ways between them."""
    graph = nx.DiGraph()
    order = {op.name: i for i, op in enumerate(line.ops)}
    stops: list[str] = []
    for layer in line.layers:
        _add_layer(graph, layer)
        inside = {name for track in layer.tracks for name in track.nodes}
        stops += [s.node for s in layer.stations if s.node not in inside]
        stops += [name for track in layer.tracks for name in (track.start, track.stop)]
    spine = sorted(dict.fromkeys(stops), key=order.__getitem__)
    graph.add_edges_from(zip(spine, spine[1:], strict=False))
    return graph


def _add_layer(graph: nx.DiGraph, layer: Layer) -> None:
    given = {"layer": layer.number}
    names: dict[str, list[Station]] = {}
    for station in layer.stations:
        names.setdefault(station.node, []).append(station)
    inside = {name for track in layer.tracks for name in track.nodes}
    for node, stations in names.items():
        hooks = "\n".join(station.hook for station in stations)
        if node not in inside:
            known = graph.nodes[node] if node in graph else {}
            label = "\n".join(filter(None, (known.get("label"), hooks)))
            graph.add_node(node, label=label, kind="station", layer=known.get("layer", layer.number))
        for station in stations:
            for i, applied in enumerate(station.applied):
                kind = "fused" if applied.fusion else "steer" if applied.steers else "capture"
                box = f"{station.name}/{i}"
                text = f"{' + '.join(applied.ops)}\n{applied.fusion or applied.lowering}"
                graph.add_node(box, label=text, kind=kind, **given)
                graph.add_edge(_owner(layer, station.node, inside), box)
    for i, track in enumerate(layer.tracks):
        box = _track_name(layer, i)
        hooks = "\n".join(dict.fromkeys(s.hook for node in track.nodes for s in names.get(node, [])))
        label = f"{track.label}\n{track.module}\n{len(track.nodes)} ops" + (f"\n{hooks}" if hooks else "")
        graph.add_node(box, label=label, kind=track.kind, **given)
        graph.add_edge(track.start, box)
        graph.add_edge(box, track.stop)


def _track_name(layer: Layer, number: int) -> str:
    return f"layers.{layer.number}/track {number}"


def _owner(layer: Layer, node: str, inside: set[str]) -> str:
    """The node, or the box of the track that it lies on."""
    if node not in inside:
        return node
    return next(_track_name(layer, i) for i, track in enumerate(layer.tracks) if node in track.nodes)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
