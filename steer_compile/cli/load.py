"""MODEL of the command line: a local Hugging Face directory, a bare config, or ``module:function``."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from steer_compile import torch_compat
from steer_compile.errors import CheckpointError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_LOAD_ERRORS = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError)
_TOKENS, _PLAIN_IDS = (2, 9), 80


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, keyword arguments of one call, and what the user should know about its weights."""

    name: str
    model: nn.Module
    inputs: dict[str, Any] = field(repr=False)
    folder: Path | None = None
    note: str = ""
    shapes: AbstractContextManager[Any] | None = field(default=None, repr=False)
    """In what its graphs run, where its tensors have shapes alone (`torch_compat.shapes_only`)."""


def load(
    text: str, dtype: torch.dtype | None = None, weights: bool = True, tokens: tuple[int, int] = _TOKENS
) -> Loaded:
    """The model that a MODEL argument names.

    Args:
        text: a directory, a ``config.json``, or ``module:function``.
        dtype: dtype of the weights; None is the checkpoint's own.
        weights: False reads a directory's config alone, and makes a model of any size without memory for its tensors.
            What a function makes stays as it is.
        tokens: rows of the example, and ids of each.

    Raises:
        CheckpointError: nothing there, no safetensors, or files that cannot be read.
    """
    path = Path(text).expanduser()
    if not path.exists() and ":" in text:
        return _from_function(text, tokens)
    if not path.exists():
        raise CheckpointError(
            f"{text} does not exist; give a local Hugging Face model directory, a config.json or module:function "
            "(models are never downloaded)"
        )
    if path.is_file() and path.name != "config.json":
        raise CheckpointError(f"{text} is a file; give the model's directory or its config.json")
    folder = path if path.is_dir() else path.parent
    _check_config(folder)
    shards = _shards(folder) if path.is_dir() else []
    if not weights:
        return _shapes(text, folder, dtype, tokens)
    model = _from_files(folder, dtype) if shards else _from_config(folder, dtype or torch.float32)
    note = "" if shards else "random weights: only a config was given"
    return Loaded(text, _ready(model), example_inputs(model, tokens), folder, note)


def _shapes(text: str, folder: Path, dtype: torch.dtype | None, tokens: tuple[int, int]) -> Loaded:
    """A model without memory for its tensors."""
    shapes = torch_compat.shapes_only()
    with shapes:
        model = _ready(_from_config(folder, dtype))
    given = example_inputs(model, tokens)
    inputs = {key: shapes.from_tensor(v) if isinstance(v, torch.Tensor) else v for key, v in given.items()}
    return Loaded(text, model, inputs, folder, "shapes alone: no weights were read", shapes)


def _check_config(folder: Path) -> None:
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder} holds no config.json, so it is no Hugging Face model directory")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not JSON: {error}; copy the model again") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{file} names no model_type, so it is no Hugging Face model config")


def _shards(folder: Path) -> list[Path]:
    """Safetensors files of a directory, each with a readable header; none where there is only a config."""
    index = folder / "model.safetensors.index.json"
    shards = sorted(folder.glob("model*.safetensors"))
    if index.is_file():
        shards = [folder / name for name in _indexed(index)]
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
    if not shards and pickles:
        raise CheckpointError(
            f"{folder} holds only pickled weights ({pickles[0]}), which can run code when they are read; convert them "
            "to safetensors once, where you trust them: AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
        )
    for shard in shards:
        try:
            with safe_open(str(shard), framework="pt") as stored:
                stored.keys()
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{shard} is missing or damaged ({error}); copy the model again") from error
    return shards


def _indexed(index: Path) -> list[str]:
    try:
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of safetensors files; copy the model again") from error


def _transformers() -> Any:
    """The library, silent and offline."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError as error:
        raise CheckpointError("reading a model needs transformers: pip install 'steer-compile[hf]'") from error
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return transformers


def _from_files(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    try:
        model, info = _transformers().AutoModelForCausalLM.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=dtype or "auto", output_loading_info=True
        )
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{folder} cannot be read as a causal language model: {first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} tensors of its model, for example {missing[0]}; copy the model again"
        )
    loaded: nn.Module = model
    return loaded


def _from_config(folder: Path, dtype: torch.dtype | None) -> nn.Module:
    library = _transformers()
    try:
        config = library.AutoConfig.from_pretrained(str(folder), local_files_only=True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
            model: nn.Module = library.AutoModelForCausalLM.from_config(config, dtype=dtype or own)
    except _LOAD_ERRORS as error:
        raise CheckpointError(f"{folder} has no config of a causal language model: {first_line(error)}") from error
    return model


def _from_function(text: str, tokens: tuple[int, int]) -> Loaded:
    module_name, _, name = text.partition(":")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{text} names no function: {first_line(error)}") from error
    made = function()
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise CheckpointError(
            f"{text} returned {type(model).__name__}; return an nn.Module or (nn.Module, keyword arguments)"
        )
    if inputs is not None and not isinstance(inputs, dict):
        raise CheckpointError(
            f"{text} returned {type(inputs).__name__} beside the model; return a dict of keyword arguments"
        )
    return Loaded(text, _ready(model), inputs if inputs is not None else example_inputs(model, tokens))


def example_inputs(model: nn.Module, tokens: tuple[int, int] = _TOKENS) -> dict[str, Any]:
    """Keyword arguments of one call: rows of a few random plain ids, and what the class needs besides.

    Raises:
        CheckpointError: the model does not take ``input_ids``.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    vocabulary = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0)
    if isinstance(kind, str) and vocabulary >= _PLAIN_IDS:
        from steer_compile.coverage.zoo import tiny_inputs

        return tiny_inputs(model, kind, *tokens)
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise CheckpointError(
            f"{type(model).__name__} takes no input_ids; let the function return (model, keyword arguments)"
        )
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, vocabulary or _PLAIN_IDS, tokens, generator=generator)}


def _ready(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none."""
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
