"""Residual writes of a graph: adds ``r' = r + f(r)`` whose branch is computed from the value that it is added to.

::

    r ----------------------------(+)--> r'        skip path: views, casts, scales, gates
     \\--> norm --> attention/mlp --/               branch: anything computed from r

The test is local and structural: one operand of an add leads back, through operators that keep the stream
(`passes_back`), to a value (the *fork*) that the other operand is computed from.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from steer_compile.passes.dataflow import Dataflow, dtype_of, op_name, same_dims, shape_of

MIX_OPS = frozenset("matmul einsum bmm".split())
"""Operators that mix the parallel streams of a hyper-connection."""
NORM_OPS = frozenset("layer_norm rms_norm norm_of_sum native_layer_norm group_norm batch_norm normalize".split())
_LAYOUT_OPS = frozenset("transpose permute swapaxes swapdims movedim mT T t".split())
_SAME_OPS = frozenset(
    "view reshape contiguous clone to type_as float half bfloat16 double dropout alpha_dropout unsqueeze squeeze "
    "flatten unflatten identity view_as reshape_as detach expand expand_as getitem nan_to_num lift_fresh alias "
    "_to_copy to_copy convert_element_type checkpoint_name".split()
)
_KINDS = {
    **dict.fromkeys(NORM_OPS, "norm"),
    **dict.fromkeys(_LAYOUT_OPS, "layout"),
    **dict.fromkeys(_SAME_OPS, "same"),
}
_SCALE_OPS = frozenset("mul multiply div truediv true_divide divide".split())
_SHIFT_OPS = frozenset("add sub subtract".split())
_GUARD_OPS = frozenset("clamp clip where masked_fill".split())
_ADD_OPS = frozenset("add sub subtract rsub addcmul lerp addmm baddbmm index_add scatter_add".split())
_MAX_WALK = 64


@dataclass(frozen=True)
class Back:
    """One step back along the stream. ``kind``: same, layout, scale, shift, gate, mix or norm."""

    node: fx.Node
    kind: str


@dataclass
class Write:
    """One residual write ``node = skip + branch``."""

    node: fx.Node
    fork: fx.Node
    """The stream value that skip and branch both read."""
    skip: list[fx.Node]
    """Values from the fork to the add's operand, both included, in graph order."""
    branch: tuple[fx.Node, ...]
    """Operands that are not the skip: one for a plain add, two for a product or interpolation."""
    exact: bool
    """Whether the branch operand is added as it is (no ``alpha``, no subtraction, no product)."""
    kind: str = "residual"
    """``residual``, or ``skip`` when the other operand is an older value of the same stream."""
    previous: Write | None = None
    path: list[fx.Node] = field(default_factory=list)
    """Values from the previous write to the fork, both included; from the stem's last value for the first write."""
    path_kinds: frozenset[str] = frozenset()
    absorbed: tuple[Write, ...] = ()
    """Writes of the same fork that this one completes: a parallel block written as two adds."""


def passes_back(flow: Dataflow, node: fx.Node) -> Iterator[Back]:
    """Values of which ``node`` is a view, a cast, a scaling, a gating or a normalisation."""
    inputs = [n for n in flow.inputs.get(node, []) if _is_float(n)]
    shape = shape_of(node)
    if node.op not in ("call_function", "call_method") or not inputs or shape is None or not _is_float(node):
        return
    name = op_name(node)
    kind = _KINDS.get(name)
    if kind is not None:
        if kind != "same" or _numel(shape) == _numel(shape_of(inputs[0])):
            yield Back(inputs[0], kind)
    elif name in MIX_OPS:
        yield from _through_mixing(node, inputs)
    elif name in _GUARD_OPS:
        yield from (Back(value, "scale") for value in inputs if _same_shape(value, node))
    elif name in _SCALE_OPS or name in _SHIFT_OPS:
        yield from _through_arithmetic(flow, node, inputs, name)


def _through_mixing(node: fx.Node, inputs: list[fx.Node]) -> Iterator[Back]:
    """Hyper-connections: m parallel streams (..., m, H) mixed by an m x m map."""
    for value in inputs:
        shape = shape_of(value)
        if shape is None or len(shape) != 4 or not _same_shape(value, node):
            continue
        maps = [shape_of(n) or () for n in inputs if n is not value]
        if any(len(s) >= 2 and same_dims(s[-2:], (shape[-2], shape[-2])) for s in maps):
            yield Back(value, "mix")


def _through_arithmetic(flow: Dataflow, node: fx.Node, inputs: list[fx.Node], name: str) -> Iterator[Back]:
    for value in inputs:
        if not _same_shape(value, node):
            continue
        others = [n for n in inputs if n is not value]
        if not any(flow.is_activation(n) for n in others):
            yield Back(value, "scale")
            continue
        if name in _SHIFT_OPS and not any(flow.depends(n, value) or flow.depends(value, n) for n in others):
            yield Back(value, "shift")
            continue
        per_token = all((shape_of(n) or (0,))[-1] == 1 for n in others if shape_of(n))
        if per_token and all(flow.depends(n, _source(flow, value)) for n in others):
            yield Back(value, "norm")
        elif name in _SCALE_OPS:
            yield Back(value, "gate")


def _source(flow: Dataflow, value: fx.Node) -> fx.Node:
    """The value behind casts: the statistics of a norm are computed from the cast or from what was cast."""
    while op_name(value) in _SAME_OPS and flow.inputs[value] and _is_float(flow.inputs[value][0]):
        value = flow.inputs[value][0]
    return value


def _is_float(node: fx.Node) -> bool:
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point


def _numel(shape: tuple[int | torch.SymInt, ...] | None) -> object:
    product = math.prod(shape or ())
    return product.node.expr if isinstance(product, torch.SymInt) else product


def _same_shape(value: fx.Node, node: fx.Node) -> bool:
    left, right = shape_of(value), shape_of(node)
    return left is not None and right is not None and same_dims(left, right)


@dataclass(frozen=True)
class _Operand:
    nodes: tuple[fx.Node, ...]
    exact: bool
    carries: bool = True
    """Whether the operand may be the stream: added with a positive sign, not one factor of a product."""


def _operands(flow: Dataflow, node: fx.Node) -> list[_Operand]:
    """Addends of an add-like node; one addend may be a product of several nodes."""
    name = op_name(node)
    if node.op not in ("call_function", "call_method") or name not in _ADD_OPS or not _is_float(node):
        return []
    by_name = flow.resolved.get(node, {})
    args = [by_name[a] for a in node.args if isinstance(a, fx.Node) and a in by_name and _is_float(by_name[a])]
    args += [
        by_name[a] for a in node.kwargs.values() if isinstance(a, fx.Node) and a in by_name and _is_float(by_name[a])
    ]
    if len(args) < 2:
        return []
    if any((shape_of(a) or (0,))[-1] != (shape_of(node) or (0,))[-1] for a in args[:2]):
        return []
    head, rest = args[0], tuple(args[1:])
    if name == "add":
        plain = node.kwargs.get("alpha", 1) == 1
        return [_Operand((head,), True), _Operand((args[1],), bool(plain))]
    if name == "rsub":
        return [_Operand((head,), False, carries=False), _Operand((args[1],), True)]
    return [_Operand((head,), name != "lerp"), _Operand(rest, False, carries=False)]


class ResidualGraph:
    """All residual writes of a graph, linked to their predecessors."""

    def __init__(self, flow: Dataflow) -> None:
        self.flow = flow
        self.writes: dict[fx.Node, Write] = {}
        for node in flow.nodes:
            if node.op in ("call_function", "call_method"):
                write = self._match(node)
                if write is not None:
                    self._link(write)
                    self.writes[node] = write

    def _match(self, node: fx.Node) -> Write | None:
        found: list[Write] = []
        operands = _operands(self.flow, node)
        for i, skip in enumerate(operands):
            branch = tuple(n for j, other in enumerate(operands) if j != i for n in other.nodes)
            exact = all(other.exact for j, other in enumerate(operands) if j != i)
            for start in skip.nodes if skip.carries else ():
                walk = self._fork(start, branch, node)
                if walk is not None:
                    path, absorbed = walk
                    found.append(Write(node, path[0], path, branch, exact and len(branch) == 1, absorbed=absorbed))
        if not found:
            return None
        write = min(found, key=lambda w: self.flow.order[w.fork])
        return self._as_long_skip(write, operands) or write

    def _fork(
        self, start: fx.Node, branch: tuple[fx.Node, ...], add: fx.Node
    ) -> tuple[list[fx.Node], tuple[Write, ...]] | None:
        """Nearest value behind ``start`` that the branch is computed from, and the writes passed on the way."""
        todo: deque[tuple[list[fx.Node], tuple[Write, ...]]] = deque([([start], ())])
        seen = {start}
        while todo and len(seen) < _MAX_WALK:
            path, absorbed = todo.popleft()
            value = path[0]
            read = any(self.flow.depends(b, value) or b is value for b in branch)
            if read and shape_of(value) and _numel(shape_of(value)) == _numel(shape_of(add)):
                return path, absorbed
            steps = [b.node for b in passes_back(self.flow, value) if b.kind not in ("norm", "shift")]
            inner = self.writes.get(value)
            passed = absorbed
            if inner is not None and len(self.flow.users[value]) == 1:
                steps = [inner.skip[-1]]
                passed = (*absorbed, inner) if inner.kind == "residual" else absorbed
            for step in steps:
                if step not in seen:
                    seen.add(step)
                    todo.append(([step, *path], passed))
        return None

    def _as_long_skip(self, write: Write, operands: list[_Operand]) -> Write | None:
        """A U-Net, dense or recurrent skip: the "branch" is the stream and the "skip" one of its older values."""
        if len(write.branch) != 1:
            return None
        reached = self._write_behind(write.branch[0], ("same", "scale", "layout"))
        if reached is None:
            return None
        last, path, _ = reached
        older: set[fx.Node] = set()
        step: Write | None = last
        while step is not None:
            older.update(step.skip)
            if "norm" in step.path_kinds:
                break
            older.update(step.path)
            step = step.previous
        if write.fork not in older or self.flow.depends(write.fork, last.node):
            return None
        skip_exact = next(o.exact for o in operands if write.skip[-1] in o.nodes)
        return Write(
            write.node, path[-1], [path[-1]], (write.skip[-1],), skip_exact, kind="skip", previous=last, path=path
        )

    def _write_behind(
        self, start: fx.Node, kinds: tuple[str, ...]
    ) -> tuple[Write, list[fx.Node], frozenset[str]] | None:
        """Nearest write that ``start`` carries on, the values from it to ``start``, and the kinds of step between."""
        todo: deque[tuple[list[fx.Node], frozenset[str]]] = deque([([start], frozenset())])
        seen = {start}
        while todo and len(seen) < _MAX_WALK:
            path, passed = todo.popleft()
            if path[0] in self.writes:
                return self.writes[path[0]], path, passed
            for back in passes_back(self.flow, path[0]):
                if back.kind in kinds and back.node not in seen:
                    seen.add(back.node)
                    todo.append(([back.node, *path], passed | {back.kind}))
        return None

    def _link(self, write: Write) -> None:
        if write.kind == "skip":
            return
        reached = self._write_behind(write.fork, ("same", "scale", "shift", "gate", "mix", "layout", "norm"))
        if reached is None:
            write.path = [write.fork]
        else:
            write.previous, write.path, write.path_kinds = reached
