"""Get the Dynamo graph of a module and the value of each of its nodes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node


def trace(module: nn.Module, *inputs: Any, dynamic: bool = False) -> tuple[GraphModule, tuple[Any, ...]]:
    """The one Dynamo graph of `module` and the real inputs that it was called with (parameters, sizes and all)."""
    graphs: list[GraphModule] = []
    calls: list[tuple[Any, ...]] = []

    def backend(gm: GraphModule, _example_inputs: list[Any]) -> Callable[..., Any]:
        graphs.append(gm)

        def run(*args: Any) -> Any:
            calls.append(args)
            return gm.forward(*args)

        return run

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(module, backend=backend, fullgraph=True, dynamic=dynamic)(*inputs)
    assert len(graphs) == len(calls) == 1
    return graphs[0], calls[0]


class _Recorder(Interpreter):
    """Clones each tensor right after its node ran: a later in-place write changes the tensor, not the record."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n.name] = result.detach().clone()
        return result


def node_values(gm: GraphModule, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
    """Node name -> its value at the moment after it ran (nodes that return one tensor)."""
    recorder = _Recorder(gm)
    with torch.no_grad():
        recorder.run(*inputs)
    return recorder.values
