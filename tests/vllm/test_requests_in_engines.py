"""Requests of one engine: batches, waiting, phases, the prefix cache, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steer_compile import SteerSpec
from steer_compile.errors import SteerError
from tests.vllm import engines
from tests.vllm.engines import at, generated, texts, vector

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

SPEC = SteerSpec(steer=engines.HOOKS, rows=6, ops=("add", "row_monitor", "clamp"), clamps=2)


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vectors") / "calm.safetensors"
    save_file({"layers.2.post_block": vector(9)}, path)
    return path


@pytest.fixture(scope="module")
def llm(models: Path, named: Path) -> Any:
    return engines.engine(engines.saved("llama", models), SPEC, vectors={"calm": named}, enable_prefix_caching=False)


@pytest.mark.behaviour(83)
def test_a_request_in_a_batch_is_what_it_is_alone(llm: Any) -> None:
    steering = [None, *(at(n % 4, vector(n)) for n in range(3)), at(0, vector(7), "decode"), None]
    prompts = [list(range(3 + i, 12 + 3 * i)) for i in range(len(steering))]
    together = texts(generated(llm, steering, prompts=prompts))
    alone = [texts(generated(llm, [s], prompts=[p]))[0] for s, p in zip(steering, prompts, strict=True)]
    assert together == alone


@pytest.mark.behaviour(55, 56)
def test_requests_wait_for_rows_and_none_runs_without(llm: Any) -> None:
    """Twelve configurations need two rows each, and there are six."""
    steering = [at(1, vector(20 + n, 2.0)) for n in range(12)]
    together = texts(generated(llm, steering))
    assert len({tuple(t) for t in together}) == 12
    assert together == [texts(generated(llm, [s]))[0] for s in steering]


def test_equal_configurations_share_rows(llm: Any) -> None:
    steering = [at(1, vector(5, 2.0))] * 8
    assert len({tuple(t) for t in texts(generated(llm, steering))}) == 1


@pytest.mark.behaviour(48)
def test_named_vectors_are_the_same_as_inline_ones(llm: Any) -> None:
    inline = [at(2, vector(9)), {**at(2, vector(9)), "scale": -1.5}, at(2, 0.5 * vector(9))]
    by_name = [{"named": "calm"}, {"named": ["calm"], "scale": -1.5}, {"named": [["calm", 0.5]]}]
    assert texts(generated(llm, inline)) == texts(generated(llm, by_name))


def test_json_text_is_the_same_as_data(llm: Any) -> None:
    import json

    assert texts(generated(llm, [at(1, vector(3, 2.0))])) == texts(generated(llm, [json.dumps(at(1, vector(3, 2.0)))]))


def test_selected_tokens_are_steered_and_no_others(llm: Any) -> None:
    strong = at(1, vector(4, 3.0))
    everything, prompt, generated_only, decode = texts(
        generated(llm, [
            {**strong, "tokens": {"spans": [[0, None]], "generated": True}},
            {**strong, "tokens": {"spans": [[0, None]]}},
            {**strong, "tokens": {"generated": True}},
            at(1, vector(4, 3.0), "decode"),
        ])
    )  # fmt: skip
    whole, prefill = texts(generated(llm, [strong, at(1, vector(4, 3.0), "prefill")]))
    assert (everything, prompt, generated_only) == (whole, prefill, decode)


@pytest.mark.behaviour(25)
def test_monitors_and_clamps_of_a_request(llm: Any) -> None:
    """A gate that is shut leaves decoded tokens alone; a clamp at 0 along the vector takes it out again."""
    strong = at(1, vector(6, 3.0))
    probe = {"probe": vector(6).tolist(), "threshold": 1e6, "sharpness": 10.0}
    shut, prefill_only, opened, steered = texts(
        generated(llm, [
            {**strong, "monitors": {"layers.1.post_block": probe}},
            at(1, vector(6, 3.0), "prefill"),
            {**strong, "monitors": {"layers.1.post_block": {**probe, "threshold": -1e6}}},
            strong,
        ])
    )  # fmt: skip
    assert shut == prefill_only
    assert opened == steered
    bound = {"direction": vector(6).tolist(), "value": 0.0}
    clamped, plain = texts(
        generated(llm, [{**strong, "clamps": {"layers.1.post_block": [bound]}},
                        {"clamps": {"layers.1.post_block": [bound]}}])
    )  # fmt: skip
    assert clamped == plain != steered


BAD = {
    "unknown field": {"vector": {}},
    "unknown hook": {"base": {"post_everything": {"1": [0.0] * engines.WIDTH}}},
    "hook not in the spec": {"base": {"mlp_out": {"1": [0.0] * engines.WIDTH}}},
    "layer not in the model": {"base": {"post_block": {"4": [0.0] * engines.WIDTH}}},
    "wrong width": {"base": {"post_block": {"1": [0.0] * 63}}},
    "nan": {"base": {"post_block": {"1": [float("nan")] * engines.WIDTH}}},
    "scale": {"base": {"post_block": {"1": [1.0] * engines.WIDTH}}, "scale": float("inf")},
    "unknown name": {"named": "angry"},
    "text": "not json",
    "number": 3,
    "base64": {"base": {"post_block": {"1": {"dtype": "float32", "shape": [64], "data": "!"}}}},
    "short data": {"base": {"post_block": {"1": {"dtype": "float32", "shape": [64], "data": "AAAA"}}}},
    "tokens": {"base": {"post_block": {"1": [1.0] * engines.WIDTH}}, "tokens": {"spans": 3}},
    "too many clamps": {"clamps": {"layers.1.post_block": [{"direction": [1.0] * engines.WIDTH, "value": 0}] * 3}},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_are_refused_and_the_engine_lives(name: str, llm: Any) -> None:
    with pytest.raises(SteerError):
        generated(llm, [BAD[name]])
    assert len(texts(generated(llm, [None]))[0]) == 8


def test_an_engine_without_a_spec_refuses_steering(models: Path) -> None:
    plain = engines.engine(engines.saved("llama", models))
    with pytest.raises(SteerError, match="has no spec"):
        generated(plain, [at(1, vector(1))])


@pytest.mark.parametrize("options", [{"enforce_eager": True}, {"compilation_config": {"mode": 1}}])
def test_an_engine_without_a_graph_is_refused_at_the_start(options: dict[str, Any], models: Path) -> None:
    with pytest.raises(Exception, match=r"no graph to steer|does not yet support: stock"):  # the latter is vLLM's
        engines.engine(engines.saved("llama", models), SPEC, **options)


def test_connectors_of_kv_blocks_are_refused_at_the_start(models: Path) -> None:
    connector = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}
    with pytest.raises(SteerError, match="connectors that move KV blocks"):
        engines.engine(engines.saved("llama", models), SPEC, kv_transfer_config=connector)


@pytest.mark.behaviour(52)
def test_a_session_that_streams_its_input_is_refused(models: Path) -> None:
    from vllm import SamplingParams

    streaming = engines.engine(engines.saved("llama", models), SPEC)
    params = SamplingParams(extra_args={"steer": at(1, vector(1))})
    process = streaming.llm_engine.input_processor.process_inputs
    given = {"prompt": {"type": "token", "prompt_token_ids": [5]}, "supported_tasks": ("generate",)}
    assert process("a", params=params, **given).sampling_params.extra_args["steer_digests"]["prefill"]
    with pytest.raises(SteerError, match="streams its input"):
        process("a", params=params, resumable=True, **given)


def test_the_core_takes_nothing_unchecked() -> None:
    """As from a front end of another language: an error of that request."""
    from vllm import SamplingParams
    from vllm.v1.engine.core import EngineCore

    request = SimpleNamespace(sampling_params=SamplingParams(extra_args={"steer": "{}"}))
    with pytest.raises(SteerError, match="past the checks"):
        EngineCore.preprocess_add_request(SimpleNamespace(), request)


def test_a_spec_that_is_none_is_refused_at_the_start(models: Path) -> None:
    with pytest.raises(SteerError, match="unknown key 'stear'"):
        engines.engine(engines.saved("llama", models), additional_config={"steer_compile": {"stear": ["post_block"]}})


def test_a_layer_that_the_model_lacks_is_refused_at_the_start(models: Path) -> None:
    with pytest.raises(SteerError, match=r"layers\.9\.post_block: the model has layers 0 to 3"):
        engines.engine(engines.saved("llama", models), SteerSpec(steer=("post_block",), layers=(9,)))


@pytest.mark.behaviour(51)
def test_chunks_of_a_prompt_are_steered_alike(models: Path, llm: Any) -> None:
    chunked = engines.engine(
        engines.saved("llama", models), SPEC, max_num_batched_tokens=16, max_num_seqs=4, enable_chunked_prefill=True
    )
    prompts = [list(range(10, 70)), list(range(40, 75)), list(range(3, 30))]
    steering = [at(1, vector(11, 2.0)), None, at(2, vector(12, 2.0), "decode")]
    assert texts(generated(chunked, steering, prompts=prompts)) == texts(generated(llm, steering, prompts=prompts))


@pytest.mark.behaviour(58, 83)
def test_a_warm_prefix_cache_gives_what_a_cold_one_gives(models: Path, llm: Any) -> None:
    """Blocks of steered prompts are their own; steering of decoded tokens alone shares the prompt's blocks."""
    cached = engines.engine(engines.saved("llama", models), SPEC, enable_prefix_caching=True, block_size=32)
    prompt = [list(range(10, 90))]
    steering: list[Any] = [None, at(1, vector(13, 2.0)), at(1, vector(14, 2.0)), at(1, vector(13, 2.0), "decode"), None]
    cold = [texts(generated(llm, [s], prompts=prompt))[0] for s in steering]
    for _ in range(2):
        warm = [texts(generated(cached, [s], prompts=prompt))[0] for s in steering]
        assert warm == cold
    # A prompt that holds what a steered request generated does not find that request's blocks.
    (said,) = texts(generated(cached, [steering[3]], tokens=24, prompts=prompt))
    longer = [prompt[0] + said]
    assert texts(generated(cached, [None], prompts=longer)) == texts(generated(llm, [None], prompts=longer))
    assert hits(cached, None, prompt) == hits(cached, at(0, vector(15), "decode"), prompt) == 64
    assert hits(cached, at(1, vector(13, 2.0)), prompt) == 64
    assert hits(cached, at(1, vector(16, 2.0)), prompt) == 0


@pytest.mark.behaviour(57)
def test_the_next_turn_of_a_chat_is_what_it_is_without_a_cache(models: Path, llm: Any) -> None:
    """What was generated, unsteered, is part of the next prompt, and steered there: its blocks are not those."""
    cached = engines.engine(engines.saved("llama", models), SPEC, enable_prefix_caching=True, block_size=32)
    for tier in ("prefill", "decode", "base"):
        steering, prompt = [at(1, vector(17, 2.0), tier)], list(range(10, 50))
        for _ in range(2):
            (said,) = texts(generated(cached, steering, tokens=24, prompts=[prompt]))
            (cold,) = texts(generated(llm, steering, tokens=24, prompts=[prompt]))
            assert said == cold
            prompt = prompt + said + [7]


def hits(llm: Any, steering: Any, prompts: list[list[int]]) -> int:
    """Tokens of a prompt that the prefix cache had."""
    from vllm import SamplingParams

    params = SamplingParams(
        max_tokens=1, detokenize=False, extra_args=None if steering is None else {"steer": steering}
    )
    (result,) = llm.generate([{"prompt_token_ids": prompts[0]}], params, use_tqdm=False)
    return int(result.num_cached_tokens)


@pytest.mark.behaviour(53)
def test_preempted_requests_go_on_as_if_nothing_had_happened(
    models: Path, llm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few blocks for all requests at once: some are stopped and computed again."""
    from vllm.v1.core.sched.scheduler import Scheduler

    small = engines.engine(
        engines.saved("llama", models), SPEC, num_gpu_blocks_override=9, block_size=32, enable_prefix_caching=False
    )
    stopped: list[str] = []
    preempt = Scheduler._preempt_request

    def noted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        stopped.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    steering = [at(1, vector(30, 2.0)), None, at(2, vector(31, 2.0), "decode"), at(0, vector(32, 2.0), "prefill")]
    prompts = [list(range(10 + i, 40 + i)) for i in range(4)]
    got = texts(generated(small, steering, tokens=40, prompts=prompts))
    assert stopped
    assert got == texts(generated(llm, steering, tokens=40, prompts=prompts))


@pytest.mark.behaviour(83)
def test_256_configurations_in_one_batch(models: Path) -> None:
    wide = engines.engine(
        engines.saved("llama", models), SteerSpec(steer=("post_block",), rows=512), enable_prefix_caching=False,
        max_num_seqs=256, max_num_batched_tokens=8192,
    )  # fmt: skip
    steering = [at(n % engines.LAYERS, vector(1000 + n, 2.0)) for n in range(256)]
    together = texts(generated(wide, steering, tokens=4))
    assert len({tuple(t) for t in together}) > 150
    for n in range(0, 256, 16):
        assert texts(generated(wide, [steering[n]], tokens=4)) == [together[n]]


def test_bf16_tables_and_streams(models: Path) -> None:
    """Also with the families that have numbers of fp32 for each token."""
    ops = ("add", "row_monitor", "clamp")
    spec = SteerSpec(steer=("post_block",), rows=4, ops=ops, clamps=1)
    low = engines.engine(engines.saved("llama", models), spec, dtype="bfloat16")
    shut = {"probe": vector(1).tolist(), "threshold": 1e6, "sharpness": 10.0}
    strong = at(1, vector(1, 3.0))
    idle, steered, prefill, gated = generated(
        low, [None, strong, at(1, vector(1, 3.0), "prefill"), {**strong, "monitors": {"layers.1.post_block": shut}}]
    )
    assert texts([idle]) != texts([steered])
    assert texts([gated]) == texts([prefill]) != texts([steered])
    assert torch.isfinite(torch.tensor(engines.logprobs(steered))).all()
