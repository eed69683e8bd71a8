"""Graphs whose kernels fill a tensor that is given to them and return nothing, as those of inference engines do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from steer_compile import SteerSpec, steer_backend

WIDTH, VOCABULARY, LAYERS = 16, 20, 2
LIBRARY = torch.library.Library("steer_compile_test", "FRAGMENT")
LIBRARY.define("filling_mm(Tensor(a!) out, Tensor x, Tensor weight) -> ()")


def _fill(out: Tensor, x: Tensor, weight: Tensor) -> None:
    out.copy_(x @ weight.T)


LIBRARY.impl("filling_mm", _fill, "CompositeExplicitAutograd")


class Filled(nn.Module):
    """A projection into an empty tensor. ``keyword``: it is given by name."""

    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.weight, self.keyword = nn.Parameter(torch.randn(WIDTH, WIDTH) / 4), keyword

    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty(x.shape)
        if self.keyword:
            torch.ops.steer_compile_test.filling_mm(x=x, weight=self.weight, out=out)
        else:
            torch.ops.steer_compile_test.filling_mm(out, x, self.weight)
        return out


class Model(nn.Module):
    def __init__(self, keyword: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), Filled(keyword)
        self.layers = nn.ModuleList(nn.ModuleList(Filled(keyword) for _ in range(4)) for _ in range(LAYERS))

    def forward(self, ids: Tensor, moved: dict[tuple[str, int], Tensor] | None = None) -> Tensor:
        """``moved``: what is added where, by hand."""
        add = moved or {}
        x = self.embed(ids)
        for n, layer in enumerate(self.layers):
            parts: Any = list(layer)  # type: ignore[call-overload]
            h = parts[0](functional.rms_norm(x, (WIDTH,)))
            x = x + parts[1](functional.scaled_dot_product_attention(h, h, h, is_causal=True))
            x = x + add.get(("post_attn", n), 0)
            x = x + parts[3](functional.silu(parts[2](functional.rms_norm(x, (WIDTH,)))))
            x = x + add.get(("post_block", n), 0)
        logits: Tensor = self.head(functional.rms_norm(x, (WIDTH,)))
        return logits


@pytest.mark.parametrize("keyword", [False, True])
def test_each_site_is_the_sum_behind_its_own_branch(keyword: bool) -> None:
    torch.manual_seed(0)
    model, ids = Model(keyword).requires_grad_(False), torch.arange(12).view(2, 6)
    backend = steer_backend(SteerSpec(steer=("post_attn", "post_block"), max_tokens=16), inner="eager")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(ids), model(ids))
    assert len({edit.site.node for edit in backend.plans[0].edits}) == 2 * LAYERS
    for site in [(hook, n) for hook in ("post_attn", "post_block") for n in range(LAYERS)]:
        vector = torch.randn(WIDTH)
        with backend.runtime.steer({site: vector}):
            torch.testing.assert_close(compiled(ids), model(ids, {site: vector}))


def test_what_a_branch_was_filled_with_is_what_is_steered_and_captured() -> None:
    torch.manual_seed(0)
    model, ids = Model(False).requires_grad_(False), torch.arange(12).view(2, 6)
    spec = SteerSpec(steer=("mlp_out",), capture=("mlp_out",), max_tokens=16)
    backend = steer_backend(spec, inner="eager")
    compiled: Any = torch.compile(model, backend=backend, fullgraph=True)
    compiled(ids)
    vector, seen = torch.randn(WIDTH), []
    model.layers[1][3].register_forward_hook(lambda module, args, out: seen.append(out.clone()))  # type: ignore[index]
    expected = model(ids, {("post_block", 1): vector})
    with backend.runtime.steer({("mlp_out", 1): vector}), backend.runtime.capture() as log:
        torch.testing.assert_close(compiled(ids), expected)
    torch.testing.assert_close(log["mlp_out", 1].view_as(seen[0]), seen[0])
