"""Steering by features: what each clamp does, what stays, and what is refused."""

import pytest
import torch

from steer_compile.errors import SAEError, VectorError
from steer_compile.sae import (
    BatchTopK,
    FactorNorm,
    FeatureClamp,
    JumpReLU,
    LayerNorm,
    NoNorm,
    ReLU,
    TopK,
    steered_delta,
    steered_reconstruction,
)
from tests.sae import _weights

CLAMPS = (
    FeatureClamp(3, 4.0),
    FeatureClamp(0, -1.5, "add"),
    FeatureClamp(7, 2.0, "add", only_if_active=True),
    FeatureClamp(5, 0.0),
)
NORMS = pytest.mark.parametrize("norm", [NoNorm(), FactorNorm(0.37), LayerNorm()], ids=lambda norm: norm.kind)


@NORMS
@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(torch.full((10,), 0.4)), TopK(3)], ids=lambda a: a.kind)
def test_delta_is_the_formula(norm: NoNorm, activation: ReLU) -> None:
    sae, h = _weights.sae(activation, normalisation=norm), _weights.rows(30)
    f = sae.encode(h)
    scale = {"none": 1.0, "factor": 1 / 0.37}.get(norm.kind, h.std(1, keepdim=True))
    expected = h.clone()
    for row in range(len(h)):
        step = torch.zeros(6)
        step += (4.0 - f[row, 3]) * sae.W_dec[3]
        step += -1.5 * sae.W_dec[0]
        step += 2.0 * float(f[row, 7] > 0) * sae.W_dec[7]
        step += -f[row, 5] * sae.W_dec[5]
        expected[row] += step * (scale[row] if isinstance(scale, torch.Tensor) else scale)
    assert 0 < int((f[:, 7] > 0).sum()) < len(h)
    torch.testing.assert_close(steered_delta(h, sae, CLAMPS), expected, rtol=1e-5, atol=1e-5)


@NORMS
def test_reconstruction_with_its_error_is_delta(norm: NoNorm) -> None:
    sae, h = _weights.sae(TopK(3), normalisation=norm, subtract_b_dec=True), _weights.rows(30)
    kept = steered_reconstruction(h, sae, CLAMPS, keep_error=True)
    torch.testing.assert_close(kept, steered_delta(h, sae, CLAMPS), rtol=1e-4, atol=1e-4)
    dropped = steered_reconstruction(h, sae, CLAMPS)
    torch.testing.assert_close(dropped + (h - sae.reconstruct(h)), kept, rtol=1e-4, atol=1e-4)
    assert torch.equal(steered_reconstruction(h, sae), sae.reconstruct(h))


def test_rows_without_a_change_are_bit_equal() -> None:
    sae, h = _weights.sae(ReLU()), _weights.rows(30).bfloat16()
    h[:, int(sae.W_dec[3].argmax())] = -0.0  # adding 0.0 would make it 0.0
    assert bool((sae.W_dec[3] > 0).any())
    f = sae.encode(h)[:, 3]
    steered = steered_delta(h, sae, [FeatureClamp(3, 9.0, only_if_active=True)])
    still = f == 0
    assert 0 < int(still.sum()) < len(h)
    assert torch.equal(steered[still].view(torch.int16), h[still].view(torch.int16))
    assert bool((steered[~still] != h[~still]).any(1).all())
    assert steered.dtype == torch.bfloat16
    assert torch.equal(steered_delta(h, sae, []), h)


def test_one_rounding_at_the_end() -> None:
    sae, h = _weights.sae(ReLU()), _weights.rows(30).bfloat16()
    for steer in (steered_delta, steered_reconstruction):
        assert torch.equal(steer(h, sae, CLAMPS), steer(h.float(), sae, CLAMPS).bfloat16())
    assert steered_delta(h.double(), sae, CLAMPS).dtype == torch.float64


def test_topk_is_among_all_features() -> None:
    """A clamped feature that is not among the k largest is 0, however large it is beside the other clamped ones."""
    sae, h = _weights.sae(TopK(1)), _weights.rows(40)
    f = sae.encode(h)
    assert bool(((f != 0).sum(1) <= 1).all())
    only = steered_delta(h, sae, [FeatureClamp(feature, 1.0, "add", only_if_active=True) for feature in (1, 2)])
    moved = (only != h).any(1)
    assert torch.equal(moved, (f[:, [1, 2]] > 0).any(1))


def test_nan_stays_in_its_row() -> None:
    sae, h = _weights.sae(ReLU()), _weights.rows(3)
    h[1, 2] = torch.nan
    for steered in (steered_delta(h, sae, CLAMPS), steered_reconstruction(h, sae, CLAMPS)):
        assert bool(steered[1].isnan().all())
        assert not bool(steered[[0, 2]].isnan().any())


def test_refusals() -> None:
    sae, h = _weights.sae(ReLU()), _weights.rows(2)
    with pytest.raises(SAEError, match="tiny has no feature 10; its features are 0 to 9"):
        steered_delta(h, sae, [FeatureClamp(10, 1.0)])
    with pytest.raises(SAEError, match="feature 3 is clamped twice"):
        steered_reconstruction(h, sae, [FeatureClamp(3, 1.0), FeatureClamp(3, 2.0, "add")])
    with pytest.raises(SAEError, match="would depend on other tokens"):
        steered_delta(h, _weights.sae(BatchTopK(2)), [FeatureClamp(3, 1.0)])
    with pytest.raises(SAEError, match="kind 'scale'; the kinds are set, add"):
        FeatureClamp(3, 1.0, "scale")
    with pytest.raises(SAEError, match="-1 is no feature"):
        FeatureClamp(-1, 1.0)
    with pytest.raises(VectorError, match="clamp of feature 3 nan is not finite"):
        FeatureClamp(3, float("nan"))
