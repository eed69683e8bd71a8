"""Encoders against their references in fp64: exact on a grid of whole numbers, where ties and thresholds are met."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_compile.sae import SAE, BatchTopK, FactorNorm, Gated, JumpReLU, LayerNorm, NoNorm, ReLU, TopK
from steer_compile.sae.activation import top_mask
from steer_compile.sae.model import reference_encode
from tests.sae import _weights
from tests.sae._weights import ACTIVATIONS, COUNT, WIDTH

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@given(
    seed=st.integers(0, 10_000),
    n=st.integers(0, 5),
    dtype=st.sampled_from(DTYPES),
    weights=st.sampled_from((torch.float32, torch.bfloat16)),
    subtract=st.booleans(),
    zero_row=st.booleans(),
    nan=st.booleans(),
)
@settings(max_examples=25, deadline=None)
def test_encode_is_the_reference(
    kind: str, seed: int, n: int, dtype: torch.dtype, weights: torch.dtype, subtract: bool, zero_row: bool, nan: bool
) -> None:
    tensors: dict[str, Any] = {name: tensor.to(weights) for name, tensor in _weights.grid(seed).items()}
    sae = SAE(**tensors, activation=ACTIVATIONS[kind](seed), subtract_b_dec=subtract)
    h = _weights.whole(seed + 1, n, WIDTH).to(dtype)
    if n and zero_row:
        h[0] = 0
    if n and nan:
        h[-1, seed % WIDTH] = torch.nan
    found = sae.encode(h)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.shape == (n, COUNT)
    np.testing.assert_array_equal(found.double().numpy(), reference_encode(sae, h).reshape(n, COUNT))
    if n and nan:
        assert bool(found[-1].isnan().all())
        assert not bool(found[:-1].isnan().any())


@pytest.mark.parametrize("norm", [NoNorm(), FactorNorm(0.37), LayerNorm()], ids=lambda norm: norm.kind)
@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk", "batch_topk", "gated"])
def test_encode_is_near_the_reference_off_the_grid(kind: str, norm: NoNorm) -> None:
    own = _weights.parts(3)
    activation = {
        "relu": ReLU(),
        "jumprelu": JumpReLU(own["threshold"]),
        "topk": TopK(3),
        "batch_topk": BatchTopK(2.5),
        "gated": Gated(own["r_mag"], own["b_mag"]),
    }[kind]
    sae = _weights.sae(activation, seed=3, normalisation=norm, subtract_b_dec=True)
    h = _weights.rows(20)
    h[0] = 0
    np.testing.assert_allclose(sae.encode(h).numpy(), reference_encode(sae, h), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sae.encode(h.double()).numpy(), reference_encode(sae, h), rtol=1e-12, atol=1e-12)


def test_formulas_written_out() -> None:
    """The formulas once more as the papers write them, apart from code and references."""
    own, h = _weights.parts(), _weights.rows()
    pre = h @ own["W_enc"] + own["b_enc"]
    assert torch.equal(_weights.sae(ReLU()).encode(h), torch.clamp(pre, min=0))
    jump = _weights.sae(JumpReLU(own["threshold"])).encode(h)
    assert torch.equal(jump, pre * torch.heaviside(pre - own["threshold"], torch.tensor(0.0)))
    best = pre.topk(3)
    assert torch.equal(
        _weights.sae(TopK(3)).encode(h), torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    )
    gated = _weights.sae(Gated(own["r_mag"], own["b_mag"])).encode(h)
    product = h @ own["W_enc"]
    magnitude = torch.relu(product * own["r_mag"].exp() + own["b_mag"])
    assert torch.equal(gated, (product + own["b_enc"] > 0) * magnitude)


def test_topk_takes_the_lowest_index_of_equal_features() -> None:
    sae = SAE(torch.ones(2, 5), torch.zeros(5), torch.ones(5, 2), torch.zeros(2), TopK(2))
    assert sae.encode(torch.tensor([[1.0, 1.0]])).tolist() == [[2, 2, 0, 0, 0]]
    assert sae.encode(torch.tensor([[-1.0, -1.0]])).tolist() == [[0, 0, 0, 0, 0]]  # the largest are below 0


def test_batch_topk_shares_its_places() -> None:
    """Without a threshold one token may take the places of another, with one it may not."""
    eye = torch.eye(3)
    h = torch.tensor([[3.0, 2.0, 1.0], [0.5, 0.0, 0.0]])
    shared = SAE(eye, torch.zeros(3), eye, torch.zeros(3), BatchTopK(1.5))
    assert shared.encode(h).tolist() == [[3, 2, 1], [0, 0, 0]]
    assert shared.encode(h[1:]).tolist() == [[0.5, 0, 0]]
    assert shared.encode(torch.stack([h, h])).count_nonzero() == 6  # all leading dimensions are one batch
    own = SAE(eye, torch.zeros(3), eye, torch.zeros(3), BatchTopK(1.5, threshold=0.5))
    assert own.encode(h).tolist() == [[3, 2, 1], [0, 0, 0]]  # above, not at the threshold
    assert not own.activation.batch_dependent
    assert shared.activation.batch_dependent


def test_fewer_than_one_place_in_a_batch_keeps_nothing() -> None:
    sae = SAE(torch.eye(2), torch.zeros(2), torch.eye(2), torch.zeros(2), BatchTopK(0.4))
    assert sae.encode(torch.ones(2, 2)).count_nonzero() == 0


def test_infinity_stays() -> None:
    for activation in (ReLU(), JumpReLU(torch.ones(2)), TopK(1), BatchTopK(1, 0.5)):
        sae = SAE(torch.eye(2) + 1, torch.zeros(2), torch.eye(2), torch.zeros(2), activation)
        assert sae.encode(torch.tensor([[torch.inf, 1.0]]))[0, 0] == torch.inf


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0, -1.0, float("nan"), float("inf")]), min_size=1), st.integers(1, 8))
@settings(max_examples=60, deadline=None)
def test_top_mask_takes_exactly_k(values: list[float], k: int) -> None:
    mask = top_mask(torch.tensor(values), k)
    order = sorted(range(len(values)), key=lambda i: (-values[i] if values[i] == values[i] else np.inf, i))
    assert set(mask.nonzero()[:, 0].tolist()) == set(order[:k])
