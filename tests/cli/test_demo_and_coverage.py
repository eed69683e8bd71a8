"""`steer-compile coverage` and `demo`."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from steer_compile.cli.main import app
from steer_compile.demo.inputs import read_passages, read_styles
from steer_compile.errors import SpecError
from tests import _tree

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

MODEL = _tree.ROOT / "models" / "demo"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_coverage_of_one_type_publishes_and_resumes(tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    command = ("coverage", "--types", "llama", "--workers", 1, "--journal", journal, "--out", tmp_path / "docs")
    first = run(*command, "--publish", "--json")
    data = json.loads(first.stdout)
    assert first.exit_code == 0, first.output
    assert (data["passed"], data["types"][0]["type"]) == (1, "llama")
    assert "| llama |" in (tmp_path / "docs" / "coverage.md").read_text()
    assert json.loads((tmp_path / "docs" / "coverage.json").read_text())[0]["type"] == "llama"
    second = run(*command)
    assert second.exit_code == 0
    assert "1 of 1 types pass" in second.stdout
    assert "in the journal" in second.stderr


def test_coverage_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    result = run("coverage", "--types", "lama", "--journal", tmp_path / "journal")
    assert result.exit_code == 2
    assert "lama" in result.stderr


def test_quick_demo_steers_mixes_and_draws(tmp_path: Path) -> None:
    result = run("demo", "--quick", "--inner", "eager", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is True
    assert report["score"]["positive"] > report["score"]["negative"]
    assert [row["steering"] for row in report["mixed"]] == ["unsteered", "positive", "negative"]
    assert all(row["equal"] for row in report["mixed"])
    assert (report["cost"]["graphs"], report["cost"]["recompiles"]) == (2, 0)
    assert (tmp_path / "strength.png").read_bytes().startswith(b"\x89PNG")
    assert "Recompiles: 0" in result.stdout


def test_demo_without_a_model_says_where_it_looks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import steer_compile

    monkeypatch.setattr(steer_compile, "__file__", str(tmp_path / "package" / "__init__.py"))
    monkeypatch.chdir(tmp_path)
    result = run("demo", "--quick", "--inner", "eager")
    assert result.exit_code == 2
    assert "models/demo was not found" in result.stderr


def test_demo_needs_both_passages(tmp_path: Path) -> None:
    file = tmp_path / "calm.txt"
    file.write_text("one\n\ntwo\n")
    result = run("demo", "--quick", "--inner", "eager", "--positive", file)
    assert result.exit_code == 2
    assert "--negative" in result.stderr


@pytest.mark.parametrize("strength", ["0", "-1", "nan", "inf"])
def test_demo_refuses_a_strength_that_is_no_positive_number(strength: str) -> None:
    result = run("demo", f"--strength={strength}", "--quick")
    assert result.exit_code == 2
    assert "strength" in result.stderr


def test_passages_are_blocks_or_lines(tmp_path: Path) -> None:
    file = tmp_path / "calm.txt"
    file.write_text("one\nstill one\n\ntwo\n")
    assert read_passages(file) == ("one\nstill one", "two")
    file.write_text("one\ntwo\nthree\n")
    assert read_passages(file) == ("one", "two", "three")
    file.write_text("one")
    with pytest.raises(SpecError, match="several"):
        read_passages(file)


def test_prompts_of_own_passages_fill_the_batch(tmp_path: Path) -> None:
    for name, text in (("calm", "a b c d e\n\nf g h i j\n"), ("angry", "k l m n o\n\np q r s t\n")):
        (tmp_path / f"{name}.txt").write_text(text)
    styles = read_styles(MODEL, tmp_path / "calm.txt", tmp_path / "angry.txt", 8, 6)
    assert (styles.positive, styles.negative) == ("calm", "angry")
    assert styles.prompts == ("a b c d ", "k l m n ", "f g h i ", "p q r s ", "a b c d ", "k l m n ")
