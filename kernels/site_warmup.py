"""Which variants of the site kernels a plan needs, and how to compile them before the first call.

Triton compiles a kernel anew for other dtypes, other constants, and pointers that are aligned or not. A plan fixes all
of these: which tensors a site has, their dtypes, its norms, its width. What is left open is the number of tokens, which
chooses between two forms; the count itself is the grid, and no argument. So a site has two variants at most, and sites
with the same data share them. `variants` derives them from frozen descriptions alone; `warm_up` launches each once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from steer_compile.ir import Bank, Edit, Fusion, Norm, Plan
from steer_compile.kernels.site import ARGUMENTS, SiteArgs, check, launch
from steer_compile.kernels.site_kernels import site_row
from steer_compile.kernels.site_launch import FEW_TOKENS
from steer_compile.kernels.site_wide import site_wide

TOKEN_COUNTS = (1, FEW_TOKENS + 1)
"""A count for each form of the kernels: for few tokens, and for many."""

_NEEDS = {
    "table": ("rows", "scale"), "tier": ("gain",), "probe": ("decode",), "rowprobe": ("rows", "decode"),
    "clamp": ("rows",), "sae": ("rows",), "choice": ("capture_rows",),
}  # fmt: skip
"""What the data of an op family is read with, by the kind of its bank."""

_ARGUMENT_OF = {"packed": "capture"}
"""Argument that takes a kind of bank, where they differ in name."""

_FIXED = {"int32": torch.int32, "float32": torch.float32}


def variants(plan: Plan, weights: Mapping[str, torch.dtype]) -> tuple[SiteArgs, ...]:
    """Arguments that stand for every call of the plan's template sites, each kind of call once.

    Args:
        weights: dtype of each weight and bias that the plan's norms name.

    Returns:
        Arguments on the ``meta`` device, in the shapes of `ARGUMENTS`: H, R and K as in the plan, T of `TOKEN_COUNTS`.
        Both forms are there even if the plan has no room for many tokens: a graph that was traced for any number of
        them takes the form for many.

    Raises:
        LoweringError: the plan's banks do not fit the kernels.
    """
    found: dict[tuple[Any, ...], SiteArgs] = {}
    for edit in plan.edits:
        if edit.lowering == "template":
            for tokens in TOKEN_COUNTS:
                a = site_args(edit, plan, weights, tokens)
                check(a)
                found.setdefault(_kind(a), a)
    return tuple(found.values())


def site_args(edit: Edit, plan: Plan, weights: Mapping[str, torch.dtype], tokens: int) -> SiteArgs:
    """Arguments of one site's call with ``tokens`` tokens, on the ``meta`` device; see `variants`."""
    site, fusion = edit.site, edit.fusion
    banks = {_ARGUMENT_OF.get(slot.kind, slot.kind): plan.banks[slot.bank] for slot in edit.slots}
    needed = {name for kind in banks for name in _NEEDS.get(kind, ())} | ({"gates"} if edit.gated else set())
    named = {argument: weights[node] for argument, node in _weight_nodes(fusion).items()}
    sizes = _sizes(banks, tokens, site.width)
    given: dict[str, Any] = {}
    for argument in ARGUMENTS:
        name, dtype = argument.name, _FIXED.get(argument.dtype, site.dtype)
        if name in banks:
            dtype = banks[name].dtype
        elif name in named:
            dtype = named[name]
        elif name not in needed and name != "stream" and not (name == "branch" and fusion.branch is not None):
            continue
        shape = [int(part) if part.isdecimal() else sizes[part] for part in argument.shape.split()]
        if name in banks:
            shape[-1] = banks[name].width  # as planned: `check` then holds it against the stream
        given[name] = torch.empty(shape, dtype=dtype, device="meta")
    clamps = plan.clamps if "clamp" in edit.ops else 0
    return SiteArgs(**given, clamps=clamps, **norm_options(fusion))


def norms_of(fusion: Fusion) -> dict[str, Norm]:
    """The norms that the template takes over, by the prefix of their arguments."""
    both = {"": fusion.norm, "branch_": fusion.branch_norm}
    return {prefix: norm for prefix, norm in both.items() if norm is not None}


def norm_options(fusion: Fusion) -> dict[str, Any]:
    """Constants of the norms that the template takes over, in the types in which the op passes them on."""
    given: dict[str, Any] = {"branch_scale": float(fusion.branch_scale)}
    given["exact"] = fusion.branch is not None and fusion.norm is not None and fusion.norm.exact
    for prefix, norm in norms_of(fusion).items():
        values = {"norm": norm.kind, "eps": float(norm.eps), "offset": float(norm.offset)}
        given |= {prefix + name: value for name, value in values.items()}
    return given


def _weight_nodes(fusion: Fusion) -> dict[str, str]:
    """Node of each weight and bias, by the argument that takes it."""
    found: dict[str, str] = {}
    for prefix, norm in norms_of(fusion).items():
        names = {"weight": norm.weight, "bias": norm.bias}
        found |= {prefix + name: node for name, node in names.items() if node is not None}
    return found


def weight_nodes(plan: Plan) -> frozenset[str]:
    """Names of the nodes that hold weights and biases of the norms in a plan."""
    return frozenset(node for edit in plan.edits for node in _weight_nodes(edit.fusion).values())


def warm_up(plan: Plan, weights: Mapping[str, torch.dtype], device: torch.device) -> int:
    """Launch each variant of the plan once in each way, on zeros, and wait.

    Args:
        weights: dtype of each weight and bias that the plan's norms name.
        device: a CUDA device, current or not.

    Returns:
        Number of kernels that Triton compiled, or loaded from its cache on disk; 0 if this process had them all.
    """
    before = _compiled()
    with torch.cuda.device(device), torch.inference_mode(False), torch.no_grad():
        for a in variants(plan, weights):
            launch(zeros(a, device))
            launch(zeros(a, device), _AsTraced)
        torch.cuda.synchronize(device)
    return _compiled() - before


class _AsTraced:
    """A kernel as torch launches it in a traced graph (``aot_eager``): with options named that are defaults.

    Triton's key has the options as they are given, in their order. The second kernel is the first, read back from the
    cache on disk.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *given, **named: self._kernel[grid](*given, **named, num_ctas=1, num_stages=3)


def zeros(a: SiteArgs, device: torch.device) -> SiteArgs:
    """The arguments on a device, zeros in the shapes and dtypes of ``a``.

    Tensors of one dtype share memory, so that a warm-up takes little: no result of it is used, and rows stay 0.
    """
    tensors = {name: t for name, t in a._asdict().items() if isinstance(t, Tensor)}
    room: dict[torch.dtype, int] = {}
    for t in tensors.values():
        room[t.dtype] = max(room.get(t.dtype, 0), t.numel())
    memory = {dtype: torch.zeros(count, dtype=dtype, device=device) for dtype, count in room.items()}
    given: dict[str, Any] = {name: memory[t.dtype][: t.numel()].view(t.shape) for name, t in tensors.items()}
    return a._replace(**given)


def _sizes(banks: Mapping[str, Bank], tokens: int, width: int) -> dict[str, int]:
    """Sizes by the letters of `ARGUMENTS`."""
    rows = [banks[kind].length for kind in ("table", "rowprobe", "sae_clamp") if kind in banks]
    lines = banks["clamp"].length if "clamp" in banks else 0
    groups = banks["choice"].length if "choice" in banks else 0
    features = banks["sae_set"].length if "sae_set" in banks else 0
    sizes = {"T": tokens, "H": width, "R": rows[0] if rows else 1, "RK": lines, "G": groups}
    return sizes | {"F": features, "FF": 2 * features}


def _kind(a: SiteArgs) -> tuple[Any, ...]:
    """What tells the calls of two sites apart: which tensors there are, their shapes and dtypes, and the constants."""
    return tuple((x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else x for x in a)


def _compiled() -> int:
    """Variants of both kernels that this process holds, on all devices."""
    kernels: list[Any] = [site_row, site_wide]
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
