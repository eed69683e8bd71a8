"""Dynamic steering of requests in engines: what acts when, and on whom."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from steer_compile import SteerSpec
from steer_compile.vllm.adapters.runners import live_of, warmed
from tests.vllm import engines
from tests.vllm.controllers import Script
from tests.vllm.engines import PROMPT, generated, texts

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

N = len(PROMPT)
SITE = ("post_block", 1)
SPEC = SteerSpec(steer=("post_block",), capture=("post_block",), rows=8, overrides=4, ops=("add", "row_monitor"))


def scripted(model: Path, ahead: bool = False, **script: Any) -> Any:
    """An engine with a `Script`; ``ahead``: the scheduler is a step ahead of what is sampled."""
    Script.seen.clear()
    controllers = {"script": {"class": "tests.vllm.controllers:Script", "args": script}}
    return engines.engine(model, SPEC, controllers=controllers, async_scheduling=ahead)


@pytest.fixture(scope="module")
def judge(models: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(engines.saved("llama", models), dtype=torch.float32)


def streams(judge: Any, ids: list[int], moved: dict[int, float], layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Pristine stream behind a layer, and logits, where some positions get a vector of one number there."""
    found: list[torch.Tensor] = []

    def hook(module: Any, args: Any, out: Any) -> Any:
        hidden = (out[0] if isinstance(out, tuple) else out).clone()
        found.append(hidden[0].clone())
        for position, number in moved.items():
            if position < hidden.size(1):
                hidden[:, position] += number
        return (hidden, *out[1:]) if isinstance(out, tuple) else hidden

    handle = judge.model.layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        logits = judge(torch.tensor([ids]), use_cache=False).logits[0]
    handle.remove()
    return found[0], logits


AHEAD = pytest.param(True, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU never runs ahead"))


@pytest.mark.behaviour(64)
@pytest.mark.parametrize("ahead", [False, AHEAD])
def test_an_override_acts_one_step_later_and_on_its_request_alone(ahead: bool, models: Path, judge: Any) -> None:
    """Asked for when position N + 1 was seen: N + 2 to N + 4 are steered, and nothing else of anyone."""
    llm = scripted(engines.saved("llama", models), ahead, plans={"chat": [N + 1, 3, 1, 0.7]})
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling is ahead
    outputs = generated(llm, [None, {"conversation": "chat"}, {"conversation": "other"}], tokens=10)
    plain = generated(llm, [None], tokens=10)[0]
    assert texts([outputs[0]]) == texts([outputs[2]]) == texts([plain])
    for output, moved in ((outputs[0], {}), (outputs[1], {N + 2: 0.7, N + 3: 0.7, N + 4: 0.7})):
        ids = PROMPT + list(output.token_ids)
        values, logits = streams(judge, ids, moved)
        assert list(output.token_ids) == logits.argmax(-1)[N - 1 : -1].tolist()
        numbers = logits.log_softmax(-1)[range(N - 1, len(ids) - 1), ids[N:]]
        assert engines.logprobs(output) == pytest.approx(numbers.tolist(), abs=engines.TOLERANCE)
        conversation = "chat" if moved else ""
        seen = [s for s in Script.seen if s.conversation == conversation]
        seen = seen[: len(ids) - N]
        assert [(s.phase, s.prompt) for s in seen] == [("prefill", N)] + [("decode", N)] * (len(seen) - 1)
        for each in seen:  # what a controller sees is the pristine value, its own token ids, at its own positions
            place = slice(each.position, each.position + each.count)
            assert each.token_ids == ids[place]
            torch.testing.assert_close(each.values[SITE].cpu(), values[place], atol=1e-3, rtol=1e-3)
    assert texts([outputs[1]]) != texts([plain])


def status(llm: Any) -> dict[str, Any]:
    """Of the first rank."""
    found: dict[str, Any] = llm.collective_rpc("steer_compile_dynamic")[0]
    return found


def flush(llm: Any) -> None:
    """Run on, so that the runner hears of the end of the last requests."""
    generated(llm, [None], tokens=1, prompts=[[7, 8, 9]])


@pytest.mark.behaviour(53)
def test_overrides_end_with_their_requests_and_by_preemption(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Too few blocks for all at once: what is computed again has no override, and no row of the pool is lost."""
    from vllm.v1.core.sched.scheduler import Scheduler

    stopped: list[str] = []
    preempt = Scheduler._preempt_request

    def noted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        stopped.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    Script.seen.clear()
    names = [f"chat {i}" for i in range(4)]
    plans = {name: [31 + i, 100, 1, 0.7] for i, name in enumerate(names)}
    llm = engines.engine(
        engines.saved("llama", models), SPEC, num_gpu_blocks_override=9, block_size=32, enable_prefix_caching=False,
        controllers={"script": {"class": "tests.vllm.controllers:Script", "args": {"plans": plans}}},
    )  # fmt: skip
    prompts = [list(range(10 + i, 40 + i)) for i in range(4)]
    generated(llm, [{"conversation": name} for name in names], tokens=40, prompts=prompts)
    assert stopped
    flush(llm)
    found = status(llm)
    assert found["overrides"] == {"in_use": 0, "capacity": 4}
    assert found["actions"]["applied"]["script"] >= 4
    assert set(found["requests"].values()) <= {""}
    again = [s for s in Script.seen if s.request in stopped and s.position == 0]
    assert len(again) > len(set(stopped))  # their prompts were computed again, as prompts
    assert all(s.phase == "prefill" for s in again)


def test_an_aborted_request_gives_its_row_back(models: Path) -> None:
    from vllm import SamplingParams

    llm = scripted(engines.saved("llama", models), plans={"chat": [N, 100, 1, 0.7]})
    params = SamplingParams(max_tokens=40, ignore_eos=True, extra_args={"steer": {"conversation": "chat"}})
    llm.llm_engine.add_request("gone", {"prompt_token_ids": PROMPT}, params)
    for _ in range(6):
        llm.llm_engine.step()
    assert status(llm)["overrides"]["in_use"] == 1
    names = [r for r, c in status(llm)["requests"].items() if c == "chat"]
    llm.llm_engine.abort_request(names, internal=True)
    flush(llm)
    assert status(llm)["overrides"]["in_use"] == 0
    assert names[0] not in status(llm)["requests"]


def test_a_controller_that_fails_is_reported_and_the_engine_runs_on(models: Path) -> None:
    llm = scripted(engines.saved("llama", models), fail=True)
    assert len(texts(generated(llm, [None]))[0]) == 8
    found = status(llm)["controllers"]["script"]
    assert found["errors"] == found["steps"] > 0
    assert "a controller of a test" in found["last_errors"][0]


def test_actions_of_an_operator_are_checked_when_they_are_applied(models: Path) -> None:
    from vllm import SamplingParams

    llm = scripted(engines.saved("llama", models))
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    llm.llm_engine.add_request("one", {"prompt_token_ids": PROMPT}, params)
    for _ in range(4):
        llm.llm_engine.step()
    (name,) = status(llm)["requests"]
    push = {"layers.1.post_block": [0.5] * engines.WIDTH}
    actions = [
        {"kind": "set_override", "request": name, "vectors": push},
        {"kind": "set_override", "request": "nobody", "vectors": push},
        {"kind": "set_override", "request": name, "vectors": {"layers.1.post_block": [0.5]}},
        {"kind": "nothing"},
    ]
    assert llm.collective_rpc("steer_compile_submit", args=(actions, {})) == [[True] * 4]
    assert status(llm)["queue"]["waiting"] == 4
    llm.llm_engine.step()
    llm.llm_engine.step()
    found = status(llm)
    assert found["actions"]["applied"] == {"operator": 1}
    assert found["actions"]["rejected"] == {"operator": 3}
    assert found["overrides"]["in_use"] == 1
    reasons = " ".join(rejection["reason"] for rejection in found["rejections"])
    assert "'nobody'" in reasons
    assert "64 wide" in reasons
    llm.llm_engine.abort_request([name], internal=True)
    flush(llm)


@pytest.mark.slow
@pytest.mark.behaviour(81)
def test_ranks_apply_the_same_and_a_planted_divergence_shows(models: Path) -> None:
    """Two tensor parallel ranks in processes of their own, against one rank of its own process."""
    path, found = engines.saved("llama", models), {}
    for ranks in (1, 2):
        found[ranks] = engines.told(ranks, ["tests.vllm.processes", str(path), str(ranks), "dynamic"])
    (tokens, ((one,), _)), (tokens_of_two, (alike, apart)) = found[1], found[2]
    assert tokens == tokens_of_two
    assert alike[0] == alike[1] != ""
    assert apart[0] != apart[1]
    assert len(one) == len(alike[0]) == 32


def test_no_controller_sees_the_requests_of_a_warm_up(models: Path) -> None:
    from vllm.v1.worker import gpu_worker

    llm = scripted(engines.saved("llama", models))
    executor = llm.llm_engine.engine_core.engine_core.model_executor
    worker = executor.driver_worker.worker
    live = live_of(worker.model_runner)
    assert live is not None
    assert live.dynamic is not None
    assert "__wrapped__" in vars(gpu_worker.Worker.compile_or_warm_up_model)
    assert Script.seen == []  # the engine has been warmed up
    seen = []

    def warm_up(self: Any) -> None:
        seen.append(live.dynamic)
        generated(llm, [None], tokens=2)
        raise RuntimeError("out of memory")

    dynamic = live.dynamic
    with pytest.raises(RuntimeError, match="out of memory"):
        warmed(warm_up)(worker)
    assert seen == [None]
    assert Script.seen == []
    assert live.dynamic is dynamic
    generated(llm, [None], tokens=2)
    assert [(each.phase, each.prompt) for each in Script.seen] == [("prefill", N), ("decode", N)]
