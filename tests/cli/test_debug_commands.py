"""`steer-compile plan`, `explain` and `diff`, and models of shapes alone, on a tiny Llama."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from steer_compile import SteerSpec

pytest.importorskip("transformers")
from tests.cli._commands import refused, run, told

pytestmark = pytest.mark.usefixtures("traced_once")


def test_help_has_an_example_for_each_verb() -> None:
    for verb in ("plan", "explain", "diff", "bisect", "trace", "doctor"):
        result = run(verb, "--help")
        assert result.exit_code == 0
        assert f"Example: steer-compile {verb}" in result.stdout


# -- models of shapes alone --------------------------------------------------------------------------------------------


def test_a_config_of_a_huge_model_needs_no_memory(tiny: Path, tmp_path: Path) -> None:
    given = json.loads((tiny / "config.json").read_text())
    given |= {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 4, "vocab_size": 300_000}
    given |= {"num_attention_heads": 128, "num_key_value_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(given))
    code = (
        "import resource\nfrom steer_compile.cli.main import app\n"
        f"app(['sites', {str(tmp_path / 'config.json')!r}, '--hook', 'post_block', '--json'], standalone_mode=False)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    text, _, most = done.stdout.strip().rpartition("\n")
    found = json.loads(text)
    assert [(s["layer"], s["width"], s["dtype"]) for s in found["sites"]] == [(n, 16384, "bf16") for n in range(4)]
    assert int(most) < 4 * 2**20  # kilobytes; the weights would be 46 GB


def test_shapes_find_the_sites_that_weights_find(tiny: Path) -> None:
    from steer_compile.cli.load import load
    from steer_compile.debug.tracing import trace

    by_shapes, by_weights = load(str(tiny), weights=False), load(str(tiny))
    found = [trace(m.model, m.inputs, m.shapes)[0].table.text() for m in (by_shapes, by_weights)]
    assert found[0] == found[1]


def test_shapes_are_symbolic_where_sizes_are_left_open(tiny: Path) -> None:
    data = told("sites", tiny, "--dynamic", "--hook", "post_block", "--layer", 1)
    (site,) = data["sites"]
    assert all(dim.startswith("s") for dim in site["shape"])
    assert len(set(site["shape"])) == 2


class ReadsNumbers(nn.Module):
    """A stream behind a graph break that needs a number."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 16)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed(input_ids)
        if x.sum().item() > 1e9:
            return x
        for block in self.blocks:
            x = x + block(x)
        return x


def reads_numbers() -> nn.Module:
    return ReadsNumbers()


class Untraceable(ReadsNumbers):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.embed(input_ids)
        return x.view(7, 7, 7)


def untraceable() -> nn.Module:
    return Untraceable()


def test_a_graph_break_is_shown_with_the_users_line() -> None:
    result = run("sites", f"{__name__}:reads_numbers")
    assert "graph break: Unsupported Tensor.item()" in result.stderr
    assert "if x.sum().item() > 1e9" in result.stderr
    breaks = json.loads(run("sites", f"{__name__}:reads_numbers", "--json").stdout)["breaks"]
    assert len(breaks) == 1


def test_a_module_that_does_not_compile_is_refused_with_the_users_line() -> None:
    result = run("sites", f"{__name__}:untraceable")
    refused(result, "does not compile", "view(7, 7, 7)", "test_debug_commands.py")
    assert len(result.stderr.strip().splitlines()) == 1


# -- plan --------------------------------------------------------------------------------------------------------------


def test_plan_says_edits_lowering_tables_and_bytes(tiny: Path, spec: Path) -> None:
    data = told("plan", spec, tiny, "--tokens", 32, "--bandwidth", 2)
    (graph,) = data["graphs"]
    edits = {(e["layer"], e["hook"]): e for e in graph["edits"]}
    assert set(edits) == {(1, "post_attn"), (0, "post_block"), (2, "post_block"), (1, "mlp_out")}
    assert edits[0, "post_block"]["ops"] == ["add", "clamp"]
    assert "us by the cost table" in edits[0, "post_block"]["why"]
    # a capture of 32 tokens of 32 numbers in fp32
    assert edits[1, "post_attn"]["active_bytes"] == 32 * 32 * 4
    assert edits[1, "post_attn"]["microseconds"] == pytest.approx(32 * 32 * 4 / 2e12 * 1e6, abs=1e-3)
    assert {bank["bytes"] for bank in graph["banks"]} >= {64 * 32 * 4}
    on_cpu = told("plan", spec, tiny, "--device", "cpu")["graphs"][0]["edits"]
    assert {e["lowering"] for e in on_cpu} == {"compiler"}
    assert "Triton kernels run on cuda" in on_cpu[0]["why"]


def test_plan_says_what_differs_from_the_step(tiny: Path, spec: Path) -> None:
    result = run("plan", spec, "tests.cli.test_debug_commands:of_six_tokens", "--tokens", 32)
    assert "the 6 tokens of the model's own example" in result.stderr
    assert "max_tokens=64" in run("plan", spec, tiny, "--tokens", 128).stderr


def of_six_tokens() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config), {"input_ids": torch.ones(1, 6, dtype=torch.long)}


def test_plan_prints_its_own_text(tiny: Path, spec: Path) -> None:
    result = run("plan", spec, tiny, "--text")
    assert result.stdout.startswith("tokens: 64\nclamps: 4\nbank 0 capture: f32[1, 64, 32]")
    assert "bytes of device memory" in run("plan", spec, tiny).stdout


def test_a_spec_for_what_is_not_there_is_refused(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "spec.json"
    file.write_text(SteerSpec(steer=("post_block",), layers=(7,)).to_json())
    for arguments in (("plan", file, tiny), ("diff", tiny, "--spec", file), ("bisect", tiny, file)):
        refused(run(*arguments), "SiteNotFound", "layers.7.post_block")


# -- explain -----------------------------------------------------------------------------------------------------------


def test_a_device_that_is_none_is_a_usage_error(tiny: Path, spec: Path) -> None:
    for command in (("plan", spec, tiny), ("diff", tiny), ("graph", tiny, "--spec", spec)):
        result = run(*command, "--device", "gpu")
        assert result.exit_code == 2
        assert "none of cuda, cpu" in result.stderr


def test_explain_a_site(tiny: Path) -> None:
    data = told("explain", "layers.1.post_block", tiny)
    assert data["text"].startswith("layers.1.post_block = ")
    assert "add(" in data["node"]["line"]
    assert "residual" in data["node"]["code"]
    assert data["node"]["module"] == "model.layers.1"
    assert {r["kind"] for r in data["readers"]} == {"redirected", "skip path"}
    assert data["path"]
    same = told("explain", "blocks.1.hook_resid_post", tiny)
    assert same == data
    assert told("explain", "layers.-2.post_block", tiny) == data
    assert "read by:" in run("explain", "1.post_block", tiny).stdout


def test_explain_a_branch_input_says_which_reads_are_redirected(tiny: Path) -> None:
    data = told("explain", "0.mlp_in", tiny)
    assert [r["kind"] for r in data["readers"]] == ["redirected"] * 2  # gate and up


def test_explain_any_layer(tiny: Path) -> None:
    assert told("explain", "layers.*.post_block", tiny)["text"].startswith("layers.0.post_block = ")
    assert "no layer has" in told("explain", "*.mhc_streams_pre_attn", tiny, code=1)["text"]
    assert "layers.-9." in told("explain", "layers.-9.post_block", tiny, code=1)["text"]


def no_operator() -> tuple[nn.Module, dict[str, Any]]:
    class Constant(nn.Module):
        def forward(self, x: torch.Tensor) -> list[int]:
            return [1]

    return Constant(), {"x": torch.ones(2)}


def test_a_model_without_a_graph_is_refused() -> None:
    refused(run("explain", "0.post_block", f"{__name__}:no_operator"), "SiteNotFound", "no graph")


def test_explain_a_miss(tiny: Path) -> None:
    data = told("explain", "1.mhc_streams_pre_attn", tiny, code=1)
    assert not data["found"]
    assert "parallel" in data["text"]
    assert data["near"]
    assert data["have"]["post_block"]
    beyond = told("explain", "9.post_block", tiny, code=1)
    assert "layers 0 to 2" in beyond["text"]


def test_explain_a_model_without_a_stream() -> None:
    data = told("explain", "0.post_block", "tests.cli.test_model_commands:no_stream", code=1)
    assert "no add in this graph" in data["text"]


@pytest.mark.parametrize("name", ["post_block", "layers.x.post_block", "0.", "layers.1.post_blok"])
def test_explain_refuses_what_is_no_site(tiny: Path, name: str) -> None:
    refused(run("explain", name, tiny), "SpecError")


# -- diff --------------------------------------------------------------------------------------------------------------


def test_diff_of_a_pass(tiny: Path, spec: Path) -> None:
    data = told("diff", tiny, "--spec", spec, "--device", "cpu")
    assert data["ops"]["copy"] == {"before": 0, "after": 1}
    changed = [line for line in data["diff"] if line.startswith(("+%", "-%"))]
    assert any("steer_bank" in line for line in changed)
    assert not any("rotary" in line for line in changed)  # what the pass leaves alone is not in it
    assert "operators" in run("diff", tiny, "--spec", spec).stdout


def test_diff_of_an_analysis_changes_no_operator(tiny: Path, spec: Path) -> None:
    data = told("diff", tiny, "--spec", spec, "--pass", "find_sites")
    assert data["ops"] == {}
    assert any(line.startswith("+# layers.0.post_block = ") for line in data["diff"])


def test_diff_of_the_choice_of_lowerings(tiny: Path, spec: Path) -> None:
    data = told("diff", tiny, "--spec", spec, "--pass", "lower_edits")
    assert any(line.startswith("+#") and "by template" in line for line in data["diff"])
    assert not any(line.startswith(("+%", "-%")) for line in data["diff"])
    on_cpu = told("diff", tiny, "--spec", spec, "--pass", "lower_edits", "--device", "cpu", code=1)
    assert on_cpu["diff"] == []
    planned = told("diff", tiny, "--spec", spec, "--pass", "plan_edits")["diff"]
    assert all(line.startswith("+") for line in planned if not line.startswith((" ", "@", "---")))


def test_diff_of_two_specs_and_of_the_same_twice(tiny: Path, spec: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text(SteerSpec(steer=("post_block",), layers=(0,), max_tokens=64).to_json())
    data = told("diff", tiny, "--spec", other, "--spec", spec, "--device", "cpu")
    assert data["ops"]["copy"]["after"] == 1
    refused(run("diff", tiny, "--spec", other, "--spec", spec, "--pass", "find_sites"), "SpecError", "leave it out")
    assert told("diff", tiny, "--spec", spec, "--spec", spec, code=1)["diff"] == []


def test_diff_refuses_a_pass_that_is_none(tiny: Path, spec: Path) -> None:
    refused(run("diff", tiny, "--pass", "fuse"), "SpecError", "'fuse' is no pass", "lower_edits")
    refused(run("diff", tiny, *("--spec", spec) * 3), "SpecError", "3 specs")


@pytest.mark.slow
def test_diff_counts_kernels(tiny: Path, spec: Path) -> None:
    data = told("diff", tiny, "--spec", spec, "--kernels")
    assert data["kernels"]["after"] >= data["kernels"]["before"] > 0
