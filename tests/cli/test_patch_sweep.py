"""`steer-compile patch-sweep`, end to end on tiny models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from steer_compile.cli.main import app
from steer_compile.sweep import Question, patch_sweep
from tests._models import toy

transformers = pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


def run(*arguments: object) -> Result:
    torch.compiler.reset()
    return CliRunner().invoke(app, ["patch-sweep", *(str(a) for a in arguments)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama without a tokenizer, so that bytes are its tokens."""
    folder = tmp_path_factory.mktemp("llama")
    sizes = {"vocab_size": 258, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def prompts(out: Path) -> tuple[object, ...]:
    return ("--inner", "eager", "--out", out, "--clean", "ab $f", "--corrupted", "ab $g", "--answer", "f")


def test_a_sweep_writes_numbers_and_a_picture(model: Path, tmp_path: Path) -> None:
    result = run(model, *prompts(tmp_path), "--foil", "g", "--hook", "post_block", "--hook", "mlp_out", "--batch", 4)
    assert result.exit_code == 0, result.output
    assert "24 cells" in result.stderr
    assert "f/g" in result.stdout
    data = json.loads((tmp_path / "patch_sweep.json").read_text())
    assert data["labels"] == ["<256>", "a", "b", "\u2423", "$", "f/g"]
    assert set(data["grids"]) == {"post_block", "mlp_out"}
    assert data["grids"]["post_block"][1][5] == pytest.approx(1.0, abs=1e-4)
    assert data["equal"] == 20
    assert (tmp_path / "patch_sweep.png").stat().st_size > 1000


def test_a_function_takes_ids(tmp_path: Path) -> None:
    ids = ("--clean", "ids:1,2,3", "--corrupted", "ids:1,5,3", "--answer", "ids:4", "--metric", "logprob")
    result = run("tests._models:toy", *ids, "--inner", "eager", "--out", tmp_path, "--layers", "1", "--json")
    assert result.exit_code == 0, result.output
    data: dict[str, Any] = json.loads(result.stdout)
    torch.compiler.reset()
    expected = patch_sweep(toy(), Question((1, 2, 3), (1, 5, 3), 4, metric="logprob"), layers=(1,), inner="eager")
    assert data["grids"]["post_block"] == [pytest.approx(line) for line in expected.grids["post_block"]]
    assert data["labels"] == ["<1>", "<2>/<5>", "<3>"]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (("--clean", "ab $fg"), "clean prompt has 7 tokens and the corrupted one 6; give two prompts of one length"),
        (("--answer", "fg"), "the answer 'fg' has 2 tokens"),
        (("--answer", "ids:300"), "token 300 is unknown: the model has 258 tokens"),
        (("--answer", "ids:x"), "'ids:x' holds no token ids; write such as"),
        (("--metric", "accuracy"), "choose one of logprob, logit_diff, recovered"),
        (("--metric", "logit_diff"), "give a foil"),
        (("--clean", "a" * 20, "--corrupted", "b" * 20), "have 21 tokens and the model has 16 positions"),
        (("--batch", 1), "batch=1 is too small"),
        (("--hook", "resid"), "resid"),
        (("--layers", "7"), "no site layers.7.post_block"),
    ],
)
def test_what_cannot_be_swept_is_one_line(change: tuple[object, ...], text: str, model: Path, tmp_path: Path) -> None:
    result = run(model, *prompts(tmp_path), *change)
    assert result.exit_code == 2, result.output
    assert text in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())


def test_prompts_are_asked_for_and_functions_have_no_tokenizer(tmp_path: Path) -> None:
    assert run("models/demo").exit_code == 2
    result = run("tests._models:toy", *prompts(tmp_path))
    assert "is a function and has no tokenizer; give token ids" in result.stderr
