"""Rewrite: put the plan's operations behind the values that they act on.

::

    %v = add(%r, %b)                       %v  = add(%r, %b)
    %n = norm(%v)                  ->      store_rows(%v, %capture0[slot], n)
    %s = add(%v, ...)                      %v' = add_rows(%v, %table0[slot], %rows, %scale)
                                           %n  = norm(%v')
                                           %s  = add(%v', ...)

The backing tensors are buffers of the graph module; nothing else of its signature changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from steer_compile.errors import LoweringError
from steer_compile.ir import ROWS, SCALE, Edit, Plan, Site, bank_name
from steer_compile.kernels.add_rows import add_rows
from steer_compile.kernels.store_rows import store_rows
from steer_compile.passes.dataflow import Dataflow, build_dataflow


def splice(gm: fx.GraphModule, plan: Plan) -> tuple[str, ...]:
    """Apply the plan to ``gm`` in place; returns the names of the buffers that the graph now reads.

    Raises:
        LoweringError: a planned value is not in this graph, or the graph is spliced already.
    """
    graph = gm.graph
    by_name = {n.name: n for n in graph.nodes}
    if any(n.op == "get_attr" and n.target == bank_name(0) for n in graph.nodes):
        raise LoweringError("another steer_backend has instrumented this graph; give one spec with the hooks of both")
    missing = [e.site for e in plan.edits if e.site.node not in by_name]
    if missing:
        raise LoweringError(f"{missing[0].name} is planned at {missing[0].node}, which this graph does not have")
    flow = build_dataflow(graph)
    _read_written_values(flow)
    splicer = _Splicer(graph, flow, by_name, next(n for n in graph.nodes if n.op != "placeholder"))
    for edit in sorted(plan.edits, key=lambda e: flow.order[by_name[e.site.node]]):
        splicer.apply(edit)
    return tuple(splicer.buffers)


def attach(gm: fx.GraphModule, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give the graph module its buffers and compile its Python code anew."""
    for name, tensor in tensors.items():
        gm.register_buffer(name, tensor, persistent=False)
    gm.graph.lint()
    gm.recompile()


def _read_written_values(flow: Dataflow) -> None:
    """Make readers of a tensor that was written in place read the write's result: the same memory, but named."""
    for node, reads in flow.resolved.items():
        for argument, value in reads.items():
            if value is not argument and value not in flow.hazards:
                node.replace_input_with(argument, value)


@dataclass
class _Splicer:
    graph: fx.Graph
    flow: Dataflow
    by_name: Mapping[str, fx.Node]
    first: fx.Node
    buffers: dict[str, fx.Node] = field(default_factory=dict)
    current: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """What a value's next capture sees: the value behind all edits so far that every reader sees."""
    reads: dict[fx.Node, dict[fx.Node, fx.Node]] = field(default_factory=dict)
    """``value -> {reader: node that it reads in its place}``."""
    row_views: dict[str, fx.Node] = field(default_factory=dict)
    counts: dict[str, fx.Node] = field(default_factory=dict)
    following: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def apply(self, edit: Edit) -> None:
        value = self.by_name[edit.site.node]
        with self.graph.inserting_before(self._following(value)):
            bank = self._buffer(bank_name(edit.slot.bank))[edit.slot.index]
            if edit.op == "capture":
                h: Any = fx.Proxy(self.current.get(value, value))
                tokens = fx.Proxy(self._count(edit.site, h))
                store_rows(_in_batch_order(edit.site, h), bank, tokens)  # type: ignore[arg-type]
            else:
                self._steer(edit.site, value, bank)

    def _steer(self, site: Site, value: fx.Node, bank: Any) -> None:
        """Steer what each of the site's readers reads; readers that see different values get an operation each."""
        reads = self.reads.setdefault(value, {})
        readers = self.flow.users[value] if site.users is None else [self.by_name[name] for name in site.users]
        sources: dict[fx.Node, list[fx.Node]] = {}
        for reader in readers:
            sources.setdefault(reads.get(reader, value), []).append(reader)
        for source, group in sources.items():
            steered = self._add_rows(site, fx.Proxy(source), bank)
            for reader in group:
                reader.replace_input_with(source, steered)
                reads[reader] = steered
            if site.users is None and source is self.current.get(value, value):
                self.current[value] = steered

    def _add_rows(self, site: Site, h: Any, bank: Any) -> fx.Node:
        rows: Any = fx.Proxy(self._rows(site, h))
        streams = site.layout == "streams"
        steered: Any = add_rows(h.flatten(-2) if streams else h, bank, rows, self._buffer(SCALE))
        node: fx.Node = steered.view_as(h).node if streams else steered.node
        return node

    def _following(self, value: fx.Node) -> fx.Node:
        """The node in front of which operations at ``value`` go, so that they stand in the order of the plan."""
        if value.op == "placeholder":
            return self.first
        return self.following.setdefault(value, value.next)

    def _buffer(self, name: str) -> Any:
        """The buffer, read once at the top of the graph: a proxy, which takes any operator."""
        if name not in self.buffers:
            with self.graph.inserting_before(self.first):
                self.buffers[name] = self.graph.create_node("get_attr", name)
        return fx.Proxy(self.buffers[name])

    def _count(self, site: Site, h: Any) -> fx.Node:
        """Number of tokens, computed at the first site of each layout."""
        if site.layout not in self.counts:
            count = h.size(0) if site.layout == "flat" else h.size(0) * h.size(1)
            self.counts[site.layout] = count.node
        return self.counts[site.layout]

    def _rows(self, site: Site, h: Any) -> fx.Node:
        """Row of each token in the site's layout, computed at the first site of each layout."""
        if site.layout not in self.row_views:
            rows = self._buffer(ROWS).narrow(0, 0, fx.Proxy(self._count(site, h)))
            if site.layout in ("batch_first", "streams"):
                rows = rows.view(h.size(0), h.size(1))
            elif site.layout == "time_first":
                rows = rows.view(h.size(1), h.size(0)).transpose(0, 1)
            self.row_views[site.layout] = rows.node
        return self.row_views[site.layout]


def _in_batch_order(site: Site, h: Any) -> Any:
    """The value with its tokens in batch order and one dimension of numbers for each."""
    if site.layout == "time_first":
        return h.transpose(0, 1)
    return h.flatten(-2) if site.layout == "streams" else h
