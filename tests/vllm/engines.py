"""Engines of vLLM over tiny models, and the Hugging Face models that judge them."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import parse
from torch import Tensor, nn

from steer_compile import SteerSpec
from steer_compile.vllm import engine_args
from tests import _tree

WIDTH, LAYERS, VOCABULARY = 64, 4, 512
HOOKS = ("post_attn", "post_block")
PROMPT = list(range(5, 20))
ON_A_GPU = {"gpu_memory_utilization": 0.05, "kv_cache_memory_bytes": 1 << 28}
TOLERANCE = 1e-3 if torch.cuda.is_available() else 2e-4
"""Of log-probabilities in fp32."""
LENGTHS = {"max_model_len": 128, "max_num_seqs": 8, "max_num_batched_tokens": 256}
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def config(name: str) -> Any:
    """A small configuration of an architecture."""
    import transformers as hf

    if name == "gpt2":
        return hf.GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=2,
            n_positions=256,
            bos_token_id=1,
            eos_token_id=2,
        )
    made = {
        "llama": hf.LlamaConfig,
        "qwen3": hf.Qwen3Config,
        "gemma3": hf.Gemma3TextConfig,
        "mixtral": hf.MixtralConfig,
    }
    more = {"mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2}, "gemma3": {"sliding_window": 64}}
    return made[name](**_COMMON, **more.get(name, {}))


def saved(name: str, folder: Path) -> Path:
    """A random model of an architecture, stored in a folder; each parameter has noise."""
    from transformers import AutoModelForCausalLM

    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config(name), dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(path)
    return path


def engine(model: Path, spec: SteerSpec | None = None, **options: Any) -> Any:
    """An engine in this process. Engines share what vLLM keeps for a process, so an old one goes before a new one."""
    from vllm import LLM

    gc.collect()

    more = {
        name: options.pop(name)
        for name in ("vectors", "vector_root", "capture_dir", "controllers", "consumers", "saes")
        if name in options
    }
    steered = engine_args(spec, **more) if spec is not None else {}
    device = ON_A_GPU if torch.cuda.is_available() else {}
    given = {"dtype": "float32", "skip_tokenizer_init": True, "seed": 0, **LENGTHS, **device, **options}
    return LLM(model=str(model), **given, **steered)


def told(ranks: int, module: list[str], more: Mapping[str, str] | None = None) -> Any:
    """What a module of tests says of an engine of tensor parallel ranks in processes of their own: its last line that
    is a list of lists. ``module``: its name and its arguments."""
    if torch.cuda.is_available() and torch.cuda.device_count() < ranks:
        pytest.skip(f"{ranks} ranks need as many GPUs")
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "|".join("01"[:ranks]),
        "PYTHONPATH": os.pathsep.join([str(_tree.ROOT), os.environ.get("PYTHONPATH", "")]), **(more or {}),
    }  # fmt: skip
    command = [sys.executable, "-m", *module]
    done = subprocess.run(command, cwd=_tree.ROOT, env=env, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("[[")][-1])


def before(version: str) -> bool:
    """Whether vLLM is older than this version."""
    import vllm

    return parse(vllm.__version__) < parse(version)


def generated(llm: Any, steering: list[Any], tokens: int = 8, prompts: list[list[int]] | None = None) -> list[Any]:
    """Greedy outputs, one for each steering (None for none), with log-probabilities."""
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=tokens, temperature=0, detokenize=False, logprobs=1, ignore_eos=True,
            extra_args=None if each is None else {"steer": each},
        )
        for each in steering
    ]  # fmt: skip
    given = [{"prompt_token_ids": p} for p in prompts or [PROMPT] * len(params)]
    return [result.outputs[0] for result in results(llm, given, params)]


def results(llm: Any, given: list[Any], params: list[Any]) -> list[Any]:
    return list(llm.generate(given, params, use_tqdm=False))


def texts(outputs: list[Any]) -> list[list[int]]:
    return [list(o.token_ids) for o in outputs]


def logprobs(output: Any) -> list[float]:
    """Log-probability of each generated token."""
    return [float(at[token].logprob) for at, token in zip(output.logprobs, output.token_ids, strict=True)]


@contextmanager
def hooked(layers: nn.ModuleList, layer: int, vector: Tensor, first: int) -> Iterator[None]:
    """Add ``vector`` to what a block returns, at positions from ``first`` on."""

    def hook(module: nn.Module, args: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        hidden[:, first:] += vector
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = layers[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def judged(model: Any, output: Any, vector: Tensor, layer: int, decode_only: bool) -> tuple[list[int], list[float]]:
    """Greedy tokens and log-probabilities that the uncompiled model gives where the engine gave ``output``."""
    layers = model.transformer.h if "transformer" in dict(model.named_children()) else model.model.layers
    ids = torch.tensor([PROMPT + list(output.token_ids)])
    at = len(PROMPT)
    with torch.no_grad(), hooked(layers, layer, vector, at if decode_only else 0):
        found = model(ids, use_cache=False).logits[0].log_softmax(-1)[at - 1 : -1]
    numbers = [float(row[token]) for row, token in zip(found, output.token_ids, strict=True)]
    return found.argmax(-1).tolist(), numbers


def vector(seed: int, size: float = 0.5) -> Tensor:
    return size * torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))


def at(layer: int, value: Tensor, tier: str = "base", hook: str = "post_block") -> Mapping[str, Any]:
    """A request's steering with one vector."""
    return {tier: {hook: {str(layer): value.tolist()}}}
