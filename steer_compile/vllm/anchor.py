"""The anchor: how a model's tables become inputs of its graph.

A compiled model of vLLM gets its tables as buffers, and its ``forward`` passes ``positions`` through an operator that
names them. Dynamo therefore lifts them into the graph as ordinary inputs, which vLLM keeps when it splits the graph,
shares pieces between layers, stores an artifact and loads it again. The splice leads them to the sites and takes the
operator out (`graph`); where it is still there, it refuses to run.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from steer_compile.errors import LoweringError, NotSteered

POSITIONS = ("positions", "position_ids")
"""Names under which models take the position of each token."""
PREFIX = "steer_compile_"
"""Of the buffers' names in the model."""


@torch.library.custom_op("steer_compile::anchor", mutates_args=())
def anchor(positions: Tensor, tables: list[Tensor]) -> Tensor:
    """Stands for ``positions`` until the splice."""
    raise NotSteered(
        "this model runs without the graph that steers it; run vLLM with compilation (no enforce_eager) or without "
        "steer_compile in additional_config"
    )


@anchor.register_fake
def _(positions: Tensor, tables: list[Tensor]) -> Tensor:
    return torch.empty_like(positions)


def anchored(model: nn.Module, tables: Mapping[str, Tensor]) -> None:
    """Give ``model`` its tables and make its ``forward`` name them.

    The class is replaced by a subclass of the same name, for this model alone.

    Raises:
        LoweringError: its ``forward`` has no ``positions``.
    """
    for name, tensor in tables.items():
        model.register_buffer(PREFIX + name, tensor, persistent=False)
    cls = type(model)
    forward = _forward(cls.forward, tuple(PREFIX + name for name in tables))
    body = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    model.__class__ = type(cls.__name__, (cls,), body)


def _forward(original: Callable[..., Any], names: tuple[str, ...]) -> Callable[..., Any]:
    order = list(inspect.signature(original).parameters)
    name = next((name for name in POSITIONS if name in order), "")
    if not name:
        raise LoweringError(
            f"{original.__qualname__} takes no {' or '.join(POSITIONS)} (it takes {', '.join(order[1:])}), beside "
            "which a model of vLLM gets its tables; this model cannot be steered in vLLM"
        )
    place = order.index(name) - 1

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tables = [self._buffers[table] for table in names]
        if name in kwargs:
            held = torch.ops.steer_compile.anchor.default(kwargs[name], tables)
            return original(self, *args, **{**kwargs, name: held})
        held = torch.ops.steer_compile.anchor.default(args[place], tables)
        return original(self, *args[:place], held, *args[place + 1 :], **kwargs)

    return forward


def raised(gm: fx.GraphModule) -> list[fx.Node]:
    """Take the anchor out of a graph; returns the nodes of the tables, in the order of `anchored`.

    Raises:
        LoweringError: the graph has no anchor, or several.
    """
    found = [n for n in gm.graph.nodes if n.target is torch.ops.steer_compile.anchor.default]
    if len(found) != 1:
        raise LoweringError(f"the graph has {len(found)} anchors where one was expected; this model cannot be steered")
    positions, tables = found[0].args[:2]
    assert isinstance(positions, fx.Node)
    found[0].replace_all_uses_with(positions)
    gm.graph.erase_node(found[0])
    return [n for n in tables if isinstance(n, fx.Node)]
