"""What is not read: each error names the file, what was expected, and what was found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from steer_compile.errors import SAEError
from steer_compile.sae import load, load_all
from tests.sae import _layouts
from tests.sae._layouts import linear, lower, plain
from tests.sae._weights import COUNT, WIDTH, parts

P = parts()
Write = Callable[[Path], Path]


def _lens(architecture: str = "standard", without: str = "", **keys: Any) -> Write:
    def write(folder: Path) -> Path:
        tensors = {name: tensor for name, tensor in plain().items() if name != without}
        return _layouts.sae_lens(folder, architecture, tensors, **keys)

    return write


def _lens_with(**tensors: torch.Tensor) -> Write:
    return lambda folder: _layouts.sae_lens(folder, tensors=plain(**tensors))


def _dictionary(name: str, **keys: Any) -> Write:
    own = linear(P, encoder__bias="b_enc", b_dec="b_dec") | {"k": torch.tensor(3)}
    return lambda folder: _layouts.dictionary_learning(folder, name, own, **keys)


MATHEMATICS = {
    "unknown key": (_lens(warp=2), "cfg.json has keys whose meaning is unknown: warp=2; give ignore="),
    "architecture": (_lens("transcoder"), "'architecture' is 'transcoder'; supported are standard, gated"),
    "activation": (_lens(activation_fn="tanh-relu"), "the activation 'tanh-relu' of 'standard' is unknown"),
    "activation key": (_lens("topk", k=3, activation_fn_kwargs={"postact_fn": "id"}), "unknown: postact_fn='id'"),
    "normalisation": (_lens(normalize_activations="constant_norm_rescale"), "'normalize_activations' is 'constant_nor"),
    "factor": (_lens(normalize_activations="expected_average_only_in"), "the factor is not in the file; give norm_fac"),
    "heads": (_lens(reshape_activations="hook_z"), "'reshape_activations' is 'hook_z'"),
    "one head": (_lens(hook_head_index=3), "'hook_head_index' is 3, which is not supported"),
    "scaled": (_lens(finetuning_scaling_factor=True), "'finetuning_scaling_factor' is True"),
    "scale": (_lens_with(scaling_factor=torch.full((COUNT,), 2.0)), "scaling_factor is not 1 everywhere"),
    "rescaled": (_lens(rescale_acts_by_decoder_norm=True), "'rescale_acts_by_decoder_norm' with 'relu' is not"),
    "transcoder": (_lens(hook_name_out="blocks.2.hook_mlp_out"), "'hook_name_out' is 'blocks.2.hook_mlp_out'"),
    "hook": (_lens(metadata={"hook_name": "blocks.2.attn.hook_z"}), "its hook 'blocks.2.attn.hook_z' is no hook poi"),
    "no k": (_lens("topk"), "'k' is None; topk takes a number of features"),
    "flag": (_lens(apply_b_dec_to_input="yes"), "'apply_b_dec_to_input' is 'yes', not true or false"),
    "affine": (lambda f: _layouts.gemma_scope_2(f, affine_connection=True), "'affine_connection' is True"),
    "kind": (lambda f: _layouts.gemma_scope_2(f, type="crosscoder"), "'type' is 'crosscoder', which is not supported"),
    "jump": (lambda f: _layouts.gemma_scope_2(f, architecture="topk"), "this layout has 'jump_relu'"),
    "elsewhere": (
        lambda f: _layouts.gemma_scope_2(f, hf_hook_point_out="model.layers.3.output"),
        "'hf_hook_point_out' is 'model.layers.3.output', which is not supported; supported: 'model.layers.2.output'",
    ),
    "attention": (
        lambda f: _layouts.gemma_scope_2(f, hf_hook_point_in="model.x", hf_hook_point_out="model.x"),
        "its hook 'model.x' is no hook point here",
    ),
    "glu": (lambda f: _layouts.llama_scope(f, use_glu_encoder=True), "'use_glu_encoder' is True"),
    "token-wise": (lambda f: _layouts.llama_scope(f, norm_activation="token-wise"), "'norm_activation' is 'token-"),
    "no average": (
        lambda f: _layouts.llama_scope(f, dataset_average_activation_norm=None),
        "hyperparams.json: 'in' is None, not a number",
    ),
    "zero average": (
        lambda f: _layouts.llama_scope(f, dataset_average_activation_norm={"in": 0, "out": 1}),
        "give finite numbers above 0",
    ),
    "negative": (lambda f: _layouts.llama_scope(f, jump_relu_threshold=-1), "negative features are not supported"),
    "act_fn": (lambda f: _layouts.llama_scope(f, act_fn="batchtopk"), "'act_fn' is 'batchtopk'; supported are"),
    "llama transcoder": (lambda f: _layouts.llama_scope(f, hook_point_out="blocks.2.x"), "'hook_point_out' is"),
    "signed": (lambda f: _layouts.sparsify(f, signed=True), "'signed' is True"),
    "groupmax": (lambda f: _layouts.sparsify(f, activation="groupmax"), "'activation' is 'groupmax'"),
    "skip": (lambda f: _layouts.sparsify(f, skip_connection=True), "'skip_connection' is True"),
    "dictionary": (_dictionary("MatryoshkaBatchTopKSAE"), "'dict_class' is 'MatryoshkaBatchTopKSAE'; supported are"),
    "two ks": (_dictionary("AutoEncoderTopK", k=4), "k is 3, and 4 in its configuration"),
}  # fmt: skip


@pytest.mark.parametrize("case", MATHEMATICS)
def test_other_mathematics(tmp_path: Path, case: str) -> None:
    write, text = MATHEMATICS[case]
    with pytest.raises(SAEError) as caught:
        load(write(tmp_path / "layers.2"), allow_pt=True)
    assert str(caught.value).startswith(str(tmp_path))
    assert text in str(caught.value)


DAMAGED = {
    "missing tensor": (_lens(without="b_dec"), "sae_weights.safetensors has no tensor 'b_dec'; it has W_dec, W_enc"),
    "unknown tensor": (_lens_with(log_threshold=P["b_enc"]), "tensors whose meaning is unknown: log_threshold"),
    "shape": (_lens_with(W_dec=P["W_enc"]), "W_dec has shape (6, 10), not (10, 6)"),
    "not a matrix": (_lens_with(W_enc=P["b_enc"]), "W_enc has shape (10,), not two dimensions"),
    "nan": (_lens_with(b_enc=P["b_enc"] * torch.nan), "b_enc holds NaN or infinity"),
    "integers": (_lens_with(b_enc=torch.zeros(COUNT, dtype=torch.int64)), "b_enc has dtype torch.int64"),
    "width of the file": (_lens(d_in=7), "W_enc takes rows of width 6, the configuration says 7"),
    "features of the file": (_lens(d_sae=16), "W_enc has 10 features, the configuration says 16"),
    "width in words": (_lens(d_in="six"), "'d_in' is 'six', not a whole number"),
    "zero decoder": (
        lambda f: _layouts.sae_lens(f, "topk", plain(W_dec=P["W_dec"] * 0), k=3, rescale_acts_by_decoder_norm=True),
        "row 0 of the decoder is zero",
    ),
    "gemma": (lambda f: _layouts.gemma_scope(f, threshold=torch.zeros(9)), "threshold has shape (9,), not (10,)"),
    "width key": (lambda f: _layouts.gemma_scope_2(f, width=16384), "W_enc has 10 features, the configuration says"),
    "tensor beside": (
        lambda f: _layouts.gemma_scope_2(f, lower(plain("threshold", affine=P["b_enc"]))),
        "tensors whose meaning is unknown: affine",
    ),
    "topk over all": (lambda f: _layouts.sparsify(f, k=11), "k is 11 of 10 features"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files(tmp_path: Path, case: str) -> None:
    write, text = DAMAGED[case]
    with pytest.raises(SAEError) as caught:
        load(write(tmp_path / "layers.2"))
    assert str(caught.value).startswith(str(tmp_path))
    assert text in str(caught.value)


def test_keys_and_tensors_may_be_left_out_by_name(tmp_path: Path) -> None:
    folder = _layouts.sae_lens(tmp_path, tensors=plain(extra=P["b_enc"]), warp=2)
    assert load(folder, ignore=["warp", "extra"]).d_sae == COUNT
    with pytest.raises(SAEError, match="ignore is the text 'warp'"):
        load(folder, ignore="warp")


@pytest.mark.parametrize("file", ["sae_weights.safetensors", "params.npz", "params.safetensors", "ae.pt"])
@pytest.mark.parametrize("keep", [0, 5, 0.5])
def test_truncated_files(tmp_path: Path, file: str, keep: float) -> None:
    own = linear(P, encoder__bias="b_enc", bias="b_dec")
    writers: dict[str, Write] = {
        "sae_weights.safetensors": _layouts.sae_lens,
        "params.npz": _layouts.gemma_scope,
        "params.safetensors": _layouts.gemma_scope_2,
        "ae.pt": lambda folder: _layouts.dictionary_learning(folder, "AutoEncoder", own),
    }
    path = writers[file](tmp_path) / file
    data = path.read_bytes()
    path.write_bytes(data[: keep if isinstance(keep, int) else int(len(data) * keep)])
    with pytest.raises(SAEError, match=f"{file} cannot be read as"):
        load(path, allow_pt=True)


def test_configurations_that_are_none(tmp_path: Path) -> None:
    folder = _layouts.sae_lens(tmp_path)
    (folder / "cfg.json").write_text('{"d_in": 6')
    with pytest.raises(SAEError, match=r"cfg\.json cannot be read as JSON"):
        load(folder)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(SAEError, match=r"cfg\.json holds a list, not a mapping"):
        load(folder)
    (folder / "cfg.json").write_text(json.dumps({"metadata": 3, "d_in": WIDTH}))
    with pytest.raises(SAEError, match="'metadata' is 3, not a mapping"):
        load(folder)


def test_pickles_are_refused(tmp_path: Path) -> None:
    release = _layouts.qwen_scope(tmp_path / "SAE-Res-Qwen3-8B-L0_3")
    with pytest.raises(SAEError, match=r"layer2\.sae\.pt is a pickle.*give allow_pt=True"):
        load(release)
    with pytest.raises(SAEError, match=r"ae\.pt is a pickle"):
        load(_dictionary("AutoEncoderTopK")(tmp_path / "dictionary"))
    torch.save({"W_enc": Path("x")}, release / "layer2.sae.pt")  # an object that weights-only loading does not make
    with pytest.raises(SAEError, match="cannot be read as a PyTorch file of weights"):
        load(release, allow_pt=True)
    torch.save([torch.zeros(2)], release / "layer2.sae.pt")
    with pytest.raises(SAEError, match="holds list with other things than tensors"):
        load(release, allow_pt=True)
    np.savez(tmp_path / "params.npz", w_enc=np.array([object()]))
    with pytest.raises(SAEError, match="cannot be read as npz, it is truncated, pickled"):
        load(tmp_path / "params.npz")


def test_k_that_nobody_says(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="k is not in the file, and no folder is named like"):
        load(_layouts.qwen_scope(tmp_path / "saes"), allow_pt=True)
    with pytest.raises(SAEError, match="its folder says k=3, not 5"):
        load(_layouts.qwen_scope(tmp_path / "SAE-Res-Qwen3-8B-L0_3"), allow_pt=True, k=5)
    with pytest.raises(SAEError, match="has k=3, and 5 was asked for; leave out k="):
        load(_layouts.sparsify(tmp_path / "layers.2"), k=5)
    lens = _layouts.sae_lens(tmp_path / "lens")
    for key in ("k", "norm_factor"):
        with pytest.raises(SAEError, match=rf"takes no {key}, and 5 was asked for"):
            load(lens, **{key: 5})  # type: ignore[arg-type]
    own = linear(P, encoder__bias="b_enc", b_dec="b_dec")
    with pytest.raises(SAEError, match="k is None, and None in its configuration"):
        load(_layouts.dictionary_learning(tmp_path / "none", "AutoEncoderTopK", own), allow_pt=True)
    old = _layouts.dictionary_learning(tmp_path / "old", "AutoEncoderTopK", own, k=3)
    assert load(old, allow_pt=True, k=3).activation.settings() == {"k": 3}


def test_what_the_caller_expects(tmp_path: Path) -> None:
    folder = _layouts.sae_lens(tmp_path / "lens")
    with pytest.raises(SAEError, match=r"rows of width 6, not 2304; it belongs to another model"):
        load(folder, width=2304)
    with pytest.raises(SAEError, match=r"belongs to layers\.2\.post_block, not to \('post_block', 3\)"):
        load(folder, site=("post_block", 3))
    attention = _layouts.sae_lens(tmp_path / "z", metadata={"hook_name": "blocks.2.attn.hook_z"})
    assert load(attention, site=("attn_in", 2)).site == ("attn_in", 2)


def test_what_is_in_no_layout(tmp_path: Path) -> None:
    with pytest.raises(SAEError, match="is not there; give a folder or file"):
        load(tmp_path / "missing")
    with pytest.raises(
        SAEError, match=r"in no known layout: the folder has nothing; known: manifest \(manifest\.json\); SAEL"
    ):
        load(tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(SAEError, match=r"the folder has weights\.bin"):
        load(tmp_path / "weights.bin")
    both = _layouts.sparsify(tmp_path / "layers.2")
    _layouts.sae_lens(both)
    with pytest.raises(
        SAEError, match="can be read in 2 ways: sae_weights.safetensors as SAELens, sae.safetensors as spars"
    ):
        load(both)
    with pytest.raises(SAEError, match=r"laid out as SAELens .* holds one autoencoder; call load"):
        load_all(_layouts.sae_lens(tmp_path / "lens"))
