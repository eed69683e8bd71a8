"""Rewrite, and back: vLLM's fused add and RMSNorm as an add and a norm, so that the residual stream shows.

::

    %t = fused_add_rms_norm(%b, %r, %w, eps)            %v = add(%b, %r)
    %n = getitem(%t, 0)                          <-->   %n = norm_of_sum(%v, %w, eps)
    %s = getitem(%t, 1)                                 readers of %s read %v

The calls are open while the graph is searched, planned and spliced. Afterwards each is closed to the call that it was,
so that vLLM's own passes find it. A call whose sum was steered cannot be: where no template took it over, its norm is
written out in plain operators, of the steered value before its rounding (`passes.splice`).

Follows the operators of vLLM 0.22, told by their names: vLLM itself is not imported.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.proxy import GraphAppendingTracer

from steer_compile.passes.dataflow import dtype_of, same_dims
from steer_compile.passes.norms import norm_of_sum

FUSED = ("vllm_ir.fused_add_rms_norm.default", "vllm_ir.fused_add_rms_norm.maybe_inplace")
"""Called with branch, residual, weight or None, eps and, where a part of the row alone is averaged, its size."""
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class _Opened:
    """The nodes in the place of a call, and what the call was beside its tensors.

    Attributes:
        rest: arguments behind the four that `_is_plain` asks for.
        metas: of the nodes by which its results were read, by index.
    """

    total: fx.Node
    normed: fx.Node
    target: Any
    rest: tuple[Any, ...]
    kwargs: dict[str, Any]
    meta: dict[str, Any]
    metas: dict[int, dict[str, Any]]


@contextmanager
def opened_sums(gm: fx.GraphModule) -> Iterator[None]:
    """Open every fused add and norm of the graph, and close them again on leaving, in place."""
    calls = [opened for node in list(gm.graph.nodes) if (opened := _open(gm.graph, node)) is not None]
    try:
        yield
    finally:
        left = set(gm.graph.nodes)
        for opened in calls:
            if opened.normed in left:
                _close(gm.graph, opened)
        if calls:
            gm.graph.lint()
            gm.recompile()


def _open(graph: fx.Graph, call: fx.Node) -> _Opened | None:
    """Put an add and a norm in the place of a call; None for what is no call of this kind."""
    results = _results(call) if str(call.target) in FUSED else {}
    if 0 not in results or not _is_plain(call):
        return None
    branch, residual, weight, epsilon = call.args[:4]
    example = call.meta["example_value"]
    dtypes = example[0].dtype, dtype_of(weight) if isinstance(weight, fx.Node) else None
    with graph.inserting_before(call):
        total = graph.call_function(operator.add, (branch, residual))
        normed = graph.call_function(norm_of_sum, (total, weight, epsilon, *dtypes))
    for index, node in enumerate((normed, total)):
        node.meta = {**call.meta, "example_value": example[index]}
        if index in results:
            results[index].replace_all_uses_with(node)
            graph.erase_node(results[index])
    metas = {index: node.meta for index, node in results.items()}
    opened = _Opened(total, normed, call.target, call.args[4:], call.kwargs, call.meta, metas)
    graph.erase_node(call)
    return opened


def _results(call: fx.Node) -> dict[int, fx.Node]:
    """The reads of the call's results by their index, nothing where it is read in another way or twice."""
    reads = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    found = {index: user for index, user in reads.items() if isinstance(index, int) and index in (0, 1)}
    return found if len(found) == len(call.users) else {}


def _is_plain(call: fx.Node) -> bool:
    """Whether all four values are given in order, whole rows are averaged, and sum and norm are like the operands."""
    example = call.meta.get("example_value")
    if len(call.args) < 4 or any(rest is not None for rest in (*call.args[4:], *call.kwargs.values())):
        return False
    operands = [n.meta.get("example_value") for n in call.args[:2] if isinstance(n, fx.Node)]
    tensors = [t for t in (*operands, *(example or ())) if isinstance(t, torch.Tensor)]
    alike = all(same_dims(t.shape, tensors[0].shape) and t.dtype == tensors[0].dtype for t in tensors)
    return len(tensors) == 4 and alike and tensors[0].dtype in _FLOATS


def _close(graph: fx.Graph, opened: _Opened) -> None:
    """Make the call again where its norm still reads the sum; elsewhere write the norm of what it reads by now out."""
    total, normed = opened.total, opened.normed
    if normed.args[0] is not total:
        with graph.inserting_before(normed):
            tracer = GraphAppendingTracer(graph)
            args: list[Any] = [fx.Proxy(a, tracer) if isinstance(a, fx.Node) else a for a in normed.args]
            written: fx.Node = norm_of_sum(*args).node
        written.meta = normed.meta
        normed.replace_all_uses_with(written)
        graph.erase_node(normed)
        return
    with graph.inserting_before(total):  # in front of captures of the sum
        call = graph.call_function(opened.target, (*total.args[:2], *normed.args[1:3], *opened.rest), opened.kwargs)
        call.meta = opened.meta
        for index, old in enumerate((normed, total)):
            part = graph.call_function(operator.getitem, (call, index))
            part.meta = opened.metas.get(index, old.meta)
            old.replace_all_uses_with(part)
            graph.erase_node(old)
            if not part.users:
                graph.erase_node(part)
