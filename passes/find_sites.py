"""Analysis: which values of a Dynamo graph are the hook points of the residual stream, or why there are none.

::

    gm.graph --build_dataflow--> reads resolved --ResidualGraph--> writes --find_spine--> main chain
             --group_blocks--> blocks --> Site for each hook with a value, Miss with a reason for each without

Structural: no model class is named. Follows Dynamo graphs of torch 2.11 to 2.13.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from steer_compile.hooks import COEFFICIENT_HOOKS, MULTI_STREAM_HOOKS
from steer_compile.ir import Miss, Site, SiteTable
from steer_compile.passes.blocks import Block, Branch, Term, group_blocks
from steer_compile.passes.branch_ends import branch_input
from steer_compile.passes.dataflow import Dataflow, build_dataflow, dtype_of, module_path
from steer_compile.passes.layout import dims_of, layout_of, permutation, stem_order
from steer_compile.passes.residual import ResidualGraph, Write
from steer_compile.passes.segments import Segment, arrival, segments_of
from steer_compile.passes.spine import find_spine
from steer_compile.passes.streams import StreamWrite, collapsed, normed, stream_write

_PARALLEL = "the block adds its mixer and its MLP in one write (parallel block); there is no value between them"
_MULTI = (
    "the block carries {} parallel streams, so no single value is the stream there; use mhc_streams_pre_attn, "
    "mhc_streams_pre_mlp or mhc_streams_final"
)
_STREAM_HOOKS = {
    "attn": ("mhc_streams_pre_attn", "pre_attn", "post_attn", "attn_out", "mhc_attn_post_mix", "mhc_attn_res_mix",
             "attn_in"),
    "mlp": ("mhc_streams_pre_mlp", "mlp_in", "mlp_out", "", "mhc_ffn_post_mix", "mhc_ffn_res_mix", ""),
}  # fmt: skip
"""Hooks of a branch on parallel streams: streams, mixed input, output twice, weights, map, input behind the norm."""


def find_sites(gm: fx.GraphModule, partial: bool = False, cut: range | None = None) -> SiteTable:
    """Sites and misses of the graph. Never raises for an odd graph: it returns misses.

    Args:
        gm: graph as Dynamo gives it to a backend. Not changed.
        partial: the graph is one of several of a model, so layers are numbered by their module's index.
        cut: the graph is the stage of a pipeline that has these layers of the model. The value that enters it is
            ``post_block`` of the layer in front of them.
    """
    flow = build_dataflow(gm.graph)
    spine = find_spine(ResidualGraph(flow))
    if spine.reason:
        return SiteTable(misses=(Miss(None, "*", spine.reason, spine.near),), partial=partial)
    blocks, loose = group_blocks(flow, spine.writes)
    hazard = _hazard(flow, spine.writes)
    homeless = next((b for b in loose if b.mixing and b.write.kind != "skip" and not b.owner), None)
    if hazard or homeless or not blocks:
        reason = hazard or "the residual writes of this graph belong to no block"
        if homeless and not hazard:
            node = homeless.write.node
            reason = f"the mixer branch added at {node.name} belongs to no block, so layers cannot be numbered"
        return SiteTable(misses=(Miss(None, "*", reason),), partial=partial)
    parallel = {id(w): parts for w in spine.writes if (parts := stream_write(flow, w)) is not None}
    entry, reason = _stage(flow, spine.writes, blocks, cut) if cut is not None else (None, "")
    if reason:
        return SiteTable(misses=(Miss(None, "*", reason),), partial=partial)
    builder = _Builder(flow, segments_of(flow, spine.writes, blocks, entry), parallel)
    numbers = list(cut) if cut is not None else _numbers(blocks, partial or _begins_at_a_block(flow, blocks))
    if numbers is None:
        reason = (
            "the graph begins at or inside a block, so its layer number is unknown; remove the graph break in the block"
        )
        return SiteTable(misses=(Miss(None, "*", reason),), partial=True, unnumbered=True)
    if entry is not None:
        builder.stream(numbers[0] - 1, "post_block", entry)
    for number, block in zip(numbers, blocks, strict=True):
        builder.add_block(number, block)
    if parallel:
        builder.final(numbers[-1], blocks[-1])
    for branch in loose:
        builder.misses.append(_loose_miss(branch))
    return SiteTable(tuple(builder.sites), tuple(builder.misses), tuple(numbers), partial)


def _numbers(blocks: list[Block], partial: bool) -> list[int] | None:
    """Layer numbers: execution order in a whole graph, module indices in a part of one."""
    if not partial:
        return list(range(len(blocks)))
    indices = [int(b.key[-1]) for b in blocks if b.key and b.key[-1].isdigit()]
    containers = {b.key[:-1] for b in blocks}
    # A lone index behind an argument may be that of a list inside the block: the graph is the block's own function.
    lone = len(blocks) == 1 and blocks[0].first.path[0].op == "placeholder"
    plain = len(indices) == len(blocks) == len(set(indices)) and len(containers) == 1 and not lone
    return indices if plain else None


def _stage(flow: Dataflow, writes: list[Write], blocks: list[Block], cut: range) -> tuple[fx.Node | None, str]:
    """The value that enters a stage behind the first one, and what keeps the graph from being the stage of a cut."""
    indices = [b.key[-1] if b.key else "" for b in blocks]
    if indices != [str(n) for n in cut]:
        text = f"the stage has the layers {cut[0]} to {cut[-1]}, and its graph has blocks of the modules"
        return None, f"{text} {', '.join(index or 'without an index' for index in indices)}"
    if not cut[0]:
        return None, ""
    path = arrival(flow, writes[0])
    if not path or blocks[0].first is not writes[0]:
        return None, "what the stage gets from the one before is neither the stream nor two values that add up to it"
    writes[0].path = path
    return path[0], ""


def _begins_at_a_block(flow: Dataflow, blocks: list[Block]) -> bool:
    """Whether the stream is an argument of a graph of modules without layer indices: one block's own function.

    Such a graph is compiled when the model around the block cannot be traced, and may serve several layers.
    """
    entry = blocks[0].first.path[0]
    modules = any(module_path(n) for n in flow.nodes)
    return entry.op == "placeholder" and modules and not any(b.key for b in blocks)


def _hazard(flow: Dataflow, writes: list[Write]) -> str:
    for write in writes:
        for value in (*write.path, *write.skip, write.node):
            if value in flow.hazards:
                return f"the stream is changed through an alias: {flow.hazards[value]}"
    return ""


def _loose_miss(branch: Branch) -> Miss:
    where = ".".join(branch.owner) or "no module"
    return Miss(None, f"write@{branch.write.node.name}", f"a residual write outside of the blocks (in {where})")


@dataclass
class _Builder:
    """Collects the sites of one block after another."""

    flow: Dataflow
    segments: dict[int, Segment]
    parallel: dict[int, StreamWrite] = field(default_factory=dict)
    """What each write to parallel streams is made of."""
    sites: list[Site] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    order: str = ""

    def add_block(self, layer: int, block: Block) -> None:
        """The sites of a block, and a miss for each hook that it does not have."""
        if self.parallel:
            self._add_streams(layer, block)
            return
        entry, values = self.segments[id(block.first)], [self.segments[id(b.write)] for b in block.branches]
        self.stream(layer, "pre_attn", entry.entering)
        leaving = self.segments[id(block.last)].leaving
        after = [segment.fork_after for segment in values[:-1]] + [leaving]
        for i, value in enumerate(after):
            self.stream(layer, f"write_{i}", value)
        mixers = [i for i, b in enumerate(block.branches) if b.mixing]
        parallel = next((b for b in block.branches if b.parallel), None)
        if parallel is not None:
            self._miss(layer, "post_attn", _PARALLEL, parallel.write.node)
        elif mixers:
            self.stream(layer, "post_attn", after[mixers[0]])
        else:
            self._miss(layer, "post_attn", "no branch of the block mixes token positions", block.last.node)
        self.stream(layer, "post_block", leaving)
        self._branches(layer, block)

    def _branches(self, layer: int, block: Block) -> None:
        chosen: dict[str, tuple[Branch, Term | None]] = {}
        for branch in block.branches:
            terms: list[tuple[bool, Term | None]] = [(bool(branch.mixing), None)]
            if branch.parallel:
                terms = [(bool(t.mixing), t) for t in branch.terms]
            for mixes, term in terms:
                if branch.write.kind == "skip":
                    continue
                if mixes:
                    chosen.setdefault("attn", (branch, term))
                else:
                    chosen["mlp"] = (branch, term)
        for kind in ("attn", "mlp"):
            if kind not in chosen:
                what = "mixes token positions" if kind == "attn" else "is an MLP"
                for end in ("in", "out"):
                    self._miss(layer, f"{kind}_{end}", f"no branch of the block {what}", block.last.node)
                continue
            branch, term = chosen[kind]
            self._branch_out(layer, f"{kind}_out", branch, term)
            self._branch_in(layer, f"{kind}_in", branch, term)

    def _branch_out(self, layer: int, hook: str, branch: Branch, term: Term | None) -> None:
        write = branch.write
        if term is None and not write.exact:
            text = f"{write.node.name} scales or combines the branch while it adds it; no value equals the contribution"
            self._miss(layer, hook, text, write.node)
            return
        node = term.node if term is not None else write.branch[0]
        self._site(layer, hook, node, None, ())

    def _branch_in(self, layer: int, hook: str, branch: Branch, term: Term | None) -> None:
        region = term.region if term is not None else branch.region
        end = branch_input(self.flow, branch.write.fork, region)
        if end is None:
            self._miss(layer, hook, "no single value is the input of the whole branch", branch.write.fork)
            return
        inside = set(region)
        users = tuple(u.name for u in self.flow.users[end] if u in inside)
        self._site(layer, hook, end, users, ())

    def _add_streams(self, layer: int, block: Block) -> None:
        """A block of parallel streams: the streams in front of each mixing, both ends of the branches, the weights."""
        written = [(b, self.parallel[id(b.write)]) for b in block.branches if id(b.write) in self.parallel]
        kinds = {
            "attn": next(((b, p) for b, p in written if b.mixing), None),
            "mlp": next(((b, p) for b, p in reversed(written) if not b.mixing), None),
        }
        streams = next(iter(self.parallel.values())).streams
        for hook in ("post_block", *(f"write_{i}" for i in range(len(block.branches)))):
            self._miss(layer, hook, _MULTI.format(streams), block.last.node)
        for kind, found in kinds.items():
            hooks = _STREAM_HOOKS[kind]
            if found is None:
                what = "mixes token positions" if kind == "attn" else "is an MLP"
                for hook in filter(None, hooks):
                    self._miss(layer, hook, f"no branch that is placed on the streams {what}", block.last.node)
                continue
            branch, parts = found
            one = collapsed(self.flow, branch.write, parts)
            behind = normed(self.flow, one, parts) if one is not None and kind == "attn" else None
            nodes = (branch.write.fork, one, parts.branch, parts.branch, parts.place, parts.mix, behind)
            for hook, node in zip(hooks, nodes, strict=True):
                self._part(layer, hook, node, branch.write.node, parts)

    def _part(self, layer: int, hook: str, node: fx.Node | None, write: fx.Node, parts: StreamWrite) -> None:
        """A hook of a block of parallel streams, where it has a value for each token."""
        if not hook:
            return
        if node is None or not self.flow.is_activation(node):
            kept = "each stream is kept as it is, so there is no map of them"
            none = kept if hook.endswith("res_mix") else "no single value of the graph is it"
            text = none if node is None else f"{node.name} is the same for every token"
            self._miss(layer, hook, f"{text} (in the write {write.name})", write)
            return
        row = (parts.streams, parts.width) if hook in MULTI_STREAM_HOOKS else ()
        self._site(layer, hook, node, None, (), row)

    def final(self, layer: int, block: Block) -> None:
        """The streams behind the last block: a hook of the model, kept under the last layer's number."""
        parts = next(iter(self.parallel.values()))
        leaving = self.segments[id(block.last)].leaving
        self._site(layer, "mhc_streams_final", leaving, None, (), (parts.streams, parts.width))

    def stream(self, layer: int, hook: str, node: fx.Node) -> None:
        """A hook of the stream's own values."""
        skips = tuple(n.name for n in self._skip_readers(node))
        self._site(layer, hook, node, None, skips)

    def _skip_readers(self, node: fx.Node) -> list[fx.Node]:
        """Reads of the value on the next skip path."""
        readers = []
        for segment in self.segments.values():
            chain = segment.skip_chain
            if node in chain[:-1]:
                readers.append(chain[chain.index(node) + 1])
        return readers

    def _site(
        self, layer: int, hook: str, node: fx.Node, users: tuple[str, ...] | None, skips: tuple[str, ...],
        row: tuple[int, ...] = (),
    ) -> None:  # fmt: skip
        dims, dtype = dims_of(node), dtype_of(node)
        layout = layout_of(node, self._order_at(node), hook in (*MULTI_STREAM_HOOKS, *COEFFICIENT_HOOKS))
        if layout == "streams" and isinstance(dims[-1], int) and isinstance(dims[-2], int):
            row, dims = (dims[-2], dims[-1]), (*dims[:-2], dims[-2] * dims[-1])
        if not layout or dtype is None or not isinstance(dims[-1], int):
            shape = ", ".join(str(d) for d in dims)
            self._miss(
                layer,
                hook,
                f"value {node.name} has shape ({shape}); tokens in front and a fixed width are needed",
                node,
            )
            return
        self.sites.append(Site(layer, hook, node.name, dims[-1], dtype, dims[:-1], layout, users, skips, row))

    def _order_at(self, node: fx.Node) -> str:
        """Meaning of the stream's dimensions at this point of the graph."""
        if not self.order:
            self.order = stem_order(self.flow, next(iter(self.segments.values())).entering)
        order, position = self.order, self.flow.order[node]
        for segment in self.segments.values():
            for value in segment.skip_chain[1:]:
                step = permutation(value)
                if step is not None and self.flow.order[value] <= position:
                    order = "".join(order[i] for i in step)
        return order

    def _miss(self, layer: int, hook: str, reason: str, near: fx.Node) -> None:
        if not any(m.layer == layer and m.hook == hook for m in self.misses):
            self.misses.append(Miss(layer, hook, reason, (near.name,)))
