"""The site template: everything that happens to one token's row at a hook point, in one pass over the row.

::

    v       = round(stream + branch)         the model's own residual add            (where the graph has it)
    capture = v                              the pristine value
    s       = steer(v)                       kernels/steer_rows.py: gates, rows, tier, clamps; one rounding
    normed  = norm(s)                        RMSNorm or LayerNorm of the written value (where the graph has it)

One program for each token, the row in registers; for long inputs a persistent grid walks over the tokens. Every stage
is a compile-time constant: what the plan does not declare is not in the kernel. For a few tokens all loads are issued
at once (`FEW`); for many, those of gates and clamps that are off are skipped. Rows wider than `MAX_WIDTH` are
left to the compiler, or refused at planning where the template was asked for (`LoweringError`).

The op is a `torch.library.triton_op`, so Inductor sees the kernel itself: its inputs keep their fusions, it is part of
the CUDA graph, and nothing is copied. `ARGUMENTS` is the single source of its schema, order and shapes.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from steer_compile.errors import LoweringError
from steer_compile.kernels.site_launch import FEW_TOKENS, launch_options
from steer_compile.kernels.steer_rows import SteerArgs, steer_rows


class Argument(NamedTuple):
    """One tensor of the op. ``shape`` in T tokens, H width, R rows, K clamps; ``dtype``: stream, table or a name."""

    name: str
    shape: str
    dtype: str
    optional: bool = True
    written: bool = False


ARGUMENTS = (
    Argument("stream", "T H", "stream", optional=False),
    Argument("branch", "T H", "stream"),
    Argument("capture", "1 T H", "stream", written=True),  # whole: a view of it would be copied back in full
    Argument("rows", "T", "int32"),
    Argument("table", "R H", "table"),
    Argument("scale", "R", "float32"),
    Argument("tier", "1 H", "float32"),
    Argument("gain", "T", "float32"),
    Argument("decode", "T", "float32"),
    Argument("probe", "1 H", "float32"),
    Argument("probe_set", "1 4", "float32"),
    Argument("rowprobe", "R H", "float32"),
    Argument("rowprobe_set", "R 2", "float32"),
    Argument("clamp", "RK H", "table"),
    Argument("clamp_set", "RK 3", "float32"),
    Argument("weight", "H", "any"),
    Argument("bias", "H", "any"),
)
"""Tensors of the op, in its order."""

OPTIONS = (("clamps", int), ("norm", str), ("eps", float), ("offset", float))
"""What follows the tensors: clamps of a row, kind of norm (see `ir.Norm`, "" for none), its eps and weight offset."""

NORMS = {"": 0, "rms": 1, "rms_wide": 2, "layer": 3}
BRANCH, CAPTURE, ADD, TIER, MONITOR, ROW_MONITOR, CLAMP = (tl.constexpr(1 << i) for i in range(7))
REDUCTIONS = 16 | 32 | 64
_STAGES = {"branch": 1, "capture": 2, "table": 4, "tier": 8, "probe": 16, "rowprobe": 32, "clamp": 64}


def signature() -> inspect.Signature:
    """The op's signature, derived from `ARGUMENTS` and `OPTIONS`; torch infers the schema from it."""
    tensors = [(a.name, Tensor | None if a.optional else Tensor) for a in ARGUMENTS]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [inspect.Parameter(name, kind, annotation=of) for name, of in (*tensors, *OPTIONS)]
    return inspect.Signature(given, return_annotation=tuple[Tensor, Tensor])


class SiteArgs(NamedTuple):
    """Arguments of one call by name, in the op's order; see `ARGUMENTS` for shapes."""

    stream: Tensor
    branch: Tensor | None = None
    capture: Tensor | None = None
    rows: Tensor | None = None
    table: Tensor | None = None
    scale: Tensor | None = None
    tier: Tensor | None = None
    gain: Tensor | None = None
    decode: Tensor | None = None
    probe: Tensor | None = None
    probe_set: Tensor | None = None
    rowprobe: Tensor | None = None
    rowprobe_set: Tensor | None = None
    clamp: Tensor | None = None
    clamp_set: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    clamps: int = 0
    norm: str = ""
    eps: float = 0.0
    offset: float = 0.0

    def steering(self) -> SteerArgs:
        """The part that `steer_rows` takes."""
        return SteerArgs(*(getattr(self, name) for name in SteerArgs._fields))


def check(a: SiteArgs) -> None:
    """Hold the arguments against `ARGUMENTS`; the kernel itself would read beyond a tensor that is too small.

    Raises:
        LoweringError: a tensor of another width, length or dtype.
    """
    sizes = {"H": a.stream.shape[-1]}
    for argument in ARGUMENTS:
        tensor: Tensor | None = getattr(a, argument.name)
        if tensor is None:
            continue
        wanted = argument.shape.split()
        fits = len(wanted) == tensor.dim()
        for name, size in zip(wanted, tensor.shape, strict=False):
            if name != "T":  # tokens may be symbolic, and a capture has room for more of them
                fits &= size == (int(name) if name.isdecimal() else sizes.setdefault(name, size))
        kind = {"stream": a.stream.dtype, "int32": torch.int32, "float32": torch.float32}.get(argument.dtype)
        if not fits or (kind is not None and tensor.dtype != kind):
            raise LoweringError(
                f"{argument.name} of the site template is {tensor.dtype}{list(tensor.shape)} beside a stream "
                f"{a.stream.dtype}{list(a.stream.shape)}; it takes {argument.dtype} ({argument.shape})"
            )


def reference(a: SiteArgs) -> tuple[Tensor, Tensor]:
    """The op in plain PyTorch: steered value (T, H) and normed value (T, H), or (0,) without a norm."""
    v = a.stream if a.branch is None else a.stream + a.branch
    if a.capture is not None:
        a.capture.flatten(0, -2)[: v.size(0)].copy_(v)
    steered = steer_rows(v, a.steering(), a.stream.dtype, a.clamps)
    steered = steered.clone() if steered is a.stream else steered  # an op's result is no input of it
    return steered, reference_norm(steered, a)


def reference_norm(s: Tensor, a: SiteArgs) -> Tensor:
    """The norm of ``s`` (T, H) as `ir.Norm` describes it."""
    if not a.norm:
        return s.new_empty(0)
    x = s.to(torch.promote_types(s.dtype, torch.float32))
    weight = torch.ones_like(x[0]) if a.weight is None else a.weight
    if a.norm == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + a.eps)
    if a.norm == "rms":
        return x.to(s.dtype) if a.weight is None else (x.to(s.dtype) * weight.to(s.dtype))
    x = x * (weight.to(x.dtype) + a.offset)
    return (x if a.bias is None else x + a.bias).to(s.dtype)


@triton.jit
def _clamped(x, clamp, clamp_set, at, cols, inside, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr,
             TILE: tl.constexpr):  # fmt: skip
    """x pulled into the bounds along each direction; all projections are of the x that comes in."""
    out = x
    if TILE:
        # All directions at once: one reduction, whatever K is.
        k = tl.arange(0, KP)
        settings = clamp_set + (at + k) * 3
        low = tl.load(settings, mask=k < K, other=0.0)
        high = tl.load(settings + 1, mask=k < K, other=0.0)
        strength = tl.load(settings + 2, mask=k < K, other=0.0)
        spots = (at + k).to(tl.int64)[:, None] * H + cols[None, :]
        directions = tl.load(clamp + spots, mask=(k < K)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        dot = tl.sum(directions * x[None, :], 1)
        out += tl.sum(directions * _pull(dot, low, high, strength)[:, None], 0)
    else:
        for i in tl.static_range(K):
            spot = clamp_set + (at + i) * 3
            direction = tl.load(clamp + (at + i).to(tl.int64) * H + cols, mask=inside, other=0.0).to(tl.float32)
            dot = tl.sum(x * direction, 0)
            out += _pull(dot, tl.load(spot), tl.load(spot + 1), tl.load(spot + 2)) * direction
    return out


@triton.jit
def _any_clamp(clamp_set, at, K: tl.constexpr, KP: tl.constexpr):
    """Whether a row has a clamp."""
    k = tl.arange(0, KP)
    return tl.sum(tl.abs(tl.load(clamp_set + (at + k) * 3 + 2, mask=k < K, other=0.0)), 0) != 0


@triton.jit
def _pull(dot, low, high, strength):
    """strength * (clip(dot) - dot), and 0 where strength is 0, also for an infinite dot"""
    clipped = tl.where(dot < low, low, tl.where(dot > high, high, dot))
    return tl.where(strength == 0, 0.0, strength * (clipped - dot))


@triton.jit
def _normed(x, weight, bias, cols, inside, dtype: tl.constexpr, H: tl.constexpr, NORM: tl.constexpr,
            HAS: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr):  # fmt: skip
    """The norm of a row in fp32; bit 0 of HAS: a weight, bit 1: a bias."""
    if NORM == 3:
        x = tl.where(inside, x - tl.sum(x, 0) / H, 0.0)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / H + EPS)
    if NORM == 1:
        y = y.to(dtype).to(tl.float32)
    if HAS & 1:
        y = y * (tl.load(weight + cols, mask=inside, other=0.0).to(tl.float32) + OFFSET)
    if HAS & 2:
        y = y + tl.load(bias + cols, mask=inside, other=0.0).to(tl.float32)
    return y


@triton.jit
def _site_gate(x, probe, probe_set, cols, inside):
    """sigmoid(sharpness * (x . probe - threshold)), 1 while the monitor is not active; and whether it gates rows."""
    threshold = tl.load(probe_set)
    sharpness = tl.load(probe_set + 1)
    gate_rows = tl.load(probe_set + 2)
    active = tl.load(probe_set + 3)
    direction = tl.load(probe + cols, mask=inside, other=0.0)
    g = tl.sigmoid(sharpness * (tl.sum(x * direction, 0) - threshold))
    return tl.where(active > 0, g, 1.0), gate_rows


@triton.jit
def _row_gate(x, r, rowprobe, rowprobe_set, cols, inside, H: tl.constexpr):
    """The same for the monitor of a row; 1 for a row without one."""
    threshold = tl.load(rowprobe_set + r * 2)
    sharpness = tl.load(rowprobe_set + r * 2 + 1)
    direction = tl.load(rowprobe + r.to(tl.int64) * H + cols, mask=inside, other=0.0)
    q = tl.sigmoid(sharpness * (tl.sum(x * direction, 0) - threshold))
    return tl.where(threshold > -1e30, q, 1.0)


@triton.jit
def steer_site(
    h, branch, capture, rows, table, scale, tier, gain, decode, probe, probe_set, rowprobe, rowprobe_set,
    clamp, clamp_set, weight, bias, out, normed, n,
    H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, STAGES: tl.constexpr,
    NORM: tl.constexpr, HAS: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """One row of ``H`` numbers for each token; see the module's text for the stages."""
    dtype: tl.constexpr = h.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    inside = cols < H
    width = tl.full((), H, tl.int64)  # offsets may be beyond 2**31
    for t in range(tl.program_id(0), n, tl.num_programs(0)):
        at = t * width + cols
        # Loads first, and those that wait for the row last: with few tokens a site costs what its loads wait for.
        r = tl.load(rows + t) if (ADD | ROW_MONITOR | CLAMP) & STAGES else 0
        x = tl.load(h + at, mask=inside, other=0.0).to(tl.float32)
        if BRANCH & STAGES:
            x = (x + tl.load(branch + at, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
        d = tl.load(decode + t) if (MONITOR | ROW_MONITOR) & STAGES else 0.0
        tier_gain = tl.load(gain + t) if TIER & STAGES else 0.0
        if ADD & STAGES:
            vector = tl.load(table + r.to(tl.int64) * H + cols, mask=inside, other=0.0).to(tl.float32)
            strength = tl.load(scale + r)
        if CAPTURE & STAGES:
            tl.store(capture + at, x.to(dtype), mask=inside)
        gate = 1.0
        if MONITOR & STAGES:
            g, gate_rows = _site_gate(x, probe, probe_set, cols, inside)
            tier_gain *= g
            gate *= d * gate_rows * g + (1 - d * gate_rows)
        if ROW_MONITOR & STAGES:
            if FEW:
                gate *= d * _row_gate(x, r, rowprobe, rowprobe_set, cols, inside, H) + (1 - d)
            elif d > 0:
                gate *= d * _row_gate(x, r, rowprobe, rowprobe_set, cols, inside, H) + (1 - d)
        if ADD & STAGES:
            x += vector * (strength * gate)
        if TIER & STAGES:
            x += tl.load(tier + cols, mask=inside, other=0.0) * tier_gain
        if CLAMP & STAGES:
            if FEW:
                x = _clamped(x, clamp, clamp_set, r * K, cols, inside, H, K, KP, KP * BLOCK <= 32768)
            elif _any_clamp(clamp_set, r * K, K, KP):
                x = _clamped(x, clamp, clamp_set, r * K, cols, inside, H, K, KP, KP * BLOCK <= 32768)
        steered = x.to(dtype)
        tl.store(out + at, steered, mask=inside)
        if NORM != 0:
            y = _normed(steered.to(tl.float32), weight, bias, cols, inside, dtype, H, NORM, HAS, EPS, OFFSET)
            tl.store(normed + at, y.to(dtype), mask=inside)


def launch(a: SiteArgs, kernel: object = steer_site) -> tuple[Tensor, Tensor]:
    """Run the kernel (or a wrapper of it) on ``a``. Tensors that a stage does not need are given as the stream."""
    stream = a.stream.contiguous()
    tokens, width = stream.shape
    out = torch.empty_like(stream)
    normed = torch.empty_like(stream) if a.norm else stream.new_empty(0)
    tensors: tuple[Any, ...] = a[1 : len(ARGUMENTS)]
    given = [stream if t is None else t if t is a.capture else t.contiguous() for t in tensors]
    few = isinstance(tokens, int) and tokens <= FEW_TOKENS
    options = launch_options(width, REDUCTIONS & stages(a) != 0, few)
    if not isinstance(tokens, int) or tokens:
        grid = (options.programs(tokens),)
        kernel[grid](  # type: ignore[index]
            stream, *given, out, normed if a.norm else out, tokens,
            H=width, BLOCK=options.block, K=a.clamps, KP=triton.next_power_of_2(max(a.clamps, 1)),
            STAGES=stages(a), NORM=NORMS[a.norm], HAS=(a.weight is not None) + 2 * (a.bias is not None),
            EPS=a.eps, OFFSET=a.offset, FEW=few, num_warps=options.warps,
        )  # fmt: skip
    return out, normed


def stages(a: SiteArgs) -> int:
    """Bit mask of the stages that ``a`` has tensors for."""
    return sum(bit for name, bit in _STAGES.items() if getattr(a, name) is not None)


def _site(*args: Any) -> tuple[Tensor, Tensor]:
    a = SiteArgs(*args)
    check(a)
    return launch(a, wrap_triton(steer_site)) if a.stream.is_cuda else reference(a)


_site.__signature__ = signature()  # type: ignore[attr-defined]
site = triton_op("steer_compile::site", _site, mutates_args={"capture"})
"""The op that enters graphs; arguments as in `SiteArgs`."""
