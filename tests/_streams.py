"""Tiny models with parallel residual streams, and forward hooks that see or change the values of their hook points."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from steer_compile.coverage.zoo import add_noise, tiny_config, tiny_model

Site = tuple[str, int]
STREAMS = 4
WIDTH = 32
LAYERS = 3
HOOKS = (
    "mhc_streams_pre_attn", "mhc_streams_pre_mlp", "mhc_streams_final", "pre_attn", "post_attn", "attn_out", "attn_in",
    "mlp_in", "mlp_out",
)  # fmt: skip
"""What can be steered."""
WEIGHTS = ("mhc_attn_post_mix", "mhc_ffn_post_mix", "mhc_attn_res_mix", "mhc_ffn_res_mix")


def deepseek_v4() -> Any:
    return tiny_model("deepseek_v4")


def qwen4_exp() -> Any:
    """Layers of linear attention alone: Dynamo does not trace the loops of transformers' sparse attention."""
    config = tiny_config("qwen4_exp_text")
    config.layer_types = ["linear_attention"] * LAYERS
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    add_noise(model, 0)
    return model.float().eval().requires_grad_(False)


MODELS: dict[str, Callable[[], Any]] = {"deepseek_v4": deepseek_v4, "qwen4_exp": qwen4_exp}


def _parts(name: str, model: Any) -> tuple[list[tuple[Any, Any, Any, Any, Any]], Any]:
    """Modules of each layer: both mixings, attention, its norm (None without one), MLP; and the last mixing."""
    inner = model.model
    if name == "deepseek_v4":
        layers = [(x.attn_hc, x.ffn_hc, x.self_attn, x.input_layernorm, x.mlp) for x in inner.layers]
        return layers, inner.hc_head
    layers = [(x.attn_hyper_connection, x.mlp_hyper_connection, x.linear_attn, None, x.mlp) for x in inner.layers]
    return layers, inner.hyper_connection_mixer


def _mixing(name: str, out: Any, kind: str) -> dict[str, Tensor]:
    """What a mixing module returns, by hook."""
    one = {"attn": "pre_attn", "ffn": "mlp_in"}[kind]
    if name == "deepseek_v4":
        return {f"mhc_{kind}_post_mix": out[0], f"mhc_{kind}_res_mix": out[1], one: out[2]}
    return {f"mhc_{kind}_post_mix": out[2], one: out[0]}


def _again(name: str, out: Any, kind: str, values: Mapping[str, Tensor]) -> Any:
    """The module's result with the values of its hooks replaced."""
    new = _mixing(name, out, kind) | dict(values)
    one = new[{"attn": "pre_attn", "ffn": "mlp_in"}[kind]]
    if name == "deepseek_v4":
        return new[f"mhc_{kind}_post_mix"], new[f"mhc_{kind}_res_mix"], one
    return one, out[1], new[f"mhc_{kind}_post_mix"]


@contextmanager
def hooked(name: str, model: Any, edit: Callable[[Site, Tensor], Tensor]) -> Iterator[None]:
    """Run the eager model with ``edit`` at every hook point, streams as (B, T, m * H)."""
    layers, last = _parts(name, model)

    def streams(site: Site, given: Tensor) -> Tensor:
        return edit(site, given.flatten(2)).view_as(given)

    def mixing(module: nn.Module, layer: int, kind: str) -> None:
        # The residual path reads the streams too, in the layer's own code: they are changed where they lie.
        hook = {"attn": "mhc_streams_pre_attn", "ffn": "mhc_streams_pre_mlp"}[kind]
        stack.callback(
            module.register_forward_pre_hook(
                lambda m, args: _write(args[0], streams((hook, layer), args[0].clone()))
            ).remove
        )
        stack.callback(
            module.register_forward_hook(
                lambda m, args, out: _again(
                    name, out, kind, {h: edit((h, layer), v) for h, v in _mixing(name, out, kind).items()}
                )
            ).remove
        )

    def output(module: nn.Module, layer: int, *hooks: str) -> None:
        def changed(m: nn.Module, args: Any, out: Any) -> Any:
            value = out[0] if isinstance(out, tuple) else out
            for hook in hooks:
                value = edit((hook, layer), value)
            return (value, *out[1:]) if isinstance(out, tuple) else value

        stack.callback(module.register_forward_hook(changed).remove)

    with ExitStack() as stack:
        for layer, (attn_mix, mlp_mix, attn, norm, mlp) in enumerate(layers):
            mixing(attn_mix, layer, "attn")
            mixing(mlp_mix, layer, "ffn")
            output(attn, layer, "post_attn", "attn_out")
            output(mlp, layer, "mlp_out")
            if norm is not None:
                output(norm, layer, "attn_in")
            else:

                def whole(m: nn.Module, args: Any, kwargs: Any, at: int = layer) -> Any:
                    return (edit(("attn_in", at), args[0]), *args[1:]), kwargs

                stack.callback(attn.register_forward_pre_hook(whole, with_kwargs=True).remove)
        final = ("mhc_streams_final", len(layers) - 1)
        stack.callback(last.register_forward_pre_hook(lambda m, args: (streams(final, args[0]),)).remove)
        yield


def _write(target: Tensor, value: Tensor) -> None:
    target.copy_(value)


def watched(name: str, model: Any, ids: Tensor) -> tuple[Tensor, dict[Site, Tensor]]:
    """Logits of the eager model, and the value of each hook point, weights as (B, T, numbers)."""
    seen: dict[Site, Tensor] = {}

    def look(site: Site, value: Tensor) -> Tensor:
        seen[site] = value.flatten(2).clone()
        return value

    with hooked(name, model, look):
        return logits(model, ids), seen


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def tokens(batch: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(3, 79, (batch, length), generator=torch.Generator().manual_seed(seed))


def direction(seed: int, width: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(width, generator=torch.Generator().manual_seed(seed))
