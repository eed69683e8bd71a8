"""The input of a branch: the last value that all of it reads, behind its norm and in front of its first projection."""

from __future__ import annotations

import networkx as nx
from torch import fx

from steer_compile.passes.dataflow import Dataflow, op_name, same_dims, shape_of

_PROJECTIONS = frozenset(
    "linear matmul bmm addmm baddbmm einsum conv1d conv2d conv_transpose1d conv1d_fn scaled_dot_product_attention "
    "grouped_mm embedding index_select topk scatter gather index_add onehot one_hot".split()
)
_CASTS = frozenset("to float half bfloat16 type_as view reshape contiguous clone dropout getitem flatten cat".split())


def branch_input(flow: Dataflow, fork: fx.Node, region: list[fx.Node]) -> fx.Node | None:
    """Last common dominator in front of the branch's first projection; the fork itself when there is no norm.

    Args:
        fork: stream value that the branch reads.
        region: nodes of the branch in graph order, its output last.
    """
    if not region:
        return None
    inside = set(region)
    chain = dominators(flow, fork, region)
    if not chain:
        return None
    first = next((n for n in region if op_name(n) in _PROJECTIONS), None)
    limit = flow.order[first] if first is not None else flow.order[region[-1]]
    result = fork
    shape = shape_of(fork)
    for node in chain[1:]:
        here = shape_of(node)
        if flow.order[node] >= limit or here is None or shape is None or not same_dims(here, shape):
            break
        result = node
    if result is fork and not all(_takes_input(n) for n in flow.users[fork] if n in inside):
        return None
    return result


def dominators(flow: Dataflow, fork: fx.Node, region: list[fx.Node]) -> list[fx.Node]:
    """Values that every path from the fork to the end of the region passes, in order; empty when there is no path."""
    inside = {fork, *region}
    graph = nx.DiGraph()
    graph.add_node(fork)
    graph.add_edges_from((value, node) for node in region for value in flow.inputs[node] if value in inside)
    above = nx.immediate_dominators(graph, fork)
    chain = [region[-1]]
    while chain[0] is not fork:
        parent = above.get(chain[0])
        if parent is None:
            return []
        chain.insert(0, parent)
    return chain


def _takes_input(node: fx.Node) -> bool:
    """Whether a reader of the stream itself takes it as the branch's input, not as a term of its own arithmetic."""
    return op_name(node) in _PROJECTIONS or op_name(node) in _CASTS
