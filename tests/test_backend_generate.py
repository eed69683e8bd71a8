"""`generate` of a model that is compiled in place equals an eager `generate` with hooks that make the same edits."""

from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import Steering, TokenSelection, steer_backend
from steer_compile.backend import SteerBackend
from steer_compile.errors import NotSteered
from tests._models import Edit, compiled, direction, edited, llama, spec, tokens

NEW, PROMPT = 4, 6
PREFILL, DECODE = direction(1), direction(2)


def generate(model: Any, ids: Tensor, cache: str, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tokens and the logits of each step."""
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW,
        do_sample=False,
        cache_implementation=cache,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return result.sequences, torch.stack(result.logits, 1)


def phased(prefill: Tensor, decode: Tensor) -> Edit:
    """Adds (batch, prompt, width) or a vector to a prompt, and another vector to each generated token."""
    return lambda h: h + (prefill if h.size(1) > 1 else decode)


def in_place(inner: str = "eager", **options: Any) -> tuple[Any, SteerBackend]:
    model = llama()
    backend = steer_backend(spec("post_block", **options), inner=inner)
    model.compile(backend=backend)
    return model, backend


def same(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(got[1], expected[1], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[0], expected[0])


@pytest.mark.behaviour(49)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_vectors_for_the_prompt_and_for_what_is_generated(cache: str) -> None:
    zero, eager, ids = torch.zeros(32), llama(), tokens(2, PROMPT)
    model, backend = in_place()
    cases: list[tuple[dict[str, Any], Edit]] = [
        ({"prefill": {"post_block": {1: PREFILL}}}, phased(PREFILL, zero)),
        ({"decode": {"post_block": {1: DECODE}}}, phased(zero, DECODE)),
        ({"vectors": {"post_block": {1: PREFILL}}}, phased(PREFILL, PREFILL)),
        (
            {"vectors": {"post_block": {1: PREFILL}}, "decode": {"post_block": {1: DECODE}}, "scale": 0.5},
            phased(0.5 * PREFILL, 0.5 * (PREFILL + DECODE)),
        ),
    ]
    outputs = []
    for config, edit in cases:
        with edited(eager, {("post_block", 1): edit}):
            expected = generate(eager, ids, cache)
        with backend.runtime.steer(**config):
            got = generate(model, ids, cache)
        same(got, expected)
        outputs.append(got[1])
    plain = generate(eager, ids, cache)
    same(generate(model, ids, cache), plain)
    torch.testing.assert_close(outputs[1][:, 0], plain[1][:, 0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(outputs[1][:, 1:], plain[1][:, 1:], atol=1e-2)
    assert not torch.allclose(outputs[0][:, 0], plain[1][:, 0], atol=1e-2)


@pytest.mark.behaviour(6, 40, 54, 83)
def test_global_and_request_tiers_add() -> None:
    """Effective vectors: base and phase of the global tiers, then base and phase of the request's."""
    eager, ids = llama(), tokens(3, PROMPT)
    model, backend = in_place("aot_eager")
    runtime = backend.runtime
    names = ["base", "prefill", "decode", "own base", "own prefill", "own decode"]
    v = {name: direction(i, 0.5) for i, name in enumerate(names)}
    at = {name: {"post_block": {1: vector}} for name, vector in v.items()}
    runtime.set_global(at["base"], prefill=at["prefill"], decode=at["decode"])
    full = Steering(at["own base"], prefill=at["own prefill"], decode=at["own decode"], scale=2.0)
    runtime.register_vectors("named", at["own decode"])
    rows = [None, full, Steering(named=[("named", -3.0)])]
    prompt = [v["base"] + v["prefill"]] * 3
    later = [v["base"] + v["decode"]] * 3
    prompt[1] = prompt[1] + 2.0 * (v["own base"] + v["own prefill"])
    later[1] = later[1] + 2.0 * (v["own base"] + v["own decode"])
    prompt[2], later[2] = prompt[2] - 3.0 * v["own decode"], later[2] - 3.0 * v["own decode"]
    edit = phased(torch.stack(prompt)[:, None], torch.stack(later)[:, None])
    with edited(eager, {("post_block", 1): edit}):
        expected = generate(eager, ids, "dynamic")
    with runtime.steer(rows=rows) as handles:
        same(generate(model, ids, "dynamic"), expected)
        assert handles[1] is not None
        runtime.set_scale(handles[1], 0.0)
        prompt[1], later[1] = torch.zeros(32), torch.zeros(32)
        edit = phased(torch.stack(prompt)[:, None], torch.stack(later)[:, None])
        with edited(eager, {("post_block", 1): edit}):
            expected = generate(eager, ids, "dynamic")
        runtime.phases.restart()
        same(generate(model, ids, "dynamic"), expected)
    runtime.clear_global()
    same(generate(model, ids, "dynamic"), generate(eager, ids, "dynamic"))


def test_selected_tokens_of_padded_prompts() -> None:
    eager = llama()
    model, backend = in_place()
    ids = tokens(2, PROMPT)
    mask = torch.ones_like(ids)
    ids[1, :2], mask[1, :2] = 0, 0
    first_two = [[0, 1, 5], [2, 3, 5]]  # of the prompt, behind the padding, and the last one
    cases: list[tuple[TokenSelection, list[list[int]], bool]] = [
        (TokenSelection(last_prompt=True), [[5], [5]], False),
        (TokenSelection(((0, 2), (-1, None)), generated=True), first_two, True),
        (TokenSelection(generated=True), [[], []], True),
    ]
    for chosen, positions, generated in cases:
        where = torch.zeros(2, PROMPT, 1)
        for b in range(2):
            where[b, positions[b]] = 1
        with edited(eager, {("post_block", 0): phased(where * PREFILL, generated * PREFILL)}):
            expected = generate(eager, ids, "dynamic", mask)
        with backend.runtime.steer({"post_block": {0: PREFILL}}, tokens=chosen, prompt_lengths=[PROMPT, PROMPT - 2]):
            same(generate(model, ids, "dynamic", mask), expected)


def test_a_prompt_of_one_token_is_a_prompt() -> None:
    eager, ids = llama(), tokens(2, 1)
    model, backend = in_place()
    calls = iter(range(100))
    with edited(eager, {("post_block", 1): lambda h: h + (PREFILL if next(calls) == 0 else DECODE)}):
        expected = generate(eager, ids, "dynamic")
    for _ in range(2):
        with backend.runtime.steer(prefill={"post_block": {1: PREFILL}}, decode={"post_block": {1: DECODE}}):
            same(generate(model, ids, "dynamic"), expected)


def test_captures_of_a_generation_follow_one_another() -> None:
    eager, ids = llama(), tokens(2, PROMPT)
    model, backend = in_place(capture="post_block")
    with backend.runtime.capture() as log:
        sequences, _ = generate(model, ids, "dynamic")
    assert len(log) == NEW
    with torch.no_grad():
        states = eager(sequences[:, :-1], output_hidden_states=True).hidden_states
    torch.testing.assert_close(log["post_block", 0], states[1], rtol=1e-4, atol=1e-4)
    assert log.steps[2]["post_block", 0].shape == (2, 1, 32)


def test_calls_beyond_the_limit_of_recompiles_are_noticed() -> None:
    """Dynamo then runs the original code for sizes that it has not compiled."""
    model = llama()
    backend = steer_backend(spec("post_block", capture="post_block"), inner="eager")
    model = compiled(model, backend, dynamic=False)
    words = r"some calls may not have been steered: Dynamo has given up recompiling .*_limit of 2.*dynamic=True"

    def call(*lengths: int) -> None:
        with backend.runtime.steer({"post_block": {0: PREFILL}}):
            for length in lengths:
                model(input_ids=tokens(1, length))

    with torch._dynamo.config.patch(recompile_limit=2), torch.no_grad():
        call(3, 4)
        with pytest.raises(NotSteered, match=words):
            call(3, 5)
    with pytest.raises(NotSteered, match="given up"), backend.runtime.capture(), torch.no_grad():
        model(input_ids=tokens(1, 3))
    torch.compiler.reset()
    with torch.no_grad():
        call(5)


def test_a_generation_that_runs_the_original_model_is_noticed() -> None:
    model = llama()
    backend = steer_backend(spec("post_block", capture="post_block"), inner="eager")
    run = compiled(model, backend)
    generate(run, tokens(2, PROMPT), "dynamic")
    words = r"nothing was steered: .* compile the module in place with model\.compile"
    with pytest.raises(NotSteered, match=words), backend.runtime.steer({"post_block": {0: PREFILL}}):
        generate(run, tokens(2, PROMPT), "dynamic")
    with pytest.raises(NotSteered, match="nothing was captured"), backend.runtime.capture() as log:
        generate(run, tokens(2, PROMPT), "dynamic")
    with pytest.raises(NotSteered, match=r"layers\.1\.post_block was not captured"):
        log["post_block", 1]
