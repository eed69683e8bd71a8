"""Full SAE: values of opted-in tokens are decoded from all features of an autoencoder, or keep their error term.

For a token whose row names the autoencoder in slot s, on the value h that all other edits have left::

    f    = features of h, over the true full set     kernels/sae_delta.py; with k > 0 only the k largest of them
    f'   = f with the row's clamps
    mode 1   h' = round(restored(f' D + bias))                      the error term is dropped
    mode 2   h' = round(h + sum (f' - f) step D)                    decode(f') - decode(f) + h: it is kept
    log      the largest L features and their activations are stored, whatever the mode

Behind a gate g (the factor of clamps, `kernels/gates.py`) the value moves by g of the way, ``h + g (h' - h)``, rounded
once; a closed gate leaves the token's bits, and nothing is computed for it.

``restored`` is ``y step``, or ``y std(h) + mean(h)`` where the autoencoder normalises rows. Of equal pre-activations
TopK takes the lowest index first. Tokens that are not opted in, and those of mode 2 in which nothing changes, keep
their bits. At most ``capacity`` tokens are served, the first ones; the runtime refuses a call with more.

Formulas: Bricken et al. 2023 (ReLU), Gao et al. 2024 (TopK), Rajamanoharan et al. 2024 (JumpReLU, gated). Products read
values in the dtype of the tables, and sums are fp32. On a GPU the op is a handful of kernels (`sae_full_kernels`),
which count and list the opted-in tokens on the device: it is legal in a CUDA graph, and costs what they cost.
Elsewhere it is the dense formula below.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton

from steer_compile.errors import LoweringError
from steer_compile.kernels.gates import FACTORS
from steer_compile.kernels.sae_delta import ADD, ADD_ACTIVE, SET_ACTIVE, activations_in, features_of, moments

RECONSTRUCT, KEEP_ERROR = 1, 2
"""Modes of a row."""


class SaeFullArgs(NamedTuple):
    """Arguments of one call, in the op's order. T tokens, width H, R rows, K clamps, S slots of F features each."""

    h: Tensor
    """Values (T, H), written in place."""
    rows: Tensor
    """Row of each token (T,) int32."""
    row_set: Tensor
    """Slot + 1 (0: not opted in), mode, whether features are logged, nothing (R, 4) fp32."""
    row_clamp: Tensor
    """Features, then codes, then values of the row's clamps (R, 3K) fp32."""
    encoder: Tensor
    """(S * F, H) in the dtype of the tables."""
    decoder: Tensor
    """(S * F, H) in the dtype of the tables."""
    settings: Tensor
    """Settings of each feature (S * F, 8) fp32, see `sae_delta.SETTINGS`."""
    bias: Tensor
    """Bias of each decoder (S, H) fp32."""
    sae_set: Tensor
    """Number of features, and k of TopK or 0 (S, 4) fp32."""
    log: Tensor | None
    """Indices, then activations of each token's largest features (1, at least T, 2L) fp32, written."""
    gates: Tensor | None
    """Factors of each token (T, 4) fp32, of which the third is that of clamps; None without gates."""
    capacity: int


def check(a: SaeFullArgs) -> None:
    """Hold the arguments against each other; a kernel would read beyond a tensor that is too small.

    Raises:
        LoweringError: a tensor of another shape or dtype.
    """
    slots, width, lines = a.sae_set.size(0), a.h.size(-1), a.encoder.size(0)
    shapes = {
        "row_set": (a.row_set, (a.row_set.size(0), 4)),
        "row_clamp": (a.row_clamp, (a.row_set.size(0), a.row_clamp.size(1) // 3 * 3)),
        "encoder": (a.encoder, (lines // slots * slots, width)),
        "decoder": (a.decoder, (lines, width)),
        "settings": (a.settings, (lines, 8)),
        "bias": (a.bias, (slots, width)),
        "sae_set": (a.sae_set, (slots, 4)),
    }
    for name, (tensor, shape) in shapes.items():
        wanted = a.encoder.dtype if name in ("encoder", "decoder") else torch.float32
        if tuple(tensor.shape) != shape or tensor.dtype != wanted:
            raise LoweringError(
                f"{name} of the full SAE op is {tensor.dtype}{list(tensor.shape)}; it takes {wanted}{list(shape)}"
            )
    if a.gates is not None and (a.gates.dim() != 2 or a.gates.size(1) != FACTORS or a.gates.dtype != torch.float32):
        raise LoweringError(
            f"gates of the full SAE op are {a.gates.dtype}{list(a.gates.shape)}; it takes float32 (T, {FACTORS})"
        )
    if a.rows.dtype != torch.int32 or a.h.dim() != 2 or not a.h.is_contiguous():
        raise LoweringError(
            f"the full SAE op takes values (T, H) in one piece and int32 rows, not {a.h.dim()} dimensions with strides "
            f"{a.h.stride()} and {a.rows.dtype}"
        )


def reference(a: SaeFullArgs) -> tuple[Tensor, Tensor | None]:
    """The op in plain PyTorch, dense: the new values (T, H), and the new log (T, 2L)."""
    wide = torch.promote_types(a.h.dtype, torch.float32)
    return _served(a, wide, wide)


def reference_fp64(a: SaeFullArgs) -> tuple[Tensor, Tensor | None]:
    """The op in fp64, unrounded but for the tokens that keep their bits."""
    given = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in a]
    return _served(SaeFullArgs(*given), torch.float64, torch.float64)  # type: ignore[arg-type]


def _served(a: SaeFullArgs, wide: torch.dtype, numbers: torch.dtype) -> tuple[Tensor, Tensor | None]:
    chosen = a.row_set[a.rows]
    gate = torch.ones_like(chosen[:, 0]) if a.gates is None else a.gates[:, 2]
    opted = (chosen[:, 0] > 0) & ((gate != 0) | (chosen[:, 2] > 0))
    opted = opted & (opted.to(torch.int32).cumsum(0) <= a.capacity)
    out, log = a.h, None if a.log is None else a.log[0, : a.h.size(0)]
    count = a.encoder.size(0) // a.sae_set.size(0)
    for slot in range(a.sae_set.size(0)):
        here = opted & (chosen[:, 0] == slot + 1)
        part = slice(slot * count, (slot + 1) * count)
        values, found = _of_slot(a, slot, part, wide, gate.to(wide).unsqueeze(-1))
        changes = here & (gate != 0) & ((chosen[:, 1] == RECONSTRUCT) | ((chosen[:, 1] == KEEP_ERROR) & values.changed))
        new = torch.where((chosen[:, 1] == RECONSTRUCT).unsqueeze(-1), values.decoded, values.kept)
        out = torch.where(changes.unsqueeze(-1), new.to(out.dtype), out)
        if log is not None:
            log = torch.where((here & (chosen[:, 2] > 0)).unsqueeze(-1), _largest(found, log.size(-1) // 2), log)
    return out, log


class _Values(NamedTuple):
    decoded: Tensor
    kept: Tensor
    changed: Tensor


def _of_slot(a: SaeFullArgs, slot: int, part: slice, wide: torch.dtype, gate: Tensor) -> tuple[_Values, Tensor]:
    """Values of all tokens by one autoencoder behind their gates (T, 1), and their features (T, F)."""
    settings, x = a.settings[part].to(wide), a.h.to(wide)
    encoder, decoder = a.encoder[part].to(wide), a.decoder[part].to(wide)
    mean, std = moments(x)
    read = x.to(a.encoder.dtype).to(wide) if a.encoder.dtype != torch.float64 else x
    inputs = activations_in(read @ encoder.T, mean, std, settings)
    f = features_of(inputs, settings)
    f = torch.where(_among_largest(f, a.sae_set[slot]) | f.isnan(), f, 0.0)
    index, codes, values = a.row_clamp[a.rows].to(wide).chunk(3, -1)
    index = index.long()
    own = f.gather(1, index)
    acts = (codes > 0) & ((codes < SET_ACTIVE) | (own > 0))
    goal = torch.where((codes == ADD) | (codes == ADD_ACTIVE), own + values, values)
    moved = torch.where(acts, goal - own, 0.0)
    moves = torch.zeros_like(f).scatter_add(1, index, moved)
    normed = settings[0, 6] >= 0
    step = torch.where(normed, std, settings[0, 7])
    decoded = ((f + moves) @ decoder + a.bias[slot].to(wide)) * step + torch.where(normed, mean, 0.0)
    decoded = torch.where(gate == 1, decoded, x + gate * (decoded - x))
    return _Values(decoded, x + gate * (moves @ decoder) * step, (moved != 0).any(-1)), f


def _among_largest(f: Tensor, numbers: Tensor) -> Tensor:
    """Which features (T, F) are among the k largest of their token, all where k is 0; NaN is less than everything."""
    values = torch.where(f.isnan(), -1.0, f)
    order = values.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(f.size(1), device=f.device).expand_as(order))
    return (rank < numbers[1]) | (numbers[1] == 0)


def _largest(f: Tensor, top: int) -> Tensor:
    """Indices, then activations (T, 2 top) of the largest features: -1 and 0 where fewer are active."""
    values, index = torch.where(f.isnan(), 0.0, f).sort(dim=-1, descending=True, stable=True)
    values, index = values[:, :top], index[:, :top]
    missing = max(top - f.size(1), 0)
    if missing:  # without pad(), which fixes the number of tokens where that is symbolic
        none = f.new_zeros(f.size(0), missing)
        values, index = torch.cat([values, none], -1), torch.cat([index, none.to(index.dtype)], -1)
    return torch.cat([torch.where(values > 0, index.to(values.dtype), -1.0), values], -1)


def _sae_full(*args: Any) -> None:
    a = SaeFullArgs(*args)
    check(a)
    if a.h.is_cuda:
        from steer_compile.kernels.sae_full_launch import launch  # needs Triton

        launch(a, wrap_triton)
        return
    values, found = reference(a)
    a.h.copy_(values)
    if a.log is not None and found is not None:
        a.log[0, : a.h.size(0)].copy_(found)


def _signature() -> inspect.Signature:
    """The op's signature, from which torch infers its schema."""
    kinds = {"log": Tensor | None, "gates": Tensor | None, "capacity": int}
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    given = [inspect.Parameter(name, kind, annotation=kinds.get(name, Tensor)) for name in SaeFullArgs._fields]
    return inspect.Signature(given, return_annotation=None)


_sae_full.__signature__ = _signature()  # type: ignore[attr-defined]
sae_full = triton_op("steer_compile::sae_full", _sae_full, mutates_args={"h", "log"})
"""The op that enters graphs; arguments as in `SaeFullArgs`."""
