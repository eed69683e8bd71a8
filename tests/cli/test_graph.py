"""`steer-compile graph`: each format, and what it says about a wrong pass or layer."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from steer_compile import SteerSpec
from steer_compile.cli.main import app

transformers = pytest.importorskip("transformers")

PAGE_BYTES = 2_000_000


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["graph", *(str(a) for a in arguments)])


def config(folder: Path, layers: int) -> Path:
    made = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    made.save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config(tmp_path_factory.mktemp("llama"), 2)


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("spec") / "spec.json"
    file.write_text(SteerSpec(steer=("post_block",), capture=("post_attn",)).to_json())
    return file


def test_help_has_an_example() -> None:
    assert "Example: steer-compile graph models/demo --format html --out page.html" in " ".join(
        run("--help").stdout.split()
    )


def test_text_without_a_spec_shows_the_sites(llama: Path) -> None:
    result = run(llama)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("# layers.0.pre_attn = ")
    assert "= scaled_dot_product_attention(" in result.stdout
    assert "steer_bank" not in result.stdout


def test_text_with_a_spec_shows_what_was_spliced_in(llama: Path, spec: Path) -> None:
    result = run(llama, "--spec", spec)
    assert result.exit_code == 0, result.output
    assert "$steer_bank_0" in result.stdout
    assert "copy_(" in result.stdout


def test_text_of_a_layer_has_its_lines_alone(llama: Path, spec: Path) -> None:
    result = run(llama, "--spec", spec, "--layer", 1, "--after", "lower_edits")
    assert result.exit_code == 0, result.output
    head = [line for line in result.stdout.splitlines() if line.startswith("#")]
    body = [line for line in result.stdout.splitlines() if not line.startswith("#")]
    assert len(head) == 2
    assert all("layers.1." in line for line in head)
    assert sum("layers.0" in line for line in body) == 1  # the value that enters the layer
    assert sum("layers.1" in line for line in body) > 30
    last = run(llama, "--spec", spec, "--layer", -1, "--after", "lower_edits")
    assert last.stdout == result.stdout


def test_each_drawing_is_written(llama: Path, spec: Path, tmp_path: Path) -> None:
    for form, start in (("dot", "digraph"), ("svg", "<svg"), ("html", "<!doctype html>")):
        out = tmp_path / f"graph.{form}"
        result = run(llama, "--spec", spec, "--format", form, "--out", out)
        assert result.exit_code == 0, result.output
        assert result.stdout == ""
        assert "wrote" in result.stderr
        text = out.read_text()
        assert text.startswith(start)
        assert "post_attn" in text


def test_json_is_the_drawing(llama: Path, spec: Path, tmp_path: Path) -> None:
    result = run(llama, "--spec", spec, "--json", "--format", "dot", "--out", tmp_path / "g.dot")
    data = json.loads(result.stdout)
    assert result.exit_code == 0
    assert data["summary"]["layers"] == 2
    assert data["summary"]["steered"] == data["summary"]["captured"] == 2
    (line,) = data["lines"]
    assert [track["kind"] for track in line["layers"][0]["tracks"]] == ["attention", "mlp"]
    assert (tmp_path / "g.dot").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--after", "inductor"), ("SpecError", "there is no pass 'inductor'", "dynamo, find_sites, plan_edits")),
        (("--after", "splice"), ("SpecError", "needs a spec", "dynamo or find_sites")),
        (("--layer", "9"), ("SiteNotFound", "there is no layer 9", "layers 0 to 1")),
        (("--layer", "-3"), ("SiteNotFound", "there is no layer -3")),
        (("--format", "png"), ("'png' is none of text, dot, svg, html",)),
    ],
)
def test_a_wrong_argument_is_one_readable_error(
    llama: Path, arguments: tuple[str, ...], words: tuple[str, ...]
) -> None:
    result = run(llama, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert all(word in " ".join(result.stderr.split()) for word in words), result.stderr


def test_kernels_of_a_bare_config_are_left_out(llama: Path) -> None:
    result = run(llama, "--kernels", "--format", "html")
    assert result.exit_code == 0
    assert "no kernels: random weights" in result.stderr


def test_a_page_of_32_layers_is_small(spec: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    result = run(config(tmp_path, 32), "--spec", spec, "--format", "html", "--out", out)
    assert result.exit_code == 0, result.output
    assert 100_000 < out.stat().st_size < PAGE_BYTES
    assert out.read_text().count("<details data-layer=") == 32
