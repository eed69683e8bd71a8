"""Correctness in front of every number: compiled steering and capture against forward hooks in fp32.

The reference is the same model in fp32, uncompiled, with the same edits made by hooks. A bf16 model cannot agree with
it exactly, so the compiled model is held to the error that the uncompiled bf16 model with the same hooks has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.workload import Workload, configurations
from steer_compile import Handle, Steering

ROOM = 1.25
"""The compiled error may be this many times the hooks' own bf16 error."""
VISIBLE = 5.0
"""Steering must move the logits by this many times the compiled error."""
STEPS = 3
"""Decode steps of a check."""


@dataclass(frozen=True)
class Gate:
    """Outcome of one check. Errors are ``|out - reference| / |reference|`` over all logits (or captured values)."""

    shape: str
    check: str
    compiled_error: float
    hooks_error: float
    effect: float
    green: bool

    def row(self) -> dict[str, Any]:
        return asdict(self)


def relative(out: Tensor, reference: Tensor) -> float:
    if out.shape != reference.shape:
        raise ValueError(f"shapes {tuple(out.shape)} and {tuple(reference.shape)} differ")
    return float((out.double() - reference.double()).norm() / reference.double().norm())


@contextmanager
def hooks(model: Any, edits: Mapping[tuple[str, int], Tensor], stored: list[Tensor] | None = None) -> Iterator[None]:
    """Add ``edits`` (broadcast over tokens) by forward hooks; ``stored`` collects what each block gives before that."""

    def at_attention(edit: Tensor) -> Any:
        return lambda module, inputs, output: (output[0] + edit.to(output[0].dtype), *output[1:])

    def at_block(edit: Tensor | None) -> Any:
        def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
            if stored is not None:
                stored.append(output.clone())
            return output if edit is None else output + edit.to(output.dtype)

        return hook

    handles = []
    for n, layer in enumerate(model.model.layers):
        if ("post_attn", n) in edits:
            handles.append(layer.self_attn.register_forward_hook(at_attention(edits["post_attn", n])))
        handles.append(layer.register_forward_hook(at_block(edits.get(("post_block", n)))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def edits_of(configs: list[Steering], batch: int, device: torch.device) -> dict[tuple[str, int], Tensor]:
    """Edit of each site, ``(batch, 1, width)`` or one for all."""
    sites = [key for key, _ in configs[0].base.items()]
    rows = [dict(c.base.items()) for c in configs]
    return {key: torch.stack([rows[i % len(rows)][key] for i in range(batch)])[:, None].to(device) for key in sites}


def compiled_logits(work: Workload, kind: str, ids: Tensor) -> Tensor:
    """Logits of the last token of ``ids`` (batch, steps or length), step by step where there is a cache."""
    work.set_position(0)
    if work.cache is None:
        return work.step(kind, ids).clone()
    for t in range(ids.shape[1]):
        logits = work.step(kind, ids[:, t : t + 1].contiguous())
    return logits.clone()


def check_steering(work: Workload, wide: Any, kind: str, count: int) -> Gate:
    """Logits with ``count`` distinct configurations over the batch, on CUDA graph replays."""
    ids, runtime = check_ids(work), work.backends[kind].runtime
    configs = configurations(work, count)
    idle = compiled_logits(work, kind, ids)
    handles = [runtime.register(c) for c in configs]
    runtime.assign([handles[i % count] for i in range(work.shape.batch)])
    steered = compiled_logits(work, kind, ids)
    drop(work, kind, handles)
    back = compiled_logits(work, kind, ids)
    edits = edits_of(configs, work.shape.batch, work.device)
    with hooks(wide, edits):
        reference = wide(ids, use_cache=False, logits_to_keep=1).logits
    with hooks(work.model, edits):
        narrow = work.model(ids, use_cache=False, logits_to_keep=1).logits
    error, bound, effect = relative(steered, reference), relative(narrow, reference), relative(steered, idle)
    green = error <= ROOM * bound and effect >= VISIBLE * error and torch.equal(idle, back)
    return Gate(work.shape.name, f"{kind}, {count} configurations", error, bound, effect, green)


def check_capture(work: Workload, wide: Any, kind: str) -> Gate:
    """Captured values of every block, steered where the graph steers: a capture is taken before the steer."""
    ids, runtime = check_ids(work)[:, : work.shape.length], work.backends[kind].runtime
    configs = configurations(work, 1) if kind.startswith("steer") else []
    handles = [runtime.register(c) for c in configs]
    runtime.assign(handles[0] if handles else None)
    with runtime.capture() as log:
        compiled_logits(work, kind, ids)
    runtime.assign(None)
    drop(work, kind, handles)
    out = torch.stack([log["post_block", n] for n in range(len(work.model.model.layers))])
    edits = edits_of(configs, 1, work.device) if configs else {}
    found: dict[str, Tensor] = {}
    for name, model in {"wide": wide, "narrow": work.model}.items():
        stored: list[Tensor] = []
        with hooks(model, edits, stored):
            model(ids, use_cache=False, logits_to_keep=1)
        found[name] = torch.stack(stored)
    error, bound = relative(out, found["wide"]), relative(found["narrow"], found["wide"])
    green = error <= ROOM * bound
    return Gate(work.shape.name, f"{kind}, captured post_block", error, bound, 0.0, green)


def drop(work: Workload, kind: str, handles: list[Handle]) -> None:
    """Nobody is steered again."""
    runtime = work.backends[kind].runtime
    runtime.assign(None)
    for handle in handles:
        runtime.release(handle)


def check_ids(work: Workload) -> Tensor:
    """Ids of a check: the workload's own, or as many decode steps as a check takes."""
    if work.cache is None:
        return work.ids
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(work.model.config.vocab_size, (work.shape.batch, STEPS), generator=generator)
    return ids.to(work.device)


def gates(work: Workload, wide: Any) -> list[Gate]:
    """Every check of a shape."""
    checks = []
    for kind in work.backends:
        if kind.startswith("steer"):
            checks.append(check_steering(work, wide, kind, 1))
            if work.shape.batch > 1:
                checks.append(check_steering(work, wide, kind, work.shape.batch))
        if "capture" in kind:
            checks.append(check_capture(work, wide, kind))
    return checks
