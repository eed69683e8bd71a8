"""The SAE delta against loops in fp64: every code and kind of feature, rows that keep their bits, NaN, compilation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_compile.kernels.sae_delta import (
    ADD,
    ADD_ACTIVE,
    NO_FEATURE,
    SET,
    SET_ACTIVE,
    SETTINGS,
    SaeArgs,
    sae_delta,
    sae_delta_fp64,
)
from steer_compile.kernels.steer_rows import SteerArgs, steer_rows, steer_rows_fp64

WIDTH, ROWS = 12, 5


def arguments(tokens: int, slots: int = 7, seed: int = 0, table: torch.dtype = torch.float32) -> SaeArgs:
    """Features of every kind with every code; row 0 has no code, row 1 one in the last place."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lines = torch.empty(slots, len(SETTINGS))
    lines[:, 0], lines[:, 1] = randn(slots) * 0.5, randn(slots).abs() * 0.5
    lines[:, 2], lines[:, 3] = randn(slots).exp(), randn(slots)
    normed = torch.rand(slots, generator=generator) < 0.4
    lines[:, 4], lines[:, 7] = randn(slots).exp(), randn(slots).exp()
    lines[:, 5], lines[:, 6] = randn(slots), torch.where(normed, 1e-3, -1.0)
    codes = torch.randint(0, 5, (ROWS, slots), generator=generator).float()
    codes[0], codes[1], codes[1, -1] = 0, 0, SET
    rows = torch.randint(0, ROWS, (tokens,), generator=generator, dtype=torch.int32)
    return SaeArgs(randn(2 * slots, WIDTH).to(table), lines, torch.cat([codes, randn(ROWS, slots) * 3], 1), rows)


def stream(tokens: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed + 100)) * 2


def feature(a: float, line: dict[str, float]) -> float:
    if math.isnan(a):
        return a
    return max(line["scale"] * a + line["magnitude"], 0.0) if a + line["bias"] > line["threshold"] else 0.0


def clamped(code: float, f: float, value: float) -> float:
    if code in (SET_ACTIVE, ADD_ACTIVE) and not f > 0:
        return f
    return value if code in (SET, SET_ACTIVE) else f + value


def by_loops(x: Tensor, args: SaeArgs, strength: Tensor | None = None) -> Tensor:
    """The formula one number after the other, in NumPy and fp64."""
    weights, lines, clamps = (t.double().numpy() for t in args[:3])
    slots, given = len(lines), x.double().numpy()
    out = given.copy()
    for t, row in enumerate(args.rows.tolist()):
        factor = 1.0 if strength is None else float(strength[t])
        mean, std = given[t].mean(), given[t].std(ddof=1)
        for c in range(slots):
            code, value = float(clamps[row, c]), float(clamps[row, slots + c])
            line = dict(zip(SETTINGS, lines[c].tolist(), strict=True))
            if code == 0 or factor == 0:
                continue
            p, normed = float(np.dot(given[t], weights[c])), line["eps"] >= 0
            a = (p - mean * line["wsum"]) / (std + line["eps"]) if normed else line["factor"] * p
            f = feature(a, line)
            if clamped(code, f, value) != f:
                step = std if normed else line["step"]
                out[t] += factor * (clamped(code, f, value) - f) * step * weights[slots + c]
    return torch.from_numpy(out)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6), tokens=st.integers(0, 6), slots=st.integers(1, 9), gated=st.booleans(),
    table=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)  # fmt: skip
def test_the_formula_by_loops(seed: int, tokens: int, slots: int, gated: bool, table: torch.dtype) -> None:
    x, args = stream(tokens, seed), arguments(tokens, slots, seed, table)
    strength = torch.arange(tokens) % 3 * 0.5 if gated else None
    expected = by_loops(x, args, strength)
    exact = sae_delta_fp64(x, args, strength)
    assert exact.dtype == torch.float64
    assert exact.shape == x.shape
    torch.testing.assert_close(exact, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("table", [torch.float32, torch.bfloat16, torch.float16])
def test_fp32_is_off_by_its_own_rounding(table: torch.dtype) -> None:
    """Away from the limits, where one rounding decides whether a feature is there."""
    compared = 0
    for seed in range(20):
        x, args = stream(9, seed), arguments(9, 7, seed, table)
        exact = sae_delta_fp64(x, args)
        again = sae_delta_fp64(x * (1 + 1e-4), args)
        steady = ((again - exact).abs().amax(-1) < 1e-2 * exact.abs().amax(-1)).nonzero().flatten()
        got = sae_delta(x, args)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double()[steady], exact[steady], rtol=1e-4, atol=1e-4)
        compared += len(steady)
    assert compared > 100


@pytest.mark.parametrize("code", [SET, ADD, SET_ACTIVE, ADD_ACTIVE])
@pytest.mark.parametrize("active", [False, True])
def test_what_a_code_does(code: int, active: bool) -> None:
    """One feature along the first axis, with a limit of 1, moved along the second."""
    features = torch.zeros(2, WIDTH)
    features[0, 0], features[1, 1] = 1.0, 1.0
    settings = torch.tensor([[0.0, 1.0, 1.0, 0.0, 1.0, 0.0, -1.0, 1.0]])
    x = torch.zeros(1, WIDTH)
    x[0, 0] = 3.0 if active else 0.5
    args = SaeArgs(features, settings, torch.tensor([[float(code), 5.0]]), torch.zeros(1, dtype=torch.int64))
    f = 3.0 if active else 0.0
    wanted = {SET: 5.0, ADD: f + 5.0, SET_ACTIVE: 5.0 if active else f, ADD_ACTIVE: f + 5.0 if active else f}[code]
    expected = x.clone()
    expected[0, 1] = wanted - f
    assert torch.equal(sae_delta(x, args), expected)
    halved = sae_delta(x, args, torch.tensor([0.5]))
    assert float(halved[0, 1]) == (wanted - f) / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_without_a_code_keep_their_bits(dtype: torch.dtype) -> None:
    args = arguments(8)
    x = stream(8).to(dtype)
    x[0, :5] = torch.tensor([-0.0, math.inf, math.nan, 1e-42, -math.inf])
    bits = {torch.float32: torch.int32, torch.float64: torch.int64}[dtype]
    for rows, strength in ((torch.zeros(8), None), (torch.ones(8), torch.zeros(8))):
        same = args._replace(rows=rows.to(torch.int32))
        assert torch.equal(sae_delta(x, same, strength).view(bits), x.view(bits))
    assert bool((sae_delta(x, args._replace(rows=torch.ones(8, dtype=torch.int32)))[1:] != x[1:]).any())


def test_a_slot_without_a_feature_moves_nothing() -> None:
    args, x = arguments(6), stream(6)
    clear = args.clamps.clone()
    clear[:, :7] = 0
    lines = torch.tensor(NO_FEATURE).repeat(7, 1)
    assert torch.equal(sae_delta(x, args._replace(clamps=clear, settings=lines)), x)
    clear[:, 2] = SET_ACTIVE  # a code that was left behind finds no active feature
    assert torch.equal(sae_delta(x, args._replace(clamps=clear, settings=lines)), x)


def test_nan_stays_in_its_row_and_its_own_features() -> None:
    args, x = arguments(6), stream(6)
    args = args._replace(rows=torch.tensor([0, 1, 2, 3, 4, 1], dtype=torch.int32))
    expected = sae_delta(x, args)
    broken = x.clone()
    broken[5, 3] = math.nan
    got = sae_delta(broken, args)
    assert torch.equal(got[:5], expected[:5])
    assert bool(got[5].isnan().all())
    weights = args.features.clone()
    weights[0] = math.nan  # an encoder row that no code of row 1 asks for
    kept = sae_delta(x, args._replace(features=weights))
    assert torch.equal(kept[[0, 1, 5]], expected[[0, 1, 5]])


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    got = sae_delta(stream(tokens), arguments(tokens))
    assert (got.shape, got.dtype) == ((tokens, WIDTH), torch.float32)


def test_a_site_applies_it_behind_its_clamps() -> None:
    """Clamps move the value first, and one rounding is at the end."""
    args, x = arguments(9), stream(9).bfloat16()
    directions = torch.nn.functional.normalize(torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(3)))
    bounds = torch.tensor([0.5, 0.5, 1.0]).repeat(ROWS, 1)
    both = SteerArgs(
        rows=args.rows, clamp=directions, clamp_set=bounds, sae=args.features, sae_set=args.settings,
        sae_clamp=args.clamps,
    )  # fmt: skip
    first = steer_rows_fp64(x, both._replace(sae=None, sae_set=None, sae_clamp=None), 1)
    exact = steer_rows_fp64(x, both, 1)
    torch.testing.assert_close(exact, by_loops(first, args), rtol=1e-11, atol=1e-11)
    got = steer_rows(x, both, x.dtype, 1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), exact, rtol=2**-7, atol=2**-7)


def test_compiled_with_any_number_of_tokens() -> None:
    graphs: list[object] = []

    def count(gm: torch.fx.GraphModule, given: list[Any]) -> object:
        graphs.append(gm)
        return torch._inductor.compile(gm, given)

    compiled = torch.compile(sae_delta, backend=count, dynamic=True, fullgraph=True)
    for tokens in (3, 5, 8):
        x, args = stream(tokens, tokens), arguments(tokens, seed=tokens)
        args = args._replace(rows=torch.arange(tokens, dtype=torch.int32) % 2)
        torch.testing.assert_close(compiled(x, args), sae_delta(x, args), rtol=1e-5, atol=1e-5)
        assert torch.equal(compiled(x, args)[::2], x[::2])
    assert len(graphs) == 1
