"""The residual spine: the outermost chain of residual writes, from the embedding to the final norm.

Chains inside a branch (rotary sums, inner residual networks, recurrences) are told apart by nesting, not by
length: everything between two neighbouring values of the spine belongs to the branch of that write.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from steer_compile import torch_compat
from steer_compile.passes.dataflow import Dataflow, dtype_of, op_name, shape_of
from steer_compile.passes.residual import ResidualGraph, Write

_ATTENTION = frozenset("scaled_dot_product_attention flex_attention multi_head_attention_forward".split())
_CONV = frozenset("conv1d conv2d conv3d conv_transpose1d causal_conv1d_fn causal_conv1d_update".split())
_SCAN = frozenset("cumsum cumprod logcumsumexp associative_scan scan while_loop fft rfft irfft stft".split())
_CONTRACT = frozenset("matmul bmm einsum baddbmm matmul_ mv".split())
_PROJECTIONS = frozenset("linear matmul addmm conv1d conv2d bmm einsum".split())
_FUSED = frozenset("_transformer_encoder_layer_fwd transformer_encoder_layer_fwd".split())


@dataclass
class Spine:
    """The main chain, or ``reason`` why there is no single one. ``others`` are further top-level chains."""

    writes: list[Write]
    reason: str = ""
    near: tuple[str, ...] = ()
    others: tuple[tuple[Write, ...], ...] = ()


def is_opaque_region(node: fx.Node) -> bool:
    """Whether the node runs a graph or a fused layer of its own that could hold residual writes."""
    if node.op != "call_function":
        return node.op == "call_module"
    return torch_compat.is_higher_order(node.target) or op_name(node) in {n.strip("_") for n in _FUSED}


def token_mixing(flow: Dataflow, region: list[fx.Node]) -> str:
    """``strong`` when the region surely mixes token positions, ``weak`` when it contracts activations, else ``""``."""
    inside = set(region)
    weak = ""
    for node in region:
        name = op_name(node)
        dtype = dtype_of(node)
        floating = dtype is None or dtype.is_floating_point
        if name in _ATTENTION or "attention" in name or "flex_attention" in str(node.target):
            return "strong"
        if name in _CONV or (name in _SCAN and floating):
            return "strong"
        if name in _CONTRACT and len([n for n in flow.inputs[node] if n in inside or is_learned(flow, n)]) >= 2:
            if _behind_softmax(flow, node, inside):
                return "strong"
            weak = "weak"
    return weak


def is_learned(flow: Dataflow, value: fx.Node) -> bool:
    """Whether the value is computed by projections or embeddings: a memory, not a mask or a position table."""
    if flow.learned is None:
        flow.learned = sum(1 << i for i, n in enumerate(flow.nodes) if op_name(n) in ("embedding", "linear"))
    return bool(flow.ancestors[flow.order[value]] & flow.learned)


def _behind_softmax(flow: Dataflow, node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether one factor is a softmax over the other's tokens: attention written by hand."""
    for value in flow.inputs[node]:
        steps = 0
        while value in inside and steps < 8:
            if op_name(value) == "softmax":
                shape = shape_of(value)
                return shape is not None and len(shape) >= 3
            if not flow.inputs[value]:
                break
            value, steps = flow.inputs[value][0], steps + 1
    return False


class _Chains:
    """Chains as a forest over `Write.previous`."""

    def __init__(self, residual: ResidualGraph) -> None:
        self.flow = residual.flow
        absorbed = {id(a) for w in residual.writes.values() for a in w.absorbed}
        self.writes = [w for w in residual.writes.values() if id(w) not in absorbed]
        self.children: dict[int, list[Write]] = {}
        self.roots: list[Write] = []
        for write in self.writes:
            if write.previous is None:
                self.roots.append(write)
            else:
                self.children.setdefault(id(write.previous), []).append(write)

    def within(self, inner: Write, outer: Write) -> bool:
        """Whether ``inner`` feeds the branch of ``outer``."""
        return self.flow.depends(outer.node, inner.node)

    def follow(self, root: Write) -> list[list[Write]]:
        """Maximal chains from ``root``: at a fork of chains, the children that no other child contains."""
        chain = [root]
        while True:
            children = self.children.get(id(chain[-1]), [])
            outer = [c for c in children if not any(self.within(c, o) for o in children if o is not c)]
            if not outer:
                return [chain]
            if len(outer) > 1:
                return [[*chain, *tail] for child in outer for tail in self.follow(child)]
            chain.append(outer[0])

    def nested(self, inner: list[Write], outer: list[Write]) -> bool:
        """Whether the whole of ``inner`` lies in the branch of one write of ``outer``."""
        bottom, top = inner[0], inner[-1]
        for write in outer:
            if self.within(top, write):
                start = write.fork
                return bottom.fork is start or self.flow.depends(bottom.fork, start)
        return False


def find_spine(residual: ResidualGraph) -> Spine:
    """Choose the main chain; refuse when several could be it or when a part of it is out of sight."""
    chains = _Chains(residual)
    flow = residual.flow
    top_level = [c for root in chains.roots for c in chains.follow(root)]
    top_level = _outermost(chains, top_level)
    strong = [c for c in top_level if any(token_mixing(flow, flow.region(w.fork, w.node)) for w in c)]
    pool = strong or [c for c in top_level if len(c) > 1] or top_level
    hidden = _opaque_reason(flow, pool)
    if not pool:
        reason = hidden or "no add in this graph has one operand that the other is computed from"
        return Spine([], reason)
    weights = {id(c): _projections(flow, c) for c in pool}
    heaviest = max(weights.values())
    pool = [c for c in pool if weights[id(c)] * 4 >= heaviest]
    total = sum(_is_projection(flow, n) for n in flow.nodes)
    if heaviest * 5 < total:
        best = max(pool, key=lambda c: weights[id(c)])
        text = f"no chain of residual adds spans the model: {_describe(best)} holds {heaviest} of {total} projections"
        return Spine([], hidden or text, _names([best]))
    final = [c for c in pool if not any(flow.depends(o[-1].node, c[-1].node) for o in pool if o is not c)]
    if len(final) > 1:
        text = "; ".join(_describe(c) for c in final)
        return Spine([], f"{len(final)} residual streams reach the output side by side: {text}", _names(final))
    main = final[0]
    others = tuple(tuple(c) for c in pool if c is not main)
    broken = hidden or _broken_reason(flow, main, others) or _interleaved_reason(flow, main, top_level)
    if broken:
        return Spine([], broken, _names([main, *map(list, others)]), others)
    return Spine(main, others=others)


def _is_projection(flow: Dataflow, node: fx.Node) -> bool:
    """Whether the node multiplies an activation by parameters."""
    return op_name(node) in _PROJECTIONS and any(not flow.is_activation(v) for v in flow.inputs[node])


def _projections(flow: Dataflow, chain: list[Write]) -> int:
    """Number of projections in the branches of a chain: its share of the model's work."""
    inside = {n for w in chain for n in flow.region(w.fork, w.node)}
    return sum(_is_projection(flow, n) for n in inside)


def _outermost(chains: _Chains, candidates: list[list[Write]]) -> list[list[Write]]:
    candidates = sorted(candidates, key=lambda c: chains.flow.order[c[-1].node], reverse=True)
    kept: list[list[Write]] = []
    for chain in candidates:
        if not any(chains.nested(chain, outer) for outer in kept):
            kept.append(chain)
    return kept


def _opaque_reason(flow: Dataflow, pool: list[list[Write]]) -> str:
    """A higher-order or fused operator that carries the stream hides writes from this graph."""
    branches: set[fx.Node] = set()
    for chain in pool:
        for write in chain:
            branches.update(flow.region(write.fork, write.node))
    for node in flow.nodes:
        if not is_opaque_region(node) or node in branches or "flex_attention" in str(node.target):
            continue
        if "autocast" in str(node.target) or not flow.is_activation(node):
            continue
        return (
            f"the stream passes through {op_name(node)} ({node.name}), whose inside this graph does not show; "
            "turn checkpointing, scans or fused encoder layers off for this model"
        )
    return ""


def _broken_reason(flow: Dataflow, main: list[Write], others: tuple[tuple[Write, ...], ...]) -> str:
    """An earlier chain whose last value is the only way into this one: one stream that changes its shape."""
    entry = main[0].path[0]
    for other in others:
        top = other[-1].node
        if flow.depends(entry, top) and _dominates(flow, top, entry):
            parts = f"{_describe(list(other))}, then {_describe(main)}"
            return f"the stream is cut between {top.name} and {entry.name}: {parts}"
    return ""


def _interleaved_reason(flow: Dataflow, main: list[Write], chains: list[list[Write]]) -> str:
    """Two chains that feed each other in turn: a reversible network's streams."""
    forks = {w.fork for w in main} | {w.node for w in main}
    for other in chains:
        if other is main or len(other) < 2 or any(w.node in forks for w in other):
            continue
        feeds = sum(
            flow.depends(m.node, o.node) and flow.depends(o.node, m.fork) for o, m in zip(other, main, strict=False)
        )
        exact = all("norm" not in w.path_kinds for w in other[1:])
        if exact and feeds >= 2 and len(other) * 2 >= len(main):
            return f"two streams feed each other in turn (reversible blocks): {_describe(main)}; {_describe(other)}"
    return ""


def _dominates(flow: Dataflow, gate: fx.Node, node: fx.Node) -> bool:
    """Whether every floating-point path from the model's inputs to ``node`` passes ``gate``."""
    seen, todo = {node}, [node]
    while todo:
        for value in flow.inputs[todo.pop()]:
            if value is gate or value in seen:
                continue
            dtype = dtype_of(value)
            source = op_name(value) == "embedding" or (value.op == "placeholder" and flow.is_activation(value))
            if source and dtype is not None and dtype.is_floating_point:
                return False
            seen.add(value)
            todo.append(value)
    return True


def _describe(chain: list[Write]) -> str:
    shape = shape_of(chain[-1].node) or ()
    return f"{len(chain)} writes from {chain[0].fork.name} to {chain[-1].node.name} (shape {_text(shape)})"


def _text(shape: tuple[object, ...]) -> str:
    return "(" + ", ".join(str(d) for d in shape) + ")"


def _names(chains: list[list[Write]]) -> tuple[str, ...]:
    return tuple(c[-1].node.name for c in chains)
