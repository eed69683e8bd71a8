"""What a spliced graph reads beside its values: buffers, and the data of each token in the layout of a site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from steer_compile.ir import Site, Slot, bank_name, slot_name


@dataclass
class Buffers:
    """Reads of buffers in one graph, each made once.

    Attributes:
        first: the node in front of which buffers are read.
        nodes: nodes that hold the buffers by name; those of a graph that has them as inputs are there from the start.
        apart: each site computes for itself what others could share, so that a graph that is cut into pieces has equal
            pieces for equal layers.
    """

    graph: fx.Graph
    first: fx.Node
    nodes: dict[str, fx.Node]
    apart: bool
    _views: dict[tuple[str, str, str], fx.Node] = field(default_factory=dict)
    _counts: dict[str, fx.Node] = field(default_factory=dict)
    _tracer: GraphAppendingTracer = field(init=False)
    """One for all proxies: an operator takes proxies of one tracer only."""

    def __post_init__(self) -> None:
        self._tracer = GraphAppendingTracer(self.graph)

    def proxy(self, node: fx.Node) -> Any:
        """The node as a value that takes any operator."""
        return fx.Proxy(node, self._tracer)

    def read(self, name: str) -> Any:
        """A buffer, read once at the top of the graph, as a proxy."""
        if name not in self.nodes:
            with self.graph.inserting_before(self.first):
                self.nodes[name] = self.graph.create_node("get_attr", name)
        return self.proxy(self.nodes[name])

    def part(self, slot: Slot) -> Any:
        """One site's part of a bank, as a proxy."""
        own = slot_name(slot.bank, slot.index)
        return self.read(own) if own in self.nodes else self.read(bank_name(slot.bank))[slot.index]

    def count(self, site: Site, h: Any) -> fx.Node:
        """Number of tokens, computed at the first site of each layout."""
        key = site.name if self.apart else site.layout
        if key not in self._counts:
            count = h.size(0) if site.layout == "flat" else h.size(0) * h.size(1)
            self._counts[key] = count.node
        return self._counts[key]

    def per_token(self, buffer: str, site: Site, h: Any, flat: bool) -> fx.Node:
        """Data of each token in the site's layout, computed at the first site of each layout."""
        key = (buffer, "flat" if flat else site.layout, site.name if self.apart else "")
        if key not in self._views:
            data = self.read(buffer).narrow(0, 0, self.proxy(self.count(site, h)))
            self._views[key] = self.lined_up(data.node, site, h, flat)
        return self._views[key]

    def lined_up(self, data: fx.Node, site: Site, h: Any, flat: bool, numbers: tuple[int, ...] = ()) -> fx.Node:
        """Data of the tokens in batch order (T, *numbers), with the leading dimensions of ``h`` unless ``flat``."""
        if flat or site.layout == "flat":
            return data
        lines: Any = self.proxy(data)
        if site.layout == "time_first":
            lines = lines.view(h.size(1), h.size(0), *numbers).transpose(0, 1)
        else:
            lines = lines.view(h.size(0), h.size(1), *numbers)
        node: fx.Node = lines.node
        return node
