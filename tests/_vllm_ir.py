"""Decoders as vLLM writes them: each norm also makes the residual add, by operators of the namespace ``vllm_ir``.

The operators are defined here with the schemas and the arithmetic of vLLM's own, which need not be installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, VOCABULARY, EPS = 32, 4, 50, 1e-6
LIBRARY = torch.library.Library("vllm_ir", "FRAGMENT")
Vectors = Mapping[tuple[str, int], Tensor]
_FUSED = "{} x, {} x_residual, Tensor? weight, float epsilon, SymInt? variance_size=None) -> (Tensor, Tensor)"


def rms_norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
    return _normalised(x.float(), weight, epsilon, variance_size).to(x.dtype)


def fused_add_rms_norm(
    x: Tensor, x_residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
) -> tuple[Tensor, Tensor]:
    total = x.float() + x_residual.float()
    return _normalised(total, weight, epsilon, variance_size).to(x.dtype), total.to(x.dtype)


def _normalised(x: Tensor, weight: Tensor | None, epsilon: float, size: int | None) -> Tensor:
    variance = (x if size is None else x[..., :size]).pow(2).mean(dim=-1, keepdim=True)
    x = x * torch.rsqrt(variance + epsilon)
    return x if weight is None else x.to(weight.dtype) * weight


def _quantised_norm(x: Tensor, x_residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    normed, total = fused_add_rms_norm(x, x_residual, weight, epsilon)
    return normed.to(torch.float8_e4m3fn), total


def define() -> None:
    """Define the operators, unless vLLM or an earlier call has."""
    if "fused_add_rms_norm" in dir(torch.ops.vllm_ir):
        return
    LIBRARY.define("rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor")
    LIBRARY.define("fused_add_rms_norm(" + _FUSED.format("Tensor", "Tensor"))
    LIBRARY.define("fused_add_rms_norm.maybe_inplace(" + _FUSED.format("Tensor(a!)", "Tensor(b!)"))
    LIBRARY.define(
        "fused_add_rms_norm_static_fp8_quant(Tensor x, Tensor x_residual, Tensor weight, float epsilon) "
        "-> (Tensor, Tensor)"
    )
    implementations: dict[str, Any] = {
        "rms_norm": rms_norm,
        "fused_add_rms_norm": fused_add_rms_norm,
        "fused_add_rms_norm.maybe_inplace": fused_add_rms_norm,
        "fused_add_rms_norm_static_fp8_quant": _quantised_norm,
    }
    for name, run in implementations.items():
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")


class Norm(nn.Module):
    """RMSNorm of vLLM: with a residual it adds first and gives back the sum. ``gemma``: one is added to the weight."""

    def __init__(self, gemma: bool, inplace: bool) -> None:
        super().__init__()
        self.weight, self.gemma = nn.Parameter(torch.rand(WIDTH) + 0.5), gemma
        packet = torch.ops.vllm_ir.fused_add_rms_norm
        self.fused = packet.maybe_inplace if inplace and not gemma else packet.default

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        weight = self.weight.float() + 1.0 if self.gemma else self.weight
        if residual is None:
            return torch.ops.vllm_ir.rms_norm.default(x, weight, EPS, None)
        return self.fused(x, residual, weight, EPS, None)


class Block(nn.Module):
    """Attention and MLP behind norms that make the residual adds; ``gemma``: and in front of norms of their own."""

    def __init__(self, gemma: bool, inplace: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(2 * WIDTH, WIDTH, bias=False)
        self.entry, self.middle = Norm(gemma, inplace), Norm(gemma, inplace)
        self.own = nn.ModuleList(Norm(gemma, inplace) for _ in range(2)) if gemma else None

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(-3, -2) for t in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = self.out(mixed.transpose(-3, -2).flatten(-2))
        return x if self.own is None else self.own[0](x)

    def mlp(self, x: Tensor) -> Tensor:
        x = self.down(functional.silu(self.up(x)))
        return x if self.own is None else self.own[1](x)

    def forward(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if residual is None:
            residual, x = x, self.entry(x)
        else:
            x, residual = self.entry(x, residual)
        x, residual = self.middle(self.attention(x), residual)
        return self.mlp(x), residual


class Decoder(nn.Module):
    """Token ids, (batch, tokens) or (tokens,), to logits."""

    def __init__(self, gemma: bool = False, inplace: bool = True, layers: int = 3) -> None:
        super().__init__()
        define()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.layers = nn.ModuleList(Block(gemma, inplace) for _ in range(layers))
        self.norm = Norm(gemma, inplace)

    def forward(self, ids: Tensor) -> Tensor:
        x, residual = self.embed(ids), None
        for layer in self.layers:
            x, residual = layer(x, residual)
        x, _ = self.norm(x, residual)
        logits: Tensor = self.head(x)
        return logits


def by_hand(model: Decoder, ids: Tensor, vectors: Vectors) -> tuple[Tensor, dict[tuple[str, int], Tensor]]:
    """Logits and pristine stream values, with vectors added to the unrounded sums."""
    values: dict[tuple[str, int], Tensor] = {}

    def add(x: Tensor, residual: Tensor, norm: Norm, site: tuple[str, int]) -> tuple[Tensor, Tensor]:
        total = x.float() + residual.float()
        values[site] = total.to(x.dtype)
        total = total + vectors[site].to(x.dtype).float() if site in vectors else total
        weight = norm.weight.float() + 1.0 if norm.gemma else norm.weight
        return _normalised(total, weight, EPS, None).to(x.dtype), total.to(x.dtype)

    blocks: list[Any] = list(model.layers)
    residual = model.embed(ids)
    x = blocks[0].entry(residual)
    for n, block in enumerate(blocks):
        x, residual = add(block.attention(x), residual, block.middle, ("post_attn", n))
        following = blocks[n + 1].entry if n + 1 < len(blocks) else model.norm
        x, residual = add(block.mlp(x), residual, following, ("post_block", n))
    return model.head(x), values
