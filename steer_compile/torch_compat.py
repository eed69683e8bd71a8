"""The only importer of private torch API. Each function: what it gives, and the versions on which it was run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._dynamo import lookup_backend
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._guards import CompileContext

Compiled = Callable[..., Any]


def mark_static(gm: fx.GraphModule, names: Sequence[str]) -> None:
    """Make buffers of a Dynamo graph static inputs: CUDA graphs keep their address and see in-place changes.

    Without an entry in the module's source table the compile fails with "not found in param_name_to_source".
    Run on torch 2.11 and 2.13. Delete when a backend may register buffers through public API.
    """
    graph_module: Any = gm  # torch types the attributes of a module as tensors and modules
    if not isinstance(graph_module._param_name_to_source, dict):
        graph_module._param_name_to_source = {}
    graph_module._param_name_to_source.update((name, ConstantSource(name)) for name in names)


def inductor_compiler(mode: str | None, options: dict[str, Any] | None, dynamic: bool | None) -> Compiled:
    """The compiler behind ``backend="inductor"`` with its mode and options. Run on torch 2.11 and 2.13."""
    return torch._TorchCompileInductorWrapper(mode, options, dynamic)


def reset_inductor(compiler: Compiled) -> None:
    """Drop the CUDA graphs of what `inductor_compiler` compiled. Run on torch 2.13."""
    if isinstance(compiler, torch._TorchCompileInductorWrapper):
        compiler.reset()


def named_backend(name: str) -> Compiled:
    """A backend that Dynamo knows by name, such as ``aot_eager``. Run on torch 2.11 and 2.13."""
    backend: Compiled = lookup_backend(name)
    return backend


def is_partial(gm: fx.GraphModule) -> bool:
    """Whether the graph is one of several of its function: it ends in a graph break or begins behind one.

    Run on torch 2.11 and 2.13.
    """
    reason = gm.compile_subgraph_reason
    if getattr(reason, "graph_break", False):
        return True
    frames = getattr(reason, "user_stack", None) or ()
    return any("torch_dynamo_resume_in" in frame.name for frame in frames)


def compile_id() -> str:
    """Dynamo's name of the compilation under way, such as ``0/1``. Run on torch 2.11 and 2.13."""
    current = CompileContext.current_compile_id()
    return str(current) if current is not None else ""


def compile_count() -> int:
    """Graphs that Dynamo has handed to a backend in this process; a recompile adds one. Run on torch 2.13."""
    return int(counters["stats"]["unique_graphs"])


def kernel_count() -> int:
    """Kernels that Inductor has generated in this process, those of its cache included. Run on torch 2.13."""
    from torch._inductor import metrics

    return int(metrics.generated_kernel_count)


DynamoError = torch._dynamo.exc.TorchDynamoException
"""What Dynamo raises for code that it cannot trace. Run on torch 2.11 and 2.13."""


def overload_name(target: object) -> str | None:
    """Bare name of an operator overload such as ``aten.add.Tensor``, else None. Run on torch 2.11 and 2.13."""
    return str(target.overloadpacket.__name__) if isinstance(target, torch._ops.OpOverload) else None


def complete_examples(graph: fx.Graph) -> None:
    """Give nodes that a pass made the example values that Dynamo gives its own. Run on torch 2.13."""
    examples = {n: n.meta["example_value"] for n in graph.nodes if "example_value" in n.meta}
    for node in graph.nodes:
        if node in examples or node.op not in ("call_function", "call_method"):
            continue
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), examples.__getitem__)
        with torch.inference_mode(False), torch.no_grad():  # as Dynamo's own: the mode is part of a piece's key
            if node.op == "call_method":
                result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                result = node.target(*args, **kwargs)
        examples[node] = node.meta["example_value"] = result


def rename(node: fx.Node, name: str) -> None:
    """Give a node a name, made unique in its graph. Run on torch 2.13."""
    node._rename(name)


def namespace(target: object) -> str:
    """Library of an operator such as ``aten``, "" for what is none. Run on torch 2.13."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name.partition("::")[0])
    return str(target.namespace) if isinstance(target, torch._ops.OpOverload) else ""


def written_arguments(target: object) -> tuple[tuple[int, str], ...]:
    """Place and name of each argument that an operator writes in place, by its schema. Run on torch 2.13."""
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if not isinstance(target, torch._ops.OpOverload):
        return ()
    written = enumerate(target._schema.arguments)
    return tuple((i, a.name) for i, a in written if a.alias_info is not None and a.alias_info.is_write)


def is_higher_order(target: object) -> bool:
    """Whether a target runs graphs of its own (checkpoint, scan, cond). Run on torch 2.11 and 2.13."""
    return isinstance(target, torch._ops.HigherOrderOperator)
