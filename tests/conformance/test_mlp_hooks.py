"""Inputs and outputs of the MLPs of several architectures, against forward hooks on the Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import SteerSpec, steer_backend
from steer_compile.coverage import zoo
from tests._models import logits

HOOKS = ("mlp_in", "mlp_out")
OUTPUTS = {"qwen3": "mlp", "qwen3_moe": "mlp", "qwen3_next": "mlp", "gemma3_text": "post_feedforward_layernorm"}
"""Architecture -> the module whose output is added to the stream."""

Edit = Callable[[Tensor], Tensor]


@contextmanager
def hooked(layer: Any, output: str, edits: dict[str, Edit]) -> Iterator[None]:
    """Put functions in front of a layer's MLP and behind what it adds."""

    def before(_: Any, args: tuple[Any, ...]) -> Any:
        return (edits["mlp_in"](args[0]), *args[1:])

    def after(_: Any, args: Any, out: Any) -> Any:
        return (edits["mlp_out"](out[0]), *out[1:]) if isinstance(out, tuple) else edits["mlp_out"](out)

    with ExitStack() as stack:
        stack.callback(layer.mlp.register_forward_pre_hook(before).remove)
        stack.callback(layer.get_submodule(output).register_forward_hook(after).remove)
        yield


@pytest.mark.behaviour(35)
@pytest.mark.parametrize("name", OUTPUTS)
def test_ends_of_the_mlp_are_captured_and_steered(name: str) -> None:
    model: Any = zoo.tiny_model(name)
    ids, width, at = torch.arange(12).view(2, 6) + 3, model.config.hidden_size, 1
    backend = steer_backend(SteerSpec(steer=HOOKS, capture=HOOKS, max_tokens=64), inner="eager")
    run: Any = torch.compile(model, backend=backend)
    seen: dict[str, Tensor] = {}

    def looking(hook: str) -> Edit:
        def look(value: Tensor) -> Tensor:
            seen[hook] = value.clone().view(2, 6, width)
            return value

        return look

    with hooked(model.model.layers[at], OUTPUTS[name], {hook: looking(hook) for hook in HOOKS}):
        plain = logits(model, ids, use_cache=False)
    with backend.runtime.capture() as log:
        torch.testing.assert_close(logits(run, ids, use_cache=False), plain, atol=2e-5, rtol=2e-5)
    for hook in HOOKS:
        torch.testing.assert_close(log[hook, at], seen[hook], atol=2e-5, rtol=2e-5)
    for hook in HOOKS:
        vector = torch.randn(width, generator=torch.Generator().manual_seed(1))
        edits: dict[str, Edit] = {each: (lambda h: h) for each in HOOKS} | {hook: lambda h, v=vector: h + v}
        with hooked(model.model.layers[at], OUTPUTS[name], edits):
            expected = logits(model, ids, use_cache=False)
        with backend.runtime.steer({(hook, at): vector}):
            found = logits(run, ids, use_cache=False)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(found, plain, atol=1e-2)
