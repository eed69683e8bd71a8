"""Rows, factors, the dynamic tier and gates at one site, in both lowerings."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer_compile.kernels.gates import opened
from tests.conformance.site_ops import (
    LOWERINGS,
    TOKENS,
    WIDTH,
    close,
    drawn,
    index,
    kernel,
    plain,
    settings,
    tensor,
    vectors,
)

H = drawn(TOKENS, WIDTH)
TABLE, TIER, PROBE = vectors(), drawn(1, WIDTH, seed=2), 0.3 * drawn(1, WIDTH, seed=3)
ROWS = index(0, 1, 2, 1, 3)
ONES = tensor(1.0, 1.0, 1.0, 1.0)
DECODE = tensor(1.0, 0.0, 1.0, 1.0, 0.0)
GAIN = 1.5 * DECODE


def factors(*rows: float) -> Any:
    """Factors that sites in front hand on: of the tier, of the row's vectors, of clamps, and one that is unused."""
    return torch.stack([tensor(1.0, row, 1.0, 1.0) for row in rows])


@pytest.mark.behaviour(1, 2, 12)
@LOWERINGS
def test_each_token_gets_the_vector_of_its_row_and_row_zero_nothing(op: Any) -> None:
    found = op(H, rows=ROWS, table=TABLE, scale=ONES)
    for t, row in enumerate(ROWS.tolist()):
        close(found[t], H[t].double() + TABLE[row].double())
    assert torch.equal(found[0], H[0])
    assert torch.equal(op(H, rows=ROWS, table=0 * TABLE, scale=ONES), H)


@pytest.mark.behaviour(11)
@LOWERINGS
def test_idle_tokens_read_nothing_of_the_other_rows(op: Any) -> None:
    table = TABLE.clone()
    table[1:] = float("nan")
    assert torch.equal(op(H, rows=0 * ROWS, table=table, scale=tensor(1.0, *[float("nan")] * 3)), H)


@pytest.mark.behaviour(6, 7, 8, 17)
@LOWERINGS
def test_factors_of_rows_and_tokens_and_the_tier_multiply_and_add(op: Any) -> None:
    scale, given = tensor(1.0, -0.5, 2.0, 1.0), (1.0, 0.0, 0.25, 1.0, -3.0)
    found = op(H, rows=ROWS, table=TABLE, scale=scale, tier=TIER, gain=GAIN, gates=factors(*given))
    for t, row in enumerate(ROWS.tolist()):
        term = TABLE[row].double() * float(scale[row]) * given[t]
        close(found[t], H[t].double() + term + TIER[0].double() * float(GAIN[t]))
    whole = op(H, rows=ROWS, table=TABLE, scale=ONES)
    assert torch.equal(op(H, rows=ROWS, table=TABLE, scale=ONES, gates=factors(*[1.0] * 5)), whole)
    assert torch.equal(op(H, rows=ROWS, table=TABLE, scale=ONES, gates=factors(*[0.0] * 5)), H)
    assert torch.equal(op(H, rows=ROWS, table=TABLE, scale=ONES, tier=TIER, gain=0 * GAIN), whole)
    other = op(H, rows=ROWS, table=TABLE, scale=tensor(1.0, 5.0, 1.0, 1.0))
    assert [torch.equal(a, b) for a, b in zip(other, whole, strict=True)] == [True, False, True, False, True]


@pytest.mark.behaviour(9)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_tier_is_added_in_fp32_and_rounded_once(dtype: torch.dtype) -> None:
    h = H.to(dtype)
    expected = (h.float() + TIER * GAIN.unsqueeze(-1)).to(dtype)
    assert torch.equal(plain(h, tier=TIER, gain=GAIN), expected)
    rounded = torch.finfo(dtype).eps * expected.double().abs().max()
    assert bool(((kernel(h, tier=TIER, gain=GAIN) - expected).abs() <= rounded).all())
    assert not torch.equal(h + TIER.to(dtype) * GAIN.to(dtype).unsqueeze(-1), expected)  # each step rounded


GATE = torch.sigmoid(2.0 * (H.double() @ PROBE[0].double() - 0.1))


@pytest.mark.behaviour(15, 18)
@pytest.mark.parametrize(("active", "rows_too"), [(False, 1.0), (True, 0.0), (True, 1.0)])
@LOWERINGS
def test_a_monitor_gates_the_tier_and_the_rows_of_decoded_tokens_where_it_is_asked_to(
    op: Any, active: bool, rows_too: float
) -> None:
    line = tensor(settings(active, threshold=0.1, sharpness=2.0, rows_too=rows_too))
    given: dict[str, Any] = {"rows": ROWS, "table": TABLE, "scale": ONES, "tier": TIER, "gain": GAIN, "decode": DECODE}
    found = op(H, **given, probe=PROBE, probe_set=line)
    for t, row in enumerate(ROWS.tolist()):
        g = float(GATE[t]) if active else 1.0
        of_row = g if rows_too and DECODE[t] else 1.0
        close(found[t], H[t].double() + TABLE[row].double() * of_row + TIER[0].double() * float(GAIN[t]) * g)
    if not active:
        assert torch.equal(found, op(H, **given))
    elif not rows_too:
        prompts = DECODE == 0
        assert torch.equal(found[prompts], op(H, rows=ROWS, table=TABLE, scale=ONES)[prompts])


@pytest.mark.behaviour(18)
@LOWERINGS
def test_a_gate_multiplies_what_sites_in_front_opened(op: Any) -> None:
    line = tensor(settings(threshold=0.1, sharpness=2.0, rows_too=1.0))
    found = op(H, rows=ROWS, table=TABLE, scale=ONES, decode=DECODE, probe=PROBE, probe_set=line,
               gates=factors(*[0.5] * 5))  # fmt: skip
    for t, row in enumerate(ROWS.tolist()):
        close(found[t], H[t].double() + TABLE[row].double() * 0.5 * (float(GATE[t]) if DECODE[t] else 1.0))


@pytest.mark.behaviour(19)
@LOWERINGS
def test_a_row_monitor_gates_the_decoded_tokens_of_its_row_alone(op: Any) -> None:
    scale, probes = tensor(1.0, 2.0, -1.0, 1.0), torch.zeros_like(TABLE)
    probes[1] = PROBE[0]
    lines = torch.stack([tensor(*settings(row == 1, threshold=0.1, sharpness=2.0, rows_too=1.0)) for row in range(4)])
    given: dict[str, Any] = {"rows": ROWS, "table": TABLE, "scale": scale, "decode": DECODE, "rowprobe": probes}
    found = op(H, **given, rowprobe_set=lines)
    for t, row in enumerate(ROWS.tolist()):
        g = float(GATE[t]) if row == 1 and DECODE[t] else 1.0
        close(found[t], H[t].double() + TABLE[row].double() * float(scale[row]) * g)
    ungated = op(H, rows=ROWS, table=TABLE, scale=scale)
    assert [torch.equal(a, b) for a, b in zip(found, ungated, strict=True)] == [True, True, True, False, True]
    assert torch.equal(op(H, **given, rowprobe_set=0 * lines), ungated)


@pytest.mark.behaviour(16)
def test_a_sigmoid_gate_is_between_nothing_and_everything() -> None:
    scores = torch.linspace(-50, 50, 401)
    gate = opened(scores, torch.tensor([settings(threshold=0.5, sharpness=3.0)]))
    torch.testing.assert_close(gate.double(), 1 / (1 + torch.exp(-3.0 * (scores.double() - 0.5))), rtol=1e-5, atol=1e-7)
    assert float(gate.min()) >= 0
    assert float(gate.max()) <= 1
    assert bool((gate.diff() >= 0).all())
    assert float(gate[0]) < 1e-6
    assert float(gate[-1]) > 1 - 1e-6
