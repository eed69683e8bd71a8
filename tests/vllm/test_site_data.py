"""The dynamic tier and monitors of sites in engines: tiers, gates of the same token, across layers, with a memory."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from steer_compile import SteerSpec
from steer_compile.errors import SteerError
from tests.vllm import engines
from tests.vllm.controllers import Script, Seen
from tests.vllm.engines import PROMPT, at, generated, vector
from tests.vllm.test_dynamic import flush, status, streams

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

N = len(PROMPT)
OPS = ("add", "tier", "monitor", "row_monitor", "clamp", "score")
ACROSS = (*OPS, "memory", "mlp")
SHUT, OPEN = 1e6, -1e6
PUSH = vector(4, 1.0)
_numbers = count(1)


def engine(models: Path, ops: tuple[str, ...], capture: tuple[str, ...] = (), **options: Any) -> Any:
    Script.seen.clear()
    return engines.engine(
        engines.saved("llama", models),
        SteerSpec(steer=("post_block",), capture=capture, rows=8, ops=ops, hidden=2, sequences=8, **options),
        controllers={"script": {"class": "tests.vllm.controllers:Script"}},
    )


@pytest.fixture(scope="module")
def judge(models: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(engines.saved("llama", models), dtype=torch.float32)


def change(llm: Any, **what: Any) -> None:
    llm.collective_rpc("steer_compile_set_sites", args=(next(_numbers), what))


def tier(layer: int, value: torch.Tensor, gain: float = 1.0) -> dict[str, Any]:
    return {"vectors": {f"layers.{layer}.post_block": value.tolist()}, "gain": gain}


def monitor(layer: int, gate_rows: bool = False, **fields: Any) -> dict[str, Any]:
    given = {"probe": vector(6).tolist(), "sharpness": 10.0, **fields}
    return {"site": f"layers.{layer}.post_block", "monitor": given, "gate_rows": gate_rows}


def numbers(llm: Any, *steering: Any) -> list[list[float]]:
    return [engines.logprobs(output) for output in generated(llm, list(steering))]


def alike(found: list[float]) -> Any:
    return pytest.approx(found, abs=engines.TOLERANCE)


@pytest.mark.behaviour(15)
def test_a_tier_steers_generated_tokens_and_a_monitor_gates_it_and_the_rows(models: Path) -> None:
    llm = engine(models, OPS)
    plain, decode, half, base, prefill = numbers(
        llm, None, at(1, PUSH, "decode"), at(1, 0.5 * PUSH, "decode"), at(1, PUSH), at(1, PUSH, "prefill")
    )
    change(llm, tier=tier(1, PUSH))
    assert numbers(llm, None, at(1, -PUSH, "decode"), at(1, PUSH, "prefill")) == list(map(alike, (decode, plain, base)))
    change(llm, tier=tier(1, PUSH, 0.5))
    assert numbers(llm, None) == [alike(half)]
    change(llm, monitor=monitor(1, threshold=SHUT))
    assert numbers(llm, None, at(1, PUSH, "decode")) == [alike(plain), alike(decode)]
    change(llm, monitor=monitor(1, gate_rows=True, threshold=SHUT))
    assert numbers(llm, None, at(1, PUSH)) == [alike(plain), alike(prefill)]
    change(llm, monitor=monitor(1, threshold=OPEN))
    assert numbers(llm, None) == [alike(half)]
    llm.collective_rpc("steer_compile_restore_sites", args=(0,))  # of another change: nothing
    assert numbers(llm, None) == [alike(half)]
    change(llm, monitor={"site": "layers.1.post_block"})
    change(llm, tier={})
    assert numbers(llm, None) == [alike(plain)]
    found = status(llm)
    assert (found["tier"]["digest"], found["monitors"]) == ("", {})
    for bad in ({"tier": tier(9, PUSH)}, {"tier": {"vectors": 3}}, {"monitor": monitor(1, hidden={})}, {}):
        with pytest.raises(Exception, match=r"layers|lacks|object|one of them"):
            change(llm, **bad)
    assert numbers(llm, None) == [alike(plain)]


def held(seen: list[Seen], layer: int, threshold: float, low: float) -> dict[int, bool]:
    """Positions at which a step gate with a memory is open, by the scores that a controller saw."""
    gates, was = {}, False
    for each in seen:
        if each.phase == "decode":
            score = float(each.values["score", "post_block", layer][-1, 0])
            was = score > threshold or (was and score >= low)
            gates[each.position] = was
        else:
            was = False
    return gates


@pytest.mark.behaviour(70)
def test_gates_across_layers_remember_for_each_request(models: Path, judge: Any) -> None:
    """Detected at layer 0, acted upon at layer 1, in the same forward; a prompt forgets, and lines are taken again."""
    llm = engine(models, ACROSS, ("post_block",), cross_layer=True)
    prompts = [list(range(3 + i, 12 + 3 * i)) for i in range(6)]
    change(llm, monitor=monitor(0, threshold=SHUT))
    generated(llm, [None] * 6, tokens=24, prompts=prompts)
    scores = torch.tensor(
        [float(s.values["score", "post_block", 0][-1, 0]) for s in Script.seen if s.phase == "decode"]
    )
    assert scores.unique().numel() > 10
    threshold, low = float(scores.quantile(0.8)), float(scores.quantile(0.3))
    change(llm, monitor=monitor(0, kind="step", threshold=threshold, low=low))
    change(llm, tier=tier(1, torch.full((engines.WIDTH,), 0.3)))
    remembered = 0
    for _ in range(2):
        Script.seen.clear()
        outputs = generated(llm, [None] * 6, tokens=24, prompts=prompts)
        names = list(dict.fromkeys(s.request for s in Script.seen))
        for name, prompt, output in zip(names, prompts, outputs, strict=True):
            seen = [s for s in Script.seen if s.request == name]
            gates = held(seen, 0, threshold, low)
            without = {s.position for s in seen if float(s.values["score", "post_block", 0][-1, 0]) > threshold}
            remembered += len([p for p, is_open in gates.items() if is_open and p not in without])
            ids = prompt + list(output.token_ids)
            _, logits = streams(judge, ids, {p: 0.3 for p, is_open in gates.items() if is_open})
            expected = logits.log_softmax(-1)[range(len(prompt) - 1, len(ids) - 1), ids[len(prompt) :]]
            assert engines.logprobs(output) == alike(expected.tolist())
    assert remembered > 5
    change(llm, tier={})


def test_hidden_units_of_a_probe(models: Path) -> None:
    llm = engine(models, ACROSS, cross_layer=True)
    units = {"weight": [vector(20).tolist(), vector(21).tolist()], "bias": [0.1, -0.2], "output": [1.0, -2.0]}
    change(llm, monitor=monitor(0, hidden=units))
    generated(llm, [None])
    with_units = [s.values["score", "post_block", 0][:, 0] for s in Script.seen]
    Script.seen.clear()
    change(llm, monitor=monitor(0))
    generated(llm, [None])
    without = [s.values["score", "post_block", 0][:, 0] for s in Script.seen]
    assert not torch.allclose(torch.cat(with_units)[:N], torch.cat(without)[:N])
    with pytest.raises(SteerError, match="hidden units"):
        change(
            llm,
            monitor=monitor(0, hidden={**units, "weight": [[1.0] * 64] * 3, "bias": [0.0] * 3, "output": [1.0] * 3}),
        )
    flush(llm)


def test_more_requests_than_the_memory_has_lines_are_refused_at_the_start(models: Path) -> None:
    with pytest.raises(SteerError, match="sequences=8"):
        engines.engine(
            engines.saved("llama", models),
            SteerSpec(steer=("post_block",), ops=("add", "monitor", "memory"), cross_layer=True, sequences=8),
            max_num_seqs=16,
        )


def test_a_controller_that_is_none_is_refused_at_the_start(models: Path) -> None:
    for path, words in (("tests.vllm.controllers:Seen", "no subclass"), ("tests.vllm.nowhere:X", "cannot be imported")):
        with pytest.raises(Exception, match=words):
            engines.engine(
                engines.saved("llama", models), SteerSpec(steer=("post_block",)), controllers={"x": {"class": path}}
            )
