"""Triton code of the site template: stages, and the two kernels that are made of them.

`site_row` holds a row in registers, `site_wide` walks over a row in chunks, once for each reduction. The formula and
the arguments are those of `kernels/site.py`. All arithmetic is in fp32, to which every value is cast when it is loaded.

What every token reads (tables, probes, weights) asks to stay in the cache, what one token reads asks to leave it: in
decoding, a step's weights pass through the cache between two sites.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORMS = {"": 0, "rms": 1, "rms_wide": 2, "layer": 3}
BRANCH, CAPTURE, ADD, TIER, MONITOR, ROW_MONITOR, CLAMP = (tl.constexpr(1 << i) for i in range(7))
TILE = tl.constexpr(32768)
"""Most numbers of clamp directions that are held at once."""


@triton.jit
def _once(pointer, cols, H: tl.constexpr, BLOCK: tl.constexpr):
    """A row that only this token reads."""
    if H % BLOCK == 0:
        row = tl.load(pointer + cols, eviction_policy="evict_first")
    else:
        row = tl.load(pointer + cols, mask=cols < H, other=0.0, eviction_policy="evict_first")
    return row.to(tl.float32)


@triton.jit
def _shared(pointer, cols, H: tl.constexpr, BLOCK: tl.constexpr):
    """A row that other tokens or later steps read as well."""
    if H % BLOCK == 0:
        row = tl.load(pointer + cols, eviction_policy="evict_last")
    else:
        row = tl.load(pointer + cols, mask=cols < H, other=0.0, eviction_policy="evict_last")
    return row.to(tl.float32)


@triton.jit
def _write(pointer, cols, row, H: tl.constexpr, BLOCK: tl.constexpr):
    if H % BLOCK == 0:
        tl.store(pointer + cols, row)
    else:
        tl.store(pointer + cols, row, mask=cols < H)


@triton.jit
def _number(pointer):
    """A setting: small, and read by every token."""
    return tl.load(pointer, eviction_policy="evict_last")


@triton.jit
def _param(pointer, cols, H: tl.constexpr, BLOCK: tl.constexpr, there: tl.constexpr):
    """A weight or bias, where there is one."""
    return _shared(pointer, cols, H, BLOCK) if there else 0.0


@triton.jit
def _weighted(y, weight, bias, dtype: tl.constexpr, NORM: tl.constexpr, HAS: tl.constexpr, OFFSET: tl.constexpr):
    """Weight and bias of normalised numbers; bit 0 of HAS: a weight, bit 1: a bias."""
    if NORM == 1:
        y = y.to(dtype).to(tl.float32)
    if HAS & 1:
        y = y * (weight + OFFSET)
    if HAS & 2:
        y = y + bias
    return y


@triton.jit
def _normalised(x, cols, H: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """A whole row over its root mean square, or its centred form over its deviation."""
    if NORM == 3:
        x = x - tl.sum(x, 0) / H
        if H % BLOCK != 0:
            x = tl.where(cols < H, x, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / H + EPS)


@triton.jit
def _sum_of_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _opened(dot, threshold, sharpness):
    return tl.sigmoid(sharpness * (dot - threshold))


@triton.jit
def _site_gate(dot, probe_set):
    """Gate of the site's monitor, 1 while it is not active; and whether it gates rows."""
    threshold, sharpness = _number(probe_set), _number(probe_set + 1)
    gate_rows, active = _number(probe_set + 2), _number(probe_set + 3)
    return tl.where(active > 0, _opened(dot, threshold, sharpness), 1.0), gate_rows


@triton.jit
def _row_gate(dot, rowprobe_set, r):
    """Gate of the row's monitor; 1 for a row without one."""
    threshold, sharpness = _number(rowprobe_set + r * 2), _number(rowprobe_set + r * 2 + 1)
    return tl.where(threshold > -1e30, _opened(dot, threshold, sharpness), 1.0)


@triton.jit
def _pull(dot, low, high, strength):
    """strength * (clip(dot) - dot), and 0 where strength is 0, also for an infinite dot"""
    clipped = tl.where(dot < low, low, tl.where(dot > high, high, dot))
    return tl.where(strength == 0, 0.0, strength * (clipped - dot))


@triton.jit
def _bounds(clamp_set, at, K: tl.constexpr, KP: tl.constexpr):
    """Lower bounds, upper bounds and strengths (KP,) of a row's clamps."""
    k = tl.arange(0, KP)
    spot = clamp_set + (at + k) * 3
    low = tl.load(spot, mask=k < K, other=0.0, eviction_policy="evict_last")
    high = tl.load(spot + 1, mask=k < K, other=0.0, eviction_policy="evict_last")
    strength = tl.load(spot + 2, mask=k < K, other=0.0, eviction_policy="evict_last")
    return low, high, strength


@triton.jit
def _directions(clamp, at, cols, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """Directions (KP, BLOCK) of a row's clamps."""
    k = tl.arange(0, KP)
    spots = (at + k).to(tl.int64)[:, None] * H + cols[None, :]
    inside = (k < K)[:, None] & (cols < H)[None, :]
    return tl.load(clamp + spots, mask=inside, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def _clamped(x, clamp, clamp_set, at, cols, H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr):
    """x pulled into the bounds along each direction; all projections are of the x that comes in."""
    out = x
    if KP * BLOCK <= TILE:
        low, high, strength = _bounds(clamp_set, at, K, KP)
        directions = _directions(clamp, at, cols, H, K, KP)
        dot = tl.sum(directions * x[None, :], 1)
        out += tl.sum(directions * _pull(dot, low, high, strength)[:, None], 0)
    else:
        for i in tl.static_range(K):
            spot = clamp_set + (at + i) * 3
            direction = _shared(clamp + (at + i).to(tl.int64) * H, cols, H, BLOCK)
            dot = tl.sum(x * direction, 0)
            out += _pull(dot, _number(spot), _number(spot + 1), _number(spot + 2)) * direction
    return out


@triton.jit
def _any_clamp(clamp_set, at, K: tl.constexpr, KP: tl.constexpr):
    """Whether a row has a clamp."""
    k = tl.arange(0, KP)
    strength = tl.load(clamp_set + (at + k) * 3 + 2, mask=k < K, other=0.0, eviction_policy="evict_last")
    return tl.sum(tl.abs(strength), 0) != 0


@triton.jit
def _gates(site_dot, row_dot, probe_set, rowprobe_set, r, d, STAGES: tl.constexpr):
    """Factor of the tier's gain, and of the row's strength."""
    tier_gate = 1.0
    row_gate = 1.0
    if MONITOR & STAGES:
        g, gate_rows = _site_gate(site_dot, probe_set)
        tier_gate = g
        row_gate = d * gate_rows * g + (1 - d * gate_rows)
    if ROW_MONITOR & STAGES:
        row_gate *= d * _row_gate(row_dot, rowprobe_set, r) + (1 - d)
    return tier_gate, row_gate


@triton.jit
def _added(x, b, dtype: tl.constexpr, SCALE: tl.constexpr, EXACT: tl.constexpr):
    """The model's residual add, rounded as the model rounds it."""
    if SCALE != 1.0:
        b = (b * SCALE).to(dtype).to(tl.float32)
    x = x + b
    if not EXACT:
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def site_row(
    h, branch, branch_weight, branch_bias, capture, rows, table, scale, tier, gain, decode, probe, probe_set,
    rowprobe, rowprobe_set, clamp, clamp_set, weight, bias, out, normed, n,
    H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, STAGES: tl.constexpr,
    BRANCH_NORM: tl.constexpr, BRANCH_HAS: tl.constexpr, BRANCH_EPS: tl.constexpr, BRANCH_OFFSET: tl.constexpr,
    BRANCH_SCALE: tl.constexpr, EXACT: tl.constexpr, NORM: tl.constexpr, HAS: tl.constexpr, EPS: tl.constexpr,
    OFFSET: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """One token, its row in registers. With FEW, everything is loaded before anything waits for a reduction; else
    gates and clamps that are off are skipped."""
    dtype: tl.constexpr = h.dtype.element_ty
    cols = tl.arange(0, BLOCK)
    for t in range(tl.program_id(0), n, tl.num_programs(0)):
        at = tl.full((), H, tl.int64) * t  # offsets may be beyond 2**31
        r = _number(rows + t) if (ADD | ROW_MONITOR | CLAMP) & STAGES else 0
        line = tl.full((), H, tl.int64) * r
        x = _once(h + at, cols, H, BLOCK)
        if BRANCH & STAGES:
            b = _once(branch + at, cols, H, BLOCK)
        d = _number(decode + t) if (MONITOR | ROW_MONITOR) & STAGES else 0.0
        tier_gain = _number(gain + t) if TIER & STAGES else 0.0
        if ADD & STAGES:
            strength = _number(scale + r)
            vector = _shared(table + line, cols, H, BLOCK)
        if FEW:
            p = _param(probe, cols, H, BLOCK, MONITOR & STAGES)
            q = _param(rowprobe + line, cols, H, BLOCK, ROW_MONITOR & STAGES)
            v = _param(tier, cols, H, BLOCK, TIER & STAGES)
            w = _param(weight, cols, H, BLOCK, HAS & 1)
        if BRANCH & STAGES:
            if BRANCH_NORM != 0:
                b = _normalised(b, cols, H, BLOCK, BRANCH_NORM, BRANCH_EPS)
                bw = _param(branch_weight, cols, H, BLOCK, BRANCH_HAS & 1)
                bb = _param(branch_bias, cols, H, BLOCK, BRANCH_HAS & 2)
                b = _weighted(b, bw, bb, dtype, BRANCH_NORM, BRANCH_HAS, BRANCH_OFFSET).to(dtype).to(tl.float32)
            x = _added(x, b, dtype, BRANCH_SCALE, EXACT)
        if CAPTURE & STAGES:
            _write(capture + at, cols, x.to(dtype), H, BLOCK)
        if not FEW:
            p = _param(probe, cols, H, BLOCK, MONITOR & STAGES)
            q = 0.0
            if ROW_MONITOR & STAGES:
                if d > 0:
                    q = _shared(rowprobe + line, cols, H, BLOCK)
                else:
                    q = tl.zeros([BLOCK], tl.float32)
        site_dot = 0.0
        row_dot = 0.0
        if (MONITOR & STAGES) and (ROW_MONITOR & STAGES):
            site_dot, row_dot = tl.reduce((x * p, x * q), 0, _sum_of_two)
        elif MONITOR & STAGES:
            site_dot = tl.sum(x * p, 0)
        elif ROW_MONITOR & STAGES:
            row_dot = tl.sum(x * q, 0)
        tier_gate, row_gate = _gates(site_dot, row_dot, probe_set, rowprobe_set, r, d, STAGES)
        if ADD & STAGES:
            x += vector * (strength * row_gate)
        if TIER & STAGES:
            if not FEW:
                v = _shared(tier, cols, H, BLOCK)
            x += v * (tier_gain * tier_gate)
        if CLAMP & STAGES:
            if FEW:
                x = _clamped(x, clamp, clamp_set, r * K, cols, H, BLOCK, K, KP)
            elif _any_clamp(clamp_set, r * K, K, KP):
                x = _clamped(x, clamp, clamp_set, r * K, cols, H, BLOCK, K, KP)
        steered = x.to(dtype)
        _write(out + at, cols, steered, H, BLOCK)
        if NORM != 0:
            y = _normalised(x if EXACT else steered.to(tl.float32), cols, H, BLOCK, NORM, EPS)
            if not FEW:
                w = _param(weight, cols, H, BLOCK, HAS & 1)
            y = _weighted(y, w, _param(bias, cols, H, BLOCK, HAS & 2), dtype, NORM, HAS, OFFSET)
            _write(normed + at, cols, y.to(dtype), H, BLOCK)


@triton.jit
def _moments(pointer, H: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """Mean and inverse deviation of a stored row; the mean is 0 in an RMSNorm."""
    mean = 0.0
    if NORM == 3:
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, H, BLOCK):
            total += _shared(pointer, start + tl.arange(0, BLOCK), H, BLOCK)
        mean = tl.sum(total, 0) / H
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = tl.where(cols < H, _shared(pointer, cols, H, BLOCK) - mean, 0.0)
        squares += x * x
    return mean, tl.rsqrt(tl.sum(squares, 0) / H + EPS)


@triton.jit
def _value(
    h, branch, branch_weight, branch_bias, cols, mean, inverse, dtype: tl.constexpr, H: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, HAS: tl.constexpr, OFFSET: tl.constexpr,
    SCALE: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A chunk of the pristine value."""
    x = _shared(h, cols, H, BLOCK)
    if BRANCH & STAGES:
        b = _shared(branch, cols, H, BLOCK)
        if NORM != 0:
            w = _param(branch_weight, cols, H, BLOCK, HAS & 1)
            bias = _param(branch_bias, cols, H, BLOCK, HAS & 2)
            b = _weighted((b - mean) * inverse, w, bias, dtype, NORM, HAS, OFFSET).to(dtype).to(tl.float32)
        x = _added(x, b, dtype, SCALE, EXACT)
    return x


@triton.jit
def _moved(x, vector, strength, tier, tier_gain, cols, H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """A chunk with the row's vector and the tier."""
    if ADD & STAGES:
        x += _shared(vector, cols, H, BLOCK) * strength
    if TIER & STAGES:
        x += _shared(tier, cols, H, BLOCK) * tier_gain
    return x


@triton.jit
def site_wide(
    h, branch, branch_weight, branch_bias, capture, rows, table, scale, tier, gain, decode, probe, probe_set,
    rowprobe, rowprobe_set, clamp, clamp_set, weight, bias, out, normed, n,
    H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, STAGES: tl.constexpr,
    BRANCH_NORM: tl.constexpr, BRANCH_HAS: tl.constexpr, BRANCH_EPS: tl.constexpr, BRANCH_OFFSET: tl.constexpr,
    BRANCH_SCALE: tl.constexpr, EXACT: tl.constexpr, NORM: tl.constexpr, HAS: tl.constexpr, EPS: tl.constexpr,
    OFFSET: tl.constexpr, FEW: tl.constexpr,
):  # fmt: skip
    """One token, its row in chunks: a pass for the branch's norm, the probes, the clamps, the write and the norm."""
    dtype: tl.constexpr = h.dtype.element_ty
    t = tl.program_id(0)
    at = tl.full((), H, tl.int64) * t
    r = _number(rows + t) if (ADD | ROW_MONITOR | CLAMP) & STAGES else 0
    line = tl.full((), H, tl.int64) * r
    d = _number(decode + t) if (MONITOR | ROW_MONITOR) & STAGES else 0.0
    tier_gain = _number(gain + t) if TIER & STAGES else 0.0
    strength = _number(scale + r) if ADD & STAGES else 0.0
    mean, inverse = 0.0, 1.0
    if BRANCH_NORM != 0:
        mean, inverse = _moments(branch + at, H, BLOCK, BRANCH_NORM, BRANCH_EPS)
    site_dots = tl.zeros([BLOCK], tl.float32)
    row_dots = tl.zeros([BLOCK], tl.float32)
    if (CAPTURE | MONITOR | ROW_MONITOR) & STAGES:
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = _value(h + at, branch + at, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES,
                       BRANCH_NORM, BRANCH_HAS, BRANCH_OFFSET, BRANCH_SCALE, EXACT)  # fmt: skip
            if CAPTURE & STAGES:
                _write(capture + at, cols, x.to(dtype), H, BLOCK)
            if MONITOR & STAGES:
                site_dots += x * _shared(probe, cols, H, BLOCK)
            if ROW_MONITOR & STAGES:
                row_dots += x * _shared(rowprobe + line, cols, H, BLOCK)
    tier_gate, row_gate = _gates(tl.sum(site_dots, 0), tl.sum(row_dots, 0), probe_set, rowprobe_set, r, d, STAGES)
    strength *= row_gate
    tier_gain *= tier_gate
    # The steered value, and the projections that clamps bound; unrounded, so it is made again in the next pass.
    dots = tl.zeros([KP], tl.float32)
    if CLAMP & STAGES:
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = _value(h + at, branch + at, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES,
                       BRANCH_NORM, BRANCH_HAS, BRANCH_OFFSET, BRANCH_SCALE, EXACT)  # fmt: skip
            x = _moved(x, table + line, strength, tier, tier_gain, cols, H, BLOCK, STAGES)
            dots += tl.sum(_directions(clamp, r * K, cols, H, K, KP) * x[None, :], 1)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _value(h + at, branch + at, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES,
                   BRANCH_NORM, BRANCH_HAS, BRANCH_OFFSET, BRANCH_SCALE, EXACT)  # fmt: skip
        x = _moved(x, table + line, strength, tier, tier_gain, cols, H, BLOCK, STAGES)
        if CLAMP & STAGES:
            low, high, pull = _bounds(clamp_set, r * K, K, KP)
            x += tl.sum(_directions(clamp, r * K, cols, H, K, KP) * _pull(dots, low, high, pull)[:, None], 0)
        _write(out + at, cols, x.to(dtype), H, BLOCK)
    if NORM != 0:
        tl.debug_barrier()  # the norm reads what this program wrote
        mean, inverse = _moments(out + at, H, BLOCK, NORM, EPS)
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            y = (_shared(out + at, cols, H, BLOCK) - mean) * inverse
            w = _param(weight, cols, H, BLOCK, HAS & 1)
            y = _weighted(y, w, _param(bias, cols, H, BLOCK, HAS & 2), dtype, NORM, HAS, OFFSET)
            _write(normed + at, cols, y.to(dtype), H, BLOCK)
