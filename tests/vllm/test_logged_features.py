"""Features that requests log: those of the Hugging Face model's stream, for the tokens of the request alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import HookSelection, SteerSpec, sae
from steer_compile.capture.read import read
from steer_compile.errors import SAEError, SiteNotFound, SpecError
from steer_compile.sae import SAE, FeatureClamp, JumpReLU, TopK
from steer_compile.vllm import Captured, capture_result, captured, engine_args
from steer_compile.vllm.frontend import FrontEnd
from steer_compile.vllm.model import Shape
from steer_compile.vllm.settings import Settings
from tests import _tree
from tests.sae._weights import parts
from tests.vllm import engines

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

COUNT, TOP = 96, 6
SITES = ("layers.1.post_block", "layers.2.post_block")
KEYS = tuple(f"{site}.features" for site in SITES)
SPEC = SteerSpec(
    steer=(HookSelection("post_block", [1, 2], ("add", "sae_full", "sae_log")),), capture=("post_block",), rows=8,
    features=8, sae_features=128, top_features=TOP, max_tokens=256, sae_tokens=256, dtype="float32",
)  # fmt: skip
SAES = {
    site: SAE(own["W_enc"], own["b_enc"], own["W_dec"], own["b_dec"], activation, site=("post_block", layer), name=site)
    for layer, site, activation, own in (
        (1, SITES[0], JumpReLU(parts(3, engines.WIDTH, COUNT)["threshold"]), parts(3, engines.WIDTH, COUNT)),
        (2, SITES[1], TopK(4), parts(4, engines.WIDTH, COUNT)),
    )
}
LOG = {"sae": "one", "mode": "log"}
CLAMPED = {"sae": "two", "clamps": [{"feature": 3, "value": 9.0}], "log": True}
GENERATED = {"generated": True}
PROMPTS = [list(range(5 + i, 14 + 3 * i)) for i in range(6)]
MOVED, PROBE = engines.vector(3, 2.0), engines.vector(1).tolist()


def named(folder: Path) -> dict[str, Any]:
    """The autoencoders for an engine, in a folder."""
    path = folder / "saes"
    if not path.exists():
        sae.save(list(SAES.values()), path)
    return {n: {"path": str(path), "whole": True, "sae": site} for n, site in zip(("one", "two"), SITES, strict=True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("logged")


@pytest.fixture(scope="module")
def saes(folder: Path) -> dict[str, Any]:
    return named(folder)


@pytest.fixture(scope="module")
def judge(models: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(engines.saved("llama", models), dtype=torch.float32)


def outputs(llm: Any, asked: list[Any], prompts: list[list[int]]) -> list[Any]:
    from vllm import SamplingParams

    params = [
        SamplingParams(max_tokens=6, temperature=0, detokenize=False, ignore_eos=True,
                       extra_args=None if each is None else {"steer": each})
        for each in asked
    ]  # fmt: skip
    return engines.results(llm, [{"prompt_token_ids": prompt} for prompt in prompts], params)


def computed(output: Any) -> list[int]:
    """Token ids of the positions that an engine computed."""
    return [*output.prompt_token_ids, *output.outputs[0].token_ids[:-1]]


def stream(judge: Any, ids: list[int], site: str) -> Tensor:
    """The Hugging Face model's, of each token."""
    with torch.no_grad():
        states = judge(torch.tensor([ids]), use_cache=False, output_hidden_states=True).hidden_states
    found: Tensor = states[int(site.split(".")[1]) + 1][0]
    return found


def largest(rows: Tensor, site: str) -> tuple[Tensor, Tensor]:
    """The largest features of each row."""
    found = SAES[site].encode(rows).topk(TOP)
    return torch.where(found.values > 0, found.indices, -1), found.values


def check(values: dict[str, Tensor], rows: Tensor, site: str) -> None:
    """``rows``: of the stream, for each token that was kept."""
    indices, activations = sae.logged(values[f"{site}.features"])
    expected = largest(rows, site)
    torch.testing.assert_close(activations, expected[1], atol=10 * engines.TOLERANCE, rtol=10 * engines.TOLERANCE)
    assert torch.equal(indices, expected[0])


def checked(found: Captured, judge: Any, output: Any, sites: tuple[str, ...], positions: list[int]) -> None:
    ids = computed(output)
    assert found.status == "complete"
    assert found.positions.tolist() == positions
    assert found.token_ids.tolist() == [ids[position] for position in positions]
    assert {key for key in found.values if key in KEYS} == {f"{site}.features" for site in sites}
    for site in sites:
        check(found.values, stream(judge, ids, site)[positions], site)


@pytest.mark.parametrize("chunk", [256, 8])
def test_each_token_has_the_largest_features_of_the_stream(
    chunk: int, models: Path, folder: Path, saes: dict[str, Any], judge: Any
) -> None:
    """Requests that log side by side with others, prompts whole and in chunks, and a prompt that the cache holds."""
    llm = engines.engine(
        engines.saved("llama", models), SPEC, saes=saes, capture_dir=folder, max_num_batched_tokens=chunk,
        consumers={"acts": {"consumer": "files", "options": {"root": str(folder / f"acts{chunk}")}}},
    )  # fmt: skip
    asked = [
        {"features": [LOG], "capture": {"sites": [KEYS[0]]}},
        None,
        {"features": [CLAMPED], "capture": {"sites": {"post_block.features": [2], "post_block": [2]}}},
        {"features": [{**LOG, "phase": "decode"}], "capture": {"sites": [KEYS[0]], "tokens": GENERATED, "to": "acts"}},
        {"features": [LOG, {"sae": "two", "mode": "log"}], "tokens": {"spans": [[2, 9]], "last_prompt": True},
         "capture": {"tokens": {"spans": [[2, 9]], "last_prompt": True}}},
        {**engines.at(1, MOVED), "features": [LOG],
         "capture": {"sites": [KEYS[0], SITES[0]], "tokens": {"top": {"count": 3, "site": SITES[0], "probe": PROBE}}}},
    ]  # fmt: skip
    made = outputs(llm, asked, PROMPTS)
    lengths = [len(prompt) for prompt in PROMPTS]
    checked(captured(made[0], llm), judge, made[0], SITES[:1], list(range(lengths[0] + 5)))
    assert made[1].kv_transfer_params is None
    rows = captured(made[4], llm)
    checked(rows, judge, made[4], SITES, [*range(2, 9), lengths[4] - 1])
    assert set(rows.values) == {*KEYS, *(f"layers.{n}.post_block" for n in range(engines.LAYERS))}
    beside = captured(made[2], llm)  # what is logged is read in front of the request's own clamp
    checked(beside, judge, made[2], SITES[1:], list(range(lengths[2] + 5)))
    exact = SAES[SITES[1]].encode(beside.values[SITES[1]]).topk(TOP).values
    torch.testing.assert_close(sae.logged(beside.values[KEYS[1]])[1], exact, atol=1e-3, rtol=1e-3)
    assert capture_result(made[3], llm)["status"] == "ok"
    kept = read(folder / f"acts{chunk}").rows
    assert kept.positions.tolist() == list(range(lengths[3], lengths[3] + 5))
    check(dict(kept.values), stream(judge, computed(made[3]), SITES[0])[kept.positions], SITES[0])
    moved, pristine = captured(made[5], llm), stream(judge, computed(made[5]), SITES[0])
    assert moved.positions.tolist() == sorted((pristine @ torch.tensor(PROBE)).topk(3).indices.tolist())
    check(moved.values, pristine[moved.positions] + MOVED, SITES[0])
    plain = outputs(llm, [None, *asked[:2], None, None, None], PROMPTS)
    assert [list(o.outputs[0].token_ids) for o in plain[:2]] == [list(o.outputs[0].token_ids) for o in made[:2]]
    (again,) = outputs(llm, asked[:1], PROMPTS[:1])
    checked(captured(again, llm), judge, again, SITES[:1], list(range(lengths[0] + 5)))


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="processes of a CPU")
@pytest.mark.parametrize("form", ["pieces", "ranks", "stages"])
def test_pieces_ranks_and_stages_log_the_same(form: str, models: Path, tmp_path: Path, judge: Any) -> None:
    model = engines.saved("llama", models)
    named(tmp_path)
    env = os.environ | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0" if form == "pieces" else "1",
        "VLLM_CPU_OMP_THREADS_BIND": "0" if form == "pieces" else "0|1",
        "VLLM_CPU_CI_ENV": "0",
        "VLLM_CACHE_ROOT": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "tests.vllm.logging_processes", str(model), str(tmp_path), form]
    done = subprocess.run(command, cwd=_tree.ROOT, env=env, capture_output=True, text=True, check=False, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = torch.load(tmp_path / "found.pt", weights_only=True)
    assert set(one) == {"ids", "positions", KEYS[0], "layers.0.post_block"}
    for found, site in ((one, SITES[0]), (two, SITES[1])):
        ids = found["ids"].tolist()[:-1]
        assert found["positions"].tolist() == list(range(len(ids)))
        check(found, stream(judge, ids, site), site)


def front(saes: dict[str, Any], folder: Path, spec: SteerSpec = SPEC) -> FrontEnd:
    given = engine_args(spec, saes=saes, capture_dir=folder)["additional_config"]
    settings = Settings.read(given, 256, torch.float32)
    assert settings is not None
    return FrontEnd(settings, Shape(engines.WIDTH, torch.float32, range(4), 4))


ONE: dict[str, Any] = {"sites": [KEYS[0]]}
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "captured and not logged": ({"capture": ONE}, SpecError, f"{KEYS[0]} is captured .* logs no features there"),
    "of another site": ({"features": [LOG], "capture": {"sites": [*KEYS]}}, SpecError, f"{KEYS[1]} .* logs no feat"),
    "logged and not captured": ({"features": [LOG]}, SpecError, f"does not capture; give it a capture with '{KEYS[0]}"),
    "captured elsewhere": ({"features": [LOG], "capture": {"sites": [SITES[0]]}}, SpecError, "does not capture"),
    "prompt": ({"features": [{**LOG, "phase": "decode"}], "capture": ONE}, SpecError, "of generated ones only"),
    "generated": ({"features": [{**LOG, "phase": "prefill"}], "capture": ONE}, SpecError, "of its prompt only"),
    "positions": (
        {"features": [{**LOG, "phase": "prefill"}], "capture": {**ONE, "tokens": {"positions": [3]}}},
        SpecError, "of its prompt only",
    ),
    "other tokens": (
        {"features": [LOG], "tokens": {"spans": [[0, 3]]}, "capture": {**ONE, "tokens": {"spans": [[0, 4]]}}},
        SpecError, "at other tokens than the request steers",
    ),
    "reduced": ({"features": [LOG], "capture": {**ONE, "reduce": "mean"}}, SpecError, "of features nothing is reduced"),
    "scored": (
        {"features": [LOG], "capture": {**ONE, "tokens": {"top": {"count": 2, "site": KEYS[0], "probe": [1.0]}}}},
        SpecError, "names no site",
    ),
    "a site without": (
        {"features": [LOG], "capture": {"sites": [KEYS[0], "layers.0.post_block.features"]}},
        SiteNotFound, "layers.0.post_block.features is not captured .* op family sae_log",
    ),
    "no truth value": ({"features": [{**LOG, "log": 1}], "capture": ONE}, SAEError, "log=1; give true or false"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_lines_that_would_be_stale_are_refused(case: str, saes: dict[str, Any], folder: Path) -> None:
    given, kind, text = REFUSED[case]
    with pytest.raises(kind, match=text):
        front(saes, folder).checked(given)


def test_what_is_captured_where_no_site_is_named(saes: dict[str, Any], folder: Path) -> None:
    """All hooks of the spec, and what the request logs."""
    made = front(saes, folder)
    streams = [["post_block", layer] for layer in range(engines.LAYERS)]
    assert made.checked({"capture": {}}).data["capture"][1] == streams
    logs = made.checked({"features": [LOG], "capture": {}}).data["capture"][1]
    assert sorted(logs) == sorted([*streams, ["post_block.features", 1]])
    alone = front(saes, folder, SteerSpec.from_dict({**SPEC.to_dict(), "capture": []}))
    assert alone.checked({"features": [LOG], "capture": {}}).data["capture"][1] == [["post_block.features", 1]]
    with pytest.raises(SpecError, match="the request captures, and logs no features"):
        alone.checked({"capture": {}})


def test_everyone_logs_nothing(saes: dict[str, Any], folder: Path) -> None:
    with pytest.raises(SpecError, match="global steering logs features"):
        front(saes, folder).checked_global({"features": [LOG]})


def test_a_clamp_of_everyone_goes_with_a_log(saes: dict[str, Any], folder: Path) -> None:
    """Of one autoencoder; the request's own row holds both."""
    made = front(saes, folder)
    made.everyone = made.checked_global({"features": [{"sae": "one", "clamps": [FeatureClamp(3, 2.0).__dict__]}]})
    assert made.checked({"features": [LOG], "capture": ONE}).capture is not None


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"overrides": 4}, "overrides=4, and tokens that read an override's row are not logged"),
        ({"capture_dir": ""}, "no capture_dir and no consumers"),
        ({"capture_dir": "", "controllers": {"a": {"class": "a:B"}}}, "no capture_dir and no consumers"),
    ],
)
def test_an_engine_that_could_not_hand_logs_out_is_refused(
    change: dict[str, Any], text: str, saes: dict[str, Any], folder: Path
) -> None:
    given = engine_args(SPEC, saes=saes, capture_dir=folder)["additional_config"]["steer_compile"]
    with pytest.raises(SpecError, match=text):
        Settings.read({"steer_compile": {**given, **change}}, 256, torch.float32)
