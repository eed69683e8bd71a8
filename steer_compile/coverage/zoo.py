"""Tiny random models, one for every causal language model class of the installed transformers."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    Gemma3nVisionConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from steer_compile.coverage.zoo_overrides import (
    COMMON,
    LAYERS,
    MOST_LAYERS,
    MULTIPLIERS,
    NESTED,
    NOISY_BUFFERS,
    OVERRIDES,
    SIZES,
    Fields,
)

_FIRST_SPECIAL_TOKEN = 80  # ids from here on stand for images, sounds and the like; 3..79 is plain text
_MATRIX_NOISE, _VECTOR_NOISE, _SCALAR_NOISE = 0.15, 0.1, 0.1


def model_types() -> tuple[str, ...]:
    """Every model type of the causal language model mapping, sorted."""
    return tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))


def class_name(model_type: str) -> str:
    """Name of the causal language model class of a model type."""
    return cast(str, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])


def tiny_config(model_type: str) -> PretrainedConfig:
    """Configuration of the tiny model, with every layer kind of the default configuration."""
    config_class = CONFIG_MAPPING[model_type]
    for field in ("decoder", "text_config"):  # composite types whose causal class is built from one part
        if config_class.sub_configs.get(field) is _model_class(model_type).config_class:
            return _shrink(config_class.sub_configs[field], f"{model_type}.{field}")
    return _shrink(config_class, model_type)


def _model_class(model_type: str) -> type[PreTrainedModel]:
    return cast(type[PreTrainedModel], getattr(transformers, class_name(model_type)))


def tiny_model(model_type: str, seed: int = 0) -> nn.Module:
    """Tiny random float32 model in eval mode, eager attention, no gradients."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = _model_class(model_type)._from_config(
            tiny_config(model_type), attn_implementation="eager", dtype=torch.float32
        )
    add_noise(model, seed)
    return model.float().eval().requires_grad_(False)


def tiny_inputs(model: nn.Module, model_type: str, batch: int = 2, length: int = 9, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of forward: input_ids [batch, length] and what the class needs besides."""
    generator = torch.Generator().manual_seed(seed)
    accepted = inspect.signature(model.forward).parameters
    config = cast(PretrainedConfig, model.config)
    rows = batch * config.num_codebooks if model_type.startswith("musicgen") else batch
    inputs: dict[str, Any] = {"input_ids": torch.randint(3, _FIRST_SPECIAL_TOKEN, (rows, length), generator=generator)}
    if "shared_kv_states" in accepted:
        inputs = _assistant_inputs(config, batch, length, generator)
    if getattr(config, "cross_attention_layers", None):  # without them the cross-attention layers are left out
        shape = (batch, 5, config.hidden_size)
        inputs["cross_attention_states"] = torch.randn(shape, generator=generator)
    if "use_cache" in accepted or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepted.values()):
        inputs["use_cache"] = False
    return inputs


def _assistant_inputs(config: PretrainedConfig, batch: int, length: int, generator: torch.Generator) -> dict[str, Any]:
    """Inputs of an assistant: embeddings [batch, length, 2 * width] and keys, values of the model it assists."""
    text, shared = config.get_text_config(), {}
    for layer, kind in enumerate(text.layer_types):
        attention = text.per_layer_config[layer]
        shape = (batch, attention.num_key_value_heads, length, attention.head_dim)
        shared[kind] = tuple(torch.randn(shape, generator=generator) for _ in range(2))
    embeddings = torch.randn((batch, length, 2 * config.backbone_hidden_size), generator=generator)
    positions = torch.arange(length).expand(batch, length)
    return {"inputs_embeds": embeddings, "position_ids": positions, "shared_kv_states": shared}


class _AbsentTowerConfig(Gemma3nVisionConfig):
    """Image tower configuration whose tower needs no further package; text never reaches the tower."""

    model_type = "absent_tower"


class _AbsentTower(PreTrainedModel):
    config_class = _AbsentTowerConfig

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.post_init()


def _shrink(config_class: type[PretrainedConfig], model_type: str) -> PretrainedConfig:
    overrides = dict(OVERRIDES.get(model_type, {}))
    layers = overrides.pop("layers", None)
    nested = {
        name: _shrink(CONFIG_MAPPING[kind], f"{model_type}.{name}") for name, kind in NESTED.get(model_type, {}).items()
    }
    default = vars(config_class(**nested))
    fields = {field.name for field in dataclasses.fields(config_class)}
    tiny: Fields = {name: value for name, value in (SIZES | MULTIPLIERS | COMMON).items() if name in fields}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        tiny["num_key_value_heads"] = tiny["num_attention_heads"]  # latent attention expands to every head
    special = _FIRST_SPECIAL_TOKEN
    for name in sorted(fields):
        if name.endswith(("_token_id", "_token_index")) and name not in tiny and default.get(name) is not None:
            tiny[name], special = special, special + 1
    for name in config_class.sub_configs:
        if isinstance(default.get(name), PretrainedConfig):
            tiny[name] = _shrink(type(default[name]), f"{model_type}.{name}")
    if isinstance(tiny.get("vision_config"), Gemma3nVisionConfig):
        AutoModel.register(_AbsentTowerConfig, _AbsentTower, exist_ok=True)
        tiny["vision_config"] = _AbsentTowerConfig(hidden_size=SIZES["hidden_size"])
    tiny |= _per_layer_lists(default, fields, layers) | overrides
    return config_class(**tiny)


def _per_layer_lists(default: Fields, fields: set[str], layers: list[int] | None) -> Fields:
    """Per-layer lists of the default configuration, cut to a few layers that show every kind once."""
    depth = next((default[name] for name in ("num_hidden_layers", "n_layer", "num_layers") if name in default), 0)
    lists = {
        name: default[name]
        for name in sorted(fields)
        if isinstance(default.get(name), list) and len(default[name]) == depth > LAYERS
    }
    if not lists:
        return {}
    kinds = list(zip(*lists.values(), strict=True))
    if layers is None:
        first = sorted({kinds.index(kind) for kind in kinds})[:MOST_LAYERS]
        extra = [layer for layer in range(depth) if layer not in first]
        layers = sorted(first + extra[: max(0, LAYERS - len(first))])
    return {name: [values[layer] for layer in layers] for name, values in lists.items()} | {
        "num_hidden_layers": len(layers)
    }


def add_noise(model: nn.Module, seed: int) -> None:
    """Add deterministic noise to every parameter and every scaling buffer, so that no gate is neutral."""
    generator = torch.Generator().manual_seed(seed + 1)
    buffers = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] in NOISY_BUFFERS]
    with torch.no_grad():
        for tensor in [*model.parameters(), *buffers]:
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.numel() == 1:
                tensor.add_(0.3 + _SCALAR_NOISE * noise)
            else:
                tensor.add_((_VECTOR_NOISE if tensor.dim() == 1 else _MATRIX_NOISE) * noise)
