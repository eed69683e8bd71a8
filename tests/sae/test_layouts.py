"""Each layout: what is read encodes and decodes as the release's own formulas do."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile.sae import SAE, BatchTopK, JumpReLU, TopK, load
from tests.sae import _layouts, _weights
from tests.sae._layouts import linear, plain
from tests.sae._weights import COUNT, WIDTH, parts

P = parts()
H = _weights.rows(20)


def _topk(pre: Tensor, k: int = 3) -> Tensor:
    best = pre.topk(k)
    return torch.zeros_like(pre).scatter(-1, best.indices, best.values.relu())


def _jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return pre * (pre > threshold)


def _agrees(sae: SAE, f: Tensor, decoded: Tensor | None = None) -> None:
    assert 0 < int((f != 0).sum()) < f.numel()
    torch.testing.assert_close(sae.encode(H), f, rtol=1e-5, atol=1e-5)
    expected = f @ P["W_dec"] + P["b_dec"] if decoded is None else decoded
    torch.testing.assert_close(sae.reconstruct(H), expected, rtol=1e-5, atol=1e-5)


PRE = H @ P["W_enc"] + P["b_enc"]
CENTRED = (H - P["b_dec"]) @ P["W_enc"] + P["b_enc"]


def test_sae_lens_standard(tmp_path: Path) -> None:
    sae = load(_layouts.sae_lens(tmp_path / "one"))
    _agrees(sae, CENTRED.relu())
    assert (sae.site, sae.name) == (("post_block", 2), "one")
    assert sae.source == str(tmp_path / "one" / "sae_weights.safetensors")
    plainly = load(_layouts.sae_lens(tmp_path / "two", apply_b_dec_to_input=False), name="mine", width=WIDTH)
    _agrees(plainly, PRE.relu())
    assert plainly.name == "mine"
    assert load(tmp_path / "one" / "sae_weights.safetensors") == sae


def test_sae_lens_jumprelu(tmp_path: Path) -> None:
    ones = torch.ones(COUNT)
    folder = _layouts.sae_lens(tmp_path, "jumprelu", plain("threshold", scaling_factor=ones))
    _agrees(load(folder), _jump(CENTRED, P["threshold"]))


def test_sae_lens_gated(tmp_path: Path) -> None:
    tensors = plain("r_mag", "b_mag", b_gate=P["b_enc"])
    del tensors["b_enc"]
    product = (H - P["b_dec"]) @ P["W_enc"]
    magnitude = ((H - P["b_dec"]) @ (P["W_enc"] * P["r_mag"].exp()) + P["b_mag"]).relu()
    _agrees(load(_layouts.sae_lens(tmp_path, "gated", tensors)), (product + P["b_enc"] > 0) * magnitude)


@pytest.mark.parametrize("rescale", [False, True])
def test_sae_lens_topk(tmp_path: Path, rescale: bool) -> None:
    sae = load(_layouts.sae_lens(tmp_path, "topk", k=3, rescale_acts_by_decoder_norm=rescale))
    norm = P["W_dec"].norm(dim=1)
    f = _topk(CENTRED * norm) if rescale else _topk(CENTRED)
    _agrees(sae, f, (f / norm if rescale else f) @ P["W_dec"] + P["b_dec"])


def test_sae_lens_batchtopk(tmp_path: Path) -> None:
    threshold = torch.tensor(0.4, dtype=torch.float64)
    sae = load(_layouts.sae_lens(tmp_path / "a", "batchtopk", plain(topk_threshold=threshold), k=2.5))
    _agrees(sae, _jump(CENTRED, 0.4))
    without = load(_layouts.sae_lens(tmp_path / "b", "batchtopk", k=2.5))
    assert without.activation.batch_dependent
    assert int((without.encode(H) > 0).sum()) == 50


def test_sae_lens_before_version_6(tmp_path: Path) -> None:
    _agrees(load(_layouts.sae_lens_old(tmp_path / "a", apply_b_dec_to_input=None)), CENTRED.relu())
    topk = _layouts.sae_lens_old(tmp_path / "b", activation_fn_str="topk", activation_fn_kwargs={"k": 3})
    _agrees(load(topk), _topk(CENTRED))
    oldest: dict[str, Any] = {
        "hook_name": None,
        "hook_point": "blocks.4.hook_resid_pre",
        "hook_point_layer": 4,
        "architecture": None,
    }
    assert load(_layouts.sae_lens_old(tmp_path / "c", **oldest)).site == ("pre_attn", 4)


def test_sae_lens_normalisation(tmp_path: Path) -> None:
    layer = load(_layouts.sae_lens(tmp_path / "a", normalize_activations="layer_norm"))
    mean, std = H.mean(1, keepdim=True), H.std(1, keepdim=True)
    f = (((H - mean) / (std + 1e-5) - P["b_dec"]) @ P["W_enc"] + P["b_enc"]).relu()
    _agrees(layer, f, (f @ P["W_dec"] + P["b_dec"]) * std + mean)
    factor = math.sqrt(WIDTH) / 7.0
    for key, value in (("b", "expected_average_only_in"), ("c", True)):
        folder = _layouts.sae_lens_old(tmp_path / key, normalize_activations=value)
        f = ((H * factor - P["b_dec"]) @ P["W_enc"] + P["b_enc"]).relu()
        _agrees(load(folder, norm_factor=factor), f, (f @ P["W_dec"] + P["b_dec"]) / factor)


def test_gemma_scope_1(tmp_path: Path) -> None:
    sae = load(_layouts.gemma_scope(tmp_path))
    _agrees(sae, _jump(PRE, P["threshold"]))
    assert sae.site is None
    assert load(tmp_path, site="blocks.5.hook_resid_post").site == ("post_block", 5)


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("model.layers.2.output", ("post_block", 2)),
        ("model.layers.7.post_feedforward_layernorm.output", ("mlp_out", 7)),
    ],
)
def test_gemma_scope_2(tmp_path: Path, hook: str, site: tuple[str, int]) -> None:
    sae = load(_layouts.gemma_scope_2(tmp_path, hf_hook_point_in=hook, hf_hook_point_out=hook))
    _agrees(sae, _jump(PRE, P["threshold"]))
    assert sae.site == site


def _llama(factor: float, unit: bool) -> tuple[Tensor, Tensor]:
    """Encoder's pre-activations and decoder of Llama Scope at the scale of the rows, as its library prepares them."""
    norm = P["W_dec"].norm(dim=1) if unit else torch.ones(COUNT)
    return (H @ P["W_enc"] + P["b_enc"] / factor) * norm, P["W_dec"] / norm[:, None]


@pytest.mark.parametrize("unit", [True, False])
def test_llama_scope(tmp_path: Path, unit: bool) -> None:
    sae = load(_layouts.llama_scope(tmp_path, sparsity_include_decoder_norm=unit))
    factor = math.sqrt(WIDTH) / _layouts.AVERAGE
    pre, decoder = _llama(factor, unit)
    f = _jump(pre, 0.35)
    _agrees(sae, f, f @ decoder + P["b_dec"] / factor)
    assert sae.site == ("post_block", 2)
    assert load(tmp_path / "checkpoints" / "final.safetensors") == sae


def test_llama_scope_is_a_normalised_autoencoder(tmp_path: Path) -> None:
    """What it reconstructs is what the parameters of the file do to normalised rows."""
    factor = math.sqrt(WIDTH) / _layouts.AVERAGE
    x = H * factor
    pre = x @ P["W_enc"] + P["b_enc"]
    f = pre * (pre * P["W_dec"].norm(dim=1) > 0.35 * factor)
    torch.testing.assert_close(
        load(_layouts.llama_scope(tmp_path)).reconstruct(H), (f @ P["W_dec"] + P["b_dec"]) / factor
    )


def test_llama_scope_variants(tmp_path: Path) -> None:
    keys: dict[str, Any] = {
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "jump_relu_threshold": 0.0,
    }
    file = "sae_weights.safetensors"
    topk = load(_layouts.llama_scope(tmp_path / "a", file, **keys, act_fn="topk"))
    _agrees(topk, _topk(PRE))
    relu = _layouts.llama_scope(tmp_path / "b", file, **keys, act_fn="relu", apply_decoder_bias_to_pre_encoder=True)
    _agrees(load(relu), CENTRED.relu())
    fitted = load(_layouts.llama_scope(tmp_path / "c", file, act_fn="topk"))
    assert isinstance(fitted.activation, JumpReLU)


def test_dictionary_learning(tmp_path: Path) -> None:
    classes = {
        "AutoEncoder": (linear(P, encoder__bias="b_enc", bias="b_dec"), CENTRED.relu()),
        "AutoEncoderNew": (linear(P, encoder__bias="b_enc", decoder__bias="b_dec"), PRE.relu()),
        "AutoEncoderTopK": (
            linear(P, encoder__bias="b_enc", b_dec="b_dec")
            | {"k": torch.tensor(3, dtype=torch.int32), "threshold": torch.tensor(-1.0)},
            _topk(CENTRED),
        ),
        "BatchTopKSAE": (
            linear(P, encoder__bias="b_enc", b_dec="b_dec") | {"k": torch.tensor(3), "threshold": torch.tensor(0.4)},
            _jump(CENTRED, 0.4),
        ),
        "JumpReluAutoEncoder": (plain("threshold"), _jump(PRE, P["threshold"])),
        "GatedAutoEncoder": (
            linear(P, gate_bias="b_enc", decoder_bias="b_dec", r_mag="r_mag", mag_bias="b_mag"),
            (CENTRED > 0) * ((CENTRED - P["b_enc"]) * P["r_mag"].exp() + P["b_mag"]).relu(),
        ),
    }
    for name, (tensors, f) in classes.items():
        sae = load(_layouts.dictionary_learning(tmp_path / name, name, tensors), allow_pt=True)
        _agrees(sae, f)
        assert sae.site == ("post_block", 2)


def test_dictionary_learning_without_a_threshold_is_of_a_batch(tmp_path: Path) -> None:
    own = linear(P, encoder__bias="b_enc", b_dec="b_dec") | {"k": torch.tensor(3), "threshold": torch.tensor(-1.0)}
    sae = load(_layouts.dictionary_learning(tmp_path, "BatchTopKSAE", own, k=3, submodule_name="mlp"), allow_pt=True)
    assert isinstance(sae.activation, BatchTopK)
    assert sae.activation.batch_dependent
    assert sae.site is None


def test_sparsify(tmp_path: Path) -> None:
    sae = load(_layouts.sparsify(tmp_path / "layers.2"))
    _agrees(sae, _topk(CENTRED))
    assert sae.site == ("post_block", 2)
    assert load(_layouts.sparsify(tmp_path / "layers.2.mlp", num_latents=0)).site is None


def test_qwen_scope(tmp_path: Path) -> None:
    release = _layouts.qwen_scope(tmp_path / "SAE-Res-Qwen3-8B-Base-W64K-L0_3")
    _layouts.qwen_scope(release, "layer3.sae.pt")
    sae = load(release / "layer2.sae.pt", allow_pt=True)
    _agrees(sae, _topk(PRE))
    assert (sae.site, sae.name) == (("post_block", 2), "layer2")
    other = load(_layouts.qwen_scope(tmp_path / "saes"), allow_pt=True, k=3)
    assert isinstance(other.activation, TopK)
    assert other.site is None
    assert torch.equal(other.W_enc, sae.W_enc)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_of_the_file_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in plain().items()}
    sae = load(_layouts.sae_lens(tmp_path, tensors=tensors))
    assert {tensor.dtype for tensor in sae.tensors().values()} == {dtype}
    pre = (H - tensors["b_dec"].float()) @ tensors["W_enc"].float() + tensors["b_enc"].float()
    torch.testing.assert_close(sae.encode(H), pre.relu())
