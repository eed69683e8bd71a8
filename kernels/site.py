"""The site template: everything that happens to one token's row at a hook point, in one pass over the row.

::

    b       = round(norm(branch)) * scale    post-norm or multiplier of the branch          (where the graph has them)
    v       = round(stream + b)              the model's own residual add                   (where the graph has it)
    capture = v                              the pristine value, of every token or of chosen ones
    score   = v . probe, v . probe[r]        scores of the site's and of the row's monitor
    s       = steer(v)                       kernels/steer_rows.py: gates, rows, tier, clamps; one rounding
    normed  = norm(s)                        RMSNorm or LayerNorm of the written value      (where the graph has it)

With ``exact`` the sum is not rounded before it is steered, and the norm reads the value before its rounding: what
vLLM's fused add and RMSNorm does.

One program for each token. Rows of up to `MAX_ROW` numbers stay in registers (`site_row`), wider ones, up to
`MAX_WIDTH`, are walked over in chunks (`site_wide`). Every stage is a compile-time constant: what the plan does not
declare is not in the kernel. For a few tokens all loads are issued at once (``FEW``); for many, those of gates and
clamps that are off are skipped.

The op is a `torch.library.triton_op`, so Inductor sees the kernel itself: its inputs keep their fusions, it is part of
the CUDA graph, and nothing is copied. `ARGUMENTS` is the single source of its schema, order and shapes.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from steer_compile.errors import LoweringError
from steer_compile.kernels.site_kernels import BIAS, EXACT, FEW, NORMS, WEIGHT, site_row
from steer_compile.kernels.site_launch import FEW_TOKENS, MAX_CLAMPS, MAX_ROW, launch_options
from steer_compile.kernels.site_wide import site_wide
from steer_compile.kernels.steer_rows import SteerArgs, score_rows, steer_rows
from steer_compile.kernels.store_rows import store_packed


class Argument(NamedTuple):
    """One tensor of the op. ``shape`` in T tokens, H width, R rows, K clamps, G groups, F features (FF twice as many).

    ``dtype``: stream, table or a name.
    """

    name: str
    shape: str
    dtype: str
    optional: bool = True
    written: bool = False


ARGUMENTS = (
    Argument("stream", "T H", "stream", optional=False),
    Argument("branch", "T H", "stream"),
    Argument("branch_weight", "H", "any"),
    Argument("branch_bias", "H", "any"),
    Argument("capture", "1 T H", "stream", written=True),  # whole: a view of it would be copied back in full
    Argument("capture_rows", "T 2", "int32"),
    Argument("choice", "G 1", "int32"),
    Argument("rows", "T", "int32"),
    Argument("table", "R H", "table"),
    Argument("scale", "R", "float32"),
    Argument("tier", "1 H", "float32"),
    Argument("gain", "T", "float32"),
    Argument("decode", "T", "float32"),
    Argument("probe", "1 H", "float32"),
    Argument("probe_set", "1 8", "float32"),
    Argument("rowprobe", "R H", "float32"),
    Argument("rowprobe_set", "R 8", "float32"),
    Argument("clamp", "RK H", "table"),
    Argument("clamp_set", "RK 3", "float32"),
    Argument("sae", "FF H", "table"),
    Argument("sae_set", "F 8", "float32"),
    Argument("sae_clamp", "R FF", "float32"),
    Argument("gates", "T 4", "float32"),
    Argument("score", "1 T 2", "float32", written=True),
    Argument("weight", "H", "any"),
    Argument("bias", "H", "any"),
)
"""Tensors of the op, in its order."""

OPTIONS = (
    ("clamps", int), ("norm", str), ("eps", float), ("offset", float), ("branch_norm", str), ("branch_eps", float),
    ("branch_offset", float), ("branch_scale", float), ("exact", bool),
)  # fmt: skip
"""What follows the tensors: clamps of a row; kind (see `ir.Norm`, "" for none), eps and weight offset of the norm and
of the branch's own norm; multiplier of the branch; whether the sum and the norm's input are left unrounded."""

_STAGES = {
    "branch": 1, "capture": 2, "table": 4, "tier": 8, "probe": 16, "rowprobe": 32, "clamp": 64, "score": 512,
    "gates": 1024, "choice": 2048, "sae": 4096,
}  # fmt: skip


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
    branch_weight: Tensor | None = None
    branch_bias: Tensor | None = None
    capture: Tensor | None = None
    capture_rows: Tensor | None = None
    choice: Tensor | None = None
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
    sae: Tensor | None = None
    sae_set: Tensor | None = None
    sae_clamp: Tensor | None = None
    gates: Tensor | None = None
    score: Tensor | None = None
    weight: Tensor | None = None
    bias: Tensor | None = None
    clamps: int = 0
    norm: str = ""
    eps: float = 0.0
    offset: float = 0.0
    branch_norm: str = ""
    branch_eps: float = 0.0
    branch_offset: float = 0.0
    branch_scale: float = 1.0
    exact: bool = False

    def steering(self) -> SteerArgs:
        """The part that `steer_rows` takes."""
        return SteerArgs(*(getattr(self, name) for name in SteerArgs._fields))


def check(a: SiteArgs) -> None:
    """Hold the arguments against `ARGUMENTS`; the kernel itself would read beyond a tensor that is too small.

    Raises:
        LoweringError: a tensor of another width, length or dtype.
    """
    sizes = {"H": a.stream.shape[-1]}
    if a.clamps > MAX_CLAMPS:
        raise LoweringError(f"a site has {a.clamps} clamps for each row; the template takes {MAX_CLAMPS} at most")
    if a.exact and sizes["H"] > MAX_ROW:
        raise LoweringError(
            f"the site template has no unrounded norm for rows of {sizes['H']} numbers; it takes {MAX_ROW} at most"
        )
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
    dtype, wide = a.stream.dtype, torch.promote_types(a.stream.dtype, torch.float32)
    v = a.stream
    if a.branch is not None:
        b = norm_of(a.branch, a.branch_norm, a.branch_weight, a.branch_bias, a.branch_eps, a.branch_offset)
        b = b * a.branch_scale if a.branch_scale != 1 else b
        v = a.stream.to(wide) + b.to(wide) if a.exact else a.stream + b
    if a.capture is not None and a.capture_rows is not None and a.choice is not None:
        store_packed(v, a.capture, a.capture_rows, a.choice, v.size(0))
    elif a.capture is not None:
        a.capture.flatten(0, -2)[: v.size(0)].copy_(v)
    if a.score is not None:
        a.score.flatten(0, -2)[: v.size(0)].copy_(score_rows(v, a.steering(), v.dtype))
    steered = steer_rows(v, a.steering(), v.dtype, a.clamps)
    written = steered.to(dtype)
    written = written.clone() if written is a.stream else written  # an op's result is no input of it
    if not a.norm:
        return written, written.new_empty(0)
    return written, norm_of(steered, a.norm, a.weight, a.bias, a.eps, a.offset, dtype)


def norm_of(
    s: Tensor, kind: str, weight: Tensor | None, bias: Tensor | None, eps: float, offset: float,
    dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """The norm of ``s`` (T, H) as `ir.Norm` describes it, ``s`` itself without a kind; ``dtype``: of the result."""
    if not kind:
        return s
    x, dtype = s.to(torch.promote_types(s.dtype, torch.float32)), dtype or s.dtype
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if kind == "rms":
        return x.to(dtype) if weight is None else x.to(dtype) * weight.to(dtype)
    if weight is not None:
        x = x * (weight.to(x.dtype) + offset)
    return (x if bias is None else x + bias).to(dtype)


def launch(a: SiteArgs, wrap: Any = lambda kernel: kernel) -> tuple[Tensor, Tensor]:
    """Run the kernel on ``a``; ``wrap`` is put around the kernel function."""
    stream = aligned(a.stream)
    tokens, width = stream.shape
    out = torch.empty_like(stream)
    normed = torch.empty_like(stream) if a.norm else stream.new_empty(0)
    tensors: tuple[Any, ...] = a[1 : len(ARGUMENTS)]
    given = [stream if t is None else t if t is a.capture or t is a.score else aligned(t) for t in tensors]
    if isinstance(tokens, int) and not tokens:
        return out, normed
    few = isinstance(tokens, int) and tokens <= FEW_TOKENS
    monitors = a.probe is not None or a.rowprobe is not None
    options = launch_options(width, monitors, a.clamp is not None, few, a.sae is not None)
    kernel = wrap(site_row if options.block >= width else site_wide)
    kernel[(tokens,)](
        stream, *given, out, normed if a.norm else out, H=width, BLOCK=options.block, **constants(a, few),
        num_warps=options.warps,
    )  # fmt: skip
    return out, normed


def constants(a: SiteArgs, few: bool) -> dict[str, Any]:
    """Compile-time constants of the kernels beside width and block; ``few``: the form for few tokens."""
    features = 0 if a.sae_set is None else a.sae_set.size(0)
    flags = (FEW.value if few else 0) | (EXACT.value if a.exact else 0)
    return {
        "K": a.clamps, "C": features, "CP": 1 << max(features - 1, 0).bit_length(), "STAGES": stages(a) | flags,
        "NORM": _norm_code(a.norm, a.weight, a.bias),
        "EPS": a.eps, "OFFSET": a.offset, "BRANCH_NORM": _norm_code(a.branch_norm, a.branch_weight, a.branch_bias),
        "BRANCH_EPS": a.branch_eps, "BRANCH_OFFSET": a.branch_offset, "BRANCH_SCALE": a.branch_scale,
    }  # fmt: skip


def _norm_code(kind: str, weight: Tensor | None, bias: Tensor | None) -> int:
    return NORMS[kind] + (WEIGHT if weight is not None else 0) + (BIAS if bias is not None else 0)


def aligned(tensor: Tensor) -> Tensor:
    """The tensor in one piece that begins at a multiple of 16 bytes, so that one compiled kernel serves all calls."""
    whole = tensor.contiguous()
    return whole if whole.storage_offset() * whole.element_size() % 16 == 0 else whole.clone()


def stages(a: SiteArgs) -> int:
    """Bit mask of the stages that ``a`` has tensors for."""
    return sum(bit for name, bit in _STAGES.items() if getattr(a, name) is not None)


def _site(*args: Any) -> tuple[Tensor, Tensor]:
    a = SiteArgs(*args)
    check(a)
    return launch(a, wrap_triton) if a.stream.is_cuda else reference(a)


_site.__signature__ = signature()  # type: ignore[attr-defined]
site = triton_op("steer_compile::site", _site, mutates_args={"capture", "score"})
"""The op that enters graphs; arguments as in `SiteArgs`."""
