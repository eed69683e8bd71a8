"""Files that SAELens writes are read, and its own classes, run in fp32, compute the same features and rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import HookSelection, SAESteering, SteerSpec, sae, steer_backend
from steer_compile.errors import SAEError
from steer_compile.sae import SAE, FactorNorm, Gated, JumpReLU, LayerNorm, ReLU, TopK
from tests._models import WIDTH as MODEL_WIDTH
from tests._models import compiled, edited, llama, logits, tokens

pytestmark = [pytest.mark.saelens, pytest.mark.filterwarnings("default")]

WIDTH, COUNT, K = 24, 96, 7
HOOK = "blocks.2.hook_resid_post"
CLASSES = {
    "standard": ("StandardSAE", ReLU),
    "gated": ("GatedSAE", Gated),
    "jumprelu": ("JumpReLUSAE", JumpReLU),
    "topk": ("TopKSAE", TopK),
}
TRAINING = {
    "standard": ("StandardTrainingSAE", ReLU),
    "gated": ("GatedTrainingSAE", Gated),
    "jumprelu": ("JumpReLUTrainingSAE", JumpReLU),
    "topk": ("TopKTrainingSAE", TopK),
    "batchtopk": ("BatchTopKTrainingSAE", JumpReLU),  # saved as such for inference
}
FACTOR = 0.37


def rows(n: int = 50, width: int = WIDTH, seed: int = 5) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 2 + 0.3


def made(lens: ModuleType, name: str, **settings: Any) -> Any:
    """An autoencoder of SAELens with random weights in all of its parameters, none of them symmetric."""
    cls = getattr(lens, name)
    config_class = getattr(lens, f"{name}Config")
    given = {"d_in": WIDTH, "d_sae": COUNT, "metadata": lens_metadata(HOOK), **settings}
    if "TopK" in name:
        given = {"k": K, **given}
    theirs = cls(config_class(**given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if key in ("threshold", "log_threshold"):
                parameter.copy_(noise.abs() * 0.5 if key == "threshold" else 0.3 * noise - 0.7)
            else:
                parameter.copy_(noise * (1.0 if parameter.ndim == 2 else 0.4))
    return theirs.eval()


def lens_metadata(hook: str) -> Any:
    from sae_lens.saes.sae import SAEMetadata

    return SAEMetadata(hook_name=hook, model_name="tiny")


def compare(theirs: Any, ours: SAE, h: Tensor, tolerance: float = 1e-5) -> Tensor:
    """Features, and rows of them; their decoder goes with the rows that it encoded last."""
    with torch.no_grad():
        features: Tensor = theirs.encode(h)
        decoded = theirs.decode(features)
    close(ours.encode(h), features, tolerance)
    close(ours.decode(features, h), decoded, tolerance)
    close(ours.reconstruct(h), decoded, tolerance)
    active = (features > 0).float().mean()
    assert 0.0 < active < 0.9, f"{active:.0%} of the features are active, which tests little"
    return features


def close(got: Tensor, expected: Tensor, tolerance: float) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("subtract", [True, False], ids=["less b_dec", "as it is"])
@pytest.mark.parametrize("norm", ["none", "layer_norm"])
@pytest.mark.parametrize("architecture", CLASSES)
def test_inference_classes(lens: ModuleType, tmp_path: Path, architecture: str, norm: str, subtract: bool) -> None:
    name, activation = CLASSES[architecture]
    theirs = made(lens, name, normalize_activations=norm, apply_b_dec_to_input=subtract)
    theirs.save_model(tmp_path)
    ours = sae.load(tmp_path, width=WIDTH)
    assert isinstance(ours.activation, activation)
    assert (ours.site, ours.subtract_b_dec) == (("post_block", 2), subtract)
    assert isinstance(ours.normalisation, LayerNorm) == (norm == "layer_norm")
    features = compare(theirs, ours, rows())
    if architecture == "topk":
        assert (features > 0).sum(1).max() == K
    with torch.no_grad():
        if norm == "none":  # their decoder forgets the statistics of a row
            close(ours.decode(ours.encode(rows())), theirs(rows()), 1e-5)


@pytest.mark.parametrize("architecture", CLASSES)
def test_average_norm_that_is_folded(lens: ModuleType, tmp_path: Path, architecture: str) -> None:
    """SAELens folds the factor into the weights before it runs; we take it beside the unfolded file."""
    name, _ = CLASSES[architecture]
    theirs = made(lens, name, normalize_activations="expected_average_only_in")
    theirs.save_model(tmp_path / "unfolded")
    theirs.fold_activation_norm_scaling_factor(FACTOR)
    theirs.save_model(tmp_path / "folded")
    beside = sae.load(tmp_path / "unfolded", norm_factor=FACTOR)
    assert beside.normalisation == FactorNorm(FACTOR)
    compare(theirs, beside, rows())
    compare(theirs, sae.load(tmp_path / "folded"), rows())
    with pytest.raises(SAEError, match="norm_factor"):
        sae.load(tmp_path / "unfolded")


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_decoder_norms_that_are_folded(lens: ModuleType, tmp_path: Path, architecture: str) -> None:
    theirs = made(lens, CLASSES[architecture][0])
    theirs.fold_W_dec_norm()
    theirs.save_model(tmp_path)
    ours = sae.load(tmp_path)
    compare(theirs, ours, rows())
    close(ours.W_dec.norm(dim=1), torch.ones(COUNT), 1e-5)


def test_topk_rescaled_by_decoder_norms(lens: ModuleType, tmp_path: Path) -> None:
    theirs = made(lens, "TopKSAE", rescale_acts_by_decoder_norm=True)
    theirs.save_model(tmp_path)
    compare(theirs, sae.load(tmp_path), rows())


@pytest.mark.parametrize(
    ("architecture", "options"),
    [(name, {}) for name in TRAINING]
    + [(name, {"rescale_acts_by_decoder_norm": False}) for name in ("topk", "batchtopk")],
)
def test_training_classes_saved_for_inference(
    lens: ModuleType, tmp_path: Path, architecture: str, options: dict[str, Any]
) -> None:
    """``save_inference_model`` of what was trained, read by them and by us; TopK rescales if not told otherwise."""
    name, activation = TRAINING[architecture]
    trained = made(lens, name, **options)
    if architecture == "batchtopk":
        trained.topk_threshold.fill_(3.1)
    trained.save_inference_model(tmp_path)
    theirs, ours = lens.SAE.load_from_disk(tmp_path), sae.load(tmp_path)
    assert isinstance(ours.activation, activation)
    compare(theirs, ours, rows())


def test_batch_of_sequences_and_half_precision(lens: ModuleType, tmp_path: Path) -> None:
    theirs = made(lens, "JumpReLUSAE", dtype="bfloat16").to(torch.bfloat16)
    theirs.save_model(tmp_path)
    ours = sae.load(tmp_path)
    assert ours.W_enc.dtype == torch.bfloat16
    wide = theirs.float()
    wide.dtype = torch.float32
    compare(wide, ours, rows(60).view(4, 15, WIDTH))


@pytest.mark.parametrize(
    ("key", "value", "hook"),
    [
        ("normalize_activations", "constant_norm_rescale", HOOK),
        ("normalize_activations", "covariance_whitening", HOOK),
        ("reshape_activations", "hook_z", "blocks.2.attn.hook_z"),
    ],
)
def test_what_asks_for_other_mathematics_is_refused(
    lens: ModuleType, tmp_path: Path, key: str, value: str, hook: str
) -> None:
    made(lens, "StandardSAE", metadata=lens_metadata(hook), **{key: value}).save_model(tmp_path)
    with pytest.raises(SAEError, match=value):
        sae.load(tmp_path)


def test_clamped_features_against_their_hooks(lens: ModuleType, tmp_path: Path) -> None:
    """Their features, changed in their decoder in an eager model, are ours in an eager and in a compiled one."""
    theirs = made(lens, "JumpReLUSAE", d_in=MODEL_WIDTH, metadata=lens_metadata("blocks.0.hook_resid_post"))
    theirs.save_model(tmp_path)
    ours, model, ids, site = sae.load(tmp_path, width=MODEL_WIDTH), llama(), tokens(2, 7), ("post_block", 0)
    clamps = [sae.FeatureClamp(5, 3.0), sae.FeatureClamp(11, 2.0, "add", only_if_active=True)]

    def their_edit(keep_error: bool) -> Callable[[Tensor], Tensor]:
        def edit(h: Tensor) -> Tensor:
            features = theirs.encode(h)
            changed = features.clone()
            changed[..., 5] = 3.0
            changed[..., 11] = torch.where(features[..., 11] > 0, features[..., 11] + 2.0, features[..., 11])
            steered: Tensor = theirs.decode(changed)
            return steered + (h - theirs.decode(features)) if keep_error else steered

        return edit

    expected = {}
    for keep_error in (True, False):
        with torch.no_grad(), edited(model, {site: their_edit(keep_error)}):
            expected[keep_error] = logits(model, ids)
    plain = logits(model, ids)
    assert all((found - plain).abs().max() > 0.01 for found in expected.values())
    with edited(model, {site: lambda h: sae.steered_delta(h, ours, clamps)}):
        close(logits(model, ids), expected[True], 1e-4)
    spec = SteerSpec(
        steer=(HookSelection(*site, ops=("add", "sae", "sae_full")),), max_tokens=64, features=4, sae_features=COUNT
    )
    backend = steer_backend(spec)
    run = compiled(model, backend)
    backend.runtime.saes.attach("theirs", ours, features=(5, 11), whole=True)
    for mode, keep_error in (("delta", True), ("keep_error", True), ("reconstruct", False)):
        with backend.runtime.steer(features=SAESteering("theirs", clamps, mode=mode)):
            close(logits(run, ids), expected[keep_error], 1e-4)
