"""Detection against fp64, and against the formula written token by token."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_compile.kernels.detect import DetectArgs, detect, detect_fp64
from steer_compile.kernels.gates import KINDS, SETTINGS

ROWS, WIDTH, UNITS, SEQUENCES = 4, 24, 3, 5


def arguments(tokens: int, seed: int, families: set[str]) -> DetectArgs:
    """Random data: each kind of gate, decoded tokens and prompts', a line of memory for some tokens."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def lines(count: int, first: int) -> Tensor:
        made = torch.zeros(count, len(SETTINGS))
        made[:, 0], made[:, 1] = 2 * randn(count), randn(count).abs()
        made[:, 2] = (torch.arange(count) + first) % len(KINDS)
        made[:, 3], made[:, 4] = made[:, 0] - randn(count).abs(), made[:, 0] + 1
        made[:, 5:] = (torch.rand(count, 3, generator=generator) < 0.8).float()
        return made

    slots = torch.zeros(tokens, dtype=torch.int32)
    own = torch.randperm(tokens, generator=generator)[: min(tokens, SEQUENCES)]
    slots[own] = torch.arange(1, len(own) + 1, dtype=torch.int32)
    state = (torch.rand(SEQUENCES + 1, 2, generator=generator) < 0.5).float()
    state[0] = 0
    given = {
        "decode": (torch.rand(tokens, generator=generator) < 0.6).float(),
        "rows": torch.randint(0, ROWS, (tokens,), generator=generator, dtype=torch.int32),
    }
    if "monitor" in families:
        given |= {"probe": randn(1, WIDTH), "probe_set": lines(1, seed)}
    if "row_monitor" in families:
        given |= {"rowprobe": randn(ROWS, WIDTH), "rowprobe_set": lines(ROWS, 0)}
    if "mlp" in families:
        given |= {"mlp": randn(UNITS, WIDTH), "mlp_set": randn(UNITS, 2)}
    if "memory" in families:
        given |= {"slot": slots, "state": state}
    if "gates" in families:
        given["gates"] = randn(tokens, 4)
    return DetectArgs(**given)


def gate(s: float, line: list[float], was: float) -> float:
    threshold, sharpness, kind, low, high, active = line[:6]
    if not active:
        return 1.0
    if kind == 0:
        return 1 / (1 + math.exp(-sharpness * (s - threshold)))
    if kind == 1:
        return min(max(sharpness * (s - threshold), low), high)
    return 1.0 if s > threshold else 0.0 if s < low else was


def by_hand(h: Tensor, a: DetectArgs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Factors, scores and memory, in Python's own numbers."""
    state = None if a.state is None else a.state.double().clone()
    factors = torch.ones(len(h), 4, dtype=torch.float64) if a.gates is None else a.gates.double().clone()
    factors[:, 3] = 1
    scores = torch.zeros(len(h), 2, dtype=torch.float64)
    for t in range(len(h)):
        slot = 0 if a.slot is None else int(a.slot[t])
        opened = [0.0, 0.0]
        for place, (probe, sets) in enumerate(((a.probe, a.probe_set), (a.rowprobe, a.rowprobe_set))):
            if probe is None or sets is None or a.rows is None:
                continue
            row = int(a.rows[t]) if place else 0
            s = float(h[t].double() @ probe[row].double())
            if place == 0 and a.mlp is not None and a.mlp_set is not None:
                for unit, (bias, output) in zip(a.mlp, a.mlp_set.tolist(), strict=True):
                    s += output * max(float(h[t].double() @ unit.double()) + bias, 0.0)
            scores[t, place] = s
            line = sets[row].tolist()
            g = gate(s, line, 0.0 if a.state is None else float(a.state[slot, place]))
            opened[place] = g if line[5] else 0.0
            decoded = bool(a.decode[t])
            factors[t, 0] *= g if place == 0 else 1.0
            factors[t, 1] *= g if line[5] and line[6] and decoded else 1.0
            factors[t, 2] *= g if line[5] and line[7] and decoded else 1.0
        if state is not None and slot:
            state[slot] = torch.tensor(opened if a.decode[t] else [0.0, 0.0])
    return factors, scores, state


FAMILIES = st.sets(st.sampled_from(["monitor", "row_monitor", "mlp", "memory", "gates"])).filter(
    lambda found: bool(found & {"monitor", "row_monitor"})
)


@pytest.mark.behaviour(16, 17)
@given(st.integers(0, 9), st.integers(0, 10**6), FAMILIES)
@settings(deadline=None)
def test_detection_is_its_formula(tokens: int, seed: int, families: set[str]) -> None:
    a = arguments(tokens, seed, families)
    h = torch.randn(tokens, WIDTH, generator=torch.Generator().manual_seed(seed + 1))
    factors, scores, state = by_hand(h, a)
    exact = detect_fp64(h, a)  # leaves the memory of `a`, as it works on a copy
    torch.testing.assert_close(exact[0], factors)
    torch.testing.assert_close(exact[1], scores)
    found = detect(h, a, torch.float32)
    torch.testing.assert_close(found[1], scores.float(), atol=1e-4, rtol=1e-5)
    near = (scores.float() - found[1]).abs().max() if tokens else 0.0
    torch.testing.assert_close(found[0], factors.float(), atol=1e-4 + 10 * float(near), rtol=1e-4)
    if state is not None:
        assert a.state is not None
        torch.testing.assert_close(a.state, state.float(), atol=1e-4, rtol=1e-4)
        assert not a.state[0].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(2, 3), (7,), (0, 4)])
def test_other_dtypes_and_shapes(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    a = arguments(count, 3, {"monitor", "row_monitor", "gates"})
    h = torch.randn(*shape, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    apart = {n: t.view(*shape, *t.shape[1:]) for n, t in a._asdict().items() if n in ("decode", "rows", "gates")}
    found = detect(h, a._replace(**apart), dtype)
    exact = detect_fp64(h.reshape(count, WIDTH), a)
    for got, wanted in zip(found, exact, strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.reshape(wanted.shape).double(), wanted, atol=1e-4, rtol=1e-4)
