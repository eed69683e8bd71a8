"""One row of the coverage table: what the finder and the splice do on one model type, against forward hooks."""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from steer_compile import torch_compat
from steer_compile.backend import SteerBackend, steer_backend
from steer_compile.coverage.oracle import Reference, edit_block_output, logits_of, reference_states
from steer_compile.coverage.zoo import class_name, tiny_inputs, tiny_model
from steer_compile.errors import SteerError
from steer_compile.spec import SteerSpec

TOLERANCE = 2e-4
"""Largest difference relative to the largest value. fp32 with other orders of summation in the two programs."""


@dataclass
class Record:
    """One model type. The columns are True, False or None (not reached)."""

    type: str
    cls: str
    compiles: bool | None = None
    sites: bool | None = None
    capture: bool | None = None
    steer: bool | None = None
    idle: bool | None = None
    layers: int = 0
    graphs: int = 0
    reason: str = ""
    broken: str = ""

    @property
    def passed(self) -> bool:
        return all((self.compiles, self.sites, self.capture, self.steer, self.idle))

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        del fields["broken"]
        return fields


def close(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal within `TOLERANCE` of the larger tensor's largest value; False for other shapes and NaN."""
    if left.shape != right.shape:
        return False
    scale = max(float(right.abs().max()), 1e-6)
    return bool((left - right).abs().max() <= TOLERANCE * scale)


def check_type(model_type: str, inner: str = "eager") -> Record:
    """Fill the record of one type. Never raises for a model that does not work: the reason says why."""
    record = Record(model_type, class_name(model_type))
    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            _check(record, inner)
        except SteerError as error:
            record.reason = record.reason or f"{type(error).__name__}: {error}"
        except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
            first = str(error).strip().splitlines()
            record.reason = record.reason or f"{type(error).__name__}: {first[0] if first else ''}"
    if record.reason and record.broken:
        record.reason += f" (graph break: {record.broken})"
    return record


def _check(record: Record, inner: str) -> None:
    watched = tiny_model(record.type)
    inputs = tiny_inputs(watched, record.type)
    reference = reference_states(watched, inputs)
    # A model of its own: reading hidden_states leaves hooks behind that Dynamo cannot trace.
    model = tiny_model(record.type)
    base, broken = _plain(model, inputs, inner)
    record.broken = broken
    record.compiles = close(base, reference.logits)
    if not record.compiles:
        record.reason = "the compiled model's logits differ from eager without any steering"
    tokens = reference.logits.shape[0] * reference.post[0].shape[-2] * 8
    multi = reference.post[0].dim() == 4 and reference.post[0].shape[0] == reference.logits.shape[0]
    hooks = ("mhc_streams_pre_attn", "mhc_streams_final") if multi else ("pre_attn", "post_block")
    spec = SteerSpec(steer=hooks, capture=hooks, rows=2, max_tokens=max(1024, tokens))
    backend = steer_backend(spec, inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=not broken)
    record.sites = False
    with backend.runtime.capture() as log:
        idle = logits_of(compiled(**inputs))
    record.layers, record.graphs = backend.sites.n_layers, len(backend.plans)
    record.idle = bool(torch.equal(idle, base))
    if backend.sites.n_layers != len(reference.post):
        record.reason = f"{backend.sites.n_layers} blocks found, the model runs {len(reference.post)}"
        return
    record.sites = True
    record.capture = _captures_match(record, log, reference)
    record.steer = _steers(record, watched, inputs, backend, compiled)


def _plain(model: torch.nn.Module, inputs: dict[str, Any], inner: str) -> tuple[torch.Tensor, str]:
    """Logits of the compiled model without steering, and why it is not one graph; such models compile in parts."""
    broken = ""
    try:
        logits = logits_of(torch.compile(model, backend=inner, fullgraph=True)(**inputs))
    except torch_compat.DynamoError as error:
        broken = str(error).strip().splitlines()[0]
        torch.compiler.reset()
        logits = logits_of(torch.compile(model, backend=inner)(**inputs))
    torch.compiler.reset()
    return logits, broken


def _captures_match(record: Record, log: Any, reference: Reference) -> bool:
    last = len(reference.post) - 1
    wanted = [
        ((hook, layer), value)
        for hook in ("pre_attn", "mhc_streams_pre_attn")
        for layer, value in enumerate(reference.pre)
    ]
    wanted += [(("post_block", layer), value) for layer, value in enumerate(reference.post)]
    wanted.append((("mhc_streams_final", last), reference.post[last]))
    captured = set(log)
    for site, value in wanted:
        if site not in captured:
            continue
        got = log[site]
        fits = value if value.shape[:2] == got.shape[:2] or value.dim() != 3 else value.transpose(0, 1)
        if not close(got, fits.flatten(2) if fits.dim() == 4 else fits):
            shapes = f"shape {tuple(value.shape)}, got {tuple(got.shape)}"
            record.reason = f"layers.{site[1]}.{site[0]} differs from the forward hook's value ({shapes})"
            return False
    return len(captured) >= len(reference.post)


def _steers(
    record: Record, model: torch.nn.Module, inputs: dict[str, Any], backend: SteerBackend, compiled: Any
) -> bool:
    layer = backend.sites.n_layers // 2
    site = ("post_block", layer)
    if backend.runtime.tables.width(site) is None:  # parallel streams: what leaves a block enters the next
        site = ("mhc_streams_pre_attn", layer + 1)
    width = backend.runtime.tables.width(site) or 0
    vector = torch.randn(width, generator=torch.Generator().manual_seed(7))
    with edit_block_output(
        model, layer, lambda value: value + vector.view(value.shape[2:] if value.dim() == 4 else -1), inputs=inputs
    ):
        wanted = logits_of(model(**inputs))
    with backend.runtime.steer({site: vector}):
        got = logits_of(compiled(**inputs))
    if not close(got, wanted):
        record.reason = f"steering layers.{site[1]}.{site[0]} differs from the same edit by forward hook"
        return False
    unsteered = logits_of(compiled(**inputs))
    if close(got, unsteered):
        record.reason = f"steering layers.{site[1]}.{site[0]} does not move the logits"
        return False
    return True
