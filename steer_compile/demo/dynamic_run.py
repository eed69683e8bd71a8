"""What the two demonstrations of dynamic steering share: the demo model, a style direction, sampled text, a trace."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steer_compile.backend import SteerBackend, steer_backend
from steer_compile.demo.bytes_tokenizer import ByteTokenizer
from steer_compile.demo.inputs import bundled_model, read_styles
from steer_compile.demo.run import Styles
from steer_compile.dynamic.steering_controller import SteeringController, Values
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import HookSelection, SteerSpec

HOOK = "post_block"
PASSAGES, LENGTH = 16, 96
TEMPERATURE, SEED = 0.7, 0


@dataclass(frozen=True)
class Axis:
    """The line from one style's mean stream to the other's at a layer: 1 is the first, -1 the second.

    Attributes:
        vector: half of the difference of the means (H,).
        probe: ``h . probe - offset`` is the place of h on the line.
    """

    site: SiteKey
    vector: Tensor = field(repr=False)
    probe: Tensor = field(repr=False)
    offset: float


@dataclass(frozen=True)
class Point:
    """One request in one step: what was read, what is applied from the next step on, and a second reading."""

    score: float
    gain: float
    projection: float


@dataclass
class Trace:
    """A run: points of each request by step, and the texts."""

    name: str
    points: dict[str, list[Point]] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)


class Traced(SteeringController):
    """A controller that keeps what it saw for a plot: the score on one axis, and the place on another."""

    def __init__(self, name: str, score: Axis, projection: Axis) -> None:
        super().__init__(name, {axis.site: axis.probe for axis in (score, projection)})
        self.score_axis, self.projection_axis = score, projection
        self.trace = Trace(name)

    def place(self, axis: Axis, values: Values) -> float:
        """Where a request's tokens of the step lie on an axis, on average."""
        return values.score(axis.site) - axis.offset

    def keep(self, request: str, values: Values, score: float, gain: float) -> None:
        """Add a point to the trace."""
        point = Point(score, gain, self.place(self.projection_axis, values))
        self.trace.points.setdefault(request, []).append(point)


class Stage:
    """The demo model, compiled in place with a pool of overrides and captures at some layers."""

    def __init__(self, layers: Sequence[int], requests: int, inner: str) -> None:
        from transformers import AutoModelForCausalLM

        folder = bundled_model()
        self.tokenizer = ByteTokenizer()
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        self.styles: Styles = read_styles(folder, None, None, 64, requests)
        chosen = (HookSelection(HOOK, tuple(layers)),)
        spec = SteerSpec(
            steer=chosen, capture=chosen, rows=2, overrides=requests, max_tokens=max(PASSAGES, requests) * LENGTH
        )
        self.backend: SteerBackend = steer_backend(spec, inner=inner)
        torch.compiler.reset()
        self.model.compile(backend=self.backend)

    def axis(self, layer: int) -> Axis:
        """From the streams of code to those of scripture at a layer."""
        code, scripture = (self._mean(texts, layer) for texts in self.styles.passages)
        vector, middle = (code - scripture) / 2, (code + scripture) / 2
        probe = vector / vector.dot(vector)
        return Axis((HOOK, layer), vector, probe, float(middle @ probe))

    def _mean(self, texts: Sequence[str], layer: int) -> Tensor:
        long = [text for text in texts if len(text.encode()) >= LENGTH][:PASSAGES]
        ids = torch.tensor([self.tokenizer.encode(text)[:LENGTH] for text in long])
        with torch.no_grad(), self.backend.runtime.capture() as log:
            self.model(input_ids=ids)
        return log[HOOK, layer].mean(dim=(0, 1))

    def run(self, controller: Traced, prompts: dict[str, str], tokens: int) -> Trace:
        """Sample continuations of prompts of equal length, by name, under a controller."""
        from transformers import StaticCache

        ids, mask = self.tokenizer.batch(list(prompts.values()))
        size = ids.size(1) + tokens
        with self._under(controller), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            with self.backend.runtime.steer(
                rows=[None] * len(prompts), names=list(prompts), prompt_lengths=mask.sum(1).tolist()
            ):
                made = self.model.generate(
                    input_ids=ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
                    max_new_tokens=tokens, min_new_tokens=tokens, disable_compile=True,
                    past_key_values=StaticCache(config=self.model.config, max_cache_len=size),
                )  # fmt: skip
        for name, row in zip(prompts, made[:, ids.size(1) :], strict=True):
            controller.trace.texts[name] = self.tokenizer.decode(row)
        return controller.trace

    @contextmanager
    def _under(self, controller: Traced) -> Iterator[None]:
        self.backend.runtime.dynamic.add(controller)
        try:
            yield
        finally:
            self.backend.runtime.dynamic.remove(controller.name)
