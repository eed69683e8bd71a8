"""Token layout of a stream value: which leading dimension is the batch and which the position."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from steer_compile.ir import Dim
from steer_compile.passes.dataflow import Dataflow, op_name, same_dims, shape_of

_SWAPS = frozenset("transpose swapaxes swapdims permute movedim".split())


def dims_of(node: fx.Node) -> tuple[Dim, ...]:
    """Shape with symbolic sizes as sympy expressions."""
    shape = shape_of(node) or ()
    return tuple(_expr(d) for d in shape)


def _expr(dim: int | torch.SymInt) -> Dim:
    if isinstance(dim, torch.SymInt):
        expr: sympy.Expr = dim.node.expr
        return int(expr) if expr.is_number else expr
    return int(dim)


def swaps_tokens(node: fx.Node) -> bool:
    """Whether the node exchanges the first two dimensions of a three-dimensional value."""
    if op_name(node) not in _SWAPS:
        return False
    dims = node.args[1:]
    if len(dims) == 1 and isinstance(dims[0], tuple | list):
        dims = tuple(dims[0])
    numbers = [d for d in dims if isinstance(d, int)]
    if op_name(node) == "permute":
        return numbers[:2] == [1, 0]
    return sorted(d % 3 for d in numbers[:2]) == [0, 1]


def stem_swapped(flow: Dataflow, entry: fx.Node) -> bool:
    """Whether the way from the embedding to the stream's first value exchanges batch and position."""
    swapped = False
    node = entry
    for _ in range(256):
        inputs = [n for n in flow.inputs[node] if flow.is_activation(n) and len(shape_of(n) or ()) in (2, 3)]
        if node.op == "placeholder" or op_name(node) == "embedding" or not inputs:
            return swapped
        swapped ^= swaps_tokens(node)
        node = max(inputs, key=lambda n: len(shape_of(n) or ()))
    return swapped


def layout_of(node: fx.Node, swapped: bool) -> str:
    """``batch_first``, ``time_first`` or ``flat``; ``""`` when the value is none of them."""
    rank = len(shape_of(node) or ())
    if rank == 3:
        return "time_first" if swapped else "batch_first"
    if rank == 2 and not swapped:
        return "flat"
    return ""


def swapped_along(path: list[fx.Node], swapped: bool) -> bool:
    """Order of the leading dimensions at the end of ``path``, given it at its start."""
    for before, node in zip(path, path[1:], strict=False):
        if swaps_tokens(node) and not same_dims((), shape_of(before) or ()):
            swapped = not swapped
    return swapped
