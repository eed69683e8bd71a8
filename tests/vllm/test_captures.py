"""Captured rows of requests, against forward hooks on the Hugging Face model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import SteerSpec
from steer_compile.capture.read import read
from steer_compile.errors import SteerError
from steer_compile.vllm import Captured, capture_result, captured
from tests import _tree
from tests.vllm import engines
from tests.vllm.engines import at, vector
from tests.vllm.processes import REPEATING, TOKENS

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

SPEC = SteerSpec(steer=("post_block",), capture=("post_block", "post_attn"), rows=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("captures")


@pytest.fixture(scope="module")
def llm(models: Path, folder: Path) -> Any:
    return engines.engine(engines.saved("llama", models), SPEC, capture_dir=folder)


@pytest.fixture(scope="module")
def judge(models: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(engines.saved("llama", models), dtype=torch.float32)


def generate(llm: Any, asked: list[Any], prompts: list[list[int]], tokens: int = 6) -> list[Any]:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            max_tokens=tokens, temperature=0, detokenize=False, ignore_eos=True,
            extra_args=None if each is None else {"steer": each},
        )
        for each in asked
    ]  # fmt: skip
    return engines.results(llm, [{"prompt_token_ids": p} for p in prompts], params)


def states(judge: Any, ids: list[int], moved: tuple[int, Tensor] | None = None) -> dict[str, Tensor]:
    """The pristine stream behind each block for each token; behind one block a vector is added."""
    found: dict[str, Tensor] = {}
    handles = []
    for n, block in enumerate(judge.model.layers):

        def keep(module: Any, args: Any, out: Any, n: int = n) -> Any:
            hidden = out[0] if isinstance(out, tuple) else out
            found[f"layers.{n}.post_block"] = hidden[0].clone()
            if moved is not None and moved[0] == n:
                return (hidden + moved[1], *out[1:]) if isinstance(out, tuple) else hidden + moved[1]
            return out

        handles.append(block.register_forward_hook(keep))
    with torch.no_grad():
        judge(torch.tensor([ids]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def streams(judge: Any, output: Any, moved: tuple[int, Tensor] | None = None) -> tuple[list[int], dict[str, Tensor]]:
    """Token ids that the request computed, and the pristine stream behind each block for each."""
    ids = [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]
    return ids, states(judge, ids, moved)


def check(found: Captured, judge: Any, output: Any, positions: list[int], **more: Any) -> None:
    ids, expected = streams(judge, output, **more)
    assert found.status == "complete"
    assert found.positions.tolist() == positions
    assert found.token_ids.tolist() == [ids[i] for i in positions]
    for name, values in found.values.items():
        if name.endswith("post_block"):
            torch.testing.assert_close(
                values, expected[name][positions], atol=engines.TOLERANCE, rtol=engines.TOLERANCE
            )


@pytest.mark.behaviour(72)
def test_rows_of_a_mixed_batch(llm: Any, judge: Any) -> None:
    """Staggered lengths, other sites and tokens for each request, one of them steered and one that captures nothing."""
    prompts = [list(range(5 + i, 12 + 4 * i)) for i in range(5)]
    moved = (1, vector(3, 2.0))
    asked = [
        {"capture": {}},
        {"capture": {"sites": {"post_block": [0, 3]}, "tokens": {"last_prompt": True}}},
        None,
        {"capture": {"sites": ["layers.2.post_block"], "tokens": {"generated": True}}},
        {**at(*moved), "capture": {"sites": {"post_block": [1, 2]}, "tokens": {"spans": [[1, 4]], "generated": True}}},
    ]
    outputs = generate(llm, asked, prompts)
    lengths = [len(p) for p in prompts]
    everything = captured(outputs[0], llm)
    check(everything, judge, outputs[0], list(range(lengths[0] + 5)))
    assert len(everything.values) == 2 * engines.LAYERS
    check(captured(outputs[1], llm), judge, outputs[1], [lengths[1] - 1])
    assert outputs[2].kv_transfer_params is None
    check(captured(outputs[3], llm), judge, outputs[3], list(range(lengths[3], lengths[3] + 5)))
    steered = captured(outputs[4], llm)
    check(steered, judge, outputs[4], [1, 2, 3, *range(lengths[4], lengths[4] + 5)], moved=moved)
    assert set(steered.values) == {"layers.1.post_block", "layers.2.post_block"}


@pytest.mark.behaviour(78)
def test_a_prefix_in_the_cache_leaves_no_row_out(llm: Any, judge: Any) -> None:
    prompt = list(range(10, 90))
    for _ in range(2):
        (output,) = generate(llm, [{"capture": {"sites": {"post_block": [2]}}}], [prompt])
        check(captured(output, llm), judge, output, list(range(len(prompt) + 5)))


@pytest.mark.behaviour(73)
def test_positions_scores_and_reductions(llm: Any, judge: Any) -> None:
    """Chosen by position, by every n-th and by score; norms, projections and means, against the Hugging Face model."""
    prompts = [list(range(5 + i, 14 + 3 * i)) for i in range(5)]
    site, probe, axes = "layers.2.post_block", vector(1), torch.stack([vector(4), vector(5)])
    one = {"sites": [site]}
    asked = [
        {**one, "tokens": {"every": 4, "generated": True}},
        {**one, "tokens": {"positions": [0, 3, 10, 13]}},
        {**one, "tokens": {"top": {"count": 4, "site": site, "probe": probe.tolist()}}},
        {**one, "reduce": ["norm", "project"], "directions": {site: axes.tolist()}},
        {"sites": [site, "layers.0.post_block"], "reduce": "mean", "tokens": {"spans": [[1, -1]]}},
    ]
    outputs = generate(llm, [{"capture": each} for each in asked], prompts)
    found = [captured(output, llm) for output in outputs]
    lengths = [len(p) for p in prompts]
    generated = range(lengths[0], lengths[0] + 5)
    check(found[0], judge, outputs[0], [p for p in generated if p % 4 == 0])
    check(found[1], judge, outputs[1], [0, 3, 10, 13])
    scores = streams(judge, outputs[2])[1][site] @ probe
    check(found[2], judge, outputs[2], sorted(scores.topk(4).indices.tolist()))
    wanted = streams(judge, outputs[3])[1][site]
    for kind, numbers in (("norm", wanted.norm(dim=-1)), ("project", wanted @ axes.T)):
        torch.testing.assert_close(found[3].values[f"{site}.{kind}"], numbers, atol=1e-3, rtol=1e-3)
    assert set(found[3].values) == {f"{site}.norm", f"{site}.project"}
    assert found[3].steps.tolist() == sorted(found[3].steps.tolist())
    stream = streams(judge, outputs[4])[1]
    for name in (site, "layers.0.post_block"):
        mean = stream[name][1 : lengths[4] - 1].mean(0, keepdim=True)
        torch.testing.assert_close(found[4].values[f"{name}.mean"], mean, atol=1e-3, rtol=1e-3)
    assert found[4].values["tokens"].tolist() == [lengths[4] - 2]
    assert found[4].positions.tolist() == [lengths[4] - 2]


TOP = {"count": 2, "site": "layers.1.post_block", "probe": [1.0] * engines.WIDTH}
ONE = ["layers.1.post_block"]
BAD = {
    "reduction": {"capture": {"reduce": "median"}},
    "mean and more": {"capture": {"reduce": ["mean", "rows"]}},
    "no directions": {"capture": {"reduce": "project"}},
    "width": {"capture": {"sites": ONE, "directions": {ONE[0]: [[1.0, 2.0]]}}},
    "directions": {"capture": {"sites": ONE, "directions": {"layers.2.post_block": [[1.0] * engines.WIDTH]}}},
    "top elsewhere": {"capture": {"sites": ["layers.2.post_block"], "tokens": {"top": TOP}}},
    "top of a width": {"capture": {"tokens": {"top": {**TOP, "probe": [1.0]}}}},
    "mean of top": {"capture": {"reduce": "mean", "tokens": {"top": TOP}}},
    "every": {"capture": {"tokens": {"every": 0}}},
    "position": {"capture": {"tokens": {"positions": [-1]}}},
    "selector": {"capture": {"tokens": {"odd": True}}},
    "site": {"capture": {"sites": ["layers.9.post_block"]}},
    "hook": {"capture": {"sites": {"mlp_out": [1]}}},
    "field": {"capture": {"where": "/etc"}},
    "name": {"capture": {"name": 3}},
    "tokens": {"capture": {"tokens": {}}},
    "sites": {"capture": {"sites": []}},
    "list": {"capture": []},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_captures_are_refused(name: str, llm: Any) -> None:
    with pytest.raises(SteerError):
        generate(llm, [BAD[name]], [engines.PROMPT])


def test_files_stay_in_the_folder_whatever_a_client_calls_them(llm: Any, folder: Path) -> None:
    names = ["../../etc/passwd", "a/b", "", "x" * 500, "..", "a\0b", "\u00e9t\u00e9"]
    outputs = generate(llm, [{"capture": {"name": n, "tokens": {"last_prompt": True}}} for n in names],
                       [engines.PROMPT] * len(names))  # fmt: skip
    files = [Path(o.kv_transfer_params["steer_capture"]["file"]) for o in outputs]
    for output in outputs:
        captured(output, llm)
    assert {f.parent for f in files} == {folder}
    assert len(set(files)) == len(names)


def test_chunks_and_preemption_leave_each_position_once(models: Path, folder: Path, judge: Any) -> None:
    small = engines.engine(
        engines.saved("llama", models), SPEC, capture_dir=folder, num_gpu_blocks_override=9, block_size=32,
        enable_prefix_caching=False, max_num_batched_tokens=16, max_num_seqs=4, enable_chunked_prefill=True,
    )  # fmt: skip
    prompts = [list(range(10 + i, 40 + i)) for i in range(4)]
    outputs = generate(small, [{"capture": {"sites": {"post_block": [1, 3]}}}] * 4, prompts, tokens=40)
    for output in outputs:
        check(captured(output, small), judge, output, list(range(30 + 39)))


def test_rows_beyond_the_room_are_dropped_and_said(models: Path, folder: Path) -> None:
    spec = SteerSpec(capture=("post_block",))
    small = engines.engine(
        engines.saved("llama", models), additional_config={"steer_compile": {
            "capture": spec.to_dict()["capture"], "capture_dir": str(folder), "capture_bytes": 12 * engines.WIDTH * 4,
        }},
    )  # fmt: skip
    (output,) = generate(small, [{"capture": {"sites": {"post_block": [1]}}}], [list(range(5, 15))])
    found = captured(output, small)
    assert found.status == "partial"
    assert found.positions.tolist() == list(range(12))
    (later,) = generate(small, [{"capture": {"sites": {"post_block": [1]}}}], [list(range(5, 10))])
    assert captured(later, small).status == "complete"  # the room is there again


@pytest.mark.behaviour(75)
def test_consumers_of_an_engine(models: Path, tmp_path: Path, judge: Any) -> None:
    """Rows of several requests in one packed file by tag, with labels, digests and results; others in files as ever."""
    consumers = {
        "acts": {"consumer": "files", "options": {"root": str(tmp_path / "acts"), "layout": "packed"}},
        "torn": {"consumer": "files", "options": {"root": str(tmp_path / "torn")}},
    }
    kept = engines.engine(engines.saved("llama", models), SPEC, capture_dir=tmp_path, consumers=consumers)
    shutil.rmtree(tmp_path / "torn")
    (tmp_path / "torn").write_text("a file in place of the folder")
    one = {"sites": {"post_block": [1]}}
    asked = [
        {**one, "to": "acts", "tag": "../train", "name": "a"},
        {**one, "to": "acts", "tag": "../train", "name": "b", "tokens": {"generated": True}},
        {**one, "reduce": "mean", "to": "acts", "tag": "means"},
        {**one, "to": "torn"},
        one,
    ]
    prompts = [list(range(5 + i, 12 + 3 * i)) for i in range(5)]
    outputs = generate(kept, [{"capture": each} for each in asked], prompts)
    results = [capture_result(output, kept) for output in outputs[:4]]
    assert [result["status"] for result in results] == ["ok", "ok", "ok", "error"]
    assert all(Path(result["place"]).is_relative_to(tmp_path / "acts") for result in results[:3])
    found = read(tmp_path / "acts", tag="../train")
    for output, positions in ((outputs[0], range(12)), (outputs[1], range(9, 14))):
        rows = found.rows.of(output.kv_transfer_params["steer_capture"]["name"])
        ids, expected = streams(judge, output)
        assert rows.positions.tolist() == list(positions)
        assert rows.token_ids.tolist() == [ids[p] for p in positions]
        assert rows.steps.unique().numel() == len(output.outputs[0].token_ids) - (positions[0] > 0)
        torch.testing.assert_close(
            rows.values["layers.1.post_block"], expected["layers.1.post_block"][list(positions)],
            atol=engines.TOLERANCE, rtol=engines.TOLERANCE,
        )  # fmt: skip
    check(captured(outputs[4], kept), judge, outputs[4], list(range(len(prompts[4]) + 5)))
    with pytest.raises(SteerError, match="went to the consumer 'acts'"):
        captured(outputs[0], kept)
    with pytest.raises(SteerError, match="no consumer 'other'; this engine has acts, torn"):
        generate(kept, [{"capture": {"to": "other"}}], [engines.PROMPT])


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"consumer": "nowhere"}, "no capture consumer is named 'nowhere'; there are callback, files"),
        ({"consumer": "files", "options": {"root": "{root}", "speed": 3}}, "does not take these options"),
        ({"consumer": "files", "options": {"root": "{root}/file/rows"}}, "no folder"),
    ],
)
def test_consumers_that_cannot_be_stop_the_start(given: Any, why: str, models: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    consumers = {"acts": json.loads(json.dumps(given).replace("{root}", str(tmp_path)))}
    with pytest.raises(SteerError, match=why):
        engines.engine(engines.saved("llama", models), SPEC, consumers=consumers)


def test_a_request_that_never_ran_names_no_file(models: Path, folder: Path) -> None:
    from vllm import SamplingParams
    from vllm.v1.engine import FinishReason

    waiting = engines.engine(engines.saved("llama", models), SPEC, capture_dir=folder).llm_engine
    params = SamplingParams(detokenize=False, extra_args={"steer": {"capture": {}}})
    waiting.add_request("a", {"prompt_token_ids": engines.PROMPT}, params)
    (state,) = waiting.output_processor.request_states.values()
    assert state.make_request_output([], None, FinishReason.ABORT, None).kv_transfer_params is None
    assert state.make_request_output([], None, FinishReason.LENGTH, None).kv_transfer_params["steer_capture"]["file"]


def test_an_engine_in_a_process_of_its_own_writes_too(models: Path, folder: Path) -> None:
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    command = [sys.executable, "-m", "tests.vllm.processes", str(engines.saved("llama", models)), "1", str(folder)]
    done = subprocess.run(command, cwd=_tree.ROOT, env=env, capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    assert json.loads(lines[-1]) == list(range(len(engines.PROMPT) + 3))


def test_drafts_that_are_not_taken_leave_no_row(models: Path, tmp_path: Path, judge: Any) -> None:
    """Their positions are computed again, and the later rows count; those behind the last token are left out."""
    env = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "0"}
    command = [sys.executable, "-m", "tests.vllm.processes", str(engines.saved("llama", models)), "1"]
    done = subprocess.run(
        [*command, f"drafts={tmp_path}"], cwd=_tree.ROOT, env=env, capture_output=True, text=True, check=False,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for rows, prompt in zip(found, REPEATING, strict=True):
        ids = [*prompt, *rows.pop("generated").tolist()[:-1]]
        labels = [rows.pop(name) for name in ("positions", "token_ids", "steps")]
        assert labels[0].tolist() == list(range(len(ids)))
        assert labels[1].tolist() == ids
        assert labels[2].unique().numel() < TOKENS, "some drafts were taken"
        expected = states(judge, ids)
        for name, values in rows.items():
            torch.testing.assert_close(values, expected[name], atol=engines.TOLERANCE, rtol=engines.TOLERANCE)
    refused = json.loads([line for line in done.stdout.splitlines() if line.startswith("[")][-1])
    assert len(refused) == 2
    assert all("drafts that are not taken" in text for text in refused)


def test_bf16(models: Path, folder: Path) -> None:
    low = engines.engine(engines.saved("llama", models), SPEC, capture_dir=folder, dtype="bfloat16")
    (output,) = generate(low, [{"capture": {}}], [engines.PROMPT])
    found = captured(output, low)
    assert found.status == "complete"
    assert all(torch.isfinite(values.float()).all() for values in found.values.values())
