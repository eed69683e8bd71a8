"""Canonical text of a graph: the same for every torch version that traces the same operations.

::

    %3 = linear(%2, $layers.0.attn.q.weight, None) : f32[s0, s1, 16] @ layers.0.attn.q

Values are numbered in order (``%arg0`` for inputs), parameters and buffers go by their module path (``$...``),
in-place operators end in ``_`` however they are spelt, and symbolic sizes are renamed in order of appearance.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import sympy
import torch
from torch import fx

from steer_compile.ir import Plan, Site, dtype_text
from steer_compile.passes.dataflow import is_inplace, is_state, module_path, op_name, shape_of
from steer_compile.passes.layout import dims_of

_STATE_STEP = re.compile(r"_?(?:modules|parameters|buffers)_")


def canonical_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Name of each value: ``%0`` for results, ``%arg0`` for inputs, ``$path`` for parameters and buffers."""
    names: dict[fx.Node, str] = {}
    results = inputs = 0
    for node in graph.nodes:
        if is_state(node):
            names[node] = f"${_state_path(node)}"
        elif node.op == "placeholder":
            names[node] = f"%arg{inputs}"
            inputs += 1
        elif node.op != "output":
            names[node] = f"%{results}"
            results += 1
    return names


def canonical_text(graph: fx.Graph, named: bool = False) -> str:
    """One line for each value that is not a parameter or buffer, and one for what the graph returns.

    Args:
        named: values have the names of their nodes, which differ between versions of torch, and which a pass that adds
            nodes leaves as they are.
    """
    return "\n".join(canonical_lines(graph, named).values()) + "\n"


def canonical_lines(graph: fx.Graph, named: bool = False) -> dict[fx.Node, str]:
    """The lines of `canonical_text`, by the node that each is of."""
    names = canonical_names(graph)
    if named:
        names = {node: text if is_state(node) else f"%{node.name}" for node, text in names.items()}
    symbols: dict[sympy.Symbol, sympy.Symbol] = {}
    lines = {}
    for node in graph.nodes:
        if node.op == "output":
            lines[node] = f"return {_text(node.args[0], names)}"
        elif not is_state(node):
            lines[node] = names[node] + _operation(node, names) + _type(node, symbols) + _where(node)
    return lines


def canonical_plan(plan: Plan, graph: fx.Graph) -> str:
    """`Plan.text` with each value by its operator and module, such as ``add@layers.0``.

    Args:
        graph: the graph that was planned, not spliced yet.
    """
    names = {node.name: f"{op_name(node)}@{'.'.join(module_path(node))}" for node in graph.nodes}

    def renamed(site: Site) -> Site:
        users = None if site.users is None else tuple(names[user] for user in site.users)
        return dataclasses.replace(site, node=names[site.node], users=users)

    edits = tuple(dataclasses.replace(edit, site=renamed(edit.site)) for edit in plan.edits)
    return dataclasses.replace(plan, edits=edits).text()


def _state_path(node: fx.Node) -> str:
    """``layers.0.attn.q.weight`` of ``L_self_modules_layers_modules_0_modules_attn_modules_q_parameters_weight_``."""
    name = str(node.target)
    if node.op == "get_attr":
        return name
    _, *path = _STATE_STEP.split(name)
    return ".".join(path).rstrip("_") or name


def _operation(node: fx.Node, names: Mapping[fx.Node, str]) -> str:
    if node.op == "placeholder":
        return ""
    name = op_name(node) + ("_" if is_inplace(node) else "")
    words = [_text(arg, names) for arg in node.args]
    words += [f"{key}={_text(value, names)}" for key, value in sorted(node.kwargs.items())]
    return f" = {name}({', '.join(words)})"


def _text(value: object, names: Mapping[fx.Node, str]) -> str:
    """An argument, nested or not."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, torch.dtype):
        return dtype_text(value)
    if isinstance(value, slice):
        return ":".join("" if part is None else _text(part, names) for part in (value.start, value.stop, value.step))
    if isinstance(value, tuple | list):
        return f"({', '.join(_text(item, names) for item in value)})"
    return str(value) if isinstance(value, torch.device) else repr(value)


def _type(node: fx.Node, symbols: dict[sympy.Symbol, sympy.Symbol]) -> str:
    value = node.meta.get("example_value")
    if isinstance(value, torch.SymInt):
        return f" : {_renamed(value.node.expr, symbols)}"
    if shape_of(node) is None or not isinstance(value, torch.Tensor):
        return ""
    dims = ", ".join(_renamed(dim, symbols) for dim in dims_of(node))
    return f" : {dtype_text(value.dtype)}[{dims}]"


def _renamed(dim: int | sympy.Expr, symbols: dict[sympy.Symbol, sympy.Symbol]) -> str:
    if isinstance(dim, int):
        return str(dim)
    for symbol in sorted(dim.free_symbols, key=str):
        symbols.setdefault(symbol, sympy.Symbol(f"s{len(symbols)}", integer=True))
    return str(dim.xreplace(symbols))


def _where(node: fx.Node) -> str:
    path = ".".join(module_path(node)) if node.op != "placeholder" else ""
    return f" @ {path}" if path else ""
