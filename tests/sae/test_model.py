"""The value itself: what it checks, keeps, decodes, and when two are equal."""

from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
import torch

from steer_compile.errors import SAEError, SpecError
from steer_compile.sae import SAE, BatchTopK, FactorNorm, Gated, JumpReLU, LayerNorm, NoNorm, TopK
from tests.sae import _weights
from tests.sae._weights import COUNT, WIDTH


def test_tensors_are_copies_that_keep_their_dtype() -> None:
    own: dict[str, Any] = {name: _weights.parts()[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    own["W_enc"], own["b_dec"] = own["W_enc"].bfloat16(), own["b_dec"].double()
    sae = SAE(**own, activation=TopK(2))
    assert (sae.W_enc.dtype, sae.b_dec.dtype) == (torch.bfloat16, torch.float32)
    own["W_dec"].zero_()
    assert bool(sae.W_dec.any())
    assert (sae.d_model, sae.d_sae) == (WIDTH, COUNT)
    with pytest.raises(FrozenInstanceError):
        sae.name = "other"  # type: ignore[misc]


def test_equal_content_is_equal() -> None:
    one = _weights.sae()
    assert one == replace(one, name="other", source="elsewhere")
    assert len({one, replace(one, name="other")}) == 1
    changed = [
        replace(one, site=("pre_attn", 2)),
        replace(one, subtract_b_dec=True),
        replace(one, activation=TopK(2)),
        replace(one, normalisation=FactorNorm(2.0)),
        replace(one, b_dec=one.b_dec + 1),
        replace(one, W_enc=one.W_enc.bfloat16()),
    ]
    assert len({one.digest, *(sae.digest for sae in changed)}) == 1 + len(changed)
    zeros = torch.zeros(COUNT)
    assert replace(one, b_enc=zeros.half()) != replace(one, b_enc=zeros.bfloat16())
    assert _weights.sae(JumpReLU(torch.ones(COUNT))) != _weights.sae(JumpReLU(torch.full((COUNT,), 2.0)))


def test_sites_are_written_in_any_way() -> None:
    for site in (("hook_resid_post", 2), "blocks.2.hook_resid_post", "layers.2.post_block"):
        sae = _weights.sae(site=site)
        assert (sae.site, sae.key) == (("post_block", 2), "layers.2.post_block")
    assert _weights.sae(site=None).key == ""
    with pytest.raises(SpecError, match="unknown hook 'hook_z'"):
        _weights.sae(site=("hook_z", 2))


@pytest.mark.parametrize("norm", [NoNorm(), FactorNorm(0.37), LayerNorm()], ids=lambda norm: norm.kind)
def test_reconstruction(norm: NoNorm) -> None:
    own, h = _weights.parts(), _weights.rows()
    sae = _weights.sae(TopK(3), normalisation=norm, subtract_b_dec=True)
    if norm.kind == "layer_norm":
        mean, std = h.mean(1, keepdim=True), h.std(1, keepdim=True)
        x, scale, shift = (h - mean) / (std + 1e-5), std, mean
    else:
        factor = norm.settings().get("factor", 1.0)
        x, scale, shift = h * factor, torch.tensor(1 / factor), torch.tensor(0.0)
    pre = (x - own["b_dec"]) @ own["W_enc"] + own["b_enc"]
    best = pre.topk(3)
    f = torch.zeros_like(pre).scatter(1, best.indices, best.values.relu())
    expected = (f @ own["W_dec"] + own["b_dec"]) * scale + shift
    torch.testing.assert_close(sae.encode(h), f)
    torch.testing.assert_close(sae.decode(f, h), expected)
    torch.testing.assert_close(sae.reconstruct(h), expected)
    torch.testing.assert_close(sae.reconstruct(h, keep_error=True), h)


def test_rows_of_any_leading_shape_and_dtype() -> None:
    sae, h = _weights.sae(TopK(3)), _weights.rows(6)
    assert torch.equal(sae.encode(h.view(2, 3, WIDTH)), sae.encode(h).view(2, 3, COUNT))
    torch.testing.assert_close(sae.encode(h[0]), sae.encode(h[:1])[0])
    half = h.bfloat16()
    assert sae.reconstruct(half).dtype == torch.bfloat16
    assert torch.equal(sae.reconstruct(half), sae.reconstruct(half.float()).bfloat16())
    assert sae.reconstruct(h.double()).dtype == torch.float64


def test_what_does_not_fit_is_refused() -> None:
    sae = _weights.sae()
    with pytest.raises(SAEError, match=r"^tiny: rows of shape \(2, 5\).*width 6"):
        sae.encode(torch.zeros(2, 5))
    with pytest.raises(SAEError, match="dtype torch.int64"):
        sae.encode(torch.zeros(2, WIDTH, dtype=torch.int64))
    with pytest.raises(SAEError, match=r"features of shape \(2, 6\).*width 10"):
        sae.decode(torch.zeros(2, WIDTH))
    with pytest.raises(SAEError, match=r"give decode\(features, h\)"):
        replace(sae, normalisation=LayerNorm()).decode(torch.zeros(2, COUNT))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"W_enc": torch.zeros(6)}, r"W_enc is \(6,\), not a matrix"),
        ({"W_enc": torch.zeros(0, 4)}, r"W_enc is \(0, 4\), not a matrix"),
        ({"W_dec": torch.zeros(6, 10)}, r"W_dec has shape \(6, 10\), not \(10, 6\)"),
        ({"b_enc": torch.zeros(9)}, r"b_enc has shape \(9,\), not \(10,\)"),
        ({"b_dec": torch.zeros(6, dtype=torch.int64)}, "b_dec is dtype torch.int64"),
        ({"b_dec": torch.tensor([0, 0, torch.nan, 0, torch.inf, 0])}, "b_dec holds NaN or infinity in 2 of 6"),
        ({"activation": JumpReLU(torch.zeros(3))}, r"threshold has shape \(3,\), not \(10,\)"),
        ({"activation": Gated(torch.zeros(10), torch.full((10,), torch.nan))}, "b_mag holds NaN"),
        ({"activation": TopK(11)}, "k is 11 of 10 features; give a number from 1 to 10"),
        ({"activation": TopK(2.5)}, "k is 2.5, not a whole number"),  # type: ignore[arg-type]
        ({"activation": BatchTopK(0)}, "k is 0 of 10 features"),
        ({"activation": BatchTopK(3, -1.0)}, "the threshold is -1.0; give a finite number from 0 on"),
        ({"normalisation": FactorNorm(0.0)}, "the norm factor is 0.0"),
        ({"normalisation": LayerNorm(-1.0)}, "layer norm with eps -1.0"),
    ],
)
def test_values_that_are_none(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(SAEError, match=f"^folder/file: .*{text}"):
        replace(_weights.sae(source="folder/file"), **changes)
