"""What the benchmarks run: a random-weight Llama of 1B shape, its step functions, and the compiled variants of them."""

from __future__ import annotations

import os
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from steer_compile import SteerBackend, Steering, SteerSpec, steer_backend
from steer_compile.runtime.vectors import VectorSet, vector_set

HOOKS = ("post_attn", "post_block")
KINDS = ("plain", "plain_again", "steer", "capture", "steer_capture")
"""Graphs that are compiled; ``plain_again`` is a second build of ``plain``: what two builds differ by."""


@dataclass(frozen=True)
class Shape:
    """Tokens of one call. ``cache`` is the length of the static key-value cache, 0 for a forward without one."""

    name: str
    batch: int
    length: int
    cache: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def text(self) -> str:
        kind = f"decode step over a static cache of {self.cache}" if self.cache else "forward without a cache"
        return f"{self.batch} x {self.length} tokens, {kind}"


SHAPES = {
    s.name: s
    for s in (
        Shape("decode_1", 1, 1, 512),
        Shape("decode_64", 64, 1, 256),
        Shape("decode_256", 256, 1, 128),
        Shape("tokens_256", 256, 1),
        Shape("prefill_4096", 8, 512),
    )
}


def build_model(layers: int, device: torch.device, tiny: bool = False) -> LlamaForCausalLM:
    """Random weights: 2048 wide, 32 heads, 8 key-value heads, MLP 8192, vocabulary 32,000, bf16."""
    width, inner, heads, vocabulary = (64, 128, 4, 256) if tiny else (2048, 8192, 32, 32000)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 4, max_position_embeddings=4096,
        attn_implementation="sdpa",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    return model.eval().requires_grad_(False)


def spec_of(kind: str, layers: int, max_tokens: int) -> SteerSpec:
    """The spec of a graph kind: both stream hooks of every layer may be steered, every block's exit is captured."""
    steer = HOOKS if "steer" in kind else ()
    capture = ("post_block",) if "capture" in kind else ()
    return SteerSpec(steer=steer, capture=capture, rows=2 * 257, max_tokens=max_tokens)


def decode_step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of one step that reads and writes the cache."""
    logits: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True).logits
    return logits


def forward_step(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Logits of the last token of each sequence, without a cache."""
    logits: Tensor = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    return logits


def own_code(function: Any, name: str) -> Callable[..., Tensor]:
    """The function with a code object of its own, so that Dynamo keeps its compiled graphs apart."""
    return types.FunctionType(function.__code__.replace(co_name=name), function.__globals__, name)


@contextmanager
def fresh_caches() -> Iterator[None]:
    """Empty compile caches, on disk and in memory, and none of them read or written."""
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")
    before = {name: os.environ.get(name) for name in names}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for name in names:
            os.environ[name] = os.path.join(folder, name.lower())
        try:
            with torch._inductor.config.patch(force_disable_caches=True):
                yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


class Workload:
    """One shape: token ids, the cache that all variants share, and the compiled graphs by kind."""

    def __init__(self, model: LlamaForCausalLM, shape: Shape, mode: str | None) -> None:
        self.model, self.shape, self.mode = model, shape, mode
        self.device = model.device
        generator = torch.Generator().manual_seed(1)
        vocabulary = model.config.vocab_size
        self.ids = torch.randint(vocabulary, (shape.batch, shape.length), generator=generator).to(self.device)
        self.cache = self._cache() if shape.cache else None
        self.calls: dict[str, Callable[..., Tensor]] = {}
        self.backends: dict[str, SteerBackend] = {}
        self.compile_seconds: dict[str, float] = {}

    def _cache(self) -> Any:
        config = self.model.config
        cache = StaticCache(config=config, max_cache_len=self.shape.cache)
        head = config.hidden_size // config.num_attention_heads
        cache.early_initialization(self.shape.batch, config.num_key_value_heads, head, self.model.dtype, self.device)
        return cache

    def set_position(self, position: int) -> None:
        """Let the next decode step write at ``position``; every call moves it by one."""
        if self.cache is not None:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(position)

    def step(self, kind: str, ids: Tensor | None = None) -> Tensor:
        """Logits of one call."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.calls[kind](self.model, self.ids if ids is None else ids, self.cache)

    def compile(self, kind: str) -> None:
        """Compile one kind with empty caches, time it, and run it until its CUDA graph is recorded."""
        function = own_code(decode_step if self.cache is not None else forward_step, f"step_{kind}")
        if kind.startswith("plain"):
            backend: Any = "inductor"
        else:
            layers = self.model.config.num_hidden_layers
            backend = self.backends[kind] = steer_backend(spec_of(kind, layers, max(self.shape.tokens, 4096)))
        self.calls[kind] = torch.compile(function, backend=backend, mode=self.mode, fullgraph=True, dynamic=False)
        self.set_position(0)
        with fresh_caches():
            start = time.perf_counter()
            self.step(kind)
            synchronize(self.device)
            self.compile_seconds[kind] = time.perf_counter() - start
        for _ in range(3):
            self.step(kind)
        synchronize(self.device)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def random_vectors(layers: int, width: int, seed: int, size: float = 0.02) -> VectorSet:
    """A vector for both stream hooks of every layer, each number of standard deviation ``size``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(HOOKS), layers, width, generator=generator).mul_(size).bfloat16().float()
    return vector_set({hook: {n: drawn[i, n] for n in range(layers)} for i, hook in enumerate(HOOKS)})


def configurations(work: Workload, count: int, seed: int = 100) -> list[Steering]:
    """Steering configurations that differ in every vector."""
    config = work.model.config
    return [Steering(random_vectors(config.num_hidden_layers, config.hidden_size, seed + i)) for i in range(count)]
