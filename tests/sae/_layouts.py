"""Files in each layout, written key by key as releases have them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.sae._weights import COUNT, WIDTH, parts

AVERAGE = 5.5
"""Average norm of the rows in Llama Scope's file."""


def save(folder: Path, file: str, tensors: Mapping[str, Tensor], config: str = "", **keys: Any) -> Path:
    """Write tensors in the format that the file's name says, and a configuration beside."""
    path = folder / file
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in tensors.items()})  # type: ignore[arg-type]
    elif path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, str(path))
    if config:
        (folder / config).write_text(json.dumps(keys))
    return folder


def plain(*extra: str, **renamed: Tensor) -> dict[str, Tensor]:
    own = parts()
    return {name: own[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec", *extra)} | renamed


def sae_lens(
    folder: Path, architecture: str = "standard", tensors: Mapping[str, Tensor] | None = None, **keys: Any
) -> Path:
    """SAELens from version 6 on."""
    base = {
        "d_in": WIDTH, "d_sae": COUNT, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True,
        "normalize_activations": "none", "reshape_activations": "none", "architecture": architecture,
        "metadata": {
            "sae_lens_version": "6.0.0", "model_name": "gpt2", "hook_name": "blocks.2.hook_resid_post",
            "hook_head_index": None, "prepend_bos": True, "dataset_path": "x", "anything": 1,
        },
    }  # fmt: skip
    return save(folder, "sae_weights.safetensors", tensors or plain(), "cfg.json", **{**base, **keys})


def sae_lens_old(folder: Path, tensors: Mapping[str, Tensor] | None = None, **keys: Any) -> Path:
    """SAELens before version 6."""
    base = {
        "architecture": "standard", "d_in": WIDTH, "d_sae": COUNT, "activation_fn_str": "relu",
        "activation_fn_kwargs": {}, "apply_b_dec_to_input": True, "finetuning_scaling_factor": False,
        "context_size": 128, "model_name": "gpt2", "hook_name": "blocks.2.hook_resid_post", "hook_layer": 2,
        "hook_head_index": None, "prepend_bos": True, "dataset_path": "x", "dataset_trust_remote_code": True,
        "normalize_activations": "none", "dtype": "torch.float32", "device": "cpu", "sae_lens_training_version": None,
        "neuronpedia_id": None, "model_from_pretrained_kwargs": {}, "seqpos_slice": [None],
    }  # fmt: skip
    return save(folder, "sae_weights.safetensors", tensors or plain(), "cfg.json", **{**base, **keys})


def lower(own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.lower(): tensor for name, tensor in own.items()}


def gemma_scope(folder: Path, **changed: Tensor) -> Path:
    return save(folder, "params.npz", lower(plain("threshold")) | changed)


def gemma_scope_2(folder: Path, tensors: Mapping[str, Tensor] | None = None, **keys: Any) -> Path:
    base = {
        "architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "hf_hook_point_in": "model.layers.2.output",
        "hf_hook_point_out": "model.layers.2.output", "width": COUNT, "l0": 20, "affine_connection": False,
        "type": "sae",
    }  # fmt: skip
    own = tensors or lower(plain("threshold"))
    return save(folder, "params.safetensors", own, "config.json", **{**base, **keys})


def linear(own: Mapping[str, Tensor], **biases: str) -> dict[str, Tensor]:
    """Matrices as ``nn.Linear`` keeps them, and biases under their names of the file."""
    matrices = {"encoder.weight": own["W_enc"].T, "decoder.weight": own["W_dec"].T}
    return matrices | {file.replace("__", "."): own[name] for file, name in biases.items()}


def llama_scope(folder: Path, file: str = "checkpoints/final.safetensors", **keys: Any) -> Path:
    base = {
        "hook_point_in": "blocks.2.hook_resid_post", "hook_point_out": "blocks.2.hook_resid_post",
        "use_decoder_bias": True, "apply_decoder_bias_to_pre_encoder": False, "expansion_factor": 8, "d_model": WIDTH,
        "d_sae": COUNT, "act_fn": "jumprelu", "jump_relu_threshold": 0.35, "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": AVERAGE, "out": AVERAGE}, "decoder_exactly_fixed_norm": False,
        "sparsity_include_decoder_norm": True, "use_glu_encoder": False, "init_decoder_norm": 0.5, "top_k": 3,
        "lp": 1, "l1_coefficient": 0.0,
    }  # fmt: skip
    own = linear(parts(), encoder__bias="b_enc", decoder__bias="b_dec")
    return save(folder, file, own, "hyperparams.json", **{**base, **keys})


def dictionary_learning(folder: Path, name: str, tensors: Mapping[str, Tensor], **keys: Any) -> Path:
    trainer = {
        "dict_class": name, "trainer_class": "T", "activation_dim": WIDTH, "dict_size": COUNT, "layer": 2,
        "lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_2", "lr": 1e-4, "device": "cuda:0",
    }  # fmt: skip
    return save(folder, "ae.pt", tensors, "config.json", trainer=trainer | keys, buffer={"ctx_len": 128})


def sparsify(folder: Path, **keys: Any) -> Path:
    base = {
        "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": COUNT, "k": 3,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": WIDTH,
    }  # fmt: skip
    own = parts()
    tensors = {"encoder.weight": own["W_enc"].T, "encoder.bias": own["b_enc"], "W_dec": own["W_dec"]}
    return save(folder, "sae.safetensors", tensors | {"b_dec": own["b_dec"]}, "cfg.json", **{**base, **keys})


def qwen_scope(folder: Path, file: str = "layer2.sae.pt", **changed: Tensor) -> Path:
    own = parts()
    tensors = {"W_enc": own["W_enc"].T, "W_dec": own["W_dec"].T, "b_enc": own["b_enc"], "b_dec": own["b_dec"]}
    return save(folder, file, tensors | changed)
