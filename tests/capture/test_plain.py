"""`capture_to`: what plain PyTorch and Hugging Face models compute, labelled, equals what the models themselves say."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_compile import TokenSelection, steer_backend
from steer_compile.backend import SteerBackend
from steer_compile.capture.consumers.memory import MemoryConsumer
from steer_compile.capture.pipeline import Pipeline
from steer_compile.capture.plain import About, capture_to, spec_digest
from steer_compile.capture.reduce import Reduction
from steer_compile.capture.selection import Selection, Top
from steer_compile.errors import CaptureError, NotSteered, SiteNotFound, SpecError, SteerError
from steer_compile.runtime.rows import PhaseTracker, real_tokens
from tests._models import compiled, llama, spec, tokens, toy

PROMPT, NEW = 6, 4
ALL = TokenSelection(((None, None),), generated=True)


def in_place(model: Any, **options: Any) -> tuple[Any, SteerBackend]:
    backend = steer_backend(spec(capture="post_block", **options), inner="eager")
    model.compile(backend=backend)
    return model, backend


def generate(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    sequences: Tensor = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    return sequences


def states_of(ids: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        states: tuple[Tensor, ...] = llama()(ids, output_hidden_states=True).hidden_states
    return states


@pytest.fixture
def memory() -> MemoryConsumer:
    return MemoryConsumer()


def test_captured_rows_equal_hidden_states(memory: MemoryConsumer) -> None:
    model, backend = in_place(llama())
    ids = tokens(2, PROMPT)
    with Pipeline({"memory": memory}) as pipeline:
        with torch.no_grad(), capture_to(backend.runtime, pipeline, ["x", "y"], about=About("t", "tiny")):
            sequences = generate(model, ids)
        assert {pipeline.wait(name)["memory"].status for name in "xy"} == {"ok"}
    states = states_of(sequences[:, :-1])
    for b, name in enumerate("xy"):
        rows = memory.get(name)
        assert rows.positions.tolist() == list(range(PROMPT + NEW - 1))
        assert torch.equal(rows.token_ids, sequences[b, :-1])
        assert rows.steps.tolist() == [rows.steps[0].item()] * PROMPT + [
            rows.steps[0].item() + i for i in range(1, NEW)
        ]
        torch.testing.assert_close(rows.values["layers.0.post_block"], states[1][b], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("inside", ["capture_to", "steer"])
def test_padding_is_not_among_the_rows(memory: MemoryConsumer, inside: str) -> None:
    model, backend = in_place(llama())
    ids = tokens(3, PROMPT)
    lengths = [PROMPT, 2, 4]
    mask = torch.arange(PROMPT) >= PROMPT - torch.tensor(lengths)[:, None]
    ids[~mask] = 0
    with Pipeline({"memory": memory}) as pipeline, torch.no_grad():
        if inside == "steer":
            with backend.runtime.steer(prompt_lengths=lengths, names=["p", "q", "r"]):  # noqa: SIM117
                with capture_to(backend.runtime, pipeline):
                    sequences = generate(model, ids, mask.long())
        else:
            with capture_to(backend.runtime, pipeline, ["p", "q", "r"], prompt_lengths=lengths):
                sequences = generate(model, ids, mask.long())
    for b, name in enumerate("pqr"):
        rows = memory.get(name)
        real = sequences[b, PROMPT - lengths[b] : -1]
        assert rows.positions.tolist() == list(range(lengths[b] + NEW - 1))
        assert torch.equal(rows.token_ids, real)
        states = states_of(real[None])
        torch.testing.assert_close(rows.values["layers.0.post_block"], states[1][0], rtol=1e-3, atol=1e-3)


def test_some_sites_and_some_tokens(memory: MemoryConsumer) -> None:
    model, backend = in_place(llama())
    ids = tokens(3, PROMPT)
    chosen = [TokenSelection(last_prompt=True), ALL, TokenSelection(((1, 3),), generated=True)]
    with Pipeline({"memory": memory}) as pipeline, torch.no_grad():
        with capture_to(backend.runtime, pipeline, sites=["layers.1.post_block"], tokens=chosen):
            generate(model, ids)
        found = {name: memory.get(name) for name in "012"} if pipeline.close() else {}
    assert found["0"].positions.tolist() == [PROMPT - 1]
    assert found["1"].positions.tolist() == list(range(PROMPT + NEW - 1))
    assert found["2"].positions.tolist() == [1, 2, *range(PROMPT, PROMPT + NEW - 1)]
    assert all(list(rows.values) == ["layers.1.post_block"] for rows in found.values())


@pytest.mark.parametrize("packed", [0, 24])
def test_reductions_and_choices(memory: MemoryConsumer, packed: int) -> None:
    """Each sequence chooses its own tokens; what is kept of them equals the same of the whole `hidden_states`."""
    model, backend = in_place(llama(), capture_rows=packed)
    ids, probe = tokens(4, PROMPT), torch.linspace(-1, 1, llama().config.hidden_size)
    site = ("post_block", 0)
    chosen = [
        Selection(every=3),
        Selection(None, positions=(2, PROMPT + 1)),
        None,
        Selection(top=Top(3, site, probe)),
    ]
    keep = Reduction(["rows", "norm", "project"], {site: torch.stack([probe, probe.flip(0)])})
    with Pipeline({"memory": memory}) as pipeline:
        with torch.no_grad(), capture_to(backend.runtime, pipeline, "abcd", [site], chosen, keep=keep):
            sequences = generate(model, ids)
        assert {pipeline.wait(name)["memory"].status for name in "abcd"} == {"ok"}
    stream = states_of(sequences[:, :-1])[1]
    scores = stream[3].float() @ probe
    wanted = {"a": [0, 3, 6], "b": [2, 7], "d": sorted(scores.topk(3).indices.tolist())}
    for name, positions in wanted.items():
        rows, b = memory.get(name), "abcd".index(name)
        own = stream[b, positions]
        assert rows.positions.tolist() == positions
        assert rows.token_ids.tolist() == sequences[b, positions].tolist()
        torch.testing.assert_close(rows.values["layers.0.post_block"], own)
        torch.testing.assert_close(rows.values["layers.0.post_block.norm"], own.norm(dim=-1))
        projected = torch.stack([own @ probe, own @ probe.flip(0)], -1)
        torch.testing.assert_close(rows.values["layers.0.post_block.project"], projected)
    with pytest.raises(CaptureError, match="no captured rows"):
        memory.get("c")


SITE, ELSEWHERE, WIDE = ("post_block", 0), ("post_block", 9), 32
ONES = torch.ones(WIDE)
BAD_KEEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "no directions": (r"layers\.1\.post_block has no directions", {"keep": Reduction("project", {SITE: ONES})}),
    "not captured": (
        r"layers\.9\.post_block is not captured and has directions",
        {"sites": [SITE], "keep": Reduction("project", {SITE: ONES, ELSEWHERE: ONES})},
    ),
    "width": (
        "have 1 numbers and its values 32",
        {"sites": [SITE], "keep": Reduction("project", {SITE: ONES[:1]})},
    ),
    "top elsewhere": (
        r"top scores the tokens at layers\.9\.post_block, which is not captured",
        {"tokens": Selection(top=Top(1, ELSEWHERE, ONES))},
    ),
    "top of a width": (
        r"the probe of top has 1 numbers and layers\.0\.post_block 32",
        {"tokens": [ALL, Selection(top=Top(1, SITE, ONES[:1]))]},
    ),
    "mean of top": (
        "a mean of the tokens of top",
        {"tokens": Selection(top=Top(1, SITE, ONES)), "keep": Reduction("mean")},
    ),
}


@pytest.mark.parametrize("packed", [0, 24])
@pytest.mark.parametrize("name", BAD_KEEPS)
def test_what_does_not_fit_the_sites_is_refused_and_keeps_nothing(
    name: str, packed: int, memory: MemoryConsumer
) -> None:
    model, backend = in_place(llama(), capture_rows=packed)
    match, given_ = BAD_KEEPS[name]
    with Pipeline({"memory": memory}) as pipeline:
        with torch.no_grad(), pytest.raises(SteerError, match=match):  # noqa: SIM117
            with capture_to(backend.runtime, pipeline, "ab", **given_):
                model(tokens(2, PROMPT))
        assert backend.runtime.sinks == []
    assert pipeline.status()["delivered"] == 0


def test_a_log_takes_no_selection_by_score() -> None:
    model, backend = in_place(llama(), capture_rows=24)
    best = Selection(top=Top(1, SITE, ONES))
    with torch.no_grad(), pytest.raises(SpecError, match="a top of 1 tokens"), backend.runtime.capture(tokens=best):
        model(tokens(2, PROMPT))


@pytest.mark.parametrize("packed", [0, 24])
def test_means_are_given_on_when_requests_end(memory: MemoryConsumer, packed: int) -> None:
    model, backend = in_place(llama(), capture_rows=packed)
    ids, last = tokens(2, PROMPT), TokenSelection(((1, None),), generated=True)
    with Pipeline({"memory": memory}) as pipeline:
        with torch.no_grad(), capture_to(backend.runtime, pipeline, "ab", tokens=last, keep=Reduction("mean")):
            sequences = generate(model, ids)
        assert {pipeline.wait(name)["memory"].status for name in "ab"} == {"ok"}
    states = states_of(sequences[:, :-1])
    for b, name in enumerate("ab"):
        rows = memory.get(name)
        mean = states[1][b, 1:].float().mean(0, keepdim=True)
        torch.testing.assert_close(rows.values["layers.0.post_block.mean"], mean)
        assert rows.values["layers.0.post_block.mean.tokens"].tolist() == [PROMPT + NEW - 2]
        assert rows.positions.tolist() == [PROMPT + NEW - 2]
        assert rows.token_ids.tolist() == sequences[b, -2:-1].tolist()


def test_each_generation_in_a_block_makes_requests_anew() -> None:
    ended: list[tuple[str, int]] = []
    model, backend = in_place(llama())

    class Counting(MemoryConsumer):
        def ended(self, end: Any) -> str:
            assert (end.tag, end.meta.spec, end.meta.model) == ("t", spec_digest(backend.spec), "m")
            place = super().ended(end)
            ended.append((end.request, len(self.get(end.request))))
            assert end.meta.prompt_length == (PROMPT if len(ended) < 3 else 3)
            return place

    with Pipeline({"memory": Counting()}) as pipeline, torch.no_grad():
        with capture_to(backend.runtime, pipeline, about=About("t", "m")):
            generate(model, tokens(2, PROMPT))
            generate(model, tokens(3, 3))
        results = {name: pipeline.wait(name)["memory"].status for name in "012"}
    assert results == {"0": "ok", "1": "ok", "2": "ok"}
    assert ended == [("0", 9), ("1", 9), ("0", 6), ("1", 6), ("2", 6)]


@pytest.mark.parametrize("cut", [None, 2])
def test_a_model_in_parts_gives_whole_rows(memory: MemoryConsumer, cut: int | None) -> None:
    """A graph break between blocks: two graphs in each call, whose sites are of the same rows."""
    backend = steer_backend(spec(capture="post_block"), inner="eager")
    run = compiled(toy(layers=4, cut=cut), backend)
    ids = tokens(2, 5)
    with Pipeline({"memory": memory}) as pipeline, torch.no_grad():
        run(ids)  # all graphs are known
        for _ in range(2):
            with backend.runtime.capture() as log, capture_to(backend.runtime, pipeline):
                run(ids)
                run(ids)
        assert {pipeline.wait(name)["memory"].status for name in "01"} == {"ok"}
    rows = memory.get("1")
    assert sorted(rows.values) == [f"layers.{layer}.post_block" for layer in range(4)]
    assert torch.equal(rows.token_ids, ids[1])
    for layer in range(4):
        assert torch.equal(rows.values[f"layers.{layer}.post_block"], log.steps[-1]["post_block", layer][1])


def test_what_is_refused(memory: MemoryConsumer) -> None:
    model, backend = in_place(llama())
    ids = tokens(2, 3)
    pipeline = Pipeline({"memory": memory})
    runtime = backend.runtime
    with torch.no_grad():
        with pytest.raises(CaptureError, match="3 requests are given but the call has 2 sequences; give one"):  # noqa: SIM117
            with capture_to(runtime, pipeline, ["a", "b", "c"]):
                model(ids)
        with pytest.raises(NotSteered, match="capture has tokens for 1 sequences but the call has 2"):  # noqa: SIM117
            with capture_to(runtime, pipeline, tokens=[ALL]):
                model(ids)
        with (
            pytest.raises(
                SiteNotFound, match=r"layers\.9\.post_block is not captured; captured are layers\.0\.post_block"
            ),
            capture_to(runtime, pipeline, sites=["layers.0.post_block", ("post_block", 9)]),
        ):
            model(ids)
        assert pipeline.wait("0")["memory"].text == "the block around its calls raised an error"
        with pytest.raises(NotSteered, match=r"nothing was captured: .* compile the module in place"):  # noqa: SIM117
            with capture_to(runtime, pipeline):
                pass
        with pytest.raises(CaptureError, match="gives a name twice"), capture_to(runtime, pipeline, ["a", "a"]):
            pass
        nothing = steer_backend(spec("post_block"), inner="eager")
        with pytest.raises(SpecError, match="the spec captures nothing"), capture_to(nothing.runtime, pipeline):
            pass
        assert runtime.sinks == []
        model(ids)
        with capture_to(runtime, pipeline):
            model(ids)
    pipeline.close()
    assert len(memory.get("1")) == 3


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=5).filter(any),
    st.lists(st.integers(1, 3), max_size=5),
    st.sampled_from(["left", "right"]),
)
def test_every_token_has_one_position(prompts: list[int], chunks: list[int], padding: str) -> None:
    """Prompts of other lengths, in one call or in chunks, then decoding: positions follow one another from 0."""
    longest = max(prompts)
    steps = []
    tracker = PhaseTracker("prefill", tuple(prompts), padding)
    done = 0
    for chunk in [*chunks, longest]:
        length = min(chunk, longest - done)
        if length:
            steps.append(tracker.advance(len(prompts), length))
            done += length
    for b, prompt in enumerate(prompts):
        positions = []
        for step in steps:
            span, first = real_tokens(step, b)
            assert 0 <= span.start <= span.stop <= step.length
            positions += list(range(first, first + len(span))) if len(span) else []
        assert positions == list(range(prompt))
    tracker.told = None
    for i in range(3):
        step = tracker.advance(len(prompts), 1)
        for b, prompt in enumerate(prompts):
            span, first = real_tokens(step, b)
            assert len(span) == 1
            assert first == prompt + i
    assert np.all(np.array([step.batch for step in steps]) == len(prompts))
