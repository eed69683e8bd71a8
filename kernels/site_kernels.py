"""Triton code of the site template: its stages, and the kernel that holds a row in registers.

`kernels/site_wide.py` walks over a row in chunks, once for each reduction. The formula and
the arguments are those of `kernels/site.py`. All arithmetic is in fp32, to which every value is cast when it is loaded.

What is read again asks to stay in the cache: in decoding, a step's weights pass through it between two sites.
"""

from __future__ import annotations

import triton
import triton.language as tl

from steer_compile.kernels.gate_kernels import gates_in_front, guarded, opened, read_number, settings_of
from steer_compile.kernels.sae_stage import count_of, read_codes, steered_by_features

NORMS = {"": 0, "rms": 1, "rms_wide": 2, "layer": 3}
WEIGHT, BIAS = 4, 8
"""Added to the kind of a norm that has a weight, or a bias."""
BRANCH, CAPTURE, ADD, TIER, MONITOR, ROW_MONITOR, CLAMP, FEW, EXACT, SCORE, GATES, PACKED, SAE = (
    tl.constexpr(1 << i) for i in range(13)
)
"""Stages of a site; few tokens; whether the sum and the norm's input are left unrounded; whether scores are stored,
whether there are gates of sites in front, whether captures are of chosen tokens, clamped features of autoencoders."""
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
def read_shared(pointer, cols, H: tl.constexpr, BLOCK: tl.constexpr):
    """A row that other tokens or later steps read as well."""
    return _read(pointer, cols, H, BLOCK, SHARED)


@triton.jit
def write_row(pointer, cols, row, H: tl.constexpr, BLOCK: tl.constexpr):
    if H % BLOCK == 0:
        tl.store(pointer + cols, row)
    else:
        tl.store(pointer + cols, row, mask=cols < H)


@triton.jit
def capture_place(capture_rows, choice, t, at, H: tl.constexpr, STAGES: tl.constexpr):
    """Where a token's row of a capture begins, -1 for a token that is not chosen."""
    if PACKED & STAGES:
        row = read_number(capture_rows + t * 2)
        chosen = (row >= 0) & (read_number(choice + read_number(capture_rows + t * 2 + 1)) != 0)
        at = tl.where(chosen, tl.full((), H, tl.int64) * row, -1)
    return at


@triton.jit
def write_capture(capture, place, cols, row, H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    if PACKED & STAGES:
        if place >= 0:
            write_row(capture + place, cols, row, H, BLOCK)
    elif CAPTURE & STAGES:
        write_row(capture + place, cols, row, H, BLOCK)


@triton.jit
def read_param(pointer, cols, H: tl.constexpr, BLOCK: tl.constexpr, there: tl.constexpr):
    """A weight or bias, where there is one."""
    return read_shared(pointer, cols, H, BLOCK) if there else 0.0


@triton.jit
def weigh(y, weight, bias, dtype: tl.constexpr, NORM: tl.constexpr, OFFSET: tl.constexpr):
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
def pull_of(dot, low, high, strength):
    """strength * (clip(dot) - dot), and 0 where strength is 0, also for an infinite dot"""
    clipped = tl.where(dot < low, low, tl.where(dot > high, high, dot))
    return tl.where(strength == 0, 0.0, strength * (clipped - dot))


@triton.jit
def read_bounds(clamp_set, at, K: tl.constexpr, KP: tl.constexpr):
    """Lower bounds, upper bounds and strengths (KP,) of a row's clamps."""
    k = tl.arange(0, KP)
    spot = clamp_set + (at + k) * 3
    low = tl.load(spot, mask=k < K, other=0.0, eviction_policy=SHARED)
    high = tl.load(spot + 1, mask=k < K, other=0.0, eviction_policy=SHARED)
    strength = tl.load(spot + 2, mask=k < K, other=0.0, eviction_policy=SHARED)
    return low, high, strength


@triton.jit
def read_directions(clamp, at, cols, H: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, AGAIN: tl.constexpr):
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
def _clamped(x, clamp, clamp_set, at, low, high, strength, factor, cols, H: tl.constexpr, BLOCK: tl.constexpr,
             K: tl.constexpr, KP: tl.constexpr):  # fmt: skip
    """x pulled into the bounds along each direction; all projections are of the x that comes in.

    Directions are read again for the move: the registers that would keep them are worth more as room for other
    programs.
    """
    if KP * BLOCK <= TILE:
        dot = tl.sum(read_directions(clamp, at, cols, H, K, KP, False) * x[None, :], 1)
        move = pull_of(dot, low, high, strength)
        out = x + tl.sum(read_directions(clamp, at, cols, H, K, KP, True) * move[:, None], 0)
    else:
        out = x
        for i in tl.static_range(K):
            spot = clamp_set + (at + i) * 3
            direction = read_shared(clamp + (at + i).to(tl.int64) * H, cols, H, BLOCK)
            dot = tl.sum(x * direction, 0)
            out += pull_of(dot, read_number(spot), read_number(spot + 1), read_number(spot + 2) * factor) * direction
    return out


@triton.jit
def read_monitors(probe_set, rowprobe_set, r, STAGES: tl.constexpr):
    """Settings of the site's and of the row's monitor."""
    site = settings_of(probe_set, (MONITOR & STAGES) != 0)
    row = settings_of(rowprobe_set + r * 8, (ROW_MONITOR & STAGES) != 0)
    return site, row


@triton.jit
def behind_monitors(dots, monitors, factors, d, STAGES: tl.constexpr):
    """Factors of tier, rows and clamps behind this site's monitors."""
    site_dot, row_dot = dots
    site, row = monitors
    if MONITOR & STAGES:
        factors = guarded(factors, opened(site_dot, site, 0.0), site, d, True)
    if ROW_MONITOR & STAGES:
        factors = guarded(factors, opened(row_dot, row, 0.0), row, d, False)
    return factors


@triton.jit
def store_scores(score, t, dots, STAGES: tl.constexpr):
    if SCORE & STAGES:
        site_dot, row_dot = dots
        tl.store(score + t * 2, site_dot)
        tl.store(score + t * 2 + 1, row_dot)


@triton.jit
def _probes(probe, rowprobe, cols, d, H: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """The probes that a token needs: that of its row only where it is decoded or scored."""
    p = read_param(probe, cols, H, BLOCK, MONITOR & STAGES)
    q = tl.zeros([BLOCK], tl.float32)
    if ROW_MONITOR & STAGES:
        if (d > 0) | ((SCORE & STAGES) != 0):
            q = read_shared(rowprobe, cols, H, BLOCK)
    return p, q


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
def add_branch(x, b, dtype: tl.constexpr, SCALE: tl.constexpr, STAGES: tl.constexpr):
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
        w, c = read_param(weight, cols, H, BLOCK, NORM & 4), read_param(bias, cols, H, BLOCK, NORM & 8)
        b = weigh(b, w, c, dtype, NORM, OFFSET).to(dtype).to(tl.float32)
    return add_branch(x, b, dtype, SCALE, STAGES) if BRANCH & STAGES else x


@triton.jit
def _finish(
    x, loads, late, t, r, place, cols, H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, STAGES: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """A row from its pristine value on: capture, scores, vectors, clamps, features, and the norm."""
    d, tier_gain, strength, vector, monitors, factors, low, high, pull, directions, codes, p, q, v, w = loads
    (capture, table, tier, probe, rowprobe, clamp, clamp_set, sae, sae_set, sae_clamp, score, weight, bias, out,
     normed) = late  # fmt: skip
    dtype: tl.constexpr = out.dtype.element_ty
    GATED: tl.constexpr = ((MONITOR | ROW_MONITOR) & STAGES) != 0
    KP: tl.constexpr = 1 if K < 2 else 2 if K < 3 else 4 if K < 5 else 8 if K < 9 else 16
    FIRST: tl.constexpr = (FEW & STAGES) != 0
    line = tl.full((), H, tl.int64) * r
    write_capture(capture, place, cols, x.to(dtype), H, BLOCK, STAGES)
    if not FIRST:
        p, q = _probes(probe, rowprobe + line, cols, d, H, BLOCK, STAGES)
    dots = _projections(x, p, q, STAGES)
    store_scores(score, t, dots, STAGES)
    tier_gate, row_gate, clamp_gate = behind_monitors(dots, monitors, factors, d, STAGES)
    if ADD & STAGES:
        x += (vector if FIRST or not GATED else read_shared(table + line, cols, H, BLOCK)) * (strength * row_gate)
    if TIER & STAGES:
        x += (v if FIRST else read_shared(tier, cols, H, BLOCK)) * (tier_gain * tier_gate)
    if CLAMP & STAGES:
        pull *= clamp_gate
        if FIRST and KP * BLOCK <= TILE:
            move = pull_of(tl.sum(directions * x[None, :], 1), low, high, pull)
            x += tl.sum(directions * move[:, None], 0)
        elif tl.sum(tl.abs(pull), 0) != 0:
            x = _clamped(x, clamp, clamp_set, r * K, low, high, pull, clamp_gate, cols, H, BLOCK, K, KP)
    if SAE & STAGES:
        if (count_of(codes) > 0) & (clamp_gate != 0):
            x = steered_by_features(x, codes, sae, sae_set, sae_clamp, r, clamp_gate, cols, H, BLOCK, C, CP, FIRST)
    write_row(out, cols, x.to(dtype), H, BLOCK)
    if NORM != 0:
        y = _normalised(x if EXACT & STAGES else x.to(dtype).to(tl.float32), cols, H, BLOCK, NORM, EPS)
        w = w if FIRST else read_param(weight, cols, H, BLOCK, NORM & 4)
        y = weigh(y, w, read_param(bias, cols, H, BLOCK, NORM & 8), dtype, NORM, OFFSET)
        write_row(normed, cols, y.to(dtype), H, BLOCK)


@triton.jit
def site_row(
    h, branch, branch_weight, branch_bias, capture, capture_rows, choice, rows, table, scale, tier, gain, decode, probe,
    probe_set, rowprobe, rowprobe_set, clamp, clamp_set, sae, sae_set, sae_clamp, gates, score, weight, bias, out,
    normed, H: tl.constexpr, BLOCK: tl.constexpr, K: tl.constexpr, C: tl.constexpr, CP: tl.constexpr,
    STAGES: tl.constexpr, BRANCH_NORM: tl.constexpr, BRANCH_EPS: tl.constexpr, BRANCH_OFFSET: tl.constexpr,
    BRANCH_SCALE: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr, OFFSET: tl.constexpr,
):  # fmt: skip
    """One token, its row in registers. With FEW, all loads come first; else what is off is not loaded."""
    dtype: tl.constexpr = h.dtype.element_ty
    GATED: tl.constexpr = ((MONITOR | ROW_MONITOR) & STAGES) != 0
    KP: tl.constexpr = 1 if K < 2 else 2 if K < 3 else 4 if K < 5 else 8 if K < 9 else 16
    FIRST: tl.constexpr = (FEW & STAGES) != 0
    t = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    at = tl.full((), H, tl.int64) * t  # may be beyond 2**31
    r = read_number(rows + t) if (ADD | ROW_MONITOR | CLAMP | SAE) & STAGES else 0
    line = tl.full((), H, tl.int64) * r
    x = _once(h + at, cols, H, BLOCK)
    b = _once(branch + at, cols, H, BLOCK) if BRANCH & STAGES else 0.0
    place = capture_place(capture_rows, choice, t, at, H, STAGES)
    d = read_number(decode + t) if GATED else 0.0
    tier_gain = read_number(gain + t) if TIER & STAGES else 0.0
    strength = read_number(scale + r) if ADD & STAGES else 0.0
    vector = read_param(table + line, cols, H, BLOCK, (ADD & STAGES) and (FIRST or not GATED))
    monitors = read_monitors(probe_set, rowprobe_set, r, STAGES)
    factors = gates_in_front(gates, t, (GATES & STAGES) != 0)
    low, high, pull, directions = 0.0, 0.0, 0.0, 0.0
    if CLAMP & STAGES:
        low, high, pull = read_bounds(clamp_set, r * K, K, KP)
        if FIRST and KP * BLOCK <= TILE:
            directions = read_directions(clamp, r * K, cols, H, K, KP, False)
    codes = read_codes(sae_clamp, r, C, CP) if SAE & STAGES else 0.0
    p = read_param(probe, cols, H, BLOCK, FIRST and (MONITOR & STAGES))
    q = read_param(rowprobe + line, cols, H, BLOCK, FIRST and (ROW_MONITOR & STAGES))
    v = read_param(tier, cols, H, BLOCK, FIRST and (TIER & STAGES))
    w = read_param(weight, cols, H, BLOCK, FIRST and (NORM & 4))
    x = _summed(x, b, branch_weight, branch_bias, cols, dtype, H, BLOCK, STAGES, BRANCH_NORM, BRANCH_EPS,
                BRANCH_OFFSET, BRANCH_SCALE)  # fmt: skip
    loads = d, tier_gain, strength, vector, monitors, factors, low, high, pull, directions, codes, p, q, v, w
    late = (capture, table, tier, probe, rowprobe, clamp, clamp_set, sae, sae_set, sae_clamp, score, weight, bias,
            out + at, normed + at)  # fmt: skip
    _finish(x, loads, late, t, r, place, cols, H, BLOCK, K, C, CP, STAGES, NORM, EPS, OFFSET)
