"""Normalisations of the last dimension that a Dynamo graph writes out or calls: RMSNorm and LayerNorm.

::

    value --> [float] --> x * rsqrt(mean(x^2) + eps) --> [round] --> * weight --> [round] --> result

A match starts at the node that holds the normalised numbers (the *core*), reads backwards to the value and forwards
to the result. Statistics are in fp32 and the result has the dtype of the value; anything else is no norm.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from steer_compile.ir import Norm
from steer_compile.passes.dataflow import dtype_of, is_state, shape_of


def norm_of_sum(x: Any, weight: Any, epsilon: float, dtype: torch.dtype, rounded: torch.dtype | None) -> Any:
    """RMSNorm of a sum before its rounding: one half of vLLM's fused add and norm (`passes.fused_norms`).

    ``x`` names the rounded sum in an opened graph; ``dtype`` is the result's, ``rounded`` the weight's.
    """
    x = x.to(torch.float32)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)
    return (x if weight is None else x.to(rounded) * weight).to(dtype)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_VLLM = "vllm_ir.rms_norm.default"
_OPS: dict[object, str] = {
    **dict.fromkeys((torch.pow, operator.pow, "pow"), "pow"),
    **dict.fromkeys((torch.square, "square"), "square"),
    **dict.fromkeys((torch.mul, torch.multiply, operator.mul, "mul", "multiply"), "mul"),
    **dict.fromkeys((torch.mean, "mean"), "mean"),
    **dict.fromkeys((torch.add, operator.add, "add"), "add"),
    **dict.fromkeys((torch.sub, torch.subtract, operator.sub, "sub", "subtract"), "sub"),
    **dict.fromkeys((torch.div, torch.divide, torch.true_divide, operator.truediv, "div"), "div"),
    **dict.fromkeys((torch.rsqrt, "rsqrt"), "rsqrt"),
    **dict.fromkeys((torch.sqrt, "sqrt"), "sqrt"),
    **dict.fromkeys((torch.reciprocal, "reciprocal"), "reciprocal"),
    **dict.fromkeys(("to", "type", "type_as", "float", "half", "bfloat16"), "cast"),
    **dict.fromkeys((functional.rms_norm, torch.rms_norm), "rms_norm"),
    **dict.fromkeys((functional.layer_norm, torch.layer_norm), "layer_norm"),
}
"""Operator of each target. Custom operators and in-place spellings have none, whatever their name."""


@dataclass(frozen=True)
class _Param:
    """A weight or bias: where it is stored, what is added to it, and the casts and additions on the way."""

    node: fx.Node
    offset: float
    side: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Match:
    """A norm as far as it is matched.

    Attributes:
        node: the last node so far.
        inner: nodes before it, value and parameters excluded.
        rounded: whether the numbers have had their one rounding to the value's dtype.
    """

    kind: str
    value: fx.Node
    node: fx.Node
    inner: frozenset[fx.Node]
    eps: float
    rounded: bool = False
    weight: _Param | None = None
    bias: _Param | None = None
    exact: bool = False

    def extended(self, node: fx.Node, rounded: bool) -> _Match:
        """The match with one more node at its end."""
        return replace(self, node=node, inner=self.inner | {self.node}, rounded=rounded)


def match_norms(graph: fx.Graph) -> dict[str, tuple[Norm, ...]]:
    """Every norm of the graph by the name of the value it normalises; norms of one value in graph order."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    data = _data_nodes(graph)
    found: dict[str, tuple[Norm, ...]] = {}
    for node in graph.nodes:
        core = _called(node) or _of_vllm(node) or _written_out(node)
        match = _finish(core, data) if core is not None else None
        norm = _as_norm(match, order) if match is not None else None
        if norm is not None:
            found[norm.value] = (*found.get(norm.value, ()), norm)
    return found


def _data_nodes(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that are computed from an input of the model."""
    data: set[fx.Node] = set()
    for node in graph.nodes:
        is_input = node.op == "placeholder" and not is_state(node)
        if is_input or any(n in data for n in node.all_input_nodes):
            data.add(node)
    return data


def _op(node: object) -> str:
    """Operator of a node, empty for what no norm is made of."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    return _OPS.get(node.target, "")


def _binary(node: object, op: str) -> tuple[object, object] | None:
    """Both operands of an operator without further arguments."""
    if not isinstance(node, fx.Node) or _op(node) != op or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def _unary(node: object, op: str) -> fx.Node | None:
    if not isinstance(node, fx.Node) or _op(node) != op or len(node.args) != 1 or node.kwargs:
        return None
    return node.args[0] if isinstance(node.args[0], fx.Node) else None


def _pairs(operands: tuple[object, object] | None) -> tuple[tuple[object, object], ...]:
    """Both orders of a commutative operator's operands."""
    return () if operands is None else (operands, operands[::-1])


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _cast_source(node: object) -> fx.Node | None:
    """What a cast casts, a cast to the same dtype included; None for other nodes and for moves between devices."""
    if not isinstance(node, fx.Node) or _op(node) != "cast" or not isinstance(node.args[0], fx.Node):
        return None
    source = node.args[0]
    before, after = source.meta.get("example_value"), node.meta.get("example_value")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.device != after.device:
        return None
    return source if before.dtype in _FLOATS and after.dtype in _FLOATS else None


def _widened(node: fx.Node) -> fx.Node | None:
    """What a cast to fp32 casts."""
    return _cast_source(node) if dtype_of(node) == torch.float32 else None


def _mean(node: object) -> fx.Node | None:
    """What a mean over the last dimension, kept as 1, averages."""
    if not isinstance(node, fx.Node) or _op(node) != "mean" or len(node.args) > 3:
        return None
    given: dict[str, object] = dict(zip(("input", "dim", "keepdim"), node.args, strict=False))
    given.update(("dim" if name == "axis" else name, value) for name, value in node.kwargs.items())
    source, dim = given.pop("input", None), given.pop("dim", None)
    if not isinstance(source, fx.Node) or given != {"keepdim": True}:
        return None
    if isinstance(dim, list | tuple):
        dim = dim[0] if len(dim) == 1 else None
    return source if dim in (-1, len(shape_of(source) or ()) - 1) else None


def _squared(node: object) -> fx.Node | None:
    """What a square squares."""
    power = _binary(node, "pow")
    if power is not None and isinstance(power[0], fx.Node):
        return power[0] if _number(power[1]) == 2 else None
    product = _binary(node, "mul")
    if product is not None and isinstance(product[0], fx.Node):
        return product[0] if product[0] is product[1] else None
    return _unary(node, "square")


def _inverse_root(node: object) -> tuple[fx.Node, tuple[fx.Node, ...]] | None:
    """What ``rsqrt(x)``, ``1 / sqrt(x)``, ``sqrt(x).reciprocal()`` or ``x ** -0.5`` reads, and its nodes."""
    if not isinstance(node, fx.Node):
        return None
    inside = _unary(node, "rsqrt")
    power = _binary(node, "pow")
    if power is not None and isinstance(power[0], fx.Node) and _number(power[1]) == -0.5:
        inside = power[0]
    if inside is not None:
        return inside, (node,)
    root: object = _unary(node, "reciprocal")
    ratio = _binary(node, "div")
    if ratio is not None and _number(ratio[0]) == 1:
        root = ratio[1]
    inside = _unary(root, "sqrt")
    return (inside, (node, root)) if inside is not None and isinstance(root, fx.Node) else None


def _scale_of(node: object) -> tuple[fx.Node, float, frozenset[fx.Node]] | None:
    """``1 / sqrt(mean(x * x) + eps)``: x, eps and the nodes."""
    root = _inverse_root(node)
    for mean, constant in _pairs(_binary(root[0], "add") if root else None):
        eps, square = _number(constant), _mean(mean)
        source = _squared(square)
        if root and eps is not None and source is not None and isinstance(mean, fx.Node) and square is not None:
            return source, eps, frozenset({*root[1], root[0], mean, square})
    return None


def _centred(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """``x - mean(x)``: x and its mean."""
    operands = _binary(node, "sub")
    if operands is None or not isinstance(operands[0], fx.Node) or not isinstance(operands[1], fx.Node):
        return None
    return (operands[0], operands[1]) if _mean(operands[1]) is operands[0] else None


def _written_out(node: fx.Node) -> _Match | None:
    """The core of a norm made of single operators: ``x * rsqrt(...)`` or ``(x - mean) * rsqrt(...)``."""
    if dtype_of(node) != torch.float32:
        return None
    for read, scale in _pairs(_binary(node, "mul")):
        stats = _scale_of(scale)
        if stats is None or not isinstance(read, fx.Node):
            continue
        source, eps, nodes = stats
        left, right = _centred(read), _centred(source)
        if left is not None and right is not None and left[0] is right[0]:
            nodes |= {read, source, left[1], right[1]}
            return _from_sources("layer", node, (left[0], left[0]), eps, nodes)
        return _from_sources("rms", node, (source, read), eps, nodes)
    return None


def _from_sources(
    kind: str, node: fx.Node, sources: tuple[fx.Node, fx.Node], eps: float, nodes: frozenset[fx.Node]
) -> _Match | None:
    """The core whose statistics and product read the sources: one node, or the value and a cast of it."""
    statistics, read = sources
    if dtype_of(statistics) != torch.float32:
        return None
    value = _widened(statistics)
    if statistics is not read and value is not read and (value is None or value is not _widened(read)):
        return None
    value = value or statistics
    casts = {source for source in sources if source is not value}
    return _Match(kind, value, node, nodes | casts, eps) if _is_normal(value) else None


def _is_normal(value: fx.Node) -> bool:
    return dtype_of(value) in _FLOATS and _width(value) is not None


def _width(value: fx.Node) -> int | None:
    shape = shape_of(value)
    return shape[-1] if shape and isinstance(shape[-1], int) else None


def _called(node: fx.Node) -> _Match | None:
    """The core that one call of torch's ``layer_norm`` or ``rms_norm`` computes. In bf16 both round once."""
    kind = _op(node)
    if kind not in ("layer_norm", "rms_norm"):
        return None
    names = ("input", "normalized_shape", "weight", *(("bias",) if kind == "layer_norm" else ()), "eps")
    given: dict[str, object] = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
    source, shape = given.get("input"), given.get("normalized_shape")
    if not isinstance(source, fx.Node) or not isinstance(shape, list | tuple) or not _is_normal(source):
        return None
    weight, bias = (_param(given.get(name), _width(source)) for name in ("weight", "bias"))
    eps = _call_eps(kind, given.get("eps", 1e-5 if kind == "layer_norm" else None), source)
    refused = (given.get("weight") is not None and weight is None) or (given.get("bias") is not None and bias is None)
    if refused or eps is None or tuple(shape) != (_width(source),) or dtype_of(node) != dtype_of(source):
        return None
    if bias is not None and bias.offset:
        return None
    value = _widened(source)
    name = "layer" if kind == "layer_norm" else "rms_wide" if weight else "rms"
    inner = frozenset() if value is None else frozenset({source})
    return _Match(name, value or source, node, inner, eps, value is None, weight, bias)


def _of_vllm(node: fx.Node) -> _Match | None:
    """The core that vLLM's operator computes: it normalises in fp32 and rounds to the weight's dtype in front of it."""
    if str(node.target) != _VLLM and node.target is not norm_of_sum:
        return None
    names = ("x", "weight", "epsilon", "variance_size")[: 3 if node.target is norm_of_sum else 4]
    given: dict[str, object] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    source, weight, eps = given.get("x"), given.get("weight"), _number(given.get("epsilon"))
    if not isinstance(source, fx.Node) or given.get("variance_size") is not None or eps is None:
        return None
    dtype, exact = dtype_of(source), node.target is norm_of_sum and dtype_of(source) != torch.float32
    if not _is_normal(source) or dtype_of(node) != dtype:
        return None
    if weight is None:
        return _Match("rms", source, node, frozenset(), eps, True, exact=exact)
    if not isinstance(weight, fx.Node) or shape_of(weight) != (_width(source),):
        return None
    wide = dtype_of(weight) == torch.float32
    if not wide and dtype_of(weight) != dtype:
        return None
    # A weight that is computed in another way is read as it is.
    param = (_param(weight, _width(source)) if wide else None) or _Param(weight, 0.0, ())
    return _Match("rms_wide" if wide else "rms", source, node, frozenset(), eps, True, param, exact=exact)


def _call_eps(kind: str, eps: object, source: fx.Node) -> float | None:
    # For narrow dtypes torch's documentation and its kernels differ in which epsilon None means.
    if kind == "rms_norm" and eps is None and dtype_of(source) == torch.float32:
        return torch.finfo(torch.float32).eps
    return _number(eps)


def _param(node: object, width: int | None) -> _Param | None:
    """A stored vector, read as it is or cast without loss, with a constant added in fp32 or not."""
    offset: float | None = None
    side: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op not in ("placeholder", "get_attr"):
        side.append(node)
        source = _cast_source(node)
        if source is not None:
            if dtype_of(node) not in (torch.float32, dtype_of(source)):
                return None
        elif offset is None:
            source, offset = _plus_constant(node)
        node = source
    if not isinstance(node, fx.Node) or shape_of(node) != (width,) or dtype_of(node) not in _FLOATS:
        return None
    return _Param(node, offset or 0.0, tuple(side))


def _plus_constant(node: fx.Node) -> tuple[fx.Node | None, float | None]:
    if dtype_of(node) == torch.float32:
        for vector, constant in _pairs(_binary(node, "add")):
            number = _number(constant)
            if isinstance(vector, fx.Node) and number is not None:
                return vector, number
    return None, None


def _finish(core: _Match, data: set[fx.Node]) -> _Match | None:
    """Follow the core to the result: a rounding, a weight, a rounding, each of them or none."""
    dtype = dtype_of(core.value)
    match: _Match | None = _round(core)
    if match is not None and match.weight is None and match.bias is None:
        match = _weigh(match, data)
        match = _round(match) if match is not None and match.weight is not None else match
    return match if match is not None and dtype_of(match.node) == dtype else None


def _sole_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _round(match: _Match) -> _Match | None:
    """Take in the cast to the value's dtype that follows; a cast to another one is no part of a norm."""
    user = _sole_user(match.node)
    if match.rounded or user is None or _cast_source(user) is not match.node:
        return match
    return match.extended(user, True) if dtype_of(user) == dtype_of(match.value) else None


def _weigh(match: _Match, data: set[fx.Node]) -> _Match | None:
    """Take in the product with the weight that follows; a learned factor that is no weight leaves no norm."""
    user = _sole_user(match.node)
    for read, factor in _pairs(_binary(user, "mul")):
        if read is not match.node or not isinstance(factor, fx.Node) or user is None or factor in data:
            continue
        weight = _param(factor, _width(match.value))
        # A LayerNorm that rounds before its weight has no kind; in fp32 there is nothing to round.
        late = match.rounded and match.kind == "layer" and dtype_of(match.value) != torch.float32
        if weight is None or late or dtype_of(user) != dtype_of(match.node):
            return None
        kind = match.kind if match.kind == "layer" or match.rounded else "rms_wide"
        return replace(match.extended(user, match.rounded), kind=kind, weight=weight)
    return match


def _as_norm(match: _Match, order: dict[fx.Node, int]) -> Norm | None:
    """The norm, unless another node reads what the norm computes on its way."""
    inner = set(match.inner)
    if match.value in inner or any(user not in inner and user is not match.node for n in inner for user in n.users):
        return None
    for param in (match.weight, match.bias):
        for node in param.side if param else ():
            if any(user not in inner and user is not match.node for user in node.users):
                break  # shared with another reader: it stays
            inner.add(node)
    return Norm(
        kind=match.kind,
        node=match.node.name,
        value=match.value.name,
        inner=tuple(n.name for n in sorted(inner, key=order.__getitem__)),
        weight=match.weight.node.name if match.weight else None,
        bias=match.bias.node.name if match.bias else None,
        eps=match.eps,
        offset=match.weight.offset if match.weight else 0.0,
        exact=match.exact,
    )
