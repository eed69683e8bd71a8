"""The model of the demo, compiled in place: steered generation and captured activations through the same two graphs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from steer_compile.backend import SteerBackend, steer_backend
from steer_compile.runtime.runtime import Handle
from steer_compile.runtime.steering import Steering
from steer_compile.spec import HookSelection, SteerSpec

HOOK = "post_block"
Row = Steering | Handle | None


class Tokenizer(Protocol):
    """What is needed of a tokenizer: ids of one text, of a batch with padding on the left, and text of ids."""

    def encode(self, text: str, bos: bool = True) -> list[int]: ...

    def batch(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]: ...

    def decode(self, ids: Tensor) -> str: ...


@dataclass(frozen=True)
class Shapes:
    """Every call has one of two shapes, so two graphs serve the whole demo: (rows, prompt) and (rows, 1)."""

    rows: int
    prompt: int
    new_tokens: int


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; temperature 0 takes the likeliest. The same seed draws the same noise for each row."""

    temperature: float = 0.0
    seed: int = 0


class Subject:
    """A Hugging Face model with `steer_backend` compiled in place, so that ``generate`` runs the steered graphs."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        shapes: Shapes,
        layers: Sequence[int],
        inner: str,
        sampling: Sampling,
    ) -> None:
        self.model: Any = model
        self.tokenizer = tokenizer
        self.shapes = shapes
        self.sampling = sampling
        chosen = (HookSelection(HOOK, tuple(layers)),)
        spec = SteerSpec(steer=chosen, capture=chosen, rows=6, max_tokens=shapes.rows * shapes.prompt)
        self.backend: SteerBackend = steer_backend(spec, inner=inner)
        self.fixed = bool(getattr(model, "_can_compile_fullgraph", False))
        self.compile(self.backend)

    def compile(self, backend: Any) -> None:
        """Compile the module in place with another backend; what was compiled before is dropped."""
        torch.compiler.reset()
        self.model.compile(backend=backend, dynamic=None if self.fixed else True)

    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Ids and mask of one call, (rows, prompt): the ends of long texts, short ones padded on the left.

        Every row gets some padding, because ``generate`` drops a mask of ones and the graph would be another one.
        """
        ids, mask = self.tokenizer.batch(texts)
        length, rows = self.shapes.prompt, self.shapes.rows
        ids, mask = ids[:, 1 - length :], mask[:, 1 - length :]
        short = length - ids.shape[1]
        ids = nn.functional.pad(ids, (short, 0), value=int(ids[0, -1]))
        mask = nn.functional.pad(mask, (short, 0))
        fill = rows - len(texts)
        if fill < 0:
            raise ValueError(f"{len(texts)} texts in a call of {rows} rows")
        return torch.cat([ids, ids[-1:].expand(fill, -1)]), torch.cat([mask, mask[-1:].expand(fill, -1)])

    def _generate(self, ids: Tensor, mask: Tensor, new_tokens: int) -> Tensor:
        options: dict[str, Any] = {"do_sample": self.sampling.temperature > 0, "max_new_tokens": new_tokens}
        if self.sampling.temperature > 0:
            options |= {"temperature": self.sampling.temperature, "top_k": 0, "top_p": 1.0}
        if self.fixed:
            from transformers import StaticCache

            size = self.shapes.prompt + self.shapes.new_tokens
            options["past_key_values"] = StaticCache(config=self.model.config, max_cache_len=size)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.sampling.seed)
            made: Tensor = self.model.generate(
                input_ids=ids, attention_mask=mask, disable_compile=True, use_cache=True, **options
            )
        return made[:, ids.shape[1] :]

    def generate(self, prompts: Sequence[str], rows: Sequence[Row] | None = None) -> list[str]:
        """Continuations of the prompts. ``rows``: the steering of each; None steers nothing and needs no backend."""
        ids, mask = self.encode(prompts)
        if rows is None:
            made = self._generate(ids, mask, self.shapes.new_tokens)
        else:
            filled = [*rows, *[None] * (self.shapes.rows - len(rows))]
            with self.backend.runtime.steer(rows=filled, prompt_lengths=mask.sum(1).tolist()):
                made = self._generate(ids, mask, self.shapes.new_tokens)
        return [self.tokenizer.decode(row) for row in made[: len(prompts)]]

    def capture(self, texts: Sequence[str]) -> dict[int, Tensor]:
        """Mean over the tokens of each text of the stream at every captured layer: layer -> (texts, width)."""
        means: dict[int, list[Tensor]] = {}
        for start in range(0, len(texts), self.shapes.rows):
            some = texts[start : start + self.shapes.rows]
            ids, mask = self.encode(some)
            with self.backend.runtime.capture() as log:
                self._generate(ids, mask, 1)
            weight = mask[: len(some)].unsqueeze(-1).float()
            count = weight.sum(1).clamp_min(1.0)  # an empty text has no tokens
            for hook, layer in log:
                stream = log[hook, layer][: len(some), : ids.shape[1]].float()
                means.setdefault(layer, []).append((stream * weight).sum(1) / count)
        return {layer: torch.cat(parts) for layer, parts in means.items()}
