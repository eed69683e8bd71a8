"""Clamped features in the site template against fp64: any number of slots, rows in registers and in chunks, bits."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile.kernels import site, site_launch
from steer_compile.kernels.site import SiteArgs, launch, reference
from tests.kernels.site_inputs import FAMILIES, PACKED, ROWS, site_args
from tests.kernels.test_site import DEVICE, DTYPES, check, with_branch_norm

CHUNKED = 150
"""Width of rows that `chunks` makes wide."""


def clamped(
    tokens: int, width: int, dtype: torch.dtype, families: tuple[str, ...], slots: int, norm: str = "rms",
    seed: int = 0, table: torch.dtype | None = None,
) -> SiteArgs:  # fmt: skip
    """Arguments with ``slots`` features of every kind and code; row 0 has no code, and row 1 one in the last place."""
    a = site_args(tokens, width, dtype, families, norm, seed, DEVICE, table)
    generator = torch.Generator().manual_seed(seed + 1)
    weights = torch.nn.functional.normalize(torch.randn(2 * slots, width, generator=generator), dim=-1)
    lines = torch.zeros(slots, 8)
    lines[:, 0], lines[:, 1] = torch.randn(2, slots, generator=generator) * 0.3
    lines[:, 2], lines[:, 3] = torch.randn(2, slots, generator=generator)
    lines[:, 4], lines[:, 7] = 0.5 + torch.rand(2, slots, generator=generator)
    lines[:, 5] = weights[:slots].sum(-1)
    lines[:, 6] = torch.where(torch.arange(slots) % 3 == 2, 0.01, -1.0)
    codes = torch.randint(0, 5, (ROWS, slots), generator=generator).float()
    codes[0], codes[1] = 0, 0
    codes[1, -1] = 2
    clamps = torch.cat([codes, torch.randn(ROWS, slots, generator=generator)], 1)
    rows = torch.randint(0, ROWS, (tokens,), generator=generator, dtype=torch.int32)
    return a._replace(
        rows=rows.to(DEVICE), sae=weights.to(DEVICE, table or dtype), sae_set=lines.to(DEVICE),
        sae_clamp=clamps.to(DEVICE),
    )  # fmt: skip


@pytest.fixture
def chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 64 numbers count as wide."""
    monkeypatch.setattr(site_launch, "MAX_ROW", 64)
    monkeypatch.setattr(site_launch, "CHUNK", 32)


SOME = [("branch", "add"), (), ("branch", "tier", "monitor"), ("clamp", "row_monitor"), FAMILIES[:-1],
        ("branch", PACKED, "gates")]  # fmt: skip


@pytest.mark.parametrize("families", SOME, ids="+".join)
@pytest.mark.parametrize("slots", [1, 3, 40])
@pytest.mark.usefixtures("poisoned_empty")
def test_rows_in_registers(families: tuple[str, ...], slots: int) -> None:
    check(clamped(6, 52, torch.float32, families, slots, "layer"))


@pytest.mark.parametrize("families", SOME, ids="+".join)
@pytest.mark.parametrize("slots", [1, 3, 40])
@pytest.mark.usefixtures("poisoned_empty", "chunks")
def test_rows_in_chunks(families: tuple[str, ...], slots: int) -> None:
    check(clamped(4, CHUNKED, torch.float32, families, slots, "layer"))


@pytest.mark.parametrize("width", [48, 3000, 17000])
@pytest.mark.parametrize("slots", [1024, 300])
def test_many_slots_in_tiles(width: int, slots: int) -> None:
    """More features than a program reads at once, of which few have a code."""
    a = clamped(2, width, torch.float32, ("branch",), slots)
    assert a.rows is not None
    assert a.sae_clamp is not None
    thin = torch.arange(slots, device=DEVICE) % 37 != 0
    a.sae_clamp[2:, :slots][:, thin] = 0
    a.rows[:] = torch.tensor([2, 4])
    check(a)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("table", DTYPES)
@pytest.mark.parametrize("few", [0, 1 << 30])
@pytest.mark.usefixtures("poisoned_empty")
def test_dtypes_and_forms(dtype: torch.dtype, table: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "FEW_TOKENS", few)
    check(clamped(9, 64, dtype, ("branch", "add", "clamp"), 11, table=table))


@pytest.mark.parametrize("norm", ["rms", "rms_wide", "layer"])
def test_behind_a_branch_with_a_norm_and_unrounded(norm: str) -> None:
    a = with_branch_norm(clamped(5, 72, torch.bfloat16, ("branch", "add"), 11, norm), norm)
    check(a)
    check(a._replace(exact=True))


def without(a: SiteArgs) -> SiteArgs:
    return a._replace(sae=None, sae_set=None, sae_clamp=None)


def bits(a: SiteArgs) -> list[Tensor]:
    stored = [x for x in (a.capture, a.score) if x is not None]
    for x in stored:
        x.fill_(7)
    return [x.view(torch.uint8) for x in (*launch(a), *stored)]


WIDTHS = pytest.mark.parametrize("width", [48, CHUNKED])


@WIDTHS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("chunks")
def test_idle_tokens_keep_their_bits_and_read_no_feature(width: int, dtype: torch.dtype) -> None:
    a = clamped(7, width, dtype, ("branch", "capture", "add", "tier"), 11)
    assert a.rows is not None
    a = a._replace(rows=torch.zeros_like(a.rows))
    a.stream[3, 2] = -0.0
    expected = bits(without(a))
    poison: dict[str, Any] = {"sae": torch.full_like(a.sae, math.nan), "sae_set": torch.full_like(a.sae_set, math.nan)}  # type: ignore[arg-type]
    for same in (a, a._replace(**poison)):
        assert all(torch.equal(x, y) for x, y in zip(bits(same), expected, strict=True))


@WIDTHS
@pytest.mark.usefixtures("chunks")
def test_idle_tokens_beside_clamped_ones_keep_their_bits(width: int) -> None:
    a = clamped(20, width, torch.bfloat16, ("branch", "capture", "add"), 11)
    assert a.rows is not None
    idle = a.rows == 0
    assert 0 < int(idle.sum()) < 20
    (out, normed), (plain, plain_normed) = launch(a), launch(without(a))
    assert torch.equal(out[idle], plain[idle])
    assert torch.equal(normed[idle], plain_normed[idle])
    assert bool((out[a.rows >= 2] != plain[a.rows >= 2]).any(-1).all())


@WIDTHS
@pytest.mark.usefixtures("chunks")
def test_a_gate_of_zero_keeps_the_bits(width: int) -> None:
    a = clamped(9, width, torch.float32, ("branch", "add", "gates"), 11)
    assert a.gates is not None
    a.gates[:, 2] = torch.tensor([0.0, 1.0, 0.0] * 3)
    (out, _), (plain, _) = launch(a), launch(without(a))
    closed = a.gates[:, 2] == 0
    assert torch.equal(out[closed], plain[closed])
    check(a)


@WIDTHS
@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.usefixtures("chunks")
def test_nan_breaks_no_other_token(width: int) -> None:
    a = clamped(18, width, torch.float32, ("branch",), 11)
    assert a.rows is not None
    a.rows[:] = torch.arange(18) % ROWS
    expected = launch(a)
    broken = a.stream.clone()
    broken[2, 5], broken[11, 0] = math.nan, math.nan
    got = launch(a._replace(stream=broken))
    keep = [t for t in range(18) if t not in (2, 11)]
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x[keep], y[keep])
        assert bool(x[[2, 11]].isnan().all())


@WIDTHS
@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 33])
@pytest.mark.usefixtures("poisoned_empty", "chunks")
def test_any_number_of_tokens(width: int, tokens: int) -> None:
    check(clamped(tokens, width, torch.float16, ("branch", "add"), 11))


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.steer_compile.site.default, tuple(clamped(3, 16, torch.float32, ("branch",), 5)))


def test_the_reference_is_what_the_kernel_does() -> None:
    a = clamped(11, 64, torch.float32, ("branch", "add"), 20)
    for got, plain in zip(launch(a), reference(a), strict=True):
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-5)
