"""Graphs -> `Drawing`: which node is on which track, at which station, of which layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
from torch import fx

from steer_compile.canon import canonical_lines, canonical_names
from steer_compile.debug.drawing import Applied, Drawing, Layer, Line, Missing, Op, Station, Track, last_frames
from steer_compile.debug.tracing import Staged, Traced, copied, op_counts
from steer_compile.ir import Edit, Miss, Site, dtype_text
from steer_compile.passes.blocks import Block, Branch, group_blocks
from steer_compile.passes.dataflow import Dataflow, build_dataflow, dtype_of, is_state, module_path, op_name
from steer_compile.passes.fused_norms import opened_sums
from steer_compile.passes.layout import dims_of
from steer_compile.passes.residual import ResidualGraph
from steer_compile.passes.spine import find_spine
from steer_compile.passes.streams import stream_write

PLANNED = ("plan_edits", "lower_edits", "splice")
"""Steps behind which there is a plan."""


def draw(
    model: str,
    graphs: Sequence[Staged | Traced],
    step: str = "splice",
    of_node: Mapping[str, tuple[str, ...]] | None = None,
    kernels: tuple[str, ...] = (),
) -> Drawing:
    """The drawing of a model's graphs behind a pass.

    Args:
        model: what the drawing is titled.
        of_node: kernels that each node became, by its name.
        kernels: all of them.
    """
    staged = [Staged(found, None, found.gm) if isinstance(found, Traced) else found for found in graphs]
    return Drawing(model, step, tuple(_Artist(one, step, of_node or {}).line() for one in staged), kernels)


@dataclass(frozen=True)
class _Found:
    """A block by names: its module, its tracks, and its span of positions in the graph."""

    key: tuple[str, ...]
    tracks: tuple[Track, ...]
    span: tuple[int, int]


def _blocks(gm: fx.GraphModule) -> list[_Found]:
    """The blocks of a graph; none where it has no spine. The sums of the graph are open."""
    flow = build_dataflow(gm.graph)
    spine = find_spine(ResidualGraph(flow))
    blocks = [] if spine.reason else group_blocks(flow, spine.writes)[0]
    return [_found(flow, block) for block in blocks]


def _found(flow: Dataflow, block: Block) -> _Found:
    tracks = tuple(track for branch in block.branches for track in _tracks(flow, branch))
    inside = [flow.order[n] for branch in block.branches for n in (*branch.region, branch.write.node)]
    return _Found(block.key, tracks, (min(inside), flow.order[block.last.node]))


def _tracks(flow: Dataflow, branch: Branch) -> Iterator[Track]:
    parts = [(term.region, term.mixing) for term in branch.terms] if branch.parallel else []
    parts = parts or [(branch.region, branch.mixing)]
    placed = stream_write(flow, branch.write)
    skip = {branch.write.node, branch.write.fork}
    for region, mixing in parts:
        nodes = [n for n in region if n not in skip]
        yield Track(
            kind="skip" if branch.write.kind == "skip" else _kind(nodes, mixing),
            module=_common([module_path(n) for n in nodes if op_name(n) == "linear"]) or ".".join(branch.owner),
            start=branch.write.fork.name,
            stop=branch.write.node.name,
            nodes=tuple(n.name for n in nodes),
            parallel=branch.parallel,
            streams=placed.streams if placed is not None else 0,
        )


def _kind(nodes: Sequence[fx.Node], mixing: str) -> str:
    if not mixing:
        return "mlp"
    names = {op_name(n) for n in nodes}
    return "attention" if "softmax" in names or any("attention" in name for name in names) else "mixer"


def _common(paths: Sequence[tuple[str, ...]]) -> str:
    """The longest path that most of the paths begin with; of one path alone, its parent."""
    shared: tuple[str, ...] = ()
    while True:
        longer = Counter(path[: len(shared) + 1] for path in paths if path[: len(shared)] == shared != path)
        best, count = longer.most_common(1)[0] if longer else (shared, 0)
        if 2 * count <= len(paths):
            return ".".join(shared[:-1] if set(paths) == {shared} else shared)
        shared = best


class _Artist:
    """Draws one graph: ``old`` as Dynamo gave it, ``new`` behind a pass."""

    def __init__(self, staged: Staged, step: str, of_node: Mapping[str, tuple[str, ...]]) -> None:
        old = copied(staged.traced.gm)
        with opened_sums(old):
            self.found = _blocks(old)
            self.table = staged.traced.table
            self.edits = staged.plan.edits if staged.plan is not None and step in PLANNED else ()
            self.of_node = of_node
            self.new = staged.graph_after(step).graph
            self.order = {node.name: i for i, node in enumerate(old.graph.nodes)}
            self.kept = {node.name for node in self.new.nodes}
            if len(self.found) != len(self.table.layers):  # what was found is no stream after all
                self.found = []
            self.spliced = self._runs()
            self.acts = self._acts()
            self.name = staged.traced.name
            self.places = self._places(old.graph)
            self.ops = self._ops(old.graph)
            self.calls = op_counts(staged.traced.gm.graph), op_counts(self.new)

    def line(self) -> Line:
        layers = tuple(self._layer(*pair) for pair in zip(self.table.layers, self.found, strict=False))
        drawn = {name for found in self.found for track in found.tracks for name in track.nodes}
        drawn |= {station.node for layer in layers for station in layer.stations}
        outside = [op.name for op in self.ops if op.layer is None and op.computes and op.name not in drawn]
        outside = [name for name in outside if name not in self.acts]
        last = self.found[-1].span[1] if self.found else len(self.order)
        in_runs = {name for run in self.spliced.values() for name in run}
        before, after = self.calls
        changed = {name: after[name] - before[name] for name in sorted({*before, *after})}
        return Line(
            name=self.name,
            layers=layers,
            before=tuple(name for name in outside if self.order[name] <= last),
            after=tuple(name for name in outside if self.order[name] > last),
            data=tuple(name for name in self.acts if name not in in_runs),
            ops=self.ops,
            misses=tuple(Missing(m.name, _why(m)) for m in self.table.misses if m.layer is None),
            calls=(before.total(), after.total()),
            change=tuple((name, more) for name, more in changed.items() if more),
        )

    def _runs(self) -> dict[str, list[str]]:
        """Spliced nodes by the node of the site that they stand behind.

        A run of new nodes stands in front of an old one. Its site is the last edited value in front of that, whether
        the value is still there or a template took it over.
        """
        edited = sorted((self.order[e.site.node], e.site.node) for e in self.edits)
        runs: dict[str, list[str]] = {}
        run: list[str] = []
        for node in self.new.nodes:
            if node.name not in self.order:
                run += [node.name] if node.op != "get_attr" else []
                continue
            sites = [name for position, name in edited if position < self.order[node.name]]
            if sites and run:
                runs.setdefault(sites[-1], []).extend(run)
            run = []
        return runs

    def _acts(self) -> dict[str, str]:
        """Each spliced node: ``steer`` where an old node reads it at some remove, else ``capture``."""
        graph = nx.DiGraph()
        graph.add_edges_from((user.name, node.name) for node in self.new.nodes for user in node.users)
        spliced = [node.name for node in self.new.nodes if node.name not in self.order]
        readers = {reader for name in spliced if name in graph for reader in graph.predecessors(name)}
        inner = graph.subgraph([n for n in graph if n not in self.order or n in readers])
        steering: set[str] = set()
        for reader in readers & self.order.keys():
            steering |= nx.descendants(inner, reader)
        acts = {name: "steer" if name in steering else "capture" for name in spliced}
        for site, run in self.spliced.items():  # what a capture shares with steering further on is drawn as its own
            kinds = {edit.ops == ("capture",) for edit in self.edits if edit.site.node == site}
            if len(kinds) == 1:
                acts |= dict.fromkeys(run, "capture" if True in kinds else "steer")
        return acts

    def _places(self, old: fx.Graph) -> dict[str, int]:
        """Layer of each node that is of one."""
        pairs = list(zip(self.table.layers, self.found, strict=False))
        places: dict[str, int] = {}
        for layer, found in pairs:
            for track in found.tracks:
                places |= dict.fromkeys((*track.nodes, track.stop), layer)
        names = canonical_names(old)
        for node in old.nodes:
            if node.name not in places and pairs:
                path = tuple(names[node][1:].split(".")) if is_state(node) else module_path(node)
                at = _layer_at(pairs, path, self.order[node.name], is_state(node))
                places |= {} if at is None or node.op == "output" else {node.name: at}
        for site, run in self.spliced.items():
            places |= dict.fromkeys(run, places[site]) if site in places else {}
        return places

    def _ops(self, old: fx.Graph) -> tuple[Op, ...]:
        """All nodes in order, what was removed at its old place."""
        ops: list[tuple[tuple[int, int, int], Op]] = []
        position = len(self.order)
        lines, names = canonical_lines(self.new), canonical_names(self.new)
        for number, node in reversed(list(enumerate(self.new.nodes))):
            at = self.order.get(node.name)
            position = position if at is None else at
            origin = "spliced" if at is None else "kept"
            op = self._op(node, lines.get(node) or names.get(node, ""), origin)
            ops.append(((position, at is not None, number), op))
        lines = canonical_lines(old)
        gone = [node for node in old.nodes if node.name not in self.kept]
        ops += [((self.order[n.name], 1, 0), self._op(n, lines.get(n, n.name), "removed")) for n in gone]
        return tuple(op for _, op in sorted(ops, key=lambda pair: pair[0]))

    def _op(self, node: fx.Node, line: str, origin: str) -> Op:
        dtype = dtype_of(node)
        state = is_state(node)
        return Op(
            name=node.name,
            kind=node.op,
            op=op_name(node),
            line=line,
            source=node.format_node() or "",
            module=line.removeprefix("$") if state else ".".join(module_path(node)),
            dtype=dtype_text(dtype) if dtype is not None else "",
            shape=f"[{', '.join(map(str, dims_of(node)))}]" if dtype is not None else "",
            frames=last_frames(node.stack_trace) if not state else (),
            users=tuple(user.name for user in node.users),
            kernels=tuple(self.of_node.get(node.name, ())),
            origin=origin,
            acts=self.acts.get(node.name, ""),
            layer=self.places.get(node.name),
            state=state,
        )

    def _layer(self, number: int, found: _Found) -> Layer:
        stations = self._stations(number)
        drawn = {station.node for station in stations} | {track.stop for track in found.tracks}
        drawn |= {name for track in found.tracks for name in track.nodes} | self.acts.keys()
        others = [op for op in self.ops if op.layer == number and op.computes and op.name not in drawn]
        return Layer(
            number=number,
            module=".".join(found.key),
            stations=stations,
            tracks=found.tracks,
            others=tuple(op.name for op in others),
            misses=tuple(Missing(m.hook, _why(m)) for m in self.table.misses if m.layer == number),
        )

    def _stations(self, number: int) -> tuple[Station, ...]:
        sites = [site for site in self.table if site.layer == number]
        return tuple(self._station(site) for site in sorted(sites, key=lambda s: self.order[s.node]))

    def _station(self, site: Site) -> Station:
        dims = ", ".join(str(d) for d in (*site.shape, *(site.row or (site.width,))))
        edits = [edit for edit in self.edits if _same(edit.site, site)]
        applied = tuple(self._applied(edit) for edit in edits)
        return Station(site.layer, site.hook, site.node, dtype_text(site.dtype), f"[{dims}]", applied)

    def _applied(self, edit: Edit) -> Applied:
        """An edit with its nodes. Where several edits stand at a value, a capture has the nodes that only store."""
        beside = [other for other in self.edits if other.site.node == edit.site.node]
        nodes = self.spliced.get(edit.site.node, [])
        acts = "capture" if edit.ops == ("capture",) else "steer"
        alike = [other for other in beside if (other.ops == ("capture",)) == (acts == "capture")]
        if len(alike) < len(beside):
            nodes = [name for name in nodes if self.acts[name] == acts]
        template = edit.lowering == "template"
        return Applied(
            ops=edit.ops,
            lowering=edit.lowering,
            why=edit.why,
            fusion=edit.fusion.text() if template else "",
            nodes=tuple(nodes) if alike[0] is edit else (),
        )


def _same(one: Site, other: Site) -> bool:
    return (one.layer, one.hook) == (other.layer, other.hook)


def _why(miss: Miss) -> str:
    near = f" (nearest: {', '.join(miss.near)})" if miss.near else ""
    return miss.reason + near


def _layer_at(pairs: Sequence[tuple[int, _Found]], path: tuple[str, ...], position: int, state: bool) -> int | None:
    """The layer of a node that is on no track: that of its module, else of its position between the layers."""
    own = [pair for pair in pairs if pair[1].key and path[: len(pair[1].key)] == pair[1].key]
    if state:
        return own[0][0] if len(own) == 1 else None
    outside = not pairs[0][1].span[0] <= position <= pairs[-1][1].span[1]
    if not own and outside:
        return None
    candidates = own or pairs
    return next((layer for layer, found in candidates if position <= found.span[1]), candidates[-1][0])
