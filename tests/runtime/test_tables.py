"""Banks whose parts do not fill a multiple of 16 bytes: each part is padded, and reads and writes as if it were not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer_compile import Clamp, Monitor, Steering, SteerSpec, steer_backend
from steer_compile.ir import Bank
from steer_compile.runtime.tables import ALIGNMENT, TableSet
from tests import _models

SITES = (("post_block", 0), ("post_block", 1), ("post_attn", 1))
CPU = torch.device("cpu")


def banks(width: int, dtype: torch.dtype, rows: int = 5) -> tuple[Bank, ...]:
    return (
        Bank("table", width, dtype, SITES, rows),
        Bank("rowprobe_set", 8, torch.float32, SITES, rows),
        Bank("clamp_set", 3, torch.float32, SITES, rows),
        Bank("capture", width, dtype, SITES[:1], 7),
    )


def grown(width: int, dtype: torch.dtype) -> TableSet:
    tables = TableSet(SteerSpec(steer=("post_block",), rows=2, max_tokens=7))
    tables.grow(banks(width, dtype), CPU)
    return tables


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("width", [1, 3, 17, 64])
@pytest.mark.usefixtures("poisoned_empty")
def test_each_part_is_whole_and_aligned(width: int, dtype: torch.dtype) -> None:
    tables = grown(width, dtype)
    for bank, tensor in zip(tables.banks, tables.tensors, strict=True):
        assert tensor.shape == (len(bank.sites), bank.length, bank.width)
        for site in bank.sites:
            view = tables.view(bank.kind, site)
            assert view.is_contiguous()
            assert view.data_ptr() % ALIGNMENT == 0
    assert not any(tables.view("rowprobe_set", site).any() for site in SITES)
    assert not tables.tensors[0].any()
    assert tables.tensors[3].is_contiguous()  # a bank of one site needs no padding


@pytest.mark.behaviour(14)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("poisoned_empty")
def test_lines_are_written_where_they_belong(dtype: torch.dtype) -> None:
    tables = grown(17, dtype)
    tables.put("table", (1,), 2, {SITES[1]: torch.arange(34.0).view(2, 17)})
    expected = torch.zeros(3, 5, 17, dtype=dtype)
    expected[1, 1:3] = torch.arange(34.0).view(2, 17)
    assert torch.equal(tables.tensors[0], expected)
    tables.put("table", (2,), 1, {})
    expected[:, 2] = 0
    assert torch.equal(tables.tensors[0], expected)
    assert torch.equal(tables.named(("steer_bank_0",))["steer_bank_0"], expected)
    tables.tensors[3][0, :4] = 2
    assert torch.equal(tables.captured(4)[SITES[0]], torch.full((4, 17), 2, dtype=dtype))


def test_inductor_reads_padded_banks() -> None:
    model = _models.llama()
    spec = SteerSpec(steer=("post_block",), ops=("add", "row_monitor", "clamp"), rows=4, clamps=1, max_tokens=32)
    probe = torch.ones(_models.WIDTH) / _models.WIDTH**0.5
    rows = [
        Steering(
            {"post_block": {n: sign * torch.ones(_models.WIDTH) for n in range(_models.LAYERS)}},
            monitors={("post_block", 1): Monitor(probe, 0.1)},
            clamps={("post_block", n): [Clamp(sign * probe, value=0.5)] for n in range(_models.LAYERS)},
        )
        for sign in (1.0, -1.0)
    ]
    found = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        backend = steer_backend(spec, inner=inner)
        compiled: Any = torch.compile(model, backend=backend)
        with torch.no_grad(), backend.runtime.steer(rows=rows, phase="decode"):
            found.append(compiled(input_ids=torch.arange(8).view(2, 4), use_cache=False).logits)
        assert any(not tensor.is_contiguous() for tensor in backend.runtime.tables.tensors)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)
