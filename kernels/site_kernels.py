"""Triton code of the site template: stages, and the two kernels that are made of them.

`site_row` holds a row in registers, `site_wide` walks over a row in chunks, once for each reduction. The formula and
the arguments are those of `kernels/site.py`. All arithmetic is in fp32, to which every value is cast when it is loaded.

What is read again asks to stay in the cache: in decoding, a step's weights pass through it between two sites.
"""

from __future__ import annotations

import triton
import triton.language as tl

NORMS = {"": 0, "rms": 1, "rms_wide": 2, "layer": 3}
WEIGHT, BIAS = 4, 8
"""Added to the kind of a norm that has a weight, or a bias."""
BRANCH, CAPTURE, ADD, TIER, MONITOR, ROW_MONITOR, CLAMP, FEW, EXACT = (tl.constexpr(1 << i) for i in range(9))
"""Stages of a site; few tokens; whether the sum and the norm's input are left unrounded."""
TILE = tl.constexpr(32768)
"""Most numbers of clamp directions that are read at once."""
ONCE, SHARED = tl.constexpr("evict_first"), tl.constexpr("evict_last")
"""Cache policy of what one token reads, and of what other tokens or later steps read as well."""


@triton.jit
def _read(pointer, cols, H: tl.constexpr, BLOCK: tl.constexpr, POLICY: tl.constexpr):
    if H % BLOCK == 0:
        row = tl.load(pointer + cols, eviction_policy=POLICY)
    else:
        row = tl.load(pointer + cols, mask=cols < H, other=0.0, eviction_policy=POLICY)
    return row.to(tl.float32)


@triton.jit
def _once(pointer, cols, H: tl.constexpr, BLOCK: tl.constexpr):
    """A row that only this token reads."""
    return _read(pointer, cols, H, BLOCK, ONCE)


@triton.jit
def _shared(pointer, cols, H: tl.constexpr, BLOCK: tl.constexpr):
    """A row that other tokens or later steps read as well."""
    return _read(pointer, cols, H, BLOCK, SHARED)


@triton.jit
def _write(pointer, cols, row, H: tl.constexpr, BLOCK: tl.constexpr):
    if H % BLOCK == 0:
        tl.store(pointer + cols, row)
    else:
        tl.store(pointer + cols, row, mask=cols < H)


@triton.jit
def _number(pointer):
    return tl.load(pointer, eviction_policy=SHARED)


@triton.jit
def _param(pointer, cols, H: tl.constexpr, BLOCK: tl.constexpr, there: tl.constexpr):
    """A weight or bias, where there is one."""
    return _shared(pointer, cols, H, BLOCK) if there else 0.0


@triton.jit
def _weighted(y, weight, bias, dtype: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr):
    """Weight and bias of normalised numbers."""
    if NORM % 4 == 1:
        y = y.to(dtype).to(tl.float32)
    if NORM & 4:
        y = y * (weight + OFFSET)
    if NORM & 8:
        y = y + bias
    return y


@triton.jit
def _normalised(x, cols, H: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """A whole row over its root mean square, or its centred form over its deviation."""
    if NORM % 4 == 3:
        x = x - tl.sum(x, 0) / H
        if H % BLOCK != 0:
            x = tl.where(cols < H, x, 0.0)
    return x * tl.rsqrt(tl.sum(x * x, 0) / H + EPS)


@triton.jit
def _sum_of_two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


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
    low = tl.load(spot, mask=k < K, other=0.0, eviction_policy=SHARED)
    high = tl.load(spot + 1, mask=k < K, other=0.0, eviction_policy=SHARED)
    strength = tl.load(spot + 2, mask=k < K, other=0.0, eviction_policy=SHARED)
    return low, high, strength


@triton.jit
def _directions(clamp, at, cols, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, AGAIN: tl.constexpr):
    """Directions (KP, BLOCK) of a row's clamps. AGAIN: of another cache policy, as the compiler makes one of two equal
    loads and keeps it in registers."""
    k = tl.arange(0, KP)
    spots = (at + k).to(tl.int64)[:, None] * H + cols[None, :]
    inside = (k < K)[:, None] & (cols < H)[None, :]
    if AGAIN:
        rows = tl.load(clamp + spots, mask=inside, other=0.0)
    else:
        rows = tl.load(clamp + spots, mask=inside, other=0.0, eviction_policy=SHARED)
    return rows.to(tl.float32)


@triton.jit
def _clamped(x, clamp, clamp_set, at, low, high, strength, cols, H: tl.constexpr, BLOCK: tl.constexpr,
             K: tl.constexpr, KP: tl.constexpr):  # fmt: skip
    """x pulled into the bounds along each direction; all projections are of the x that comes in.

    Directions are read again for the move: the registers that would keep them are worth more as room for other
    programs.
    """
    if KP * BLOCK <= TILE:
        dot = tl.sum(_directions(clamp, at, cols, H, K, KP, False) * x[None, :], 1)
        move = _pull(dot, low, high, strength)
        out = x + tl.sum(_directions(clamp, at, cols, H, K, KP, True) * move[:, None], 0)
    else:
        out = x
        for i in tl.static_range(K):
            spot = clamp_set + (at + i) * 3
            direction = _shared(clamp + (at + i).to(tl.int64) * H, cols, H, BLOCK)
            dot = tl.sum(x * direction, 0)
            out += _pull(dot, _number(spot), _number(spot + 1), _number(spot + 2)) * direction
    return out


@triton.jit
def _settings(probe_set, rowprobe_set, r, STAGES: tl.constexpr):
    """Threshold, sharpness, whether rows are gated and whether it is active, of the site's monitor; threshold and
    sharpness of the row's."""
    threshold, sharpness, gate_rows, active, row_threshold, row_sharpness = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    if MONITOR & STAGES:
        threshold, sharpness = _number(probe_set), _number(probe_set + 1)
        gate_rows, active = _number(probe_set + 2), _number(probe_set + 3)
    if ROW_MONITOR & STAGES:
        row_threshold, row_sharpness = _number(rowprobe_set + r * 2), _number(rowprobe_set + r * 2 + 1)
    return threshold, sharpness, gate_rows, active, row_threshold, row_sharpness


@triton.jit
def _gates(scores, settings, d, STAGES: tl.constexpr):
    """Factor of the tier's gain, and of the row's strength. A monitor that is not active, and a row without one, have
    open gates."""
    site_dot, row_dot = scores
    threshold, sharpness, gate_rows, active, row_threshold, row_sharpness = settings
    tier_gate = 1.0
    row_gate = 1.0
    if MONITOR & STAGES:
        g = tl.where(active > 0, tl.sigmoid(sharpness * (site_dot - threshold)), 1.0)
        tier_gate = g
        row_gate = d * gate_rows * g + (1 - d * gate_rows)
    if ROW_MONITOR & STAGES:
        g = tl.where(row_threshold > -1e30, tl.sigmoid(row_sharpness * (row_dot - row_threshold)), 1.0)
        row_gate *= d * g + (1 - d)
    return tier_gate, row_gate


@triton.jit
def _projections(x, p, q, STAGES: tl.constexpr):
    """Scores of the site's and of the row's probe, in one reduction."""
    site_dot = 0.0
    row_dot = 0.0
    if (MONITOR & STAGES) and (ROW_MONITOR & STAGES):
        site_dot, row_dot = tl.reduce((x * p, x * q), 0, _sum_of_two)
    elif MONITOR & STAGES:
        site_dot = tl.sum(x * p, 0)
    elif ROW_MONITOR & STAGES:
        row_dot = tl.sum(x * q, 0)
    return site_dot, row_dot


@triton.jit
def _added(x, b, dtype: tl.constexpr, SCALE: tl.constexpr, STAGES: tl.constexpr):
    """The model's residual add, rounded as the model rounds it."""
    if SCALE != 1.0:
        b = (b * SCALE).to(dtype).to(tl.float32)
    x = x + b
    if not (EXACT & STAGES):
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def _summed(x, b, weight, bias, cols, dtype: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
            NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr):  # fmt: skip
    """The stream with the branch behind its own norm, where there is a branch."""
    if NORM != 0:
        b = _normalised(b, cols, H, BLOCK, NORM, EPS)
        w, c = _param(weight, cols, H, BLOCK, NORM & 4), _param(bias, cols, H, BLOCK, NORM & 8)
        b = _weighted(b, w, c, dtype, NORM, OFFSET).to(dtype).to(tl.float32)
    return _added(x, b, dtype, SCALE, STAGES) if BRANCH & STAGES else x


@triton.jit
def site_row(
    h, branch, branch_weight, branch_bias, capture, rows, table, scale, tier, gain, decode, probe, probe_set,
    rowprobe, rowprobe_set, clamp, clamp_set, weight, bias, out, normed,
    H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, BRANCH_NORM: tl.constexpr,
    BRANCH_EPS: tl.constexpr, BRANCH_OFFSET: tl.constexpr, BRANCH_SCALE: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One token, its row in registers. With FEW, all loads come first; else what is off is not loaded."""
    dtype: tl.constexpr = h.dtype.element_ty
    GATED: tl.constexpr = ((MONITOR | ROW_MONITOR) & STAGES) != 0
    KP: tl.constexpr = 1 if K < 2 else 2 if K < 3 else 4 if K < 5 else 8 if K < 9 else 16
    FIRST: tl.constexpr = (FEW & STAGES) != 0
    TILED: tl.constexpr = FIRST and KP * BLOCK <= TILE
    t = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    at = tl.full((), H, tl.int64) * t  # may be beyond 2**31
    r = _number(rows + t) if (ADD | ROW_MONITOR | CLAMP) & STAGES else 0
    line = tl.full((), H, tl.int64) * r
    x = _once(h + at, cols, H, BLOCK)
    b = _once(branch + at, cols, H, BLOCK) if BRANCH & STAGES else 0.0
    d = _number(decode + t) if GATED else 0.0
    tier_gain = _number(gain + t) if TIER & STAGES else 0.0
    strength = _number(scale + r) if ADD & STAGES else 0.0
    vector = _param(table + line, cols, H, BLOCK, (ADD & STAGES) and (FIRST or not GATED))
    settings = _settings(probe_set, rowprobe_set, r, STAGES)
    if CLAMP & STAGES:
        low, high, pull = _bounds(clamp_set, r * K, K, KP)
        directions = _directions(clamp, r * K, cols, H, K, KP, False) if TILED else 0.0
    if FIRST:
        p = _param(probe, cols, H, BLOCK, MONITOR & STAGES)
        q = _param(rowprobe + line, cols, H, BLOCK, ROW_MONITOR & STAGES)
        v = _param(tier, cols, H, BLOCK, TIER & STAGES)
        w = _param(weight, cols, H, BLOCK, NORM & 4)
    x = _summed(x, b, branch_weight, branch_bias, cols, dtype, H, BLOCK, STAGES, BRANCH_NORM, BRANCH_EPS,
                BRANCH_OFFSET, BRANCH_SCALE)  # fmt: skip
    if CAPTURE & STAGES:
        _write(capture + at, cols, x.to(dtype), H, BLOCK)
    if not FIRST:
        p = _param(probe, cols, H, BLOCK, MONITOR & STAGES)
        q = tl.zeros([BLOCK], tl.float32)
        if ROW_MONITOR & STAGES:
            if d > 0:
                q = _shared(rowprobe + line, cols, H, BLOCK)
    tier_gate, row_gate = _gates(_projections(x, p, q, STAGES), settings, d, STAGES)
    if ADD & STAGES:
        x += (vector if FIRST or not GATED else _shared(table + line, cols, H, BLOCK)) * (strength * row_gate)
    if TIER & STAGES:
        x += (v if FIRST else _shared(tier, cols, H, BLOCK)) * (tier_gain * tier_gate)
    if CLAMP & STAGES:
        if TILED:
            move = _pull(tl.sum(directions * x[None, :], 1), low, high, pull)
            x += tl.sum(directions * move[:, None], 0)
        elif tl.sum(tl.abs(pull), 0) != 0:
            x = _clamped(x, clamp, clamp_set, r * K, low, high, pull, cols, H, BLOCK, K, KP)
    _write(out + at, cols, x.to(dtype), H, BLOCK)
    if NORM != 0:
        y = _normalised(x if EXACT & STAGES else x.to(dtype).to(tl.float32), cols, H, BLOCK, NORM, EPS)
        w = w if FIRST else _param(weight, cols, H, BLOCK, NORM & 4)
        y = _weighted(y, w, _param(bias, cols, H, BLOCK, NORM & 8), dtype, NORM, OFFSET)
        _write(normed + at, cols, y.to(dtype), H, BLOCK)


@triton.jit
def _moments(pointer, H: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr):
    """Mean and inverse deviation of a stored row; the mean is 0 in an RMSNorm."""
    mean = 0.0
    if NORM % 4 == 3:
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
    BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    """A chunk of the pristine value."""
    x = _shared(h, cols, H, BLOCK)
    if BRANCH & STAGES:
        b = _shared(branch, cols, H, BLOCK)
        if NORM != 0:
            w = _param(branch_weight, cols, H, BLOCK, NORM & 4)
            bias = _param(branch_bias, cols, H, BLOCK, NORM & 8)
            b = _weighted((b - mean) * inverse, w, bias, dtype, NORM, OFFSET).to(dtype).to(tl.float32)
        x = _added(x, b, dtype, SCALE, STAGES)
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
def _stored_and_scored(
    h, branch, branch_weight, branch_bias, capture, probe, rowprobe, mean, inverse, dtype: tl.constexpr,
    H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr,
    SCALE: tl.constexpr,
):  # fmt: skip
    """The pass over the pristine value: its capture, and the scores of both probes."""
    site_dots = tl.zeros([BLOCK], tl.float32)
    row_dots = tl.zeros([BLOCK], tl.float32)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _value(h, branch, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES, NORM, OFFSET,
                   SCALE)  # fmt: skip
        if CAPTURE & STAGES:
            _write(capture, cols, x.to(dtype), H, BLOCK)
        if MONITOR & STAGES:
            site_dots += x * _shared(probe, cols, H, BLOCK)
        if ROW_MONITOR & STAGES:
            row_dots += x * _shared(rowprobe, cols, H, BLOCK)
    return tl.sum(site_dots, 0), tl.sum(row_dots, 0)


@triton.jit
def site_wide(
    h, branch, branch_weight, branch_bias, capture, rows, table, scale, tier, gain, decode, probe, probe_set,
    rowprobe, rowprobe_set, clamp, clamp_set, weight, bias, out, normed,
    H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, STAGES: tl.constexpr, BRANCH_NORM: tl.constexpr,
    BRANCH_EPS: tl.constexpr, BRANCH_OFFSET: tl.constexpr, BRANCH_SCALE: tl.constexpr, NORM: tl.constexpr,
    EPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One token, its row in chunks: a pass for the branch's norm, the probes, the clamps, the write and the norm."""
    dtype: tl.constexpr = h.dtype.element_ty
    KP: tl.constexpr = 1 if K < 2 else 2 if K < 3 else 4 if K < 5 else 8 if K < 9 else 16
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
    scores = 0.0, 0.0
    if (CAPTURE | MONITOR | ROW_MONITOR) & STAGES:
        scores = _stored_and_scored(
            h + at, branch + at, branch_weight, branch_bias, capture + at, probe, rowprobe + line, mean, inverse, dtype,
            H, BLOCK, STAGES, BRANCH_NORM, BRANCH_OFFSET, BRANCH_SCALE,
        )  # fmt: skip
    settings = _settings(probe_set, rowprobe_set, r, STAGES)
    tier_gate, row_gate = _gates(scores, settings, d, STAGES)
    strength *= row_gate
    tier_gain *= tier_gate
    # The steered value, and the projections that clamps bound; unrounded, so it is made again in the next pass.
    dots = tl.zeros([KP], tl.float32)
    if CLAMP & STAGES:
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = _value(h + at, branch + at, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES,
                       BRANCH_NORM, BRANCH_OFFSET, BRANCH_SCALE)  # fmt: skip
            x = _moved(x, table + line, strength, tier, tier_gain, cols, H, BLOCK, STAGES)
            dots += tl.sum(_directions(clamp, r * K, cols, H, K, KP, False) * x[None, :], 1)
    for start in range(0, H, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        x = _value(h + at, branch + at, branch_weight, branch_bias, cols, mean, inverse, dtype, H, BLOCK, STAGES,
                   BRANCH_NORM, BRANCH_OFFSET, BRANCH_SCALE)  # fmt: skip
        x = _moved(x, table + line, strength, tier, tier_gain, cols, H, BLOCK, STAGES)
        if CLAMP & STAGES:
            low, high, pull = _bounds(clamp_set, r * K, K, KP)
            moves = _pull(dots, low, high, pull)[:, None]
            x += tl.sum(_directions(clamp, r * K, cols, H, K, KP, False) * moves, 0)
        _write(out + at, cols, x.to(dtype), H, BLOCK)
    if NORM != 0:
        tl.debug_barrier()  # the norm reads what this program wrote
        mean, inverse = _moments(out + at, H, BLOCK, NORM, EPS)
        for start in range(0, H, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            y = (_shared(out + at, cols, H, BLOCK) - mean) * inverse
            w = _param(weight, cols, H, BLOCK, NORM & 4)
            y = _weighted(y, w, _param(bias, cols, H, BLOCK, NORM & 8), dtype, NORM, OFFSET)
            _write(normed + at, cols, y.to(dtype), H, BLOCK)
