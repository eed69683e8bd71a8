"""What must not happen: other tokens when idle, recompiles, CUDA graphs recorded again, replays that see old tables."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch._inductor.cudagraph_trees import CUDAGraphTreeManager

from benchmarks.workload import Workload, configurations
from steer_compile import Steering


class Events:
    """What the compiler did since this was made: graphs compiled, CUDA graphs recorded, runs outside of them."""

    def __init__(self) -> None:
        self.recorded = 0
        self.without_graph = 0
        self._before = _counted()

    @property
    def compiled(self) -> int:
        return _counted()[0] - self._before[0]

    @property
    def skipped(self) -> int:
        """Compiled graphs that got no CUDA graph."""
        return _counted()[1] - self._before[1]

    def counts(self) -> dict[str, int]:
        names = ("compiled", "recorded", "without_graph", "skipped")
        return {name: getattr(self, name) for name in names}


def _counted() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], counters["inductor"]["cudagraph_skips"]


@contextmanager
def watch() -> Iterator[Events]:
    """Count compiles, recordings of CUDA graphs, and runs outside of them."""
    events = Events()
    manager: Any = CUDAGraphTreeManager
    record, warm = manager.record_function, manager.run_eager

    def counted_record(*args: Any, **kwargs: Any) -> Any:
        events.recorded += 1
        return record(*args, **kwargs)

    def counted_warm(*args: Any, **kwargs: Any) -> Any:
        events.without_graph += 1
        return warm(*args, **kwargs)

    manager.record_function, manager.run_eager = counted_record, counted_warm
    try:
        yield events
    finally:
        manager.record_function, manager.run_eager = record, warm


def greedy(work: Workload, kind: str, tokens: int) -> Tensor:
    """Greedy continuation of the workload's first ids by ``tokens`` tokens."""
    work.set_position(0)
    ids, made = work.ids[:, :1], []
    for _ in range(tokens):
        ids = work.step(kind, ids)[:, -1:].argmax(-1)
        made.append(ids.clone())
    return torch.cat(made, 1)


def change_everything(work: Workload, kind: str, times: int) -> dict[str, Any]:
    """Change vectors, rows, scales, globals and captures between replays; each change must be seen, and be undone.

    Returns:
        Counts of compiles, recordings and skips (all of which should be 0), of the changes made, and of those not seen.
    """
    runtime, blind, changes = work.backends[kind].runtime, [], 0

    def logits() -> Tensor:
        work.set_position(0)
        return work.step(kind).clone()

    configs = configurations(work, 2 * times, seed=1000)
    with watch() as events:
        idle = logits()
        for i in range(times):
            first, second = (runtime.register(c) for c in configs[2 * i : 2 * i + 2])
            runtime.assign(first)
            seen = [logits()]
            runtime.assign([second] * work.shape.batch)
            seen.append(logits())
            runtime.set_scale(second, 0.5)
            seen.append(logits())
            runtime.set_scale(second, 0.0)
            scaled_away = logits()
            runtime.assign(None)
            runtime.release(first)
            runtime.release(second)
            runtime.set_global(base=configs[2 * i].base)
            seen.append(logits())
            runtime.clear_global()
            with runtime.capture() as log:
                last = logits()
            changes += 7
            differ = [not torch.equal(a, b) for a, b in zip([idle, *seen], [*seen, idle], strict=True)]
            same = [torch.equal(idle, scaled_away), torch.equal(idle, last), torch.equal(seen[0], seen[3])]
            blind += [i for ok in (*differ, *same, bool(len(log))) if not ok]
    return {"changes": changes, "unseen": len(blind), **events.counts()}


def steering(work: Workload, state: str) -> list[Steering | None]:
    """Configuration of each sequence: none (``idle``), one for all (``active``), or as many as there are (``rows``)."""
    if state == "idle":
        return [None] * work.shape.batch
    configs = configurations(work, 1 if state == "active" else min(256, work.shape.batch))
    return [configs[i % len(configs)] for i in range(work.shape.batch)]
