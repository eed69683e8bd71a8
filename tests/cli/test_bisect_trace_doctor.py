"""`steer-compile bisect`, `trace` and `doctor`, on a tiny Llama."""

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_compile import SteerSpec
from steer_compile.debug import checkup
from steer_compile.debug.bisecting import difference_of
from steer_compile.passes import splice

pytest.importorskip("transformers")
from tests.cli._commands import refused, run, told

pytestmark = pytest.mark.usefixtures("traced_once")


# -- bisect ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def every(tmp_path: Path) -> Path:
    file = tmp_path / "every.json"
    file.write_text(SteerSpec(steer=("attn_in", "mlp_out"), layers=(0, 1), max_tokens=64).to_json())
    return file


def test_bisect_finds_nothing_in_a_sound_splice(tiny: Path, every: Path) -> None:
    data = told("bisect", tiny, every, "--inner", "eager")
    assert data["culprit"] == ""
    assert data["trials"][0]["difference"] < 1e-6
    assert len(data["trials"][0]["sites"]) == 4


def test_bisect_of_two_hooks_at_one_value(tiny: Path, tmp_path: Path) -> None:
    """The end of a block is the entry of the next: both vectors are added there."""
    file = tmp_path / "both.json"
    file.write_text(SteerSpec(steer=("pre_attn", "post_block"), max_tokens=64).to_json())
    assert told("bisect", tiny, file, "--inner", "eager")["culprit"] == ""


def test_bisect_ends_with_a_refusal_where_the_model_cannot_run(tiny: Path, tmp_path: Path) -> None:
    few, none = tmp_path / "few.json", tmp_path / "none.json"
    few.write_text(SteerSpec(steer=("post_block",), max_tokens=8).to_json())
    none.write_text(SteerSpec(capture=("post_block",), max_tokens=64).to_json())
    refused(run("bisect", tiny, few, "--inner", "eager"), "TooManyTokens")
    refused(run("bisect", tiny, none, "--inner", "eager"), "SpecError", "steers nothing")


def test_differences_of_numbers_that_are_none() -> None:
    inf, nan = torch.inf, torch.nan
    some = torch.tensor([1.0, -inf, nan, 4.0])
    assert difference_of(some, some.clone()) == 0
    assert difference_of(torch.tensor([1.0, -inf, nan, 3.0]), some) == 0.25
    for other in ([1.0, inf, nan, 4.0], [1.0, -inf, 2.0, 4.0], [nan, -inf, nan, 4.0], [1.0, nan, -inf, 4.0]):
        assert difference_of(torch.tensor(other), some) == inf
    assert difference_of(torch.ones(3), some) == inf
    assert difference_of(torch.full((2,), nan), torch.full((2,), nan)) == 0


def broken(name: str) -> Any:
    original = splice._Splicer.apply

    def apply(self: Any, edit: Any) -> None:
        if edit.site.name != name:
            original(self, edit)

    return apply


def test_bisect_names_the_site_that_is_wrong(tiny: Path, every: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splice._Splicer, "apply", broken("layers.1.mlp_out"))
    data = told("bisect", tiny, every, "--inner", "eager", code=1)
    assert data["culprit"] == "splice"
    assert data["sites"] == ["layers.1.mlp_out"]


def test_bisect_names_the_compiler_that_is_wrong(tiny: Path, every: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from steer_compile import torch_compat

    original = torch_compat.named_backend

    def named(name: str) -> Any:
        compiler = original(name)
        if name == "aot_eager":
            return lambda gm, inputs: lambda *args: [2 * t for t in compiler(gm, inputs)(*args)]
        return compiler

    monkeypatch.setattr(torch_compat, "named_backend", named)
    data = told("bisect", tiny, every, "--inner", "aot_eager", code=1)
    assert data["culprit"] == "aot_eager"
    assert "it agrees under eager" in data["text"]
    assert len(data["sites"]) == 1


# -- trace -------------------------------------------------------------------------------------------------------------


def test_trace_dumps_every_pass_and_reads_it_back(tiny: Path, spec: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    data = told("trace", tiny, "--spec", spec, "--out", folder)
    (files,) = data["dumps"].values()
    assert [(f["step"], f["when"]) for f in files] == [
        ("find_sites", "before"), ("find_sites", "after"), ("plan_edits", "after"), ("lower_edits", "after"),
        ("splice", "before"), ("splice", "after"),
    ]  # fmt: skip
    assert files[0]["plan"] == "none"
    assert files[3]["plan"] == files[5]["plan"] != "none"
    assert files[5]["lines"] > files[4]["lines"]
    assert files[4]["reads"] == 0 < files[5]["reads"]
    assert told("trace", "--read", folder) == data
    refused(run("trace", tiny, "--out", folder), "DumpError", "not empty")


def test_damaged_dumps_are_refused(tiny: Path, spec: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    told("trace", tiny, "--spec", spec, "--out", folder)
    file = next(folder.glob("*/05.splice.after.txt"))
    text = file.read_text()
    for damaged in (
        "",
        text[: len(text) // 2],
        "# something\n" + text,
        text.replace("after splice", "after find_sites"),
    ):
        file.write_text(damaged)
        refused(run("trace", "--read", folder), "DumpError", "05.splice.after.txt", "damaged")
    file.write_bytes(b"\xff\xfe\x00")
    refused(run("trace", "--read", folder), "DumpError", "cannot be read")
    refused(run("trace", "--read", tmp_path), "DumpError", "holds no dumps")
    refused(run("trace"), "DumpError", "nothing to do")


def test_what_cannot_be_meant_is_refused(tiny: Path, spec: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    refused(run("trace", tiny, "--spec", spec, "--out", file / "dumps"), "DumpError", "cannot be written", str(file))
    refused(run("trace", tiny, "--read", tmp_path), "DumpError", "not both")
    refused(run("doctor", "--spec", spec), "SpecError", "none was given")


def test_a_running_process_dumps_where_the_environment_says(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import torch, transformers\nfrom steer_compile import SteerSpec, steer_backend\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(tiny)!r})\n"
        "with torch.no_grad():\n    torch.compile(model, backend=steer_backend(SteerSpec(steer=('post_block',)), "
        "inner='eager'))(input_ids=torch.tensor([[1, 2]]))\n"
    )
    environment = {**os.environ, "STEER_COMPILE_TRACE": str(tmp_path / "dumps"), "TORCH_TRACE": str(tmp_path / "trace")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300, capture_output=True)
    (files,) = told("trace", "--read", tmp_path / "dumps")["dumps"].values()
    assert len(files) == 6
    structured = "".join(path.read_text() for path in (tmp_path / "trace").iterdir())
    assert "steer_compile_05.splice.after" in structured  # what tlparse shows


def cache(folder: Path, graph: str, factors: str = '{"config_hash": "ab", "env": {}}') -> Path:
    at = folder / "0123abcd" / "rank_0_0" / "backbone"
    at.mkdir(parents=True, exist_ok=True)
    (at / "computation_graph.py").write_text(graph)
    (at / "cache_key_factors.json").write_text(factors)
    return folder


GRAPH = """from __future__ import annotations
class GraphModule(torch.nn.Module):
    def forward(self, L_self_buffers_steer_compile_steer_bank_0_1_: "f32[11, 64]", L_steer_gain_: "f32[256]"):
        l_self_buffers_steer_compile_steer_bank_0_1_ = L_self_buffers_steer_compile_steer_bank_0_1_
        l_self_buffers_steer_compile_steer_gain_ = L_steer_gain_
        x = torch.ops.steer_compile.site.default(l_self_buffers_steer_compile_steer_bank_0_1_, steer_rows)
    class submod_0(torch.nn.Module):
        pass
    class submod_1(torch.nn.Module):
        pass
"""


def test_vllms_cache_is_read(tmp_path: Path) -> None:
    artifact = tmp_path / "torch_aot_compile" / "99ff" / "rank_0_0" / "model"
    artifact.parent.mkdir(parents=True)
    artifact.write_bytes(b"never opened")
    data = told("trace", "--cache", cache(tmp_path, GRAPH))["cache"]
    graph, whole = data
    assert (graph["key"], graph["pieces"], graph["tables"], graph["calls"]) == ("0123abcd", 2, 2, {"site": 1})
    assert graph["hashes"] == {"config_hash": "ab"}
    assert (whole["key"], whole["kind"], whole["tables"]) == ("99ff", "artifact", None)
    assert "1 of 1 graphs are steered" in run("trace", "--cache", tmp_path).stderr


def test_a_damaged_cache_is_refused(tmp_path: Path) -> None:
    refused(run("trace", "--cache", tmp_path), "DumpError", "no compile cache")
    refused(run("trace", "--cache", cache(tmp_path, "nothing")), "DumpError", "computation_graph.py", "damaged")
    refused(run("trace", "--cache", cache(tmp_path, GRAPH, "{")), "DumpError", "cache_key_factors.json", "damaged")


def test_owners_of_pass_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config, "post_grad_custom_post_pass", broken)
    slots = told("trace", "--slots")["slots"]
    assert slots["post_grad_custom_post_pass"] == f"{broken.__module__}.broken"
    assert slots["joint_custom_pre_pass"] == ""


# -- doctor ------------------------------------------------------------------------------------------------------------


def test_doctor_knows_the_versions_that_are_here() -> None:
    result = run("doctor", "--json")
    found = {finding["topic"]: finding for finding in json.loads(result.stdout)}
    assert found["torch"]["text"].startswith(torch.__version__)
    assert found["transformers"]["text"] == importlib.metadata.version("transformers")
    assert {"gpu" if not torch.cuda.is_available() else "gpu 0", "triton", "vllm", "inductor cache"} <= set(found)
    assert result.exit_code == int(any(f["state"] == "fault" for f in found.values()))
    assert "steer_compile" in run("doctor").stdout


def test_doctor_says_what_is_off_and_the_cure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("STEER_COMPILE_TRACE", str(tmp_path))
    result = run("doctor", "--json")
    assert result.exit_code == 1
    texts = " ".join(finding["text"] + finding["cure"] for finding in json.loads(result.stdout))
    for words in ("nothing can be steered", "unset TORCH_COMPILE_DISABLE", "interpreter", str(tmp_path)):
        assert words in texts


def test_each_skip_of_cuda_graphs_has_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reasons = ["skipping cudagraphs due to mutated inputs (1 instances)", "skipping cudagraphs due to cpu device (x)"]
    found = checkup._graphs(reasons)
    assert [f.state for f in found] == ["fault", "fault"]
    assert "mark it static" in found[0].cure
    assert "move it to the GPU" in found[1].cure
    assert "TORCH_LOGS" in checkup.cure_of_skip("something new")


def test_skips_are_collected(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cudagraph_utils

    from steer_compile import torch_compat

    with torch_compat.cudagraph_skips() as lines:
        cudagraph_utils.log_cudagraph_skip_and_bump_counter("skipping cudagraphs due to cpu device")
    cudagraph_utils.log_cudagraph_skip_and_bump_counter("outside")
    assert lines == ["skipping cudagraphs due to cpu device"]
