"""Which kernel each value of a graph became, as Inductor tells it: its provenance of nodes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from steer_compile import torch_compat
from steer_compile.backend import steer_backend
from steer_compile.debug.tracing import afresh
from steer_compile.spec import SteerSpec

MAPPINGS = "inductor_provenance_tracking_node_mappings"
"""Name of the artifact of a compile that holds them."""


@dataclass(frozen=True)
class Kernels:
    """Kernels of all graphs of a model.

    Attributes:
        names: one for each launch, in the order of the code.
        of_node: by FX node of the graph that Inductor got, the kernels that compute it or a part of it.
    """

    names: tuple[str, ...] = ()
    of_node: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def compiled_kernels(model: nn.Module, inputs: dict[str, Any], spec: SteerSpec | None = None) -> Kernels:
    """Compile a model with Inductor, and read off what became of its nodes. Caches are left aside.

    Args:
        spec: what is spliced in front of Inductor; None compiles the model alone.
    """
    backend: Any = "inductor" if spec is None else steer_backend(spec)
    with afresh(), torch_compat.provenance() as artifacts:
        torch.compile(model, backend=backend)(**inputs)
    return merged([json.loads(text) for name, text in artifacts if name == MAPPINGS])


def merged(mappings: list[dict[str, Any]]) -> Kernels:
    """Kernels of the mappings of several graphs."""
    names: list[str] = []
    of_node: dict[str, tuple[str, ...]] = {}
    for mapping in mappings:
        names += sorted(mapping.get("cppCodeToPost", {}), key=_place)
        by_post = mapping.get("postToCppCode", {})
        for node, posts in mapping.get("preToPost", {}).items():
            kernels = dict.fromkeys(kernel for post in posts for kernel in by_post.get(post, ()))
            of_node[node] = (*of_node.get(node, ()), *sorted(kernels, key=_place))
    return Kernels(tuple(names), {node: kernels for node, kernels in of_node.items() if kernels})


def _place(name: str) -> int:
    """Number of a launch, behind the colon."""
    number = name.rpartition(":")[2]
    return int(number) if number.isdecimal() else 0
