"""Steering of one site's value: gates, additive rows, dynamic tier, directional clamps, clamped SAE features.

For token t with row r, gates on the pristine value h, and the rest on p, which is h or what a patch made of it::

    s, s_r  = h . probe, h . probe[r]        scores of the site's and of the row's monitor
    f       = factors of tier, rows and clamps: those of sites in front, times what s and s_r open (kernels/gates.py)
    x       = p + T[r] * scale[r] * f.rows + V * gain[t] * f.tier
    p_k     = x . v[r, k]
    x'      = x + sum_k strength[r, k] * f.clamps * (clip(p_k, low, high) - p_k) * v[r, k]
    h'      = round(x' + f.clamps * delta(x'))                                       kernels/sae_delta.py

Arithmetic is in fp32 (fp64 where the stream is fp64) with one rounding to the stream dtype at the end. A term whose
tensors are None is left out. The functions here are the reference, and the lowering by plain operators, which Inductor
fuses. `kernels/site.py` does the same in one Triton kernel together with the add and the norm around the site.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from steer_compile.kernels.gates import Factors, guarded, opened
from steer_compile.kernels.sae_delta import SaeArgs, sae_delta


class SteerArgs(NamedTuple):
    """Data of one site. R rows, width H, K clamps a row; ``(...)`` are the leading dimensions of the value.

    The additive term needs ``table`` and ``scale``; ``tier`` needs ``gain``; the monitors need ``decode``.
    """

    rows: Tensor | None = None
    """Row of each token (...), integer."""
    table: Tensor | None = None
    """Additive vectors (R, H)."""
    scale: Tensor | None = None
    """Strength of each row (R,), fp32."""
    tier: Tensor | None = None
    """Vector of the dynamic tier (1, H), fp32."""
    gain: Tensor | None = None
    """Gain of the dynamic tier for each token (...), fp32."""
    decode: Tensor | None = None
    """1 for decoded tokens, 0 in prefill (...), fp32."""
    probe: Tensor | None = None
    """Direction of the site's monitor (1, H), fp32."""
    probe_set: Tensor | None = None
    """Settings of the site's monitor (1, 8), fp32; see `gates.SETTINGS`."""
    rowprobe: Tensor | None = None
    """Direction of each row's monitor (R, H), fp32."""
    rowprobe_set: Tensor | None = None
    """Settings of each row's monitor (R, 8), fp32."""
    clamp: Tensor | None = None
    """Unit directions (R * K, H)."""
    clamp_set: Tensor | None = None
    """Lower bound, upper bound and strength of each direction (R * K, 3), fp32."""
    sae: Tensor | None = None
    """Encoder rows, then decoder rows of the site's features (2C, H)."""
    sae_set: Tensor | None = None
    """Settings of each feature (C, 8), fp32; see `sae_delta.SETTINGS`."""
    sae_clamp: Tensor | None = None
    """Codes, then values of each row's clamped features (R, 2C), fp32."""
    gates: Tensor | None = None
    """Factors of each token (..., 4) from sites in front, fp32; see `gates.FACTORS`."""


def steer_rows(
    h: Tensor, args: SteerArgs, dtype: torch.dtype, clamps: int = 0, patched: Tensor | None = None
) -> Tensor:
    """Steer a value.

    Args:
        h: stream value (..., H) of dtype ``dtype``.
        args: the site's data; terms without tensors are left out.
        clamps: K, directions of each row.
        patched: the value that `patch_rows` made of ``h``, unrounded.

    Returns:
        Tensor like ``h``.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return _steered(h, h if patched is None else patched, args, wide, clamps).to(dtype)


def steer_rows_fp64(h: Tensor, args: SteerArgs, clamps: int = 0, patched: Tensor | None = None) -> Tensor:
    """The formula in fp64, unrounded: what every lowering is checked against."""
    given = [t.double() if t is not None and t.is_floating_point() else t for t in args]
    x = (h if patched is None else patched).double()
    return _steered(h.double(), x, SteerArgs(*given), torch.float64, clamps)


def scores(h: Tensor, args: SteerArgs, wide: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Scores of each token by the site's and by its row's probe (...), None where there is none."""
    site = None if args.probe is None else (h.to(wide) * args.probe[0]).sum(-1)
    row = None if args.rowprobe is None else (h.to(wide) * args.rowprobe[args.rows]).sum(-1)
    return site, row


def score_rows(h: Tensor, args: SteerArgs, dtype: torch.dtype) -> Tensor:
    """Both scores of each token (..., 2), 0 where there is no probe; a stream value (..., H) of dtype ``dtype``."""
    found = scores(h, args, torch.promote_types(dtype, torch.float32))
    zero = torch.zeros_like(next(s for s in found if s is not None))
    return torch.stack([zero if s is None else s for s in found], -1)


def score_rows_fp64(h: Tensor, args: SteerArgs) -> Tensor:
    """`score_rows` in fp64."""
    given = [t.double() if t is not None and t.is_floating_point() else t for t in args]
    return score_rows(h.double(), SteerArgs(*given), torch.float64)


def _steered(h: Tensor, x: Tensor, args: SteerArgs, wide: torch.dtype, clamps: int) -> Tensor:
    factors = _factors(h, args, wide)
    if args.table is not None and args.scale is not None:
        vector, strength = args.table[args.rows], args.scale[args.rows]
        strength = strength if factors.rows is None else strength * factors.rows
        x = x + vector * strength.unsqueeze(-1)  # at least fp32, as the scale is
    if args.tier is not None and args.gain is not None:
        gain = args.gain if factors.tier is None else args.gain * factors.tier
        x = x + args.tier[0] * gain.unsqueeze(-1)
    if args.clamp is not None:
        x = _clamped(x.to(wide), args, factors.clamps, clamps)
    if args.sae is not None and args.sae_set is not None and args.sae_clamp is not None and args.rows is not None:
        x = sae_delta(x.to(wide), SaeArgs(args.sae, args.sae_set, args.sae_clamp, args.rows), factors.clamps)
    return x


def _factors(h: Tensor, args: SteerArgs, wide: torch.dtype) -> Factors:
    factors, d = Factors.of(args.gates), args.decode
    site, row = scores(h, args, wide)
    if site is not None and args.probe_set is not None and d is not None:
        settings = args.probe_set[0]
        factors = guarded(factors, opened(site, settings), settings, d, True)
    if row is not None and args.rowprobe_set is not None and d is not None:
        settings = args.rowprobe_set[args.rows]
        factors = guarded(factors, opened(row, settings), settings, d, False)
    return factors


def _clamped(x: Tensor, args: SteerArgs, factor: Tensor | None, clamps: int) -> Tensor:
    assert args.clamp is not None
    assert args.clamp_set is not None
    directions = args.clamp.unflatten(0, (-1, clamps))[args.rows].to(x.dtype)
    low, high, strength = args.clamp_set.unflatten(0, (-1, clamps))[args.rows].unbind(-1)
    strength = strength if factor is None else strength * factor.unsqueeze(-1)
    dot = (directions * x.unsqueeze(-2)).sum(-1)
    pull = torch.where(strength == 0, torch.zeros_like(dot), strength * (torch.clamp(dot, low, high) - dot))
    corrected: Tensor = x + (directions * pull.unsqueeze(-1)).sum(-2)
    return corrected
