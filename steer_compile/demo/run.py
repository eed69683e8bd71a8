"""The demo's steps: a style direction from captures, steered and mixed generation, strength response, compile cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steer_compile import torch_compat
from steer_compile.demo.subject import HOOK, Row, Subject
from steer_compile.runtime.steering import Steering

Step = Callable[[str], None]
Scorer = Callable[[Sequence[str]], list[float]]
CURVE = (-1.5, -1.0, -0.67, -0.33, 0.0, 0.33, 0.67, 1.0, 1.5)
"""Strengths of the response curve, as multiples of the demo's strength."""
QUICK_CURVE = (-1.0, 0.0, 1.0)


@dataclass(frozen=True)
class Styles:
    """Passages of the two styles, and the prompts that are continued."""

    positive: str
    negative: str
    passages: tuple[tuple[str, ...], tuple[str, ...]] = field(repr=False)
    prompts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Direction:
    """Difference of the styles' mean streams at one layer: ``positive - negative``."""

    layer: int
    vector: Tensor = field(repr=False)
    middle: Tensor = field(repr=False)
    stream: float
    separation: float
    """Share of the passages on their own side of the middle."""

    def project(self, streams: Tensor) -> list[float]:
        """Place of each stream ``(texts, width)`` on the line through the means: 1 is positive's, -1 negative's."""
        along = (streams - self.middle) @ self.vector / (0.5 * self.vector.dot(self.vector))
        return [float(value) for value in along]


@dataclass
class Result:
    """Texts and numbers of a run. Texts are continuations in the order of the prompts."""

    direction: Direction
    strength: float
    texts: dict[str, list[str]] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    natural: dict[str, float] = field(default_factory=dict)
    mixed: list[dict[str, Any]] = field(default_factory=list)
    curve: list[tuple[float, list[float]]] = field(default_factory=list)
    graphs: int = 0
    recompiles: int = 0
    changes: dict[str, int] = field(default_factory=lambda: {"vectors": 0, "rows": 0, "scales": 0})
    kernels: dict[str, int] = field(default_factory=dict)
    plain: int | None = None
    """Prompts whose unsteered text is that of the compiled model without the backend; None where it was not run."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether mixed rows equal their own runs, nothing recompiled and the style follows the direction."""
        moved = sum(self.scores["positive"]) > sum(self.scores["negative"])
        return all(row["equal"] for row in self.mixed) and self.recompiles == 0 and moved


def find_direction(subject: Subject, styles: Styles) -> Direction:
    """Difference of means over the passages at the captured layer."""
    positive, negative = (subject.capture(texts) for texts in styles.passages)
    layer = next(iter(positive))
    means = positive[layer].mean(0), negative[layer].mean(0)
    vector, middle = means[0] - means[1], (means[0] + means[1]) / 2
    right = ((positive[layer] - middle) @ vector > 0).sum() + ((negative[layer] - middle) @ vector < 0).sum()
    total = len(positive[layer]) + len(negative[layer])
    stream = float(torch.cat([positive[layer], negative[layer]]).norm(dim=1).mean())
    return Direction(layer, vector, middle, stream, float(right) / total)


class Demo:
    """Runs the steps on one compiled subject and fills a `Result`."""

    def __init__(self, subject: Subject, styles: Styles, step: Step) -> None:
        self.subject = subject
        self.styles = styles
        self.step = step
        self._started = time.perf_counter()
        self._plain: list[str] | None = None
        self._kernels: dict[str, int] = {}

    def run_plain(self, inner: str) -> None:
        """Generate with the same model compiled without the backend, and count its kernels."""
        self.step("compiling without steering, for comparison")
        self.subject.compile(inner)
        before = torch_compat.kernel_count()
        self._plain = self.subject.generate(self.styles.prompts)
        self._kernels["plain"] = torch_compat.kernel_count() - before
        self.subject.compile(self.subject.backend)

    def run(self, strength: float, scorer: Scorer | None, curve: Sequence[float]) -> Result:
        """All steps with the backend. ``scorer`` None scores by projection on the direction."""
        first = torch_compat.compile_count()
        self.step("compiling with steering and capture")
        before = torch_compat.kernel_count() if self._kernels else 0
        self.subject.generate(self.styles.prompts, [None] * len(self.styles.prompts))
        if self._kernels:
            self._kernels["steered"] = torch_compat.kernel_count() - before
        self.step("deriving the style direction from captures")
        result = Result(find_direction(self.subject, self.styles), strength, kernels=self._kernels)
        compiled = torch_compat.compile_count()
        result.graphs = compiled - first
        score = scorer or (lambda texts: self._project(result.direction, texts))
        self._homogeneous(result, score)
        self._mixed(result)
        self._response(result, score, curve)
        result.recompiles = torch_compat.compile_count() - compiled
        result.seconds = time.perf_counter() - self._started
        return result

    def _project(self, direction: Direction, texts: Sequence[str]) -> list[float]:
        streams = [
            self.subject.capture(texts[start : start + self.subject.shapes.rows])[direction.layer]
            for start in range(0, len(texts), self.subject.shapes.rows)
        ]
        return direction.project(torch.cat(streams))

    def _config(self, result: Result, sign: float) -> Steering:
        vector = {HOOK: {result.direction.layer: result.direction.vector}}
        return Steering(vector, scale=sign * result.strength)

    def _homogeneous(self, result: Result, score: Scorer) -> None:
        rows: dict[str, Row] = {
            "unsteered": None,
            "positive": self._config(result, 1.0),
            "negative": self._config(result, -1.0),
        }
        for name, row in rows.items():
            self.step(f"generating, every row {self._label(name)}")
            result.texts[name] = self.subject.generate(self.styles.prompts, [row] * len(self.styles.prompts))
            result.scores[name] = score(result.texts[name])
            result.changes["vectors"] += row is not None
        for name, texts in zip(("positive", "negative"), self.styles.passages, strict=True):
            values = score(texts)
            result.natural[name] = sum(values) / len(values)
        if self._plain is not None:
            result.plain = sum(a == b for a, b in zip(self._plain, result.texts["unsteered"], strict=True))

    def _label(self, name: str) -> str:
        style = {"positive": self.styles.positive, "negative": self.styles.negative}.get(name)
        return f"toward {style}" if style else name

    def _mixed(self, result: Result) -> None:
        """One batch in which neighbouring rows are steered differently; each must equal its row of the run above."""
        self.step("generating a mixed batch")
        cycle = ("unsteered", "positive", "negative")
        names = [cycle[i % 3] for i in range(len(self.styles.prompts))]
        rows = {"unsteered": None, "positive": self._config(result, 1.0), "negative": self._config(result, -1.0)}
        texts = self.subject.generate(self.styles.prompts, [rows[name] for name in names])
        result.changes["rows"] += 1
        for i, (name, text) in enumerate(zip(names, texts, strict=True)):
            same = text == result.texts[name][i]
            result.mixed.append(
                {"row": i, "steering": name, "prompt": self.styles.prompts[i], "text": text, "equal": same}
            )

    def _response(self, result: Result, score: Scorer, curve: Sequence[float]) -> None:
        """Style against strength: one handle whose scale alone changes."""
        runtime = self.subject.backend.runtime
        handle = runtime.register(self._config(result, 1.0))
        for part in curve:
            self.step(f"generating at strength {part * result.strength:+.2f}")
            runtime.set_scale(handle, part)
            texts = self.subject.generate(self.styles.prompts, [handle] * len(self.styles.prompts))
            result.curve.append((part * result.strength, score(texts)))
            result.changes["scales"] += 1
        runtime.release(handle)
