"""Directional clamps at one site, in both lowerings: projections in fp64 say what each token got."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conformance.site_ops import DEVICE, LOWERINGS, TOKENS, WIDTH, close, drawn, index, settings, tensor, vectors

H = drawn(TOKENS, WIDTH, seed=5)
ROWS = index(0, 1, 2, 1, 2)
INF = math.inf
FREE = (-INF, INF, 0.0)
AXES = torch.linalg.qr(drawn(WIDTH, 3, seed=6)).Q.T.contiguous()
"""Three directions at right angles."""
ONES = tensor(1.0, 1.0, 1.0)


def clamps(*rows: list[tuple[int, float, float, float]]) -> dict[str, Any]:
    """Data of rows 1, 2, ...: direction, bounds and strength of up to two clamps each; row 0 and the rest have none."""
    directions, lines = torch.zeros(6, WIDTH, device=DEVICE), [FREE] * 6
    for row, given in enumerate(rows, 1):
        for k, (axis, low, high, strength) in enumerate(given):
            directions[2 * row + k], lines[2 * row + k] = AXES[axis], (low, high, strength)
    return {"rows": ROWS, "clamp": directions, "clamp_set": tensor(*lines), "clamps": 2}


def on(value: Tensor, axis: int) -> Tensor:
    projection: Tensor = value.double() @ AXES[axis].double()
    return projection


@pytest.mark.behaviour(21)
@LOWERINGS
def test_without_clamps_a_token_passes_and_the_result_is_new(op: Any) -> None:
    given = H.clone()
    found = op(given, **clamps([(0, 1.0, 1.0, 1.0)]))
    assert torch.equal(found[[0, 2, 4]], H[[0, 2, 4]])
    assert not torch.equal(found[1], H[1])
    assert torch.equal(given, H)  # what was given stays
    idle = op(given, **{**clamps([(0, 1.0, 1.0, 1.0)]), "rows": 0 * ROWS})
    assert torch.equal(idle, H)
    assert idle.data_ptr() != given.data_ptr()


@pytest.mark.behaviour(22)
@pytest.mark.parametrize(
    ("low", "high", "strength"),
    [(1.5, 1.5, 1.0), (-0.2, 0.2, 1.0), (0.3, INF, 1.0), (-INF, 0.1, 1.0), (1.5, 1.5, 0.25), (-0.2, 0.2, 0.5)],
    ids=["pin", "range", "lower bound", "upper bound", "weak pin", "weak range"],
)
@LOWERINGS
def test_the_projection_is_brought_into_its_bounds(op: Any, low: float, high: float, strength: float) -> None:
    found = op(H, **clamps([(0, low, high, strength)], [(0, low, high, strength)]))
    touched = 0
    for t in range(1, TOKENS):
        was = float(on(H[t], 0))
        target = min(max(was, low), high)
        close(on(found[t], 0), torch.tensor(was + strength * (target - was), dtype=torch.float64, device=DEVICE))
        close(found[t], H[t].double() + strength * (target - was) * AXES[0].double())
        touched += target != was
        if target == was:
            close(found[t], H[t].double(), 1e-6)
    assert touched


@pytest.mark.behaviour(23)
@LOWERINGS
def test_clamps_at_right_angles_are_independent_and_rows_have_their_own(op: Any) -> None:
    both = op(H, **clamps([(0, 1.0, 1.0, 1.0), (1, -2.0, -2.0, 1.0)], [(2, 0.5, 0.5, 1.0)]))
    one, two = torch.ones(2, dtype=torch.float64, device=DEVICE), [1, 3]
    close(on(both[two], 0), one)
    close(on(both[two], 1), -2 * one)
    close(on(both[two], 2), on(H[two], 2))
    close(on(both[[2, 4]], 2), 0.5 * one)
    close(on(both[[2, 4]], 0), on(H[[2, 4]], 0))
    assert torch.equal(both[0], H[0])
    padded = clamps([(0, 1.0, 1.0, 1.0)])
    parts = {name: padded[name][::2].contiguous() for name in ("clamp", "clamp_set")}
    alone = {**padded, **parts, "clamps": 1}
    close(op(H, **padded), op(H, **alone).double(), 1e-6)  # a place without a clamp does nothing


@pytest.mark.behaviour(25)
@LOWERINGS
def test_clamps_see_what_was_added(op: Any) -> None:
    table = vectors(7, rows=3)
    found = op(H, table=table, scale=ONES, **clamps([(0, 1.0, 1.0, 1.0)], [(0, 1.0, 1.0, 1.0)]))
    close(on(found[1:], 0), torch.ones(4, dtype=torch.float64, device=DEVICE))
    added = H.double() + table[ROWS.long()].double()
    close(on(found, 1), on(added, 1))  # the rest of the vector is there


@pytest.mark.behaviour(26)
@pytest.mark.parametrize("gate", [0.0, 0.4, 1.0])
@LOWERINGS
def test_a_gate_is_a_factor_of_the_correction(op: Any, gate: float) -> None:
    held = clamps([(0, 1.0, 1.0, 1.0)], [(0, 1.0, 1.0, 1.0)])
    found = op(H, **held, gates=torch.stack([tensor(1.0, 1.0, gate, 1.0)] * TOKENS))
    whole = op(H, **held)
    close(found, H.double() + gate * (whole.double() - H.double()))
    if gate == 0.0:
        assert torch.equal(found, H)


@pytest.mark.behaviour(26)
@LOWERINGS
def test_a_monitor_gates_clamps_only_where_it_is_told_to(op: Any) -> None:
    held = clamps([(0, 1.0, 1.0, 1.0)], [(0, 1.0, 1.0, 1.0)])
    decode, probe = tensor(0.0, 1.0, 1.0, 0.0, 1.0), drawn(1, WIDTH, seed=8)
    whole, gate = op(H, **held), torch.sigmoid(H.double() @ probe[0].double())
    for told in (0.0, 1.0):
        line = tensor(settings(clamps_too=told))
        found = op(H, **held, decode=decode, probe=probe, probe_set=line)
        factor = torch.where((decode > 0) & bool(told), gate, torch.ones_like(gate)).unsqueeze(-1)
        close(found, H.double() + factor * (whole.double() - H.double()))
