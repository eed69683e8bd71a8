"""`steer-compile sites` and `verify`, and what all verbs do with models that cannot be read."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from steer_compile import SteerSpec, __version__
from steer_compile.cli.main import app
from steer_compile.cli.verify import read_spec

transformers = pytest.importorskip("transformers")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, saved as safetensors."""
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def copy_of(folder: Path, target: Path, weights: bool = False) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        if weights or file.suffix == ".json":
            (target / file.name).write_bytes(file.read_bytes())
    return target


def test_version_and_help() -> None:
    assert run("--version").stdout == f"steer-compile {__version__}\n"
    for verb in ("sites", "verify", "coverage", "demo", "patch-sweep"):
        result = run(verb, "--help")
        assert result.exit_code == 0
        assert f"Example: steer-compile {verb}" in result.stdout


def test_sites_lists_every_site(llama: Path) -> None:
    result = run("sites", llama)
    assert result.exit_code == 0, result.output
    for word in ("post_block", "attn_out", "batch_first", "2 layers"):
        assert word in result.stdout


def test_sites_as_json_of_one_hook_and_layer(llama: Path) -> None:
    result = run("sites", llama, "--hook", "resid_post", "--layer", "-1", "--json")
    data = json.loads(result.stdout)
    assert [(s["hook"], s["layer"], s["width"]) for s in data["sites"]] == [("post_block", 1, 32)]
    assert result.exit_code == 0


def test_sites_of_a_config_says_that_no_weights_were_read(llama: Path) -> None:
    result = run("sites", llama / "config.json")
    assert result.exit_code == 0
    assert "shapes alone" in result.stderr


def test_verify_of_a_config_says_that_the_weights_are_random(llama: Path) -> None:
    result = run("verify", llama / "config.json", "--inner", "eager", "--json")
    assert json.loads(result.stdout)["note"] == "random weights: only a config was given"


def test_sites_of_a_layer_that_is_not_there(llama: Path) -> None:
    result = run("sites", llama, "--layer", "9")
    assert result.exit_code == 1
    assert "layers 0 to 1" in result.stdout


def test_sites_of_a_model_without_a_stream() -> None:
    result = run("sites", f"{__name__}:no_stream", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 1
    assert data["sites"] == []
    assert data["misses"][0]["reason"]


def no_stream() -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    return torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 4)), {
        "input": torch.ones(2, 4)
    }


def test_verify_passes_on_a_working_model(llama: Path) -> None:
    result = run("verify", llama, "--inner", "eager", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 0, result.output
    assert data["ok"] is True
    assert data["idle"]["difference"] == 0.0
    assert {(s["hook"], s["layer"]) for s in data["sites"]} == {
        (hook, layer) for hook in ("pre_attn", "post_attn", "post_block") for layer in (0, 1)
    }


def test_a_spec_is_read_from_both_kinds_of_file(tmp_path: Path) -> None:
    spec = SteerSpec(steer=("mlp_out",), capture=("post_block",), layers=(-1,))
    (tmp_path / "spec.json").write_text(spec.to_json())
    (tmp_path / "spec.toml").write_text(spec.to_toml())
    assert read_spec(tmp_path / "spec.json") == read_spec(tmp_path / "spec.toml") == spec


def test_verify_with_a_spec(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text(SteerSpec(steer=("mlp_out",), capture=("post_block",), layers=(-1,)).to_toml())
    result = run("verify", llama, "--inner", "eager", "--spec", file)
    assert result.exit_code == 0, result.output
    assert "mlp_out" in result.stdout
    assert "capture" in result.stdout
    assert "bit-equal" in result.stdout


def test_verify_fails_where_a_site_has_no_effect(llama: Path) -> None:
    result = run("verify", f"{__name__}:deaf", "--inner", "eager", "--json")
    data = json.loads(result.stdout)
    assert result.exit_code == 1
    assert {s["layer"] for s in data["sites"] if not s["ok"]} == {0}


def deaf() -> torch.nn.Module:
    """A Llama whose logits are constant."""
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model: torch.nn.Module = transformers.LlamaForCausalLM(config)
    model.get_parameter("lm_head.weight").data.zero_()
    return model


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


def test_an_unknown_hook_is_refused(llama: Path) -> None:
    refused(run("sites", llama, "--hook", "post_blok"), "SpecError", "post_block")


def test_a_spec_for_a_site_that_is_not_there_is_refused(llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(SteerSpec(steer=("post_block",), layers=(7,)).to_json())
    refused(run("verify", llama, "--inner", "eager", "--spec", file), "SiteNotFound", "layers.7.post_block")


def test_a_spec_of_another_kind_is_refused(llama: Path, tmp_path: Path) -> None:
    refused(run("verify", llama, "--spec", tmp_path / "spec.yaml"), "SpecError", ".toml")
    refused(run("verify", llama, "--spec", tmp_path / "spec.json"), "SpecError", "cannot be read")


def test_a_missing_model_is_refused(tmp_path: Path) -> None:
    refused(run("sites", tmp_path / "nothing"), "CheckpointError", "does not exist")
    refused(run("sites", tmp_path), "CheckpointError", "config.json")
    refused(run("sites", "no_such_module:make"), "CheckpointError", "no_such_module")


def test_only_pickled_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "pickled")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    refused(run("sites", folder), "CheckpointError", "pytorch_model.bin", "save_pretrained")


def test_damaged_weights_are_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "damaged", weights=True)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(run("verify", folder, "--inner", "eager"), "CheckpointError", "model.safetensors")


def test_a_lost_shard_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "shards")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(run("sites", folder), "CheckpointError", "model-00001-of-00002.safetensors")


def test_a_checkpoint_without_some_tensors_is_refused(llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(llama, tmp_path / "short", weights=True)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    refused(run("verify", folder, "--inner", "eager"), "CheckpointError", "up_proj")


def test_a_damaged_config_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = copy_of(llama, tmp_path / "config")
    (folder / "config.json").write_text("{")
    refused(run("sites", folder), "CheckpointError", "not JSON")
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_type"}))
    refused(run("sites", folder), "CheckpointError", "no_such_type")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = run("--debug", "sites", tmp_path)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr


def test_an_unknown_compiler_is_a_usage_error(llama: Path) -> None:
    result = run("verify", llama, "--inner", "fast")
    assert result.exit_code == 2
    assert "aot_eager" in result.stderr
