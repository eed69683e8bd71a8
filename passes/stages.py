"""Rewrite, and back: the end of a pipeline stage that hands its stream on in two parts.

::

    return %b, %r          <-->          %v = add(%b, %r)
                                         return %v

The stage behind it adds them up, mostly in its first norm. While a graph is searched, planned and spliced the sum
stands in it, so that the last branch shows as one that is added. Afterwards the graph hands on what the sum would read
by then, so what was steered in front of it is handed on steered.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from steer_compile.errors import LoweringError
from steer_compile.passes.dataflow import same_dims


@contextmanager
def summed_end(gm: fx.GraphModule) -> Iterator[str]:
    """Let the graph end in the sum of the two parts that it hands on, and hand them on again on leaving, in place.

    Yields the name of the sum, "" where the graph hands the stream on as one value.

    Raises:
        LoweringError: it hands on other values.
    """
    end = gm.graph.output_node()
    given, parts = end.args, list(end.all_input_nodes)
    if len(parts) == 1:
        yield ""
        return
    if len(parts) != 2 or not _alike(parts):
        raise LoweringError(
            f"a pipeline stage hands on {len(parts)} values ({', '.join(n.name for n in parts)}), where the stream, or "
            "two values that add up to it, were expected; run this model with pipeline_parallel_size=1"
        )
    with gm.graph.inserting_before(end):
        total = gm.graph.call_function(operator.add, tuple(parts))
    total.meta["example_value"] = parts[0].meta["example_value"]
    end.args = (total,)
    try:
        yield total.name
    finally:
        now = dict(zip(parts, total.args, strict=True))
        end.args = fx.map_arg(given, lambda node: now[node])
        gm.graph.erase_node(total)


def _alike(parts: list[fx.Node]) -> bool:
    """Whether two values may be parts of one stream."""
    first, second = (node.meta.get("example_value") for node in parts)
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return False
    return first.is_floating_point() and first.dtype == second.dtype and same_dims(first.shape, second.shape)
