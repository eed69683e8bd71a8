"""End-to-end cost of steering and capture in a compiled Llama under CUDA graphs. See docs/performance.md.

    python -m benchmarks.overhead

Needs a CUDA device. All variants of a shape run interleaved in one process; no overhead is printed before the
correctness checks of its shape are green.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import random
import sys
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import changes, claims, gate, records, timing
from benchmarks.workload import KINDS, SHAPES, Shape, Workload, build_model
from steer_compile import Handle

VARIANTS = {
    "plain": ("plain", "idle"),
    "plain_again": ("plain_again", "idle"),
    "idle": ("steer", "idle"),
    "active": ("steer", "active"),
    "rows": ("steer", "rows"),
    "capture": ("capture", "idle"),
    "steer_capture": ("steer_capture", "active"),
}
"""Variant -> graph kind and what is active in it."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    rounds: int
    calls: int
    greedy: int
    changes: int


class Measurement:
    """The rounds of one shape."""

    def __init__(self, work: Workload, plan: Plan) -> None:
        self.work, self.plan = work, plan
        known = [v for v, (kind, state) in VARIANTS.items() if kind in work.calls]
        self.variants = [v for v in known if v != "rows" or work.shape.batch > 1]
        self.handles: dict[str, list[Handle]] = {}
        self.samples: dict[str, dict[str, list[float]]] = {
            v: {q: [] for q in ("kernel", "generated", "kernels", "wall", "host")} for v in self.variants
        }
        self.names: dict[str, Counter[str]] = {}

    def _enter(self, variant: str) -> str:
        """Set what is active and run one call that is not measured."""
        kind, state = VARIANTS[variant]
        if kind in self.work.backends and state != "idle":
            runtime = self.work.backends[kind].runtime
            if variant not in self.handles:
                made = {id(c): c for c in changes.steering(self.work, state) if c is not None}
                self.handles[variant] = [runtime.register(c) for c in made.values()]
            live = self.handles[variant]
            runtime.assign([live[i % len(live)] for i in range(self.work.shape.batch)])
        elif kind in self.work.backends:
            self.work.backends[kind].runtime.assign(None)
        self._rewind()
        self.work.step(kind)
        return kind

    def _rewind(self) -> None:
        self.work.set_position(self.work.shape.cache // 2)

    def run(self) -> None:
        """All rounds, the variants in a new order each round."""
        order = random.Random(0)
        for _ in range(self.plan.rounds):
            for variant in order.sample(self.variants, len(self.variants)):
                kind = self._enter(variant)
                step = partial(self.work.step, kind)
                found = timing.kernels(step, self.plan.calls)
                self._rewind()
                wall, host = timing.wall_and_host(step, self.plan.calls)
                self.names[variant] = found.names
                taken = {"kernel": found.microseconds, "generated": found.generated, "kernels": found.count}
                taken |= {"wall": wall, "host": host}
                for name, value in taken.items():
                    self.samples[variant][name].append(value)
        for variant, live in self.handles.items():
            gate.drop(self.work, VARIANTS[variant][0], live)

    def different_kernels(self) -> dict[str, dict[str, list[str]]]:
        """Kernels of each variant that plain has not, and the reverse."""
        plain = self.names["plain"]
        found = {}
        for variant, names in self.names.items():
            found[variant] = {"only_here": sorted(names - plain), "only_in_plain": sorted(plain - names)}
        return found

    def wrapper_costs(self) -> dict[str, float]:
        """Microseconds a call that the wrapper around each compiled graph spends on the host."""
        found = {}
        shape = self.work.shape
        for kind, backend in self.work.backends.items():
            runtime = backend.runtime

            def around(runtime: Any = runtime) -> None:
                runtime.before_call(0, shape.batch, shape.length)
                runtime.after_call(())

            found[kind] = round(timing.host_microseconds(around), 3)
        return found


def measure_shape(model: Any, wide: Any, shape: Shape, kinds: list[str], plan: Plan) -> dict[str, Any]:
    """Compile, check and measure one shape.

    Raises:
        SystemExit: a correctness check is red.
    """
    print(f"== {shape.name}: {shape.text}", flush=True)
    work = Workload(model, shape, "reduce-overhead")
    shift = list(SHAPES).index(shape.name) % len(kinds)
    with changes.watch() as compiled:
        for kind in [*kinds[shift:], *kinds[:shift]]:
            work.compile(kind)
    print(f"compile seconds {json.dumps({k: round(v, 1) for k, v in work.compile_seconds.items()})}", compiled.counts())
    checks = gate.gates(work, wide)
    for check in checks:
        print("gate", json.dumps(check.row()), flush=True)
    if not all(check.green for check in checks) or compiled.recorded < len(kinds) or compiled.skipped:
        sys.exit(f"{shape.name}: a correctness check is red, so no overhead is measured")
    result: dict[str, Any] = {
        "shape": shape.name, "text": shape.text, "tokens": shape.tokens, "batch": shape.batch,
        "compile_seconds": work.compile_seconds, "gate": [check.row() for check in checks],
    }  # fmt: skip
    if shape.cache > plan.greedy and "steer" in kinds:
        plain, idle = (changes.greedy(work, kind, plan.greedy) for kind in ("plain", "steer"))
        result["greedy"] = {"tokens": plan.greedy, "same": int((plain == idle).all(0).sum())}
    if "steer_capture" in kinds:
        result["changes"] = {"steer_capture": changes.change_everything(work, "steer_capture", plan.changes)}
    measurement = Measurement(work, plan)
    with changes.watch() as events:
        measurement.run()
    result |= {"samples": measurement.samples, "different_kernels": measurement.different_kernels()}
    result["events"] = events.counts()
    result["host"] = measurement.wrapper_costs()
    return result


def write(results: dict[str, Any], where: dict[str, Any], command: str, out: Path) -> None:
    """Write the csv, the json and the summary; shapes of earlier runs that were not measured again stay."""
    path = out / "overhead.json"
    old = json.loads(path.read_text())["shapes"] if path.exists() else {}
    new = {name: {**shape, "environment": where, "command": command} for name, shape in results.items()}
    merged = {name: (old | new)[name] for name in SHAPES if name in old | new}
    records.write_csv([row for shape in merged.values() for row in claims.table(shape)], out / "overhead.csv")
    path.write_text(json.dumps({"environment": where, "command": command, "shapes": merged}, indent=1) + "\n")
    found = [c for shape in merged.values() for c in claims.shape_claims(shape)]
    found += claims.compile_claims(merged)
    bandwidth = where["copy_tb_per_s"]
    found.append(records.claim("device-to-device copy, bytes read and written", "none, a reference", bandwidth, "TB/s"))
    records.update_summary(found, where, command, out / "summary.json")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=KINDS)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--calls", type=int, default=20, help="calls of a variant in each round")
    parser.add_argument("--changes", type=int, default=8, help="how often everything is changed between replays")
    parser.add_argument("--commit", default=None, help="commit to write into the results (default: asks git)")
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("the overhead benchmark needs a CUDA device")
    device = torch.device("cuda")
    plan = Plan(options.rounds, options.calls, 256, options.changes)
    where = {**records.environment(options.commit), "copy_tb_per_s": round(timing.copy_bandwidth(), 3)}
    print(json.dumps(where), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    command = "python -m benchmarks.overhead" + (
        f" --shapes {' '.join(options.shapes)}" if len(options.shapes) < len(SHAPES) else ""
    )
    with torch.no_grad():
        Workload(build_model(1, device, tiny=True), SHAPES["decode_1"], None).compile("plain")
        model = build_model(options.layers, device)
        wide = copy.deepcopy(model).float()
        for name in options.shapes:
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            result = measure_shape(model, wide, SHAPES[name], options.kinds, plan)
            write({name: result}, where, command, options.out)
            print(claims.text_table(claims.table(result)), flush=True)


if __name__ == "__main__":
    main()
