"""What is known of one site: the node, where it comes from and who reads it; or why there is none, and what is near."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import networkx
import torch
from torch import fx

from steer_compile.canon import canonical_lines
from steer_compile.debug.tracing import Traced, breaks
from steer_compile.errors import SiteNotFound, SpecError
from steer_compile.hooks import parse_hook
from steer_compile.ir import Miss, Site
from steer_compile.passes.dataflow import Dataflow, build_dataflow, dtype_of, module_path, op_name

_NAME = re.compile(r"(?:(?:layers|blocks)\.)?(-?\d+|\*)\.(.+)")
CANDIDATES = 5
"""Most nodes that are named beside a miss."""
_LIBRARY = ("/torch/", "/transformers/utils/", "/transformers/modeling_layers")
"""Parts of paths whose frames are not the model's own code."""


@dataclass(frozen=True)
class NodeView:
    """A node in words: canonical line, FX source, the module that it is in, and its line in the model's code."""

    name: str
    line: str
    source: str
    module: str
    code: str

    def to_dict(self) -> dict[str, str]:
        return {"node": self.name, "line": self.line, "fx": self.source, "module": self.module, "code": self.code}


@dataclass(frozen=True)
class Explanation:
    """All about one site.

    Attributes:
        found: the site, or the miss.
        graph: name of the graph that was looked at.
        node: what holds the value, None for a miss.
        readers: who reads it, and whether an edit reaches the read.
        path: values between the stream's previous value and this one.
        near: for a miss, the nearest nodes, those that its reason names first.
        have: hooks that the layer does have, with their nodes.
        breaks: for a miss, why graphs of the model end before its functions do.
    """

    found: Site | Miss
    graph: str
    node: NodeView | None = None
    readers: tuple[tuple[NodeView, str], ...] = ()
    path: tuple[NodeView, ...] = ()
    near: tuple[NodeView, ...] = ()
    have: tuple[tuple[str, str], ...] = ()
    breaks: tuple[str, ...] = ()


def parse_site(text: str) -> tuple[str, int | None]:
    """Hook and layer of ``layers.3.post_block``, ``3.post_block`` or ``blocks.3.hook_resid_post``; None for ``*``.

    Raises:
        SpecError: another form, or no hook.
    """
    found = _NAME.fullmatch(text.strip())
    if found is None:
        raise SpecError(f"{text!r} names no site; write it as layers.3.post_block, with a layer and a hook")
    layer, hook = found.groups()
    number = None if layer == "*" else int(layer)
    return (hook, None) if hook.startswith("write@") else (parse_hook(hook.removeprefix("hook_")), number)


def explain(graphs: Sequence[Traced], hook: str, layer: int | None) -> Explanation:
    """The explanation of a site; negative layers count from the last of all graphs."""
    if not graphs:
        raise SiteNotFound("no graph of the model was compiled: its forward runs no operator on a tensor; see the code")
    layers = sorted({number for traced in graphs for number in traced.table.layers})
    if layer is not None and layer < 0 and layers and layer + layers[-1] >= -1:
        layer += layers[-1] + 1
    for traced in graphs:
        found = _find(traced, hook, layer)
        if isinstance(found, Site):
            return _found(traced, found)
    traced = next((t for t in graphs if layer in t.table.layers), max(graphs, key=lambda t: len(t.gm.graph.nodes)))
    miss = _find(traced, hook, layer)
    assert isinstance(miss, Miss)
    return replace(_missed(traced, miss), breaks=breaks(graphs))


def _find(traced: Traced, hook: str, layer: int | None) -> Site | Miss:
    if layer is not None:
        return traced.table.find(hook, layer)
    first = next((site for site in traced.table.sites if site.hook == hook), None)
    if first is not None:
        return first
    whole = [m for m in traced.table.misses if m.layer is None and m.hook in (hook, "*")]
    return whole[0] if whole else Miss(None, hook, "no layer has such a value")


def _views(traced: Traced) -> Mapping[str, NodeView]:
    lines = canonical_lines(traced.gm.graph)
    return {
        node.name: NodeView(node.name, lines.get(node, node.name), node.format_node() or node.name,
                            ".".join(module_path(node)), code_line(node))
        for node in traced.gm.graph.nodes
    }  # fmt: skip


def code_line(node: fx.Node) -> str:
    """Last line of the model's own code that led to a node, as ``file:line text``."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', node.stack_trace or "")
    own = [frame for frame in frames if not any(part in frame[0] for part in _LIBRARY)] or frames
    if not own:
        return ""
    file, line, text = own[-1]
    return f"{'/'.join(file.split('/')[-2:])}:{line} {text}"


def _found(traced: Traced, site: Site) -> Explanation:
    views, flow = _views(traced), build_dataflow(traced.gm.graph)
    nodes = {n.name: n for n in traced.gm.graph.nodes}
    node = nodes[site.node]
    readers = []
    for user in flow.users.get(node, ()):
        reached = site.users is None or user.name in site.users
        kind = "not redirected" if not reached else "skip path" if user.name in site.skip_users else "redirected"
        readers.append((views[user.name], kind))
    path = [views[n.name] for n in _path(traced, flow, nodes, site)]
    return Explanation(site, traced.name, views[site.node], tuple(readers), tuple(path))


def _path(traced: Traced, flow: Dataflow, nodes: Mapping[str, fx.Node], site: Site) -> list[fx.Node]:
    """The shortest chain of values from a site in front of this one, without both ends."""
    node = nodes[site.node]
    order = list(flow.order)
    others = [nodes[s.node] for s in traced.table.sites if flow.order[nodes[s.node]] < flow.order[node]]
    if not others:
        return []
    graph = networkx.DiGraph((value, reader) for reader in order for value in flow.inputs[reader])
    for start in sorted(set(others), key=lambda n: -flow.order[n]):
        if graph.has_node(start) and graph.has_node(node) and networkx.has_path(graph, start, node):
            return list(networkx.shortest_path(graph, start, node))[:-1]
    return []


def _missed(traced: Traced, miss: Miss) -> Explanation:
    views, nodes = _views(traced), {n.name: n for n in traced.gm.graph.nodes}
    named = [word for word in re.findall(r"\w+", miss.reason) if word in nodes]
    near = dict.fromkeys((*miss.near, *named))
    sites = [s for s in traced.table.sites if s.layer == miss.layer]
    if not near:
        near = dict.fromkeys(_candidates(traced, nodes, sites))
    have = tuple((site.hook, site.node) for site in sites if not site.hook.startswith("write_"))
    return Explanation(miss, traced.name, near=tuple(views[n] for n in near if n in views), have=have)


def _candidates(traced: Traced, nodes: Mapping[str, fx.Node], sites: list[Site]) -> list[str]:
    """Sums in the layer that have the stream's shape, or the largest sums of the graph where it has no stream."""
    if sites:
        like = nodes[sites[0].node]
        owner = module_path(like)
        pool = [n for n in nodes.values() if module_path(n)[: len(owner)] == owner and _alike(n, like)]
        pool.sort(key=lambda n: op_name(n) != "add")
        return [n.name for n in pool if n.name not in {s.node for s in sites}][:CANDIDATES]
    sums = [n for n in nodes.values() if op_name(n) == "add" and _dims(n) > 1]
    shapes = Counter(str(n.meta["example_value"].shape) for n in sums)
    sums.sort(key=lambda n: -shapes[str(n.meta["example_value"].shape)])  # those of the stream are the most
    return [n.name for n in sums][:CANDIDATES]


def _dims(node: fx.Node) -> int:
    value = node.meta.get("example_value")
    return value.dim() if isinstance(value, torch.Tensor) and value.is_floating_point() else 0


def _alike(node: fx.Node, like: fx.Node) -> bool:
    ours, theirs = node.meta.get("example_value"), like.meta.get("example_value")
    if not isinstance(ours, torch.Tensor) or not isinstance(theirs, torch.Tensor):
        return False
    return ours.dim() == theirs.dim() and str(ours.shape) == str(theirs.shape) and dtype_of(node) == dtype_of(like)
