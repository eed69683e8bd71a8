"""The only importer of private torch API. Each function: what it gives, and the versions on which it was run."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._dynamo import lookup_backend
from torch._dynamo.source import ConstantSource
from torch._dynamo.utils import counters
from torch._guards import CompileContext
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

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


def break_reason(gm: fx.GraphModule) -> str:
    """Why Dynamo ended the graph before its function's end, with the line of the user's code; "" where it did not.

    Run on torch 2.11 and 2.13.
    """
    reason: Any = gm.compile_subgraph_reason
    if reason is None or not reason.graph_break:
        return ""
    frames = list(reason.user_stack)
    where = f" at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""
    return str(reason.reason).splitlines()[0] + where


def untraceable(error: BaseException) -> str:
    """What Dynamo says about code that it cannot trace, in one line, with the line of the user's code.

    Run on torch 2.11 and 2.13.
    """
    head, _, user = str(error).partition("from user code:")
    lines = [line.strip() for line in head.splitlines() if line.strip()]
    told = next((line.removeprefix("Explanation: ") for line in lines if line.startswith("Explanation:")), "")
    if len(lines) > 1 and lines[0].endswith(":"):  # a backend's own error is in the next line
        lines[0] += f" {lines[1]}"
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*(.*)', user)
    where = " at {}:{}: {}".format(*frames[-1]) if frames else ""
    return f"{lines[0] if lines else type(error).__name__}{where}{f' ({told[:300]})' if told else ''}"


class _Limits(logging.Handler):
    """Keeps the functions that Dynamo no longer recompiles: calls of other sizes then run the original code."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.hits: dict[str, str] = {}

    def emit(self, record: logging.LogRecord) -> None:
        args = record.args
        if isinstance(args, tuple) and len(args) > 3 and "_dynamo hit config" in str(record.msg):
            found = re.match(r"'(.*)' \((.*):\d+\)", str(args[2]))
            if found is not None:
                self.hits[f"{found[1]} {found[2]}"] = f"{args[0]} of {args[1]}, {args[3]}"


_LIMITS = _Limits()


def watch_recompile_limits() -> None:
    """Note from now on which functions Dynamo gives up on. Run on torch 2.11 and 2.13."""
    logging.getLogger("torch._dynamo.convert_frame").addHandler(_LIMITS)  # adding it twice is adding it once


def compiled_function(gm: fx.GraphModule) -> str:
    """Name and file of the function that a graph is of, "" where no node tells. Run on torch 2.11 and 2.13."""
    for node in gm.graph.nodes:
        found = re.match(r'\s*File "(.*)", line \d+, in (\S+)', node.stack_trace or "")
        if found is not None:
            return f"{found[2]} {found[1]}"
    return ""


def gave_up(function: str) -> str:
    """Why Dynamo no longer recompiles a function (`compiled_function`), "" where it does. Run on torch 2.13."""
    return _LIMITS.hits.get(function, "")


def forget_limits() -> None:
    """Called on `torch._dynamo.reset`, after which functions are compiled again."""
    _LIMITS.hits.clear()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Dynamo's warnings about graph breaks off the screen. Run on torch 2.11 and 2.13."""
    log = logging.getLogger("torch._dynamo")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


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


class _Artifacts(logging.Handler):
    """Keeps name and text of the artifacts of compiles."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        given = vars(record)
        name = (given.get("metadata") or {}).get("artifact", {}).get("name")
        if name:
            self.found.append((name, given.get("payload") or ""))


@contextmanager
def provenance() -> Iterator[list[tuple[str, str]]]:
    """Compile without caches and with Inductor's provenance of nodes; gives the names and texts of all artifacts.

    They come through the logger that `torch._logging.trace_structured` writes to. Run on torch 2.11 and 2.13.
    """
    from torch._functorch import config as functorch
    from torch._inductor import config as inductor

    log, handler = logging.getLogger("torch.__trace"), _Artifacts()
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    try:
        with (
            inductor.patch({"trace.provenance_tracking_level": 1, "fx_graph_cache": False}),
            functorch.patch({"enable_autograd_cache": False}),
        ):
            yield handler.found
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def trace_artifact(name: str, text: str) -> None:
    """Hand a text to torch's structured trace, so that tlparse shows it beside the compile. Run on torch 2.11, 2.13."""
    from torch._logging._internal import trace_structured

    trace_structured("artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=lambda: text)


def shapes_only() -> Any:
    """A context in which tensors have shapes and no memory, and in which graphs of such tensors run.

    ``from_tensor`` gives a tensor its counterpart. Run on torch 2.11 and 2.13.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


PASS_SLOTS = (
    "pre_grad_custom_pass", "joint_custom_pre_pass", "joint_custom_post_pass", "post_grad_custom_pre_pass",
    "post_grad_custom_post_pass", "custom_partitioner_fn", "_post_fusion_custom_pass",
    "_pre_fusion_custom_pass",
)  # fmt: skip
"""Slots of Inductor's configuration that take one pass of somebody else."""


def pass_slots() -> dict[str, object]:
    """What is in each slot for a custom pass, None where it is free. Run on torch 2.11 and 2.13."""
    from torch._inductor import config as inductor

    return {name: getattr(inductor, name) for name in PASS_SLOTS if hasattr(inductor, name)}


class _Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@contextmanager
def cudagraph_skips() -> Iterator[list[str]]:
    """Why graphs that are compiled inside of the block run without CUDA graphs. Run on torch 2.11 and 2.13."""
    from torch._inductor.cudagraph_utils import cudagraphs_log

    handler, level, passed = _Lines(), cudagraphs_log.level, cudagraphs_log.propagate
    cudagraphs_log.addHandler(handler)
    cudagraphs_log.setLevel(logging.WARNING)
    cudagraphs_log.propagate = False
    try:
        yield handler.lines
    finally:
        cudagraphs_log.removeHandler(handler)
        cudagraphs_log.setLevel(level)
        cudagraphs_log.propagate = passed


def inductor_cache() -> str:
    """Folder of Inductor's caches. Run on torch 2.11 and 2.13."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    return cache_dir() if "TORCHINDUCTOR_CACHE_DIR" in os.environ else default_cache_dir()


NumbersNeeded = (DataDependentOutputException, DynamicOutputShapeException)
"""What tensors of shapes alone raise where their numbers are asked for. Run on torch 2.11 and 2.13."""

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
