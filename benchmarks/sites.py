"""GPU time and kernel counts of whole models by op family and lowering, against the same model without this package.

    python -m benchmarks.sites --model 1b
    python -m benchmarks.sites --model 8b --layers 8

Needs a CUDA device. The variants of a shape run interleaved in one process. A variant whose results are not those of
the uncompiled fp32 model with the same data is reported as red, without a number.
"""

from __future__ import annotations

import argparse
import copy
import gc
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import gate, records, timing, turns
from benchmarks.opaque import opaque_sites
from benchmarks.site_kinds import KINDS, Kind, activate
from benchmarks.workload import Shape, Workload, decode_step, forward_step, own_code
from steer_compile import SteerBackend, steer_backend

MODELS = {"1b": (2048, 8192, 16), "8b": (4096, 14336, 32), "tiny": (128, 256, 2)}
SHAPES = {
    1: Shape("decode_1", 1, 1, 128), 8: Shape("decode_8", 8, 1, 128), 64: Shape("decode_64", 64, 1, 128),
    256: Shape("decode_256", 256, 1, 128), 1024: Shape("prefill_1024", 4, 256), 4096: Shape("prefill_4096", 8, 512),
}  # fmt: skip


def build(name: str, layers: int) -> LlamaForCausalLM:
    """A random-weight Llama of the shape ``name``, bf16."""
    width, inner, _ = MODELS[name]
    config = LlamaConfig(
        vocab_size=32000, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=width // 64, num_key_value_heads=max(width // 256, 1), max_position_embeddings=4096,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        return LlamaForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)


def reference_logits(model: Any, kind: Kind, work: Workload, ids: Tensor) -> Tensor:
    """Logits of the uncompiled model with the plain-PyTorch lowering and the same data."""
    backend = steer_backend(replace(kind, lowering="compiler").spec(8192), inner="eager")
    activate(backend.runtime, kind, model.config.num_hidden_layers, model.config.hidden_size)
    torch._dynamo.reset_code(forward_step.__code__)
    step = torch.compile(own_code(forward_step, "reference"), backend=backend, fullgraph=True, dynamic=False)
    return step(model, ids, None)


class Variants:
    """The compiled graphs of one shape."""

    def __init__(self, model: Any, shape: Shape, mode: str | None) -> None:
        self.work = Workload(model, shape, mode)
        self.backends: dict[str, SteerBackend] = {}
        self.red: dict[str, str] = {}

    def compile(self, name: str) -> None:
        work, config = self.work, self.work.model.config
        kind = KINDS.get(name)
        if kind is not None:
            self.backends[name] = steer_backend(kind.spec(max(work.shape.tokens, 4096)))
        function = own_code(decode_step if work.cache is not None else forward_step, f"step_{name}")
        backend: Any = self.backends.get(name, "inductor")
        work.calls[name] = torch.compile(function, backend=backend, mode=work.mode, fullgraph=True, dynamic=False)
        work.set_position(0)
        if kind is not None:
            activate(self.backends[name].runtime, kind, config.num_hidden_layers, config.hidden_size)
        if kind is not None and kind.opaque:
            with opaque_sites():
                work.step(name)
        for _ in range(3):
            work.step(name)
        torch.cuda.synchronize()

    def check(self, wide: Any) -> None:
        """Compare each variant with the fp32 model; the room is that of `benchmarks.gate`."""
        ids = gate.check_ids(self.work)
        seen: dict[object, list[Tensor]] = {}
        for name in self.backends:
            kind = KINDS[name]
            key = (kind.ops, kind.idle, kind.detect)
            if key not in seen:
                models = (wide, self.work.model)
                seen[key] = [reference_logits(model, kind, self.work, ids) for model in models]
            reference, narrow = seen[key]
            out = gate.compiled_logits(self.work, name, ids)
            error, bound = gate.relative(out, reference), gate.relative(narrow, reference)
            lowered = {e.lowering for plan in self.backends[name].plans for e in plan.edits}
            print(f"check {name}: {error:.5f}, uncompiled bf16 {bound:.5f}, lowering {sorted(lowered)}", flush=True)
            if not error <= gate.ROOM * bound:
                self.red[name] = f"logits are off by {error:.4f}, the uncompiled bf16 model's by {bound:.4f}"


def measure(variants: Variants, rounds: int, calls: int) -> dict[str, dict[str, list[float]]]:
    """Kernel time, kernel count and wall clock of every green variant, in a new order each round."""
    work = variants.work
    names = [n for n in work.calls if n not in variants.red]
    samples: dict[str, dict[str, list[float]]] = {
        n: {"kernel": [], "kernels": [], "wall": [], "host": []} for n in names
    }
    order = random.Random(0)
    for _ in range(rounds):
        for name in order.sample(names, len(names)):
            work.set_position(work.shape.cache // 2)
            step = partial(work.step, name)
            step()
            found = timing.kernels(step, calls)
            work.set_position(work.shape.cache // 2)
            wall, host = timing.wall_and_host(step, calls)
            for key, value in (
                ("kernel", found.microseconds),
                ("kernels", found.count),
                ("wall", wall),
                ("host", host),
            ):
                samples[name][key].append(value)
    return samples


def rows(model: str, shape: Shape, mode: str, samples: dict[str, dict[str, list[float]]], red: dict[str, str]) -> Any:
    """One row for each variant: medians, and percent over ``plain`` round by round with quartiles."""
    made = []
    for name, taken in samples.items():
        row: dict[str, Any] = {
            "model": model,
            "tokens": shape.tokens,
            "shape": shape.name,
            "graphs": mode,
            "kind": name,
        }
        for key in ("kernel", "wall", "host"):
            over = timing.percent_over(taken[key], samples["plain"][key])
            row[f"{key}_us"] = round(timing.Spread.of(taken[key]).median, 2)
            row[f"{key}_over_percent"] = round(over.median, 3)
            row[f"{key}_over_quartiles"] = f"{over.low:.3f}..{over.high:.3f}"
        count = timing.Spread.of(taken["kernels"]).median
        row |= {"kernels": count, "extra_kernels": count - timing.Spread.of(samples["plain"]["kernels"]).median}
        made.append({**row, "red": ""})
    empty = dict.fromkeys(made[0], "")
    made += [{**empty, "model": model, "tokens": shape.tokens, "kind": name, "red": why} for name, why in red.items()]
    return made


def show(found: list[dict[str, Any]]) -> None:
    for r in found:
        if r["red"]:
            print(f"{r['tokens']:>5} {r['kind']:<22} RED {r['red']}")
            continue
        print(
            f"{r['tokens']:>5} {r['kind']:<22} kernel {r['kernel_us']:>9.1f} us {r['kernel_over_percent']:+7.2f} % "
            f"({r['kernel_over_quartiles']})  kernels {r['kernels']:.0f} ({r['extra_kernels']:+.0f})  "
            f"wall {r['wall_over_percent']:+7.2f} %", flush=True,
        )  # fmt: skip


def compare(options: argparse.Namespace, tokens: int, where: dict[str, Any]) -> list[dict[str, Any]]:
    """Build, check and measure the variants of one shape."""
    layers = options.layers or MODELS[options.model][2]
    mode = None if options.plain_graphs else "reduce-overhead"
    model = build(options.model, layers)
    variants = Variants(model, SHAPES[tokens], mode)
    start = time.perf_counter()
    for name in ("plain", "plain_again", *options.kinds):
        variants.compile(name)
    print(f"{tokens} tokens: compiled after {time.perf_counter() - start:.0f} s", flush=True)
    variants.check(copy.deepcopy(model).float())
    gc.collect()
    torch.cuda.empty_cache()
    print(f"{tokens} tokens: checked after {time.perf_counter() - start:.0f} s", flush=True)
    with turns.turn(options.turns, options.processes, options.patience):
        samples = measure(variants, options.rounds, options.calls)
        found = rows(f"{options.model}x{layers}", SHAPES[tokens], mode or "none", samples, variants.red)
        show(found)
        where = {**where, "copy_tb_per_s": round(timing.copy_bandwidth(), 3)}
        suffix = "_no_graphs" if options.plain_graphs else ""
        records.merge_csv([{**row, **where} for row in found], options.out / f"sites_{options.model}{suffix}.csv")
    return found


def each_shape(
    options: argparse.Namespace,
    where: dict[str, Any],
    measured: Callable[[argparse.Namespace, int, dict[str, Any]], object],
) -> None:
    """Measure one shape after the other, each with nothing left of the one before."""
    with torch.no_grad():
        for tokens in options.tokens:
            torch._dynamo.reset()
            gc.collect()
            torch.cuda.empty_cache()
            measured(options, tokens, where)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="1b", choices=list(MODELS))
    parser.add_argument("--layers", type=int, default=0, help="default: as many as the model has")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(SHAPES))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--plain-graphs", action="store_true", help="without CUDA graphs")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calls", type=int, default=10)
    turns.add_options(parser)
    options, where = records.begin(parser)
    each_shape(options, where, compare)


if __name__ == "__main__":
    main()
