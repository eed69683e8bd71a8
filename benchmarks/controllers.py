"""Cost of a controller with a probe on the GPU, of the queue and of the status, in decoding under CUDA graphs.

    python -m benchmarks.controllers

A step of the 1B shape at 64 requests, with a controller that scores one captured layer and engages overrides, against
the same compiled graph without it, in turn. Needs a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import records, timing
from benchmarks.sites import SHAPES, build
from benchmarks.workload import Workload, decode_step, own_code
from steer_compile import HookSelection, SteerSpec, steer_backend
from steer_compile.dynamic import Decision, RequestState, RequestView, SetScale, SteeringController, Values
from steer_compile.runtime.rows import PhaseTracker

LAYER, OTHER = 8, 9
NAME = "probe"


class Engage(SteeringController):
    """Adds a vector to requests whose score is above a threshold; the scores of random weights hardly move."""

    def __init__(self, site: str, target: str, width: int) -> None:
        generator = torch.Generator().manual_seed(3)
        super().__init__(NAME, probes={site: torch.randn(width, generator=generator)})
        self._site = site
        self._push = Decision({target: 0.01 * torch.randn(width, generator=generator)})

    def decide(self, request: RequestView, values: Values, state: RequestState) -> Decision | None:
        return self._push if values.score(self._site) > 0 else None


def free_running(work: Workload, name: str, calls: int) -> float:
    """Microseconds of a call where nothing waits between calls but what a controller waits for."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work.step(name)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls * 1e6


def copies(work: Workload, name: str, calls: int) -> float:
    """Copies from the device to the host in a call."""
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        for _ in range(calls):
            work.step(name)
        torch.cuda.synchronize()
    found = [e for e in profiler.profiler.kineto_results.events() if "DtoH" in e.name()]
    return len(found) / calls


def submit_microseconds(runtime: Any, count: int = 500) -> float:
    """Microseconds of one `submit`; the queue is drained between rounds."""
    rounds = []
    for _ in range(20):
        action = SetScale(0.5)
        start = time.perf_counter()
        for _ in range(count):
            runtime.dynamic.submit(action)
        rounds.append((time.perf_counter() - start) / count)
        runtime.dynamic.queue.drain()
    return statistics.median(rounds) * 1e6


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=20)
    options, where = records.begin(parser)
    model = build("1b", 16)
    work = Workload(model, SHAPES[options.tokens], "reduce-overhead")
    spec = SteerSpec(
        steer=("post_attn", "post_block"), capture=[HookSelection("post_block", [LAYER])], rows=8,
        overrides=options.tokens, max_tokens=4096,
    )  # fmt: skip
    backend = steer_backend(spec)
    work.calls["steered"] = torch.compile(
        own_code(decode_step, "step_controlled"), backend=backend, mode=work.mode, fullgraph=True, dynamic=False
    )
    runtime = backend.runtime
    runtime.phases = PhaseTracker(told="decode")
    controller = Engage(f"layers.{LAYER}.post_block", f"layers.{OTHER}.post_block", model.config.hidden_size)
    taken: dict[tuple[str, str], list[float]] = {}
    with torch.no_grad():
        work.set_position(0)
        for _ in range(4):
            work.step("steered")
        runtime.dynamic  # noqa: B018  (from here on calls are steps of it)
        for _ in range(options.rounds):
            for variant in ("without", "with"):
                if variant == "with":
                    runtime.dynamic.add(controller)
                work.set_position(work.shape.cache // 2)
                for _ in range(4):  # overrides are installed
                    work.step("steered")
                wall, host = timing.wall_and_host(partial(work.step, "steered"), options.calls)
                found = {"wall": wall, "host": host, "free": free_running(work, "steered", options.calls)}
                found["kernel"] = timing.kernels(partial(work.step, "steered"), 5).microseconds
                found["copies"] = copies(work, "steered", 5)
                for name, value in found.items():
                    taken.setdefault((variant, name), []).append(value)
                status = runtime.dynamic.status()
                if variant == "with":
                    runtime.dynamic.remove(NAME)
    medians = {f"{variant}_{name}": round(statistics.median(v), 2) for (variant, name), v in taken.items()}
    more = [a - b for a, b in zip(taken["with", "wall"], taken["without", "wall"], strict=True)]
    spread = timing.Spread.of(more)
    row = {
        "tokens": options.tokens, **medians, "controller_wall_us": round(spread.median, 2),
        "controller_wall_quartiles": f"{spread.low:.1f}..{spread.high:.1f}",
        "submit_us": round(submit_microseconds(runtime), 3),
        "status_us": round(timing.host_microseconds(runtime.dynamic.status, 200), 1),
        "overrides": status["overrides"]["in_use"], **where,
    }  # fmt: skip
    print(json.dumps(row), flush=True)
    records.write_csv([row], options.out / "controllers.csv")


if __name__ == "__main__":
    main()
