"""Dataflow view of a Dynamo FX graph: resolved inputs, users, ancestors and operator names.

A Dynamo graph is not in SSA form: ``x.add_(b)`` changes ``x`` and later nodes may keep reading ``x``. The view
resolves each read to the node that produced the value it sees, so that passes can reason about values.

Follows traces of torch 2.11 to 2.13 (``inline_inbuilt_nn_modules``, parameters lifted as placeholders).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from steer_compile import torch_compat

VIEW_OPS = frozenset(
    "view reshape transpose permute unsqueeze squeeze narrow select expand expand_as chunk split unbind flatten "
    "unflatten t swapaxes swapdims movedim view_as reshape_as getitem detach mT T ravel".split()
)
"""Operators whose result shares memory with their first argument."""

SELF_OPS = frozenset("to type_as float half bfloat16 double dropout alpha_dropout identity".split())
"""Operators that return their argument itself when there is nothing to do."""

_KERNEL_OF_MATMUL = re.compile(r"(^|_)(mm|gemm|matmul|linear)(_|$)")

_SHAPE_OPS = frozenset(
    "zeros_like ones_like full_like empty_like rand_like randn_like new_zeros new_ones new_full new_empty new_tensor "
    "size dim numel element_size sym_size".split()
)
_SHAPE_OF_SECOND = frozenset("expand_as view_as reshape_as type_as".split())
_INPLACE_FUNCTIONS = frozenset("iadd isub imul itruediv ipow iand ior ixor imatmul setitem".split())


def op_name(node: fx.Node) -> str:
    """Bare operator name: ``add`` for ``operator.add``, ``torch.add``, ``Tensor.add_`` and ``aten.add.Tensor``.

    Kernels of matrix products outside of torch (``_C.onednn_mm``, ``cutlass_scaled_mm``) are ``linear``.
    """
    name = raw_name(node)
    if name in _INPLACE_FUNCTIONS and name != "setitem":
        return name[1:]
    if _KERNEL_OF_MATMUL.search(name) and torch_compat.namespace(node.target) not in ("", "aten"):
        return "linear"
    return name.strip("_")


def raw_name(node: fx.Node) -> str:
    """Operator name with its in-place spelling kept."""
    target = node.target
    if isinstance(target, str):
        return target
    overload = torch_compat.overload_name(target)
    if overload is not None:
        return overload
    return str(target.__name__) if callable(target) and "__name__" in dir(target) else str(target)


def is_inplace(node: fx.Node) -> bool:
    """Whether the node writes its first argument."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = raw_name(node)
    return (
        name in _INPLACE_FUNCTIONS
        or (name.endswith("_") and not name.endswith("__"))
        or bool(node.kwargs.get("inplace"))
    )


def shape_of(node: fx.Node) -> tuple[int | torch.SymInt, ...] | None:
    """Shape of the node's tensor value, or None when the value is not one tensor."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def dtype_of(node: fx.Node) -> torch.dtype | None:
    """Dtype of the node's tensor value, or None when the value is not one tensor."""
    value = node.meta.get("example_value", node.meta.get("val"))
    return value.dtype if isinstance(value, torch.Tensor) else None


def same_dims(left: Iterable[object], right: Iterable[object]) -> bool:
    """Equality of two shapes without installing guards: symbolic sizes compare by their expressions."""

    def key(dim: object) -> object:
        return dim.node.expr if isinstance(dim, torch.SymInt) else dim

    return [key(d) for d in left] == [key(d) for d in right]


@dataclass
class Dataflow:
    """Resolved reads of one graph. ``order[n]`` is the node's position; ancestor sets are bit masks over positions."""

    nodes: list[fx.Node]
    order: dict[fx.Node, int]
    inputs: dict[fx.Node, list[fx.Node]]
    users: dict[fx.Node, list[fx.Node]]
    ancestors: list[int]
    resolved: dict[fx.Node, dict[fx.Node, fx.Node]]
    """``user -> {argument as written: value it reads}``."""
    hazards: dict[fx.Node, str] = field(default_factory=dict)
    """Values that change later through an alias that graph surgery cannot follow."""
    writers: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    """Operators without a result of their own that fill a tensor, by the tensor: it is a value behind the last one."""

    def depends(self, node: fx.Node, on: fx.Node) -> bool:
        """Whether ``node`` is computed from ``on`` (strictly)."""
        return bool(self.ancestors[self.order[node]] >> self.order[on] & 1)

    def region(self, start: fx.Node, stop: fx.Node) -> list[fx.Node]:
        """Nodes computed from ``start`` and needed by ``stop``, ``stop`` included, in graph order."""
        low = self.order[start]
        seen, todo = {stop}, [stop]
        while todo:
            for value in self.inputs[todo.pop()]:
                if value not in seen and self.ancestors[self.order[value]] >> low & 1:
                    seen.add(value)
                    todo.append(value)
        return sorted(seen, key=self.order.__getitem__)

    def is_activation(self, node: fx.Node) -> bool:
        """Whether the value depends on anything that is not a parameter, a buffer or a constant."""
        i = self.order[node]
        return bool((self.ancestors[i] | 1 << i) & self._data_mask)

    _data_mask: int = 0
    learned: int | None = None
    """Mask of projections and embeddings, filled by the first pass that asks."""


def is_state(node: fx.Node) -> bool:
    """Whether a placeholder or attribute is a parameter or buffer of the model, or what a kernel keeps of one."""
    if node.op == "get_attr":
        return True
    name = str(node.target)
    held = any(part in name for part in ("_parameters_", "_buffers_", "_cell_contents_"))
    return node.op == "placeholder" and (held or name.startswith("p_"))


class _Aliases:
    """Which names mean the same memory, and which node wrote it last."""

    def __init__(self) -> None:
        self.identity: dict[fx.Node, fx.Node] = {}
        self.latest: dict[fx.Node, fx.Node] = {}
        self.base: dict[fx.Node, fx.Node] = {}
        self.stale: dict[fx.Node, fx.Node] = {}

    def resolve(self, node: fx.Node) -> fx.Node:
        root = self.identity.get(node, node)
        return self.latest.get(root, node)

    def root(self, node: fx.Node) -> fx.Node:
        root = self.identity.get(node, node)
        while root in self.base:
            root = self.identity.get(self.base[root], self.base[root])
        return root

    def write(self, node: fx.Node, target: fx.Node) -> bool:
        """Record that ``node`` wrote ``target``; True when it wrote through a view or hides views made earlier."""
        root = self.identity.get(target, target)
        memory = self.root(target)
        self.identity[node] = root
        self.latest[root] = node
        through_view = memory is not root
        if through_view:
            self.latest[memory] = node
        for view in self.base:
            if view is not root and self.root(view) is memory:
                self.stale[view] = node
        return through_view


def build_dataflow(graph: fx.Graph) -> Dataflow:
    """Resolve every read of ``graph``. The graph is not changed."""
    nodes = list(graph.nodes)
    order = {n: i for i, n in enumerate(nodes)}
    flow = Dataflow(nodes, order, {}, {n: [] for n in nodes}, [], {})
    aliases = _Aliases()
    for i, node in enumerate(nodes):
        mask = 0
        inputs: list[fx.Node] = []
        filled = _filled(node)
        for arg in node.all_input_nodes:
            if arg in filled:
                continue
            value = aliases.resolve(arg)
            if arg in aliases.stale and value is not aliases.stale[arg]:
                writer = aliases.stale[arg]
                flow.hazards[value] = f"it is a view whose memory {writer.name} writes before {node.name} reads it"
                mask |= 1 << order[writer] | flow.ancestors[order[writer]]
            flow.resolved.setdefault(node, {})[arg] = value
            if value not in inputs:
                inputs.append(value)
                flow.users[value].append(node)
                if not _reads_shape_only(node, arg):
                    mask |= 1 << order[value] | flow.ancestors[order[value]]
        flow.inputs[node] = inputs
        flow.ancestors.append(mask)
        _note_aliases(flow, aliases, node)
        for arg in filled:
            _note_filled(flow, aliases, node, arg)
        if node.op == "placeholder" and not is_state(node):
            flow._data_mask |= 1 << i
    return flow


def _filled(node: fx.Node) -> list[fx.Node]:
    """Tensors that an operator fills, where it gives no result: kernels of vLLM take their output as an argument."""
    if node.op != "call_function" or shape_of(node) is not None:
        return []
    written = torch_compat.written_arguments(node.target)
    found = [node.args[i] if i < len(node.args) else node.kwargs.get(name) for i, name in written]
    return [arg for arg in found if isinstance(arg, fx.Node)]


def _note_filled(flow: Dataflow, aliases: _Aliases, writer: fx.Node, arg: fx.Node) -> None:
    """Make a tensor a value that its writer computed: whoever reads it does so later."""
    memory = aliases.root(arg)
    flow.writers.setdefault(memory, []).append(writer)
    if memory is not arg:
        flow.hazards[arg] = flow.hazards[memory] = f"{writer.name} fills it through a view"
    for node in dict.fromkeys((memory, arg)):
        flow.ancestors[flow.order[node]] |= 1 << flow.order[writer] | flow.ancestors[flow.order[writer]]
        flow.inputs[node].append(writer)
        flow.users[writer].append(node)


def _reads_shape_only(node: fx.Node, arg: fx.Node) -> bool:
    """Whether the node takes the argument's shape, dtype or device, not its numbers."""
    name = op_name(node)
    if name in _SHAPE_OPS:
        return node.args[:1] == (arg,)
    if name == "getattr":
        return node.args[1] in ("shape", "dtype", "device", "ndim", "layout")
    return name in _SHAPE_OF_SECOND and len(node.args) > 1 and node.args[1] is arg and node.args[0] is not arg


def _note_aliases(flow: Dataflow, aliases: _Aliases, node: fx.Node) -> None:
    first = node.args[0] if node.args else None
    if node.op not in ("call_function", "call_method") or not isinstance(first, fx.Node):
        return
    if is_inplace(node):
        if aliases.write(node, first) or raw_name(node) == "setitem":
            memory = aliases.root(first)
            text = f"{node.name} writes part of {memory.name} through a view"
            flow.hazards[memory] = flow.hazards[node] = text
        return
    name = op_name(node)
    if name == "getitem" and not _basic_index(node.args[1]):
        return
    if name in SELF_OPS and dtype_of(node) == dtype_of(first) and not _drops(node):
        aliases.identity[node] = aliases.identity.get(first, first)
    elif name in VIEW_OPS or name == "contiguous":
        aliases.base[node] = aliases.identity.get(first, first)


def _drops(node: fx.Node) -> bool:
    """Whether a dropout is active."""
    training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else False)
    return "dropout" in op_name(node) and training is not False


def _basic_index(index: object) -> bool:
    """Whether indexing gives a view: advanced indexing with tensors or lists copies."""
    parts = index if isinstance(index, tuple) else (index,)
    return not any(isinstance(p, fx.Node | list) for p in parts)


def module_path(node: fx.Node) -> tuple[str, ...]:
    """Components of the innermost module that produced the node, root excluded; ``()`` when unknown."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ()
    path = next(reversed(stack.values()))[0]
    return tuple(_components(str(path)))


def _components(path: str) -> Iterator[str]:
    if path.startswith("L["):
        path = path.partition("]")[2]
    for part in path.replace("[", ".").replace("]", "").split("."):
        part = part.strip("'\"")
        if part and part != "_modules":
            yield part
