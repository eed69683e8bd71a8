"""What a spliced graph reads beside its values: buffers, and the data of each token in the layout of a site."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from steer_compile.ir import CAPTURE, Edit, Site, Slot, bank_name, slot_name


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

    def bank(self, slot: Slot) -> Any:
        """The whole bank of a slot, as a proxy."""
        return self.read(bank_name(slot.bank))

    def part(self, slot: Slot) -> Any:
        """The part of a bank that a slot names, as a proxy."""
        part = slot_name(slot.bank, slot.index)
        return self.read(part) if part in self.nodes else self.bank(slot)[slot.index]

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

    def stored(self, edit: Edit, h: Any) -> dict[str, Any]:
        """Where an edit's captures go: the whole bank, and what chooses tokens of a packed one; nothing without."""
        slots = {slot.kind: slot for slot in edit.slots}
        if "packed" not in slots:
            return {"capture": self.bank(slots["capture"])} if "capture" in slots else {}
        rows = self.proxy(self.per_token(CAPTURE, edit.site, h, flat=True))
        choice = self.part(slots["choice"])
        return {"capture": self.bank(slots["packed"]), "capture_rows": rows, "choice": choice}

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
