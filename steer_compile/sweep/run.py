"""`Sweeper`: one compiled forward with capture, then one for each batch of cells, each element patched at its own."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from steer_compile.backend import SteerBackend, steer_backend
from steer_compile.errors import SpecError
from steer_compile.runtime.capture import CaptureLog
from steer_compile.runtime.patches import Captured, Patch
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import HookSelection, LayersLike, SteerSpec
from steer_compile.sweep.question import Question
from steer_compile.sweep.result import Grid, SweepResult

Step = Callable[[int, int], None]
"""Told the cells that are done and how many there are."""
Place = tuple[SiteKey, int]
BATCH = 32


class Sweeper:
    """A causal language model, compiled once for prompts of one length; sweeps of other prompts compile nothing.

    Args:
        model: takes ids (batch, length) and returns logits (batch, length, vocabulary) in ``.logits``.
        length: tokens of every prompt.
        hooks, layers: the sites; layers without a hook are left out where they are ``"all"``.
        batch: cells of one forward, at least 2: the first forward runs the clean and the corrupted prompt together.
        inner: compiler, as in `steer_backend`.

    Raises:
        SpecError: an unknown hook or layer selection, a batch or length that is none.
    """

    def __init__(
        self,
        model: nn.Module,
        length: int,
        hooks: Sequence[str] = ("post_block",),
        layers: LayersLike = "all",
        batch: int = BATCH,
        inner: str = "inductor",
    ) -> None:
        if batch < 2:
            raise SpecError(
                f"batch={batch} is too small: the clean and the corrupted prompt run in one; give at least 2"
            )
        chosen = tuple(HookSelection(hook, layers, "patch") for hook in hooks)
        spec = SteerSpec(steer=chosen, capture=chosen, rows=1, patches=batch, max_tokens=max(batch * length, 1))
        self.hooks = tuple(dict.fromkeys(selection.hook for selection in chosen))
        self.length, self.batch = length, batch
        self.backend: SteerBackend = steer_backend(spec, inner=inner)
        self._run = torch.compile(model, backend=self.backend, dynamic=False)
        self._options = last_logits_options(model)
        self._vocabulary = vocabulary(model)
        self._device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def run(
        self,
        question: Question,
        positions: Iterable[int] | None = None,
        step: Step = lambda done, total: None,
        every: bool = False,
    ) -> SweepResult:
        """Patch the clean value of each site and position into the corrupted run.

        Where both runs have the same value to the bit, as in front of the first token that differs, the patch changes
        nothing, and the cell has the metric of the corrupted run without a forward of its own.

        Args:
            positions: those that are swept, all where None.
            step: called behind each forward.
            every: run these cells too.

        Raises:
            SpecError: prompts of another length than the sweeper's, ids beyond the vocabulary, a position beyond the
                prompts, ``recovered`` of two prompts that measure the same. SiteNotFound: a hook that the model lacks.
        """
        columns = tuple(range(self.length)) if positions is None else tuple(dict.fromkeys(positions))
        self._check(question, columns)
        start = time.perf_counter()
        clean, corrupted, log = self._first(question)
        begun = time.perf_counter()
        if question.metric == "recovered" and clean == corrupted:
            raise SpecError(
                f"both prompts have a {question.measure} of {clean:.6g}, so there is nothing to recover; give prompts "
                "that are answered differently, or another metric"
            )
        everywhere = [(site, position) for site in log for position in columns]
        differs = {site: (values[0] != values[1]).any(-1).tolist() for site, values in log.steps[0].items()}
        places = [(site, position) for site, position in everywhere if every or differs[site][position]]
        found = dict.fromkeys(everywhere, question.value(corrupted, clean, corrupted))
        done = len(everywhere) - len(places)
        batches = [places[at : at + self.batch] for at in range(0, len(places), self.batch)]
        ids, source = self._ids([question.corrupted] * self.batch), Captured(log)
        for cells in batches:
            rows = [[Patch(site, position, source)] for site, position in cells]
            rows += [[] for _ in range(self.batch - len(cells))]
            with self.backend.runtime.patch(rows=rows):
                measured = question.measured(self._logits(ids)[: len(cells)])
            values = (question.value(m, clean, corrupted) for m in measured)
            found |= dict(zip(cells, values, strict=True))
            done += len(cells)
            step(done, len(everywhere))
        layers = tuple(sorted({layer for _, layer in log}))
        return SweepResult(
            question.metric, question.measure, clean, corrupted, layers, columns,
            {hook: _grid(hook, layers, columns, found) for hook in self.hooks},
            len(everywhere) - len(places), self.batch, 1 + len(batches), begun - start, time.perf_counter() - begun,
        )  # fmt: skip

    def _check(self, question: Question, positions: Sequence[int]) -> None:
        if len(question.clean) != self.length:
            raise SpecError(
                f"the prompts have {len(question.clean)} tokens and this sweeper is compiled for {self.length}; make "
                "one of their length"
            )
        if not positions or min(positions) < 0 or max(positions) >= self.length:
            raise SpecError(f"positions={positions!r} are not in prompts of {self.length} tokens; count from 0")
        if self._vocabulary:
            question.check_vocabulary(self._vocabulary)

    def _first(self, question: Question) -> tuple[float, float, CaptureLog]:
        """Both measures, and what the clean run is made of; element 0 of the log is the clean prompt."""
        ids = self._ids([question.clean] + [question.corrupted] * (self.batch - 1))
        with self.backend.runtime.patch([]), self.backend.runtime.capture() as log:
            clean, corrupted = question.measured(self._logits(ids)[:2])
        return clean, corrupted, log

    def _ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int64, device=self._device)

    def _logits(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self._run(ids, **self._options).logits
        return logits[:, -1]


def _grid(hook: str, layers: Sequence[int], positions: Sequence[int], found: dict[Place, float]) -> Grid:
    return tuple(tuple(found.get(((hook, layer), position)) for position in positions) for layer in layers)


def last_logits_options(model: nn.Module) -> dict[str, Any]:
    """Keyword arguments that spare a model what a sweep does not read: caches, and logits of other positions."""
    taken = inspect.signature(model.forward).parameters
    wanted = {"use_cache": False, "logits_to_keep": 1}
    return {name: value for name, value in wanted.items() if name in taken}


def vocabulary(model: nn.Module) -> int:
    """Tokens that the model's first embedding has, 0 where it has none."""
    return next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), 0)


def patch_sweep(
    model: nn.Module,
    question: Question,
    hooks: Sequence[str] = ("post_block",),
    layers: LayersLike = "all",
    batch: int = BATCH,
    inner: str = "inductor",
) -> SweepResult:
    """Sweep one question; `Sweeper` keeps the compiled model for more of them, and says what is raised."""
    return Sweeper(model, len(question.clean), hooks, layers, batch, inner).run(question)
