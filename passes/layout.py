"""Token layout of a stream value: which leading dimension is the batch and which the position."""

from __future__ import annotations

import sympy
import torch
from torch import fx

from steer_compile.ir import Dim
from steer_compile.passes.dataflow import Dataflow, op_name, shape_of

_CHANNELS_FIRST = frozenset("conv1d conv2d conv3d".split())
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


def permutation(node: fx.Node) -> tuple[int, ...] | None:
    """Order of the three dimensions that a transposing node makes; None when it is not one."""
    shape = shape_of(node)
    if op_name(node) not in _SWAPS or shape is None or len(shape) != 3:
        return None
    given = node.args[1:]
    if len(given) == 1 and isinstance(given[0], tuple | list):
        given = tuple(given[0])
    numbers = [d % 3 for d in given if isinstance(d, int)]
    if op_name(node) == "permute":
        return tuple(numbers)
    order = [0, 1, 2]
    if len(numbers) == 2:
        i, j = numbers
        order[i], order[j] = order[j], order[i]
    return tuple(order)


def swaps_tokens(node: fx.Node) -> bool:
    """Whether the node exchanges the first two dimensions of a three-dimensional value."""
    return permutation(node) == (1, 0, 2)


def stem_order(flow: Dataflow, entry: fx.Node) -> str:
    """Meaning of the dimensions of the stream's first value: ``bth``, ``tbh``, or another order of these letters."""
    steps: list[tuple[int, ...]] = []
    order = "bth"
    node = entry
    for _ in range(256):
        inputs = [n for n in flow.inputs[node] if flow.is_activation(n) and shape_of(n)]
        if op_name(node) in _CHANNELS_FIRST:
            order = "bht"
            break
        if node.op == "placeholder" or op_name(node) == "embedding" or not inputs:
            break
        order_here = permutation(node)
        if order_here is not None:
            steps.append(order_here)
        node = max(inputs, key=lambda n: len(shape_of(n) or ()))
    for step in reversed(steps):
        order = "".join(order[i] for i in step)
    return order


def layout_of(node: fx.Node, order: str, multi: bool = False) -> str:
    """``batch_first``, ``time_first``, ``flat`` or ``streams``; ``""`` when the value is none of them.

    Args:
        multi: four-dimensional values are parallel streams (B, T, m, H).
        order: meaning of the dimensions that a three-dimensional value has here (see `stem_order`).
    """
    rank = len(shape_of(node) or ())
    if rank == 3:
        return {"bth": "batch_first", "tbh": "time_first"}.get(order, "")
    if rank == 4:
        return "streams" if multi and order == "bth" else ""
    return "flat" if rank == 2 and order == "bth" else ""
