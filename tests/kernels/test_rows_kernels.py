"""The kernels against fp64: one rounding at the end, nothing of other tokens, nothing outside of the tokens."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from steer_compile.kernels.steer_rows import SteerArgs, steer_rows, steer_rows_fp64
from steer_compile.kernels.store_rows import store_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, WIDTH = 6, 24


def add_rows(h: Tensor, table: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return steer_rows(h, SteerArgs(rows, table, scale), h.dtype)


def add_rows_fp64(h: Tensor, table: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    return steer_rows_fp64(h, SteerArgs(rows, table, scale))


def inputs(dtype: torch.dtype, seed: int, *shape: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Stream, vectors, rows and scales; the sizes range over several powers of two, and row 0 is zeros."""
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(*shape, WIDTH, generator=generator) * torch.randn(*shape, 1, generator=generator).exp()
    table = torch.randn(ROWS, WIDTH, generator=generator) * 3
    table[0] = 0
    rows = torch.randint(0, ROWS, shape, generator=generator, dtype=torch.int32)
    return h.to(dtype), table.to(dtype), rows, torch.randn(ROWS, generator=generator)


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Distance of neighbours of the dtype at each value (at least that of the smallest normal number)."""
    info = torch.finfo(dtype)
    return torch.exp2(torch.floor(torch.log2(value.abs().clamp(min=info.tiny)))) * info.eps


def assert_rounded_once(got: Tensor, exact: Tensor, terms: Tensor) -> None:
    """Half an ulp of the result for the rounding, and for a narrow dtype nothing else that shows.

    The fp32 arithmetic inside is off by at most 2 eps of its largest term; fp32 results show that as well.
    """
    inside = 2 * torch.finfo(torch.float32).eps * terms
    error = (got.double() - exact).abs()
    assert bool((error <= 0.5 * ulp(exact, got.dtype) * (1 + 1e-6) + inside).all())
    rounded = exact.to(got.dtype).double()
    assert bool(((got.double() - rounded).abs() <= ulp(exact, got.dtype) + inside).all())


def largest_term(h: Tensor, table: Tensor, rows: Tensor, scale: Tensor) -> Tensor:
    term = (table.double()[rows.long()] * scale.double()[rows.long()].unsqueeze(-1)).abs()
    return torch.maximum(h.double().abs(), term)


@pytest.mark.behaviour(12)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (1, 1), (0, 4), (2, 0)])
def test_add_rows_rounds_the_exact_sum_once(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    for seed in range(5):
        h, table, rows, scale = inputs(dtype, seed, *shape)
        before = h.clone()
        got = add_rows(h, table, rows, scale)
        assert (got.dtype, got.shape) == (dtype, h.shape)
        assert torch.equal(h, before)
        assert_rounded_once(got, add_rows_fp64(h, table, rows, scale), largest_term(h, table, rows, scale))


@pytest.mark.behaviour(4)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_table_may_be_wider_than_the_stream(dtype: torch.dtype) -> None:
    h, table, rows, scale = inputs(dtype, 1, 4, 4)
    table = table.float() + 1e-4
    table[0] = 0
    got = add_rows(h, table, rows, scale)
    assert got.dtype == dtype
    assert_rounded_once(got, add_rows_fp64(h, table, rows, scale), largest_term(h, table, rows, scale))


def test_fp64_is_not_rounded_to_fp32() -> None:
    h = torch.randn(3, WIDTH, dtype=torch.float64)
    _, table, rows, scale = inputs(torch.float32, 0, 3)
    assert torch.equal(add_rows(h, table, torch.zeros_like(rows), scale), h)
    torch.testing.assert_close(
        add_rows(h, table, rows, scale), add_rows_fp64(h, table, rows, scale), rtol=1e-6, atol=1e-6
    )


@pytest.mark.behaviour(1)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_row_zero_changes_nothing(dtype: torch.dtype) -> None:
    h, table, rows, scale = inputs(dtype, 3, 4, 5)
    h[0, 0, 0], h[1, 1, 1], h[2, 2, 2] = float("inf"), float("-inf"), torch.finfo(dtype).tiny / 4
    assert torch.equal(add_rows(h, table, torch.zeros_like(rows), scale), h)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_token_or_row_breaks_no_other(dtype: torch.dtype) -> None:
    h, table, rows, scale = inputs(dtype, 4, 3, 5)
    rows[rows == 5] = 4
    rows[1, 2] = 5
    expected = add_rows(h, table, rows, scale)
    for broken in ("token", "row", "scale"):
        h2, table2, scale2 = h.clone(), table.clone(), scale.clone()
        target = {"token": h2[1, 2], "row": table2[5], "scale": scale2[5:]}[broken]
        target.fill_(float("nan"))
        got = add_rows(h2, table2, rows, scale2)
        assert bool(got[1, 2].isnan().all())
        got[1, 2] = expected[1, 2]
        assert torch.equal(got, expected)


STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
    "every second": lambda h: torch.stack([h, torch.full_like(h, float("nan"))], -1)[..., 0],
    "a column of a wider tensor": lambda h: torch.cat([torch.full_like(h, float("nan")), h], -1)[..., WIDTH:],
}


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_do_not_matter(dtype: torch.dtype, strides: str) -> None:
    h, table, rows, scale = inputs(dtype, 5, 3, 5)
    strided = STRIDES[strides](h)
    assert torch.equal(strided, h)
    assert not strided.is_contiguous()
    expected = add_rows(h, table, rows, scale)
    assert torch.equal(add_rows(strided, table, rows, scale), expected)
    flipped = rows.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(add_rows(strided, table, flipped, scale), expected)
    buffers = [torch.full((20, WIDTH), float("nan"), dtype=dtype) for _ in range(2)]
    store_rows(h, buffers[0], 15)
    store_rows(strided, buffers[1], 15)
    torch.testing.assert_close(buffers[1], buffers[0], rtol=0, atol=0, equal_nan=True)


def test_one_row_for_all_tokens_by_expansion() -> None:
    h, table, _, scale = inputs(torch.float32, 6, 3, 5)
    rows = torch.tensor(2, dtype=torch.int32).expand(3, 5)
    one = h[:1, :1].expand(3, 5, WIDTH)
    assert torch.equal(add_rows(one, table, rows, scale), add_rows(one.clone(), table, rows.clone(), scale))


def test_gradients_of_the_stream_pass_unchanged() -> None:
    h, table, rows, scale = inputs(torch.float32, 7, 3, 5)
    h.requires_grad_()
    upstream = torch.randn(3, 5, WIDTH)
    add_rows(h, table, rows, scale).backward(upstream)
    assert h.grad is not None
    assert torch.equal(h.grad, upstream)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (0, 4), (16,)])
def test_store_rows_writes_the_tokens_and_nothing_else(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    h, *_ = inputs(dtype, 8, *shape)
    count = h[..., 0].numel()
    buffer = torch.full((16, WIDTH), float("nan"), dtype=dtype)
    written = store_rows(h, buffer, count)
    assert torch.equal(buffer[:count], h.reshape(count, WIDTH))
    assert bool(buffer[count:].isnan().all())
    assert written.data_ptr() == buffer.data_ptr() or count == 0
    assert written.shape == (count, WIDTH)


def test_what_is_stored_takes_no_part_in_autograd() -> None:
    h = torch.randn(2, 3, WIDTH, requires_grad=True)
    buffer = torch.zeros(8, WIDTH)
    for _ in range(2):
        store_rows(h * 2, buffer, 6)
        assert not buffer.requires_grad
