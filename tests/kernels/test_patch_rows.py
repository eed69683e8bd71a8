"""Patching against fp64: exact ends, one rounding, nothing of slots that a token does not read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_compile.kernels.patch_rows import PatchArgs, patch_rows, patch_rows_fp64
from steer_compile.kernels.steer_rows import SteerArgs, steer_rows, steer_rows_fp64

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARES = (0.0, 1.0, 0.5, 0.3, -0.7, 1.5)
SLOTS = 5


def arguments(seed: int, dtype: torch.dtype, shape: tuple[int, ...], width: int) -> tuple[Tensor, PatchArgs]:
    """A value and its patches: shares mixed over dimensions, ends among them; line 0 passes through."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(*shape, width, generator=generator).to(dtype)
    table = (3 * torch.randn(SLOTS, width, generator=generator)).to(dtype)
    alpha = torch.tensor(SHARES)[torch.randint(0, len(SHARES), (SLOTS, width), generator=generator)]
    alpha[0] = 0
    return h, PatchArgs(table, alpha, torch.randint(0, SLOTS, shape, generator=generator, dtype=torch.int32))


@pytest.mark.behaviour(27)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    dtype=st.sampled_from(DTYPES),
    shape=st.sampled_from([(3, 5), (7,), (1, 1), (0, 4), (2, 0), (0,)]),
    width=st.sampled_from([1, 3, 24, 33]),
)
def test_patches_are_the_formula_rounded_once(
    seed: int, dtype: torch.dtype, shape: tuple[int, ...], width: int
) -> None:
    h, args = arguments(seed, dtype, shape, width)
    before, exact = h.clone(), patch_rows_fp64(h, args)
    got = steer_rows(h, SteerArgs(), dtype, patched=patch_rows(h, args, dtype))
    assert (got.dtype, got.shape) == (dtype, h.shape)
    assert torch.equal(h, before)
    share, row = args.alpha[args.slots], args.table[args.slots]
    assert torch.equal(got[share == 0], h[share == 0])
    assert torch.equal(got[share == 1], row[share == 1])
    terms = torch.maximum(h.double().abs(), row.double().abs()) * 4
    inside = 4 * torch.finfo(torch.float32).eps * terms
    half = 0.5 * torch.finfo(dtype).eps * exact.abs() + torch.finfo(dtype).tiny
    assert bool(((got.double() - exact).abs() <= half * (1 + 1e-6) + inside).all())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(DTYPES), bad=st.sampled_from([torch.nan, torch.inf]))
def test_what_is_not_taken_never_leaks(seed: int, dtype: torch.dtype, bad: float) -> None:
    h, args = arguments(seed, dtype, (4, 6), 9)
    poisoned = args.table.clone()
    poisoned[2] = bad
    keep = args.slots != 2
    got, clean = (patch_rows(h, args._replace(table=table), dtype) for table in (poisoned, args.table))
    assert torch.equal(got[keep], clean[keep])
    untouched = args.alpha[args.slots] == 0
    assert torch.equal(got[untouched], h.float()[untouched])
    whole = torch.full_like(h, bad)
    replaced = args.alpha[args.slots] == 1
    assert torch.equal(patch_rows(whole, args, dtype)[replaced], args.table[args.slots].float()[replaced])


@pytest.mark.behaviour(27)
@pytest.mark.parametrize("dtype", DTYPES)
def test_idle_keeps_every_bit(dtype: torch.dtype) -> None:
    tiny = torch.finfo(dtype).tiny / 4
    h = torch.tensor([[0.0, -0.0, torch.inf, -torch.inf, torch.nan, tiny, -tiny, 1.0]]).to(dtype)
    args = PatchArgs(torch.full((2, 8), torch.nan, dtype=dtype), torch.zeros(2, 8), torch.zeros(1, dtype=torch.int32))
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    got = steer_rows(h, SteerArgs(), dtype, patched=patch_rows(h, args, dtype))
    assert torch.equal(got.view(integer), h.view(integer))


def test_fp64_is_not_rounded_to_fp32() -> None:
    h, args = arguments(3, torch.float32, (5,), 7)
    wide, table = h.double() + 1e-12, args.table.double() + 1e-12
    got = patch_rows(wide, args._replace(table=table), torch.float64)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, patch_rows_fp64(wide, args._replace(table=table)), rtol=1e-15, atol=1e-15)


def test_terms_build_on_the_patched_value_and_gates_on_the_pristine_one() -> None:
    h, args = arguments(4, torch.float32, (6,), 8)
    rows = torch.ones(6, dtype=torch.int32)
    given = SteerArgs(
        rows=rows, table=torch.randn(2, 8), scale=torch.ones(2), decode=torch.ones(6), probe=torch.randn(1, 8),
        probe_set=torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0.0]]),
    )  # fmt: skip
    patched = patch_rows(h, args, torch.float32)
    got = steer_rows(h, given, torch.float32, patched=patched)
    assert given.table is not None
    assert given.probe is not None
    gate = torch.sigmoid(h @ given.probe[0])
    torch.testing.assert_close(got, patched + given.table[1] * gate.unsqueeze(-1))
    torch.testing.assert_close(got.double(), steer_rows_fp64(h, given, patched=patched), rtol=1e-6, atol=1e-6)


def test_the_gradient_passes_what_is_not_replaced() -> None:
    h, args = arguments(5, torch.float32, (4,), 6)
    h.requires_grad_()
    patch_rows(h, args, torch.float32).sum().backward()
    torch.testing.assert_close(h.grad, torch.where(args.alpha == 1, 0.0, 1 - args.alpha)[args.slots])
