"""GPU time of steering and capturing parallel residual streams, against the same model without this package.

    python -m benchmarks.streams

A DeepSeek-V4 of random weights: 4 layers of all its kinds of attention, 4096 wide, 4 streams, 16 experts of which a
token takes 6. Needs a CUDA device. The variants of a shape run interleaved in one process. A variant whose logits or
captures are not those of the fp32 model with the same vectors is red.
"""

from __future__ import annotations

import argparse
import copy
import gc
import time
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM

from benchmarks import gate, records, sites, timing, turns
from benchmarks.workload import Shape, Workload, forward_step, own_code
from steer_compile import SteerBackend, Steering, SteerSpec, steer_backend
from steer_compile.hooks import COEFFICIENT_HOOKS, MULTI_STREAM_HOOKS
from steer_compile.runtime.rows import PhaseTracker

STREAMS, LAYERS = 4, 4
SHAPES = {64: Shape("tokens_64", 4, 16), 4096: Shape("prefill_4096", 8, 512)}
KINDS: dict[str, tuple[bool, bool, str]] = {
    "steer": (True, False, "auto"),
    "capture": (False, True, "auto"),
    "both": (True, True, "auto"),
    "both_compiler": (True, True, "compiler"),
    "both_template": (True, True, "template"),
}
"""Whether all ``mhc_streams_*`` hooks are steered, whether all ``mhc_*`` hooks are captured, and the lowering."""


def build(width: int) -> DeepseekV4ForCausalLM:
    """The model in bf16, with noise in what is initialised to constants."""
    config = DeepseekV4Config(
        vocab_size=32000, hidden_size=width, num_hidden_layers=LAYERS, hc_mult=STREAMS, n_routed_experts=16,
        num_attention_heads=width // 64, head_dim=128, moe_intermediate_size=width // 2, max_position_embeddings=4096,
        q_lora_rank=width // 4, o_lora_rank=width // 4, index_n_heads=8, index_topk=64, index_head_dim=64,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention",
                     "sliding_attention"],
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = DeepseekV4ForCausalLM(config).to(torch.bfloat16).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "_hc." in name or "hc_head" in name:
            weight.add_(0.02 * torch.randn_like(weight))
    return model


def spec_of(kind: str, max_tokens: int) -> SteerSpec:
    """The spec of a kind."""
    steers, captures, lowering = KINDS[kind]
    return SteerSpec(
        steer=MULTI_STREAM_HOOKS if steers else (),
        capture=(*MULTI_STREAM_HOOKS, *COEFFICIENT_HOOKS) if captures else (),
        rows=8, max_tokens=max_tokens, lowering=lowering,
    )  # fmt: skip


def activate(runtime: Any, kind: str, width: int) -> None:
    """A vector on all streams of every site."""
    runtime.phases = PhaseTracker(told="decode")
    if not KINDS[kind][0]:
        return
    generator = torch.Generator().manual_seed(7)
    wanted = [(hook, n) for hook in MULTI_STREAM_HOOKS[:2] for n in range(LAYERS)]
    wanted.append((MULTI_STREAM_HOOKS[2], LAYERS - 1))
    vectors = {site: 0.02 * torch.randn(STREAMS * width, generator=generator) for site in wanted}
    runtime.assign(runtime.register(Steering(vectors)))


class Variants:
    """The compiled graphs of one shape."""

    def __init__(self, model: Any, shape: Shape) -> None:
        self.work = Workload(model, shape, "reduce-overhead")
        self.backends: dict[str, SteerBackend] = {}
        self.red: dict[str, str] = {}

    def compile(self, name: str) -> None:
        work = self.work
        if name in KINDS:
            self.backends[name] = steer_backend(spec_of(name, work.shape.tokens))
        backend: Any = self.backends.get(name, "inductor")
        function = own_code(forward_step, f"step_{name}")
        work.calls[name] = torch.compile(function, backend=backend, mode=work.mode, fullgraph=True, dynamic=False)
        if name in KINDS:
            activate(self.backends[name].runtime, name, work.model.config.hidden_size)
        for _ in range(3):
            work.step(name)
        torch.cuda.synchronize()

    def check(self) -> None:
        """Logits and captures against the fp32 model's with the same vectors."""
        wide = copy.deepcopy(self.work.model).float()
        for name, backend in self.backends.items():
            reference, exact = uncompiled(wide, name, self.work)
            narrow, stored = uncompiled(self.work.model, name, self.work)
            out, captured = self._run(name, backend)
            error, bound = gate.relative(out, reference), gate.relative(narrow, reference)
            apart = max((gate.relative(captured[s], v) for s, v in exact.items()), default=0.0)
            room = max((gate.relative(stored[s], v) for s, v in exact.items()), default=0.0)
            lowered = sorted({e.lowering for plan in backend.plans for e in plan.edits})
            errors = f"{error:.5f}, uncompiled bf16 {bound:.5f}, captures {apart:.5f}, uncompiled bf16 {room:.5f}"
            print(f"check {name}: {errors}, lowering {lowered}", flush=True)
            if not error <= gate.ROOM * bound:
                self.red[name] = f"logits are off by {error:.4f}, the uncompiled bf16 model's by {bound:.4f}"
            if not apart <= gate.ROOM * room:
                self.red[name] = f"captures are off by {apart:.4f}, the uncompiled bf16 model's by {room:.4f}"

    def _run(self, name: str, backend: SteerBackend) -> tuple[Tensor, dict[Any, Tensor]]:
        if not KINDS[name][1]:
            return self.work.step(name).clone(), {}
        with backend.runtime.capture() as log:
            out = self.work.step(name).clone()
        return out, {site: log[site] for site in log}


def uncompiled(model: Any, kind: str, work: Workload) -> tuple[Tensor, dict[Any, Tensor]]:
    """Logits and captures of the model's operators one by one, with the plain-PyTorch lowering."""
    backend = steer_backend(spec_of(kind, work.shape.tokens), inner="eager")
    activate(backend.runtime, kind, model.config.hidden_size)
    step = torch.compile(own_code(forward_step, f"reference_{kind}"), backend=backend, fullgraph=True, dynamic=False)
    if not KINDS[kind][1]:
        return step(model, work.ids, None), {}
    with backend.runtime.capture() as log:
        out = step(model, work.ids, None)
    return out, {site: log[site].clone() for site in log}


def compare(options: argparse.Namespace, tokens: int, where: dict[str, Any]) -> None:
    """Build, check and measure the variants of one shape."""
    model, shape, start = build(options.width), SHAPES[tokens], time.perf_counter()
    variants = Variants(model, shape)
    for name in ("plain", "plain_again", *options.kinds):
        variants.compile(name)
    print(f"{tokens} tokens: compiled after {time.perf_counter() - start:.0f} s", flush=True)
    variants.check()
    gc.collect()
    torch.cuda.empty_cache()
    print(f"{tokens} tokens: checked after {time.perf_counter() - start:.0f} s", flush=True)
    with turns.turn(options.turns, options.processes, options.patience):
        samples = sites.measure(variants, options.rounds, options.calls)  # type: ignore[arg-type]
        found = sites.rows(f"deepseek_v4x{LAYERS}", shape, "reduce-overhead", samples, variants.red)
        sites.show(found)
        where = {**where, "copy_tb_per_s": round(timing.copy_bandwidth(), 3)}
        records.merge_csv([{**row, **where} for row in found], options.out / "streams.csv")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="*", default=list(SHAPES))
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--calls", type=int, default=6)
    turns.add_options(parser)
    options, where = records.begin(parser)
    sites.each_shape(options, where, compare)


if __name__ == "__main__":
    main()
