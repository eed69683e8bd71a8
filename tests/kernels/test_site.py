"""The site template against fp64: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_compile import LoweringError
from steer_compile.kernels import site, site_kernels, site_launch
from steer_compile.kernels.site import ARGUMENTS, OPTIONS, SiteArgs, launch, norm_of, reference
from steer_compile.kernels.site_launch import launch_options
from steer_compile.kernels.steer_rows import score_rows_fp64, steer_rows_fp64
from tests.kernels.site_inputs import FAMILIES, GATED, PACKED, site_args

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NORMS = ["", "rms", "rms_wide", "layer"]
STEPS = {torch.float32: 8.0, torch.bfloat16: 2.0 if DEVICE == "cuda" else 3.0, torch.float16: 2.0}
"""Tolerance in epsilons of the dtype, of the size of a row. The interpreter truncates bf16 where a GPU rounds, and
gates follow the value."""


def wide(a: SiteArgs) -> tuple[Tensor, Tensor]:
    """The op in fp64 behind the model's own rounded add."""
    v = value(a)
    steered = steer_rows_fp64(v, a.steering(), a.clamps)
    weight, bias = (None if t is None else t.double() for t in (a.weight, a.bias))
    return steered, norm_of(steered, a.norm, weight, bias, a.eps, a.offset) if a.norm else steered.new_empty(0)


def value(a: SiteArgs) -> Tensor:
    """The pristine value: what the model's own operators make of stream and branch."""
    if a.branch is None:
        return a.stream
    b = norm_of(a.branch, a.branch_norm, a.branch_weight, a.branch_bias, a.branch_eps, a.branch_offset)
    b = b * a.branch_scale
    return a.stream.float() + b.float() if a.exact else a.stream + b


def assert_close(got: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    assert got.dtype == dtype
    assert got.shape == exact.shape
    assert bool(got.isfinite().all())
    if not got.numel():
        return
    size = exact.abs().amax(-1, keepdim=True)
    error = ((got.double() - exact).abs() / size).max()
    assert error <= factor * STEPS[dtype] * torch.finfo(dtype).eps, float(error)


def check(a: SiteArgs) -> None:
    dtype, tokens = a.stream.dtype, a.stream.size(0)
    expected, expected_norm = wide(a)
    out, normed = launch(a)
    assert_close(out, expected, dtype)
    assert_close(normed, expected_norm, dtype, 3.0)
    if a.capture is not None and a.choice is not None:
        row, chosen = chosen_of(a)
        assert_close(a.capture[0, row], value(a).double()[chosen], dtype)
        others = torch.ones(a.capture.size(1), dtype=torch.bool, device=row.device)
        others[row] = False
        assert bool(a.capture[0, others].isnan().all())
    elif a.capture is not None:
        assert_close(a.capture[0, :tokens], value(a).double(), dtype)
        assert bool(a.capture[0, tokens:].isnan().all())
    if a.score is not None:
        size = value(a).double().norm(dim=-1, keepdim=True) * a.stream.size(1) ** 0.5
        found, exact = a.score[0, :tokens].double(), score_rows_fp64(value(a), a.steering())
        assert bool(((found - exact).abs() <= STEPS[dtype] * 1e-6 * size + size * (1e-2 if a.exact else 1e-6)).all())
        assert bool(a.score[0, tokens:].isnan().all())


def chosen_of(a: SiteArgs) -> tuple[Tensor, Tensor]:
    """Rows of the tokens that a packed capture stores, and the tokens' numbers."""
    assert a.capture_rows is not None
    assert a.choice is not None
    row, group = a.capture_rows.long().unbind(1)
    chosen = ((row >= 0) & (a.choice[group, 0] != 0)).nonzero().flatten()
    return row[chosen], chosen


@pytest.mark.behaviour(13)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [64, 96, 1000])
@pytest.mark.usefixtures("poisoned_empty")
def test_all_stages(dtype: torch.dtype, norm: str, width: int) -> None:
    check(site_args(5, width, dtype, norm=norm, device=DEVICE))


@pytest.mark.behaviour(7, 17)
@pytest.mark.parametrize("families", [(*FAMILIES, "gates"), (*FAMILIES, "gates", "score"), ("add", "gates"),
                                      ("add", "clamp", "gates"), ("monitor", "score"), ("tier", "gates"),
                                      ("row_monitor", "score", "branch")])  # fmt: skip
@pytest.mark.parametrize("width", [64, 1000, 17000])
@pytest.mark.usefixtures("poisoned_empty")
def test_gates_of_other_sites_and_scores(families: tuple[str, ...], width: int) -> None:
    check(site_args(3, width, torch.float32, families, device=DEVICE))


@pytest.mark.filterwarnings("ignore:overflow")  # in the sigmoid of a score far from its threshold
@pytest.mark.parametrize("few", [0, 1 << 30])
@pytest.mark.parametrize(
    "families", [(PACKED,), ("branch", PACKED), (PACKED, *FAMILIES[2:]), ("branch", PACKED, "add")]
)
@pytest.mark.parametrize("width", [48, 100, 17000])
@pytest.mark.usefixtures("poisoned_empty")
def test_captures_of_chosen_tokens(
    families: tuple[str, ...], width: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "FEW_TOKENS", few)
    for seed in range(3):
        check(site_args(9, width, torch.float32, families, device=DEVICE, seed=seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [40, 96])
@pytest.mark.usefixtures("small_chunks")
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6), tokens=st.integers(0, 9), broken=st.booleans())
def test_packed_rows_are_the_dense_ones_bit_for_bit(
    dtype: torch.dtype, width: int, seed: int, tokens: int, broken: bool
) -> None:
    a = site_args(tokens, width, dtype, ("branch", PACKED, "add"), seed=seed, device=DEVICE)
    if broken and tokens:
        a.stream[0] = float("nan")
    row, chosen = chosen_of(a)
    for run in (launch, reference):
        assert a.capture is not None
        packed, dense = (torch.full_like(a.capture, 7) for _ in range(2))
        after = run(a._replace(capture=packed))
        before = run(a._replace(capture=dense, capture_rows=None, choice=None))
        assert torch.equal(packed[0, row].view(torch.uint8), dense[0, chosen].view(torch.uint8))
        assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(after, before, strict=True))
        untouched = torch.ones(packed.size(1) - 1, dtype=torch.bool)
        untouched[row] = False
        assert bool((packed[0, :-1][untouched] == 7).all())


@pytest.mark.behaviour(13)
@pytest.mark.parametrize("families", [c for n in (1, 2) for c in itertools.combinations(FAMILIES, n)])
@pytest.mark.usefixtures("poisoned_empty")
def test_each_stage_vanishes_alone(families: tuple[str, ...]) -> None:
    check(site_args(4, 48, torch.float32, families, "layer", device=DEVICE))


@pytest.mark.parametrize("tokens", [0, 1, 2, 17])
@pytest.mark.usefixtures("poisoned_empty")
def test_any_number_of_tokens(tokens: int) -> None:
    check(site_args(tokens, 80, torch.float16, device=DEVICE))


@pytest.mark.behaviour(4)
@pytest.mark.parametrize("table", DTYPES)
def test_the_table_has_a_dtype_of_its_own(table: torch.dtype) -> None:
    check(site_args(3, 72, torch.bfloat16, table=table, device=DEVICE))


def test_strided_and_expanded_inputs() -> None:
    a = site_args(6, 40, torch.float32, device=DEVICE)
    expected = launch(a)
    assert a.branch is not None
    other = torch.stack([a.stream, torch.full_like(a.stream, float("nan"))], -1)[..., 0]
    same = launch(a._replace(stream=other, branch=a.branch.t().contiguous().t()))
    assert all(torch.equal(x, y) for x, y in zip(same, expected, strict=True))
    one = a._replace(stream=a.stream[:1].expand(6, 40))
    both = launch(one), launch(one._replace(stream=one.stream.contiguous()))
    assert torch.equal(both[0][0], both[1][0])


def test_a_broken_token_breaks_no_other() -> None:
    a = site_args(6, 40, torch.float32, device=DEVICE)
    expected = launch(a)
    broken = a.stream.clone()
    broken[2] = float("nan")
    got = launch(a._replace(stream=broken))
    for x, y in zip(got, expected, strict=True):
        assert bool(x[2].isnan().all())
        keep = [i for i in range(6) if i != 2]
        assert torch.equal(x[keep], y[keep])


@pytest.mark.behaviour(1, 21)
@pytest.mark.filterwarnings("ignore:overflow", "ignore:invalid value")  # a projection of 3e38, which is not used
def test_neutral_rows_change_nothing() -> None:
    a = site_args(6, 40, torch.float32, ("add", "row_monitor", "clamp"), "", device=DEVICE)
    assert a.rows is not None
    a.stream[3, 5] = 3e38
    out, _ = launch(a._replace(rows=torch.zeros_like(a.rows)))
    assert torch.equal(out, a.stream)


@pytest.mark.parametrize("norm", NORMS)
def test_the_reference_is_the_formula(norm: str) -> None:
    a = site_args(7, 33, torch.float32, norm=norm)
    for got, exact in zip(reference(a), wide(a), strict=True):
        assert_close(got, exact, torch.float32, 3.0)


@pytest.mark.behaviour(33)
def test_one_record_is_the_source_of_the_schema() -> None:
    schema = torch.ops.steer_compile.site.default._schema
    assert [a.name for a in schema.arguments] == [a.name for a in ARGUMENTS] + [name for name, _ in OPTIONS]
    assert list(SiteArgs._fields) == [a.name for a in schema.arguments]
    written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == [a.name for a in ARGUMENTS if a.written]
    full = with_branch_norm(site_args(2, 16, torch.float32, (*FAMILIES, *GATED, PACKED), norm="layer"), "layer")
    sizes = {"T": 2, "H": 16, "R": 5, "RK": 15, "G": 4, "F": 11, "FF": 22}
    for argument in ARGUMENTS:
        tensor = getattr(full, argument.name)
        expected = [sizes[d] if d in sizes else int(d) for d in argument.shape.split()]
        assert list(tensor.shape)[-1:] == expected[-1:], argument
        assert argument.name in ("capture", "score") or list(tensor.shape) == expected, argument


@pytest.mark.parametrize("families", [FAMILIES, ("branch", "add"), ("capture",), (PACKED,)])
def test_opcheck(families: tuple[str, ...]) -> None:
    a = site_args(3, 16, torch.float32, families)
    torch.library.opcheck(torch.ops.steer_compile.site.default, tuple(a))


@pytest.mark.behaviour(10)
@pytest.mark.parametrize("name", ["branch", "table", "tier", "probe_set", "rowprobe", "clamp_set", "weight", "capture"])
def test_a_tensor_of_another_size_is_refused(name: str) -> None:
    a = site_args(3, 16, torch.float32)
    wrong: dict[str, Any] = {name: getattr(a, name)[..., :-1]}
    with pytest.raises(LoweringError, match=f"^{name} of the site template is "):
        torch.ops.steer_compile.site(*a._replace(**wrong))


def test_a_tensor_of_another_dtype_is_refused() -> None:
    a = site_args(3, 16, torch.float32)
    assert a.rows is not None
    with pytest.raises(LoweringError, match=r"^rows of the site template is torch.int64"):
        torch.ops.steer_compile.site(*a._replace(rows=a.rows.long()))


def test_launch_options_hold_a_row() -> None:
    for width in (1, 2, 64, 65, 1000, 2048, 4096, 7168, 16384):
        options = launch_options(width)
        assert options.block >= width
        assert options.block & (options.block - 1) == 0
        assert options.warps in (1, 2, 4, 8, 16)


def test_the_stage_bits_agree() -> None:
    kernels = site_kernels
    bits = [kernels.BRANCH, kernels.CAPTURE, kernels.ADD, kernels.TIER, kernels.MONITOR, kernels.ROW_MONITOR]
    more = (kernels.CLAMP, kernels.SCORE, kernels.GATES, kernels.PACKED, kernels.SAE)
    assert [b.value for b in (*bits, *more)] == list(site._STAGES.values())
    assert kernels.FEW.value | kernels.EXACT.value == 128 | 256


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", ["", "rms", "layer"])
@pytest.mark.parametrize("branch_norm", NORMS)
@pytest.mark.usefixtures("poisoned_empty")
def test_norm_and_multiplier_of_the_branch(dtype: torch.dtype, norm: str, branch_norm: str) -> None:
    check(with_branch_norm(site_args(4, 96, dtype, norm=norm, device=DEVICE), branch_norm))


def with_branch_norm(a: SiteArgs, kind: str, scale: float = 0.375) -> SiteArgs:
    generator = torch.Generator().manual_seed(5)
    weight, bias = (torch.randn(a.stream.size(1), generator=generator).to(a.stream) for _ in range(2))
    offset = 1.0 if kind == "rms_wide" else 0.0
    given: dict[str, Any] = {"branch_norm": kind, "branch_eps": 1e-5, "branch_offset": offset, "branch_scale": scale}
    return a._replace(**given, branch_weight=weight if kind else None, branch_bias=bias if kind == "layer" else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
def test_exact_keeps_the_sum_unrounded(dtype: torch.dtype, norm: str) -> None:
    a = site_args(4, 96, dtype, norm=norm, device=DEVICE)._replace(exact=True)
    check(a)
    for got, exact in zip(reference(a), wide(a), strict=True):
        assert_close(got, exact, dtype, 3.0)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of more than 64 numbers count as wide, so that tests of the chunked kernel are quick."""
    monkeypatch.setattr(site_launch, "MAX_ROW", 64)
    monkeypatch.setattr(site_launch, "CHUNK", 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("width", [96, 100])
@pytest.mark.usefixtures("poisoned_empty", "small_chunks")
def test_wide_rows(dtype: torch.dtype, norm: str, width: int) -> None:
    a = site_args(3, width, dtype, norm=norm, device=DEVICE)
    check(a)
    check(with_branch_norm(site_args(3, width, dtype, norm=norm, device=DEVICE), norm))


@pytest.mark.parametrize("families", [c for n in (1, 2) for c in itertools.combinations(FAMILIES, n)])
@pytest.mark.usefixtures("poisoned_empty", "small_chunks")
def test_each_stage_vanishes_alone_in_wide_rows(families: tuple[str, ...]) -> None:
    check(site_args(2, 72, torch.float32, families, "layer", device=DEVICE))


@pytest.mark.filterwarnings("ignore:overflow")  # in the sigmoid of a score far from its threshold
@pytest.mark.parametrize("width", [16385, 28672, 65536])
def test_the_widest_rows(width: int) -> None:
    check(site_args(1, width, torch.bfloat16, device=DEVICE))


@pytest.mark.parametrize("few", [0, 1 << 30])
@pytest.mark.usefixtures("poisoned_empty")
def test_the_forms_for_few_and_for_many_tokens(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "FEW_TOKENS", few)
    for dtype in DTYPES:
        check(site_args(5, 80, dtype, norm="rms", device=DEVICE))


def test_a_misaligned_tensor_is_copied() -> None:
    a = site_args(3, 24, torch.float32, device=DEVICE)
    room = torch.empty(3 * 24 + 1, device=DEVICE)
    room[1:] = a.stream.flatten()
    shifted = room[1:].view(3, 24)
    assert site.aligned(shifted).data_ptr() % 16 == 0
    assert all(torch.equal(x, y) for x, y in zip(launch(a._replace(stream=shifted)), launch(a), strict=True))
