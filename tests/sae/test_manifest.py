"""The layout of this package: what is written comes back, changes are found, and a folder is whole or not there."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_compile.errors import SAEError
from steer_compile.sae import SAE, BatchTopK, FactorNorm, Gated, JumpReLU, LayerNorm, ReLU, TopK, load, load_all, save
from steer_compile.sae.layouts import manifest
from tests.sae import _weights
from tests.sae._weights import parts

P = parts()


def _each() -> list[SAE]:
    kinds = {
        "relu": ReLU(),
        "jumprelu": JumpReLU(P["threshold"].half()),
        "topk": TopK(3),
        "batch_topk": BatchTopK(2.5),
        "threshold": BatchTopK(2, 0.1),
        "gated": Gated(P["r_mag"], P["b_mag"]),
    }
    saes = [_weights.sae(kind, name=name) for name, kind in kinds.items()]
    saes[1] = replace(saes[1], normalisation=FactorNorm(1 / 3), site=None, subtract_b_dec=True)
    saes[2] = replace(saes[2], normalisation=LayerNorm(), W_enc=saes[2].W_enc.bfloat16())
    return saes


def test_round_trip(tmp_path: Path) -> None:
    saes = _each()
    path = save(saes, tmp_path / "deep" / "saes")
    found = load_all(path)
    assert list(found) == [sae.name for sae in saes]
    for sae in saes:
        other = found[sae.name]
        assert (other, other.name, other.digest) == (sae, sae.name, sae.digest)
        assert other.header() == sae.header()
        assert torch.equal(other.encode(_weights.rows()), sae.encode(_weights.rows()))
        assert load(path.parent, name=sae.name) == sae
    assert sorted(item.name for item in (tmp_path / "deep").iterdir()) == ["saes"]


def test_one_needs_no_name(tmp_path: Path) -> None:
    sae = _weights.sae(site=None)
    save(sae, tmp_path / "one")
    assert load(tmp_path / "one") == sae
    assert load(tmp_path / "one", site=("attn_in", 4)) == replace(sae, site=("attn_in", 4))


def test_what_is_not_written(tmp_path: Path) -> None:
    sae = _weights.sae()
    with pytest.raises(SAEError, match=r"named \['tiny', 'tiny'\]; give at least one"):
        save([sae, sae], tmp_path / "twice")
    with pytest.raises(SAEError, match="give at least one"):
        save([], tmp_path / "none")
    (tmp_path / "taken").mkdir()
    with pytest.raises(SAEError, match="taken is there already; take another name"):
        save(sae, tmp_path / "taken")


def test_a_failed_write_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(manifest, "save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save(_weights.sae(), tmp_path / "folder")
    assert list(tmp_path.iterdir()) == []


def _edited(folder: Path, **changes: Any) -> Path:
    """The manifest with other values for the first autoencoder."""
    path = folder / "manifest.json"
    data = json.loads(path.read_text())
    data["saes"][0].update(changes)
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"subtract_b_dec": True}, "the manifest was changed"),
        ({"activation": {"kind": "topk", "k": 4}}, "the manifest was changed"),
        ({"site": "layers.3.post_block"}, "the manifest was changed"),
        ({"digest": "00"}, "not 00; the manifest was changed"),
        ({"sha256": "00"}, "not 00; it was changed or truncated"),
        ({"activation": {"kind": "softmax"}}, "the activation 'softmax' is unknown; known are relu, jumprelu, topk"),
        ({"activation": {"kind": "topk"}}, "the activation 'topk' does not fit its numbers or tensors"),
        ({"activation": {"kind": "topk", "k": "3"}}, "'k' of the activation is '3', not a number"),
        ({"normalisation": {"kind": "factor"}}, "the normalisation 'factor' does not fit"),
        ({"file": "../0.safetensors"}, "which is no file of its folder"),
        ({"file": "1.safetensors"}, "1.safetensors cannot be read"),
        ({"d_sae": 11}, "W_enc has 10 features, the configuration says 11"),
        ({"scale": 2}, "keys whose meaning is unknown: scale=2"),
    ],
)
def test_changed_manifests(tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    save(_weights.sae(TopK(3)), tmp_path / "one")
    path = _edited(tmp_path / "one", **changes)
    with pytest.raises(SAEError) as caught:
        load(path)
    assert str(caught.value).startswith(str(tmp_path))
    assert text in str(caught.value)


def test_changed_tensors(tmp_path: Path) -> None:
    save(_weights.sae(), tmp_path / "one")
    path = tmp_path / "one" / "0.safetensors"
    data = bytearray(path.read_bytes())
    for changed in (data[:-4], data[:-1] + bytes([data[-1] ^ 1])):
        path.write_bytes(changed)
        with pytest.raises(SAEError, match=r"0\.safetensors has the sha256 .* it was changed or truncated"):
            load(tmp_path / "one")


def test_what_is_no_manifest(tmp_path: Path) -> None:
    path = save(_each(), tmp_path / "all")
    with pytest.raises(SAEError, match=r"has 6 autoencoders; give name=\.\.\. of relu, jumprelu"):
        load(path)
    with pytest.raises(SAEError, match="has no autoencoder 'x'; it has relu"):
        load(path, name="x")
    with pytest.raises(SAEError, match="rows of width 6, not 8"):
        load_all(path, width=8)
    path.write_text(json.dumps({"format": "steer_compile.sae", "version": 2, "saes": []}))
    with pytest.raises(SAEError, match=r"is steer_compile\.sae version 2, not steer_compile\.sae version 1"):
        load(path, name="relu")
    path.write_text(json.dumps({"format": "steer_compile.sae", "version": 1, "saes": {}}))
    with pytest.raises(SAEError, match="not a list of autoencoders"):
        load_all(path)
