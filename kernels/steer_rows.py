"""Steering of one site's value: gates, additive rows, dynamic tier, directional clamps.

For token t with row r, all on the pristine value h::

    g     = sigmoid(sharpness * (h . probe - threshold))            monitor of the site; 1 while it is not active
    q     = sigmoid(sharpness[r] * (h . probe[r] - threshold[r]))   monitor of the row; 1 for a row without one
    gain' = gain[t] * g
    gate  = (gate_rows ? d*g + 1-d : 1) * (d*q + 1-d)               d = 1 for decoded tokens, 0 in prefill
    x     = h + T[r] * scale[r] * gate + V * gain'
    p_k   = x . v[r, k]
    h'    = round(x + sum_k strength[r, k] * (clip(p_k, low, high) - p_k) * v[r, k])

Arithmetic is in fp32 (fp64 where the stream is fp64) with one rounding to the stream dtype at the end. A term whose
tensors are None is left out. The functions here are the reference, and the lowering by plain operators, which Inductor
fuses. `kernels/site.py` does the same in one Triton kernel together with the add and the norm around the site.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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
    """Threshold, sharpness, whether rows are gated, whether it is active (1, 4), fp32."""
    rowprobe: Tensor | None = None
    """Direction of each row's monitor (R, H), fp32."""
    rowprobe_set: Tensor | None = None
    """Threshold and sharpness of each row's monitor (R, 2), fp32."""
    clamp: Tensor | None = None
    """Unit directions (R * K, H)."""
    clamp_set: Tensor | None = None
    """Lower bound, upper bound and strength of each direction (R * K, 3), fp32."""


def steer_rows(h: Tensor, args: SteerArgs, dtype: torch.dtype, clamps: int = 0) -> Tensor:
    """Steer a value.

    Args:
        h: stream value (..., H) of dtype ``dtype``.
        args: the site's data; terms without tensors are left out.
        clamps: K, directions of each row.

    Returns:
        Tensor like ``h``.
    """
    wide = torch.promote_types(dtype, torch.float32)
    return _steered(h, args, wide, clamps).to(dtype)


def steer_rows_fp64(h: Tensor, args: SteerArgs, clamps: int = 0) -> Tensor:
    """The formula in fp64, unrounded: what every lowering is checked against."""
    given = [t.double() if t is not None and t.is_floating_point() else t for t in args]
    return _steered(h.double(), SteerArgs(*given), torch.float64, clamps)


def _steered(h: Tensor, args: SteerArgs, wide: torch.dtype, clamps: int) -> Tensor:
    gain, gate = _gates(h, args, wide)
    x = h
    if args.table is not None and args.scale is not None:
        vector, strength = args.table[args.rows], args.scale[args.rows]
        strength = strength if gate is None else strength * gate
        x = x + vector * strength.unsqueeze(-1)  # at least fp32, as the scale is
    if args.tier is not None and gain is not None:
        x = x + args.tier[0] * gain.unsqueeze(-1)
    return x if args.clamp is None else _clamped(x.to(wide), args, wide, clamps)


def _gates(h: Tensor, args: SteerArgs, wide: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Gain of the tier and gate of the row for each token, None where nothing changes them."""
    gain, gate, d = args.gain, None, args.decode
    if args.probe is not None and args.probe_set is not None and d is not None:
        threshold, sharpness, gate_rows, active = args.probe_set[0].unbind(0)
        dot = (h.to(wide) * args.probe[0]).sum(-1)
        opened = torch.sigmoid(sharpness * (dot - threshold))
        opened = torch.where(active > 0, opened, torch.ones_like(opened))
        gain = None if gain is None else gain * opened
        masked = d * gate_rows
        gate = masked * opened + (1 - masked)
    if args.rowprobe is not None and args.rowprobe_set is not None and d is not None:
        threshold, sharpness = args.rowprobe_set[args.rows].unbind(-1)
        dot = (h.to(wide) * args.rowprobe[args.rows]).sum(-1)
        opened = d * torch.sigmoid(sharpness * (dot - threshold)) + (1 - d)
        gate = opened if gate is None else gate * opened
    return gain, gate


def _clamped(x: Tensor, args: SteerArgs, wide: torch.dtype, clamps: int) -> Tensor:
    assert args.clamp is not None
    assert args.clamp_set is not None
    directions = args.clamp.unflatten(0, (-1, clamps))[args.rows].to(wide)
    low, high, strength = args.clamp_set.unflatten(0, (-1, clamps))[args.rows].unbind(-1)
    dot = (directions * x.unsqueeze(-2)).sum(-1)
    pull = torch.where(strength == 0, torch.zeros_like(dot), strength * (torch.clamp(dot, low, high) - dot))
    corrected: Tensor = x + (directions * pull.unsqueeze(-1)).sum(-2)
    return corrected
