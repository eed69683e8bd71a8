"""Activation patching of every layer and position: compiled and batched, against forward hooks in eager mode.

    python -m benchmarks.patch_sweep

Hooks are used as people use them, one cell in a forward, and in the same batches as the compiled sweep. All of them
run every cell; the compiled sweep is timed with its rule as well that a cell whose value is equal in both runs needs no
forward. On a CPU that others use too, ``OMP_WAIT_POLICY=PASSIVE`` keeps threads from spinning, which would measure the
others; the record says so. The four take turns, round by round.
Compile time is apart. ``--device cuda`` runs it on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import records
from benchmarks.timing import Spread
from steer_compile.sweep import Question, Sweeper
from steer_compile.sweep.run import last_logits_options

CLEAN, CORRUPTED = "with open(path) as f:\n    data = ", "with open(path) as g:\n    data = "
GOAL = ">= 5 x"
Cells = dict[tuple[int, int], float]
VARIANTS = ("hooks_one", "hooks_batched", "compiled_every", "compiled")


def models(device: str) -> dict[str, nn.Module]:
    """The demo model, and a tiny one of random weights on which the cost of a call is what counts."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    folder = Path(__file__).parents[1] / "models" / "demo"
    demo = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sizes = {"vocab_size": 258, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 4}
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    found = {"the demo model (8 layers, width 256)": demo, "a tiny Llama (4 layers, width 64)": tiny}
    return {name: model.eval().requires_grad_(False).to(device) for name, model in found.items()}


class Hooks:
    """The sweep of post_block by forward hooks of an eager model."""

    def __init__(self, model: Any, question: Question, device: str) -> None:
        self.model, self.question, self.device = model, question, device
        self.blocks = list(model.model.layers)
        self.options = last_logits_options(model)

    def _logits(self, ids: tuple[int, ...], batch: int) -> Tensor:
        tokens = torch.tensor([ids] * batch, device=self.device)
        logits: Tensor = self.model(tokens, **self.options).logits
        return logits[:, -1]

    def clean(self) -> tuple[list[Tensor], float, float]:
        """The clean values (tokens, width) of each layer, and both measures."""
        seen: list[Tensor] = []
        handles = [b.register_forward_hook(lambda m, a, out: seen.append(out[0].clone())) for b in self.blocks]
        clean = self.question.measured(self._logits(self.question.clean, 1))[0]
        for handle in handles:
            handle.remove()
        return seen, clean, self.question.measured(self._logits(self.question.corrupted, 1))[0]

    def sweep(self, batch: int) -> Cells:
        """Every cell, in forwards of ``batch`` of them."""
        rows, clean, corrupted = self.clean()
        length, found = len(self.question.clean), {}
        places = [(layer, position) for layer in range(len(self.blocks)) for position in range(length)]
        for at in range(0, len(places), batch):
            some = places[at : at + batch]
            by_layer: dict[int, list[tuple[int, int]]] = {}
            for element, (layer, position) in enumerate(some):
                by_layer.setdefault(layer, []).append((element, position))
            handles = [
                self.blocks[layer].register_forward_hook(_put(rows[layer], cells)) for layer, cells in by_layer.items()
            ]
            measured = self.question.measured(self._logits(self.question.corrupted, len(some)))
            for handle in handles:
                handle.remove()
            values = (self.question.value(m, clean, corrupted) for m in measured)
            found |= dict(zip(some, values, strict=True))
        return found


def _put(rows: Tensor, cells: list[tuple[int, int]]) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        for element, position in cells:
            output[element, position] = rows[position]
        return output

    return hook


def measure(model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each variant by round, the compile time, and how far the numbers are from those of single hooks."""
    encode = [(256, *text.encode()) for text in (CLEAN, CORRUPTED)]
    question = Question(encode[0], encode[1], ord("f"), ord("g"), "logit_diff")
    torch.compiler.reset()
    hooks = Hooks(model, question, options.device)
    sweeper = Sweeper(model, len(question.clean), batch=options.batch)

    def compiled(every: bool) -> Cells:
        return {(cell.layer, cell.position): cell.value for cell in sweeper.run(question, every=every)}

    start = time.perf_counter()
    compiled(True)
    first = time.perf_counter() - start
    runs: dict[str, Callable[[], Cells]] = {
        "hooks_one": lambda: hooks.sweep(1),
        "hooks_batched": lambda: hooks.sweep(options.batch),
        "compiled_every": lambda: compiled(True),
        "compiled": lambda: compiled(False),
    }
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    cells: dict[str, Cells] = {}
    for _ in range(options.rounds + 1):  # the first round warms up
        for name in VARIANTS:
            start = time.perf_counter()
            cells[name] = runs[name]()
            seconds[name].append(time.perf_counter() - start)
    exact = cells["hooks_one"]
    apart = max(abs(cells[name][place] - value) for name in VARIANTS for place, value in exact.items())
    found = {name: values[1:] for name, values in seconds.items()}
    extra = first - Spread.of(found["compiled_every"]).median
    return {"seconds": found, "compile": extra, "apart": apart, "cells": len(exact)}


def claims(name: str, taken: dict[str, Any], batch: int) -> list[dict[str, Any]]:
    """Summary records of one model."""
    seconds, made = taken["seconds"], []
    pairs = (
        ("compiled", "hooks_one", GOAL, "cells equal in both runs left out, against hooks one cell at a time"),
        ("compiled_every", "hooks_one", "none, beside it", "every cell run, against hooks one cell at a time"),
        ("compiled_every", "hooks_batched", "none, beside it", f"every cell run, against hooks in batches of {batch}"),
    )
    for variant, base, goal, what in pairs:
        ratios = Spread.of([b / v for v, b in zip(seconds[variant], seconds[base], strict=True)])
        medians = [Spread.of(seconds[key]).median for key in (variant, base)]
        spread = (
            f"quartiles {ratios.low:.2f} to {ratios.high:.2f} over {len(seconds[base])} rounds; "
            f"{medians[0]:.3f} s against {medians[1]:.3f} s for {taken['cells']} cells"
        )
        made.append(records.claim(f"patch sweep, {what}, {name}", goal, ratios.median, "x faster", spread=spread))
    made.append(records.claim(f"patch sweep, compile time, {name}", "none, once", taken["compile"], "s"))
    text = f"patch sweep, largest difference of a logit difference from hooks one cell at a time, {name}"
    made.append(records.claim(text, "<= 1000", 1e6 * taken["apart"], "1e-6 of a logit"))
    return made


def processor(device: str) -> str:
    """The GPU, or the CPU's model and the threads that torch takes of it."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    waits = os.environ.get("OMP_WAIT_POLICY", "").lower()
    return f"CPU: {named or platform.machine()}, {torch.get_num_threads()} threads{waits and f', {waits} waits'}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--commit", default=None)
    parser.add_argument("--summary", type=Path, default=records.SUMMARY)
    options = parser.parse_args()
    where = {**records.environment(options.commit), "card": processor(options.device)}
    print(json.dumps(where), flush=True)
    found, place = [], "the CPU" if options.device == "cpu" else "a GPU"
    with torch.no_grad():
        for name, model in models(options.device).items():
            found += claims(f"{name}, on {place}", measure(model, options), options.batch)
    for each in found:
        print(json.dumps(each), flush=True)
    device = "" if options.device == "cpu" else f" --device {options.device}"
    records.update_summary(found, where, f"python -m benchmarks.patch_sweep{device}", options.summary)


if __name__ == "__main__":
    main()
