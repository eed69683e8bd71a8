"""Settings of features do what the autoencoder does: all activations and normalisations, and a bias."""

import pytest
import torch

from steer_compile.errors import SAEError
from steer_compile.kernels.sae_delta import SaeArgs, sae_delta, sae_delta_fp64
from steer_compile.sae import SAE, BatchTopK, FactorNorm, FeatureClamp, Gated, JumpReLU, LayerNorm, NoNorm, ReLU
from steer_compile.sae.activation import Activation
from steer_compile.sae.normalise import Normalisation
from steer_compile.sae.packing import decoder_rows, encoder_rows, feature_settings
from steer_compile.sae.steer import steered_delta
from tests.sae._weights import parts, rows, sae

P = parts()
ACTIVATIONS = [ReLU(), JumpReLU(P["threshold"] - 0.1), BatchTopK(2, 0.4), Gated(P["r_mag"], P["b_mag"])]
CLAMPS = [
    FeatureClamp(1, 2.5),
    FeatureClamp(4, -1.0, "add"),
    FeatureClamp(7, 3.0, only_if_active=True),
    FeatureClamp(2, 0.5, "add", True),
]
CODES = torch.tensor([1.0, 2.0, 3.0, 4.0])


def arguments(made: SAE, row: torch.Tensor) -> SaeArgs:
    index = torch.tensor([clamp.feature for clamp in CLAMPS])
    line = torch.cat([CODES, torch.tensor([clamp.value for clamp in CLAMPS])])
    features = torch.cat([encoder_rows(made, index), decoder_rows(made, index)])
    return SaeArgs(features, feature_settings(made, index), torch.stack([torch.zeros(8), line]), row)


@pytest.mark.parametrize("norm", [NoNorm(), FactorNorm(0.37), LayerNorm(1e-5)], ids=lambda norm: norm.kind)
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda activation: activation.kind)
@pytest.mark.parametrize("subtract", [False, True])
def test_delta_of_packed_features_is_that_of_the_autoencoder(
    activation: Activation, norm: Normalisation, subtract: bool
) -> None:
    made = sae(activation, normalisation=norm, subtract_b_dec=subtract)
    h, row = rows(40).double(), torch.arange(40) % 2
    got = sae_delta_fp64(h, arguments(made, row))
    expected = steered_delta(h, made, CLAMPS)
    assert (expected != h).any(-1).sum() > 20
    torch.testing.assert_close(got[1::2], expected[1::2], rtol=1e-5, atol=1e-5)
    assert torch.equal(got[::2], h[::2])
    narrow = sae_delta(h.float(), arguments(made, row))
    torch.testing.assert_close(narrow.double(), got, rtol=1e-4, atol=1e-4)


def test_what_depends_on_the_batch_is_refused() -> None:
    with pytest.raises(SAEError, match="depend on the batch"):
        feature_settings(sae(BatchTopK(2)), torch.tensor([0]))


def test_nan_of_a_row_stays_in_it() -> None:
    made, h = sae(ReLU()), rows(4)
    h[1, 2] = torch.nan
    got = sae_delta(h, arguments(made, torch.ones(4, dtype=torch.int64)))
    assert got[1].isnan().all()
    assert not got[[0, 2, 3]].isnan().any()
    assert torch.equal(
        sae_delta(h, arguments(made, torch.ones(4, dtype=torch.int64)), torch.zeros(4)).nan_to_num(), h.nan_to_num()
    )
