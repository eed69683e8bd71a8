"""The full SAE against fp64 and against the autoencoders: in Triton's interpreter, or on the GPU where there is one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_compile.errors import LoweringError
from steer_compile.kernels.sae_delta import ADD, ADD_ACTIVE, NO_FEATURE, SET, SET_ACTIVE
from steer_compile.kernels.sae_full import SaeFullArgs, check, reference, reference_fp64, sae_full
from steer_compile.kernels.sae_full_launch import launch
from steer_compile.sae import SAE, BatchTopK, FactorNorm, FeatureClamp, Gated, JumpReLU, LayerNorm, NoNorm, ReLU, TopK
from steer_compile.sae.activation import Activation
from steer_compile.sae.normalise import Normalisation
from steer_compile.sae.packing import decoder_rows, encoder_rows, feature_settings
from steer_compile.sae.steer import steered_delta, steered_reconstruction
from tests.sae._weights import parts

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTH, COUNT, ROOM, K, TOP = 24, 40, 48, 4, 6
CLAMPS = [FeatureClamp(3, 2.0), FeatureClamp(8, -1.5, "add"), FeatureClamp(20, 1.0, only_if_active=True)]
CODES = {("set", False): SET, ("add", False): ADD, ("set", True): SET_ACTIVE, ("add", True): ADD_ACTIVE}
P = parts(3, WIDTH, COUNT)
ACTIVATIONS = [ReLU(), JumpReLU(P["threshold"]), BatchTopK(3, 0.4), Gated(P["r_mag"], P["b_mag"]), TopK(5)]
NORMS = [NoNorm(), FactorNorm(0.5), LayerNorm(1e-5)]
ROWS = torch.tensor([[0, 0, 0, 0], [1, 1, 0, 0], [1, 2, 0, 0], [1, 0, 1, 0], [1, 2, 1, 0], [2, 1, 1, 0]]).float()
"""Not opted in; reconstructed; error kept; logged only; error kept and logged; by the second autoencoder."""


def tiny(activation: Activation, norm: Normalisation | None = None, seed: int = 3, **options: Any) -> SAE:
    own = parts(seed, WIDTH, COUNT)
    weights = own["W_enc"], own["b_enc"], own["W_dec"], own["b_dec"]
    return SAE(*weights, activation, norm or NoNorm(), **options)


def clamp_line(clamps: list[FeatureClamp]) -> Tensor:
    line = torch.zeros(3, K)
    for i, clamp in enumerate(clamps):
        line[:, i] = torch.tensor([clamp.feature, CODES[clamp.kind, clamp.only_if_active], clamp.value])
    return line.flatten()


def packed(
    saes: list[SAE], rows: Tensor, dtype: torch.dtype = torch.float32, clamped: bool = True, seed: int = 0,
    table: torch.dtype | None = None,
) -> SaeFullArgs:  # fmt: skip
    """Arguments of a call of these autoencoders; ``rows``: row of each token, of `ROWS`."""
    table, every = table or dtype, torch.arange(COUNT)
    encoder, decoder = (torch.zeros(len(saes), ROOM, WIDTH) for _ in range(2))
    lines = torch.tensor(NO_FEATURE).repeat(len(saes), ROOM, 1)
    for i, made in enumerate(saes):
        encoder[i, :COUNT], decoder[i, :COUNT] = encoder_rows(made, every), decoder_rows(made, every)
        lines[i, :COUNT] = feature_settings(made, every)
    numbers = [[COUNT, made.activation.k if isinstance(made.activation, TopK) else 0, 0, 0] for made in saes]
    h = torch.randn(rows.numel(), WIDTH, generator=torch.Generator().manual_seed(seed)) * 2
    line = clamp_line(CLAMPS if clamped else [])
    tensors = (
        h.to(dtype), rows.int(), ROWS.clone(), line.expand(len(ROWS), -1).contiguous(),
        encoder.flatten(0, 1).to(table), decoder.flatten(0, 1).to(table), lines.flatten(0, 1),
        torch.stack([made.b_dec for made in saes]), torch.tensor(numbers).float(),
        torch.full((1, rows.numel() + 2, 2 * TOP), torch.nan),
    )  # fmt: skip
    moved = [t.to(DEVICE) for t in tensors]
    return SaeFullArgs._make([*moved, None, rows.numel()])


def run(a: SaeFullArgs) -> tuple[Tensor, Tensor]:
    """The kernels on copies of what is written."""
    own = a._replace(h=a.h.clone(), log=a.log.clone())  # type: ignore[union-attr]
    launch(own)
    assert own.log is not None
    return own.h, own.log[0]


def hold(a: SaeFullArgs, tolerance: float = 2e-4) -> None:
    got, logged = run(a)
    expected, log = reference_fp64(a)
    size = expected.abs().amax(-1, keepdim=True).clamp(min=1)
    assert float(((got.double() - expected).abs() / size).max()) <= tolerance
    idle = (a.row_set[a.rows, 1] == 0) | (a.gates is not None and a.gates[:, 2] == 0)
    assert torch.equal(got[idle], a.h[idle])
    tokens = a.h.size(0)
    assert bool(logged[tokens:].isnan().all())
    wanted = (a.row_set[a.rows, 2] > 0) & (a.row_set[a.rows, 0] > 0)
    assert bool(logged[:tokens][~wanted].isnan().all())
    assert log is not None
    found, exact = logged[:tokens][wanted].double().nan_to_num(-9), log[wanted].nan_to_num(-9)  # -9: beyond the room
    torch.testing.assert_close(found[:, TOP:], exact[:, TOP:], rtol=1e-4 if tolerance < 1e-3 else 3e-2, atol=tolerance)
    if tolerance < 1e-3:
        assert torch.equal(found[:, :TOP], exact[:, :TOP])


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.kind)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
def test_every_activation_and_norm(activation: Activation, norm: Normalisation) -> None:
    made = [tiny(activation, norm, subtract_b_dec=True), tiny(JumpReLU(P["threshold"]), seed=9)]
    hold(packed(made, torch.tensor([0, 1, 2, 3, 4, 5, 0, 1, 2, 5, 5, 0])))


@pytest.mark.parametrize("activation", [ReLU(), TopK(7)], ids=["relu", "topk"])
def test_bf16(activation: Activation) -> None:
    hold(packed([tiny(activation), tiny(ReLU(), seed=9)], torch.arange(6).repeat(3), torch.bfloat16), 2e-2)


def test_an_unrounded_stream_beside_narrow_weights() -> None:
    a = packed([tiny(ReLU()), tiny(ReLU(), seed=9)], torch.arange(6).repeat(3), torch.float32, table=torch.bfloat16)
    got, _ = run(a)
    expected, _ = reference(a)
    size = expected.abs().amax(-1, keepdim=True)  # features enter the decoder rounded
    assert float(((got - expected).abs() / size).max()) < 3e-2
    keeps = a.row_set[a.rows, 1] == 2
    tight = 2e-5 if DEVICE == "cuda" else 3e-2  # the interpreter truncates what a GPU rounds
    assert float(((got - expected).abs() / size)[keeps].max()) < tight


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.kind)
def test_the_autoencoders_own_formulas(activation: Activation, norm: Normalisation) -> None:
    made = tiny(activation, norm, subtract_b_dec=True)
    a = packed([made, made], torch.tensor([0, 1, 1, 2, 4, 1, 2]))
    got, log = run(a)
    h = a.h.cpu()
    for clamped, rows in (
        (steered_reconstruction(h, made, CLAMPS), [1, 2, 5]),
        (steered_delta(h, made, CLAMPS), [3, 4, 6]),
    ):
        torch.testing.assert_close(got[rows].cpu(), clamped[rows], rtol=1e-4, atol=1e-4)
    kept = steered_reconstruction(h, made, CLAMPS, keep_error=True)
    torch.testing.assert_close(got[[3, 4, 6]].cpu(), kept[[3, 4, 6]], rtol=1e-4, atol=1e-4)
    best = made.encode(h)[4].topk(TOP)
    torch.testing.assert_close(log[4, TOP:].cpu(), best.values, rtol=1e-4, atol=1e-4)


def test_reconstruction_without_clamps_and_ties() -> None:
    """On a grid of whole numbers pre-activations tie: the lowest index is taken, as the reference does."""
    generator = torch.Generator().manual_seed(0)
    whole = {"W_enc": (WIDTH, COUNT), "b_enc": (COUNT,), "W_dec": (COUNT, WIDTH), "b_dec": (WIDTH,)}
    tensors = {name: torch.randint(-1, 2, shape, generator=generator).float() for name, shape in whole.items()}
    made = SAE(tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"], TopK(6))
    a = packed([made, made], torch.tensor([1, 4, 3, 1, 5, 2]), clamped=False)
    a.h.round_()
    hold(a, 1e-6)
    got, _ = run(a)
    kept = a.row_set[a.rows, 1] == 2
    assert torch.equal(got[kept], a.h[kept])


def wide_topk(k: int, count: int, whole: bool) -> SaeFullArgs:
    """Tokens of one TopK autoencoder of many features; with ``whole`` most pre-activations tie."""
    draw = torch.Generator().manual_seed(k)

    def numbers(*shape: int) -> Tensor:
        return torch.randint(-1, 2, shape, generator=draw).float() if whole else torch.randn(shape, generator=draw)

    lines = torch.tensor(NO_FEATURE).repeat(count, 1)
    lines[:, 1] = 0.0
    clamps = torch.zeros(3, K)
    clamps[:, 0], clamps[:, 1] = torch.tensor([count - 1.0, SET_ACTIVE, 2.0]), torch.tensor([7.0, ADD, 1.5])
    tensors = (
        numbers(5, WIDTH), torch.tensor([1, 0, 4, 2, 3]).int(), ROWS[:5].clone(), clamps.flatten().repeat(5, 1),
        numbers(count, WIDTH), numbers(count, WIDTH), lines, numbers(1, WIDTH),
        torch.tensor([[count, k, 0, 0]]).float(), torch.full((1, 7, 2 * TOP), torch.nan),
    )  # fmt: skip
    return SaeFullArgs._make([*[t.to(DEVICE) for t in tensors], None, 5])


@pytest.mark.parametrize(
    ("k", "count", "whole"), [(3, 2048, False), (100, 4096, False), (300, 4096, False), (80, 8704, True)],
    ids=["few_groups", "many_groups", "more_than_are_listed", "ties_in_all_groups"],
)  # fmt: skip
def test_topk_of_many_features(k: int, count: int, whole: bool) -> None:
    a = wide_topk(k, count, whole)
    hold(a, 1e-6 if whole else 2e-4)
    a.h[0, 2] = torch.nan
    got, _ = run(a)
    assert bool(got[0].isnan().all())
    assert bool(got[1:].isfinite().all())


def test_features_that_are_nan_are_decoded_however_many_there_are() -> None:
    a = wide_topk(3, 64, False)
    a.encoder[60:, 0] = torch.nan
    got, _ = run(a)
    exact, _ = reference_fp64(a)
    decoded = a.row_set[a.rows, 1] == 1
    assert bool(exact[decoded].isnan().all())
    assert bool(got[decoded].isnan().all())


@pytest.mark.parametrize("rows", [[0] * 5, [1] * 5, [5] * 5, [2] * 3, [], [3, 3]], ids=str)
def test_none_all_and_no_tokens(rows: list[int]) -> None:
    a = packed([tiny(ReLU()), tiny(TopK(4), seed=9)], torch.tensor(rows, dtype=torch.int32))
    if rows:
        hold(a)
    else:
        launch(a)
        sae_full(*a)
    if set(rows) == {0}:
        assert torch.equal(run(a)[0], a.h)


def test_what_is_beyond_the_capacity_is_left_alone() -> None:
    a = packed([tiny(ReLU()), tiny(ReLU(), seed=9)], torch.tensor([1, 0, 5, 2, 1, 1, 5]))._replace(capacity=3)
    hold(a._replace(log=a.log))
    got, _ = run(a)
    assert torch.equal(got[4:], a.h[4:])
    assert not torch.equal(got[:4], a.h[:4])


@pytest.mark.parametrize("activation", [ReLU(), TopK(4)], ids=["relu", "topk"])
def test_nan_stays_in_its_row(activation: Activation) -> None:
    a = packed([tiny(activation), tiny(ReLU(), seed=9)], torch.tensor([1, 1, 2, 2, 0]))
    clean, _ = run(a)
    a.h[0, 3], a.h[2, 0], a.h[4, 1] = torch.nan, torch.nan, torch.nan
    got, _ = run(a)
    assert bool(got[0].isnan().all())
    assert bool(got[2].isnan().all())
    assert torch.equal(got[[1, 3]], clean[[1, 3]])
    assert torch.equal(got[4].nan_to_num(), a.h[4].nan_to_num())


def gated(a: SaeFullArgs, numbers: list[float]) -> SaeFullArgs:
    """Behind gates, of which tier and rows are of no interest here."""
    gates = torch.full((a.h.size(0), 4), torch.nan)
    gates[:, 2] = torch.tensor(numbers).repeat(a.h.size(0))[: a.h.size(0)]
    return a._replace(gates=gates.to(DEVICE))


@pytest.mark.parametrize("norm", NORMS, ids=lambda norm: norm.kind)
@pytest.mark.parametrize("activation", [JumpReLU(P["threshold"]), TopK(5)], ids=lambda activation: activation.kind)
def test_a_gate_is_the_part_of_the_way_that_a_value_moves(activation: Activation, norm: Normalisation) -> None:
    made = tiny(activation, norm, subtract_b_dec=True)
    plain = packed([made, tiny(ReLU(), seed=9)], torch.arange(6).repeat(5))
    hold(gated(plain, [0.0, 1.0, 0.3, -0.5, 0.0, 2.0, 1.0]))
    got, whole = run(gated(plain, [0.5]))[0], run(plain)[0]
    torch.testing.assert_close(got, plain.h + 0.5 * (whole - plain.h), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(run(gated(plain, [1.0]))[0], whole, rtol=1e-6, atol=1e-5)  # another kernel's roundings


def test_closed_gates_cost_no_place_of_the_capacity() -> None:
    """Two places, of which a closed token without a log takes none."""
    a = gated(packed([tiny(ReLU()), tiny(ReLU(), seed=9)], torch.tensor([1, 2, 4, 1])), [0.0, 0.0, 0.0, 1.0])
    a = a._replace(capacity=2)
    got, log = run(a)
    assert torch.equal(got[:3], a.h[:3])
    assert not torch.equal(got[3], a.h[3])
    assert log[2].isfinite().all()
    expected, _ = reference(a)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 5), min_size=1, max_size=40), st.integers(0, 3))
def test_any_mix_of_rows(rows: list[int], seed: int) -> None:
    hold(packed([tiny(ACTIVATIONS[seed]), tiny(TopK(3), seed=9)], torch.tensor(rows), seed=seed))


def test_the_op_is_the_reference_on_a_cpu_and_compiles() -> None:
    a = packed([tiny(TopK(4)), tiny(ReLU(), seed=9)], torch.arange(6))
    a = SaeFullArgs(*[t.cpu() if isinstance(t, Tensor) else t for t in a])  # type: ignore[arg-type]
    a = a._replace(gates=torch.tensor([1.0, 0.5, 0.0]).repeat(2)[:, None].expand(6, 4).contiguous())
    expected, log = reference(a)

    def steered(h: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        own, logged = h.clone(), a.log.clone()  # type: ignore[union-attr]
        torch.ops.steer_compile.sae_full(*a._replace(h=own, rows=rows, log=logged))
        return own, logged

    for form in (steered, torch.compile(steered, fullgraph=True, dynamic=True)):
        got, logged = form(a.h, a.rows)
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(logged[0, : a.h.size(0)], log, equal_nan=True)
    op: Any = torch.ops.steer_compile.sae_full.default
    torch.library.opcheck(op, tuple(a), test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_a_log_with_room_for_more_than_all_features() -> None:
    a = packed([tiny(TopK(4)), tiny(ReLU(), seed=9)], torch.arange(6))
    wide = a._replace(log=torch.full((1, 6, 2 * (ROOM + 5)), torch.nan, device=DEVICE))
    (_, log), (_, found) = reference(a), reference(wide)
    assert log is not None
    assert found is not None
    logged = ROWS[:, 2] > 0
    for part, few, none in zip(found[logged].chunk(2, -1), log[logged].chunk(2, -1), (-1, 0), strict=True):
        assert torch.equal(part[:, :TOP], few)
        assert bool((part[:, ROOM:] == none).all())


def test_what_does_not_fit_is_refused() -> None:
    a = packed([tiny(ReLU()), tiny(ReLU(), seed=9)], torch.arange(6))
    with pytest.raises(LoweringError, match=r"decoder of the full SAE op is .*; it takes torch.float32\[96, 24\]"):
        check(a._replace(decoder=a.decoder[:5]))
    with pytest.raises(LoweringError, match=r"in one piece and int32 rows, not 2 dimensions with strides \(1, 6\)"):
        check(a._replace(h=a.h.T.contiguous().T))
    with pytest.raises(
        LoweringError, match=r"gates of the full SAE op are torch.float32\[6\]; it takes float32 \(T, 4\)"
    ):
        check(a._replace(gates=torch.ones(6)))
    with pytest.raises(LoweringError, match="int32 rows"):
        check(a._replace(rows=a.rows.long()))
