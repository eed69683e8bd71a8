"""A sweep has the numbers of the same sweep by forward hooks in eager mode, and refuses what cannot be swept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile.errors import SiteNotFound, SpecError
from steer_compile.sweep import Question, Sweeper, SweepResult, patch_sweep
from steer_compile.sweep.heatmap import draw_sweep
from steer_compile.torch_compat import compile_count
from tests._models import LAYERS, VOCAB, gpt2, llama, logits, replaced, tokens, toy

HOOKS = ("pre_attn", "post_attn", "post_block", "mlp_out")
LENGTH, ANSWER, FOIL = 5, 7, 9
CLEAN = tuple(tokens(1, LENGTH)[0].tolist())
CORRUPTED = (*CLEAN[:1], *tokens(1, LENGTH, seed=9)[0, 1:-1].tolist(), *CLEAN[-1:])


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.compiler.reset()


def question(metric: str = "logit_diff", **options: Any) -> Question:
    return Question(
        **{"clean": CLEAN, "corrupted": CORRUPTED, "answer": ANSWER, "foil": FOIL, **options}, metric=metric
    )


def measured(last: Tensor, measure: str) -> float:
    if measure == "logprob":
        return float(last.double().log_softmax(-1)[ANSWER])
    return float(last[ANSWER] - last[FOIL])


def by_hooks(model: Any, hook: str, layer: int, position: int, measure: str) -> float:
    """One cell, by hooks in eager mode: one run that looks and one that is edited."""
    seen: list[Tensor] = []

    def look(h: Tensor) -> Tensor:
        seen.append(h[0, position].clone())
        return h

    def put(h: Tensor) -> Tensor:
        h = h.clone()
        h[0, position] = seen[0]
        return h

    with replaced(model, {(hook, layer): look}):
        logits(model, torch.tensor([CLEAN]))
    with replaced(model, {(hook, layer): put}):
        return measured(logits(model, torch.tensor([CORRUPTED]))[0, -1], measure)


@pytest.mark.parametrize("make", [llama, gpt2])
def test_every_cell_equals_forward_hooks(make: Callable[[], Any]) -> None:
    model = make()
    result = patch_sweep(model, question(), HOOKS, batch=7, inner="eager")
    found = list(result)
    assert len(found) == len(HOOKS) * LAYERS * LENGTH
    for cell in found:
        expected = by_hooks(model, cell.hook, cell.layer, cell.position, "logit_diff")
        assert cell.value == pytest.approx(expected, abs=2e-4), cell
    for ids, value in ((CLEAN, result.clean), (CORRUPTED, result.corrupted)):
        assert value == pytest.approx(measured(logits(model, torch.tensor([ids]))[0, -1], "logit_diff"), abs=1e-4)
    assert max(cell.value for cell in found) - min(cell.value for cell in found) > 0.1


def test_metrics_go_together() -> None:
    model = toy()
    sweeper = Sweeper(model, LENGTH, batch=4, inner="eager")
    compiles = None
    results = {}
    for metric, foil in (("logprob", None), ("logit_diff", FOIL), ("recovered", FOIL), ("recovered", None)):
        results[metric, foil] = sweeper.run(question(metric, foil=foil))
        compiles = compiles or compile_count()
    assert compile_count() == compiles
    for foil, plain in ((FOIL, results["logit_diff", FOIL]), (None, results["logprob", None])):
        share = results["recovered", foil]
        assert (share.measure, share.baseline, plain.baseline) == (plain.metric, 0.0, plain.corrupted)
        for one, other in zip(share, plain, strict=True):
            expected = (other.value - plain.corrupted) / (plain.clean - plain.corrupted)
            assert one.value == pytest.approx(expected, abs=1e-5)
    last = [cell for cell in results["recovered", FOIL] if cell[1:3] == (LAYERS - 1, LENGTH - 1)]
    assert [cell.value for cell in last] == pytest.approx([1.0], abs=1e-5)


@pytest.mark.behaviour(31)
def test_the_clean_run_into_itself_is_the_clean_run() -> None:
    same = question("logprob", corrupted=CLEAN)
    sweeper = Sweeper(toy(), LENGTH, HOOKS[:1], batch=8, inner="eager")
    for every in (False, True):
        result = sweeper.run(same, every=every)
        assert {cell.value for cell in result} == {result.clean}
        assert (result.equal, result.forwards) == ((0, 3) if every else (LAYERS * LENGTH, 1))


def test_cells_that_are_equal_in_both_runs_need_no_forward() -> None:
    """The first token is the same in both prompts, and no later one reaches it."""
    sweeper = Sweeper(toy(), LENGTH, batch=4, inner="eager")
    steps: list[tuple[int, int]] = []
    some = sweeper.run(question(), step=lambda done, total: steps.append((done, total)))
    every = sweeper.run(question(), every=True)
    assert (some.equal, every.equal) == (LAYERS, 0)
    assert [c.value for c in some] == pytest.approx([c.value for c in every], abs=1e-5)
    assert steps == [(6, 10), (10, 10)]


def test_positions_and_layers_of_ones_choice() -> None:
    sweeper = Sweeper(toy(), LENGTH, layers=(1,), batch=3, inner="eager")
    result = sweeper.run(question(), positions=(3, 1))
    assert [cell[:3] for cell in result] == [("post_block", 1, 3), ("post_block", 1, 1)]
    whole = {cell[1:3]: cell.value for cell in sweeper.run(question())}
    assert [cell.value for cell in result] == pytest.approx([whole[1, 3], whole[1, 1]], abs=1e-6)
    assert result.strongest(1)[0].value == max(result, key=lambda c: abs(c.value - result.corrupted)).value


def test_a_hook_that_only_some_layers_have_leaves_cells_empty() -> None:
    result = SweepResult(
        "logprob", "logprob", -1.0, -2.0, (0, 1), (0,), {"mlp_out": ((None,), (-1.5,))}, 0, 2, 2, 0.0, 0.0
    )
    assert [cell.layer for cell in result] == [1]
    assert result.to_dict()["grids"] == {"mlp_out": [[None], [-1.5]]}


REFUSED: dict[str, tuple[Callable[[], object], str]] = {
    "lengths": (
        lambda: question(clean=CLEAN[1:]),
        "clean prompt has 4 tokens and the corrupted one 5; give two prompts",
    ),
    "empty": (lambda: question(clean=(), corrupted=()), "has 0 tokens"),
    "metric": (lambda: question("accuracy"), "'accuracy' is unknown; choose one of logprob, logit_diff, recovered"),
    "foil": (lambda: question(foil=None), "none is given; give a foil"),
    "id": (lambda: question(answer=-1), "-1 is no token id"),
    "vocabulary": (lambda: sweep(question(answer=VOCAB)), f"token {VOCAB} is unknown: the model has {VOCAB} tokens"),
    "other length": (lambda: sweep(question(), length=4), "have 5 tokens and this sweeper is compiled for 4"),
    "position": (lambda: sweep(question(), positions=(5,)), "not in prompts of 5 tokens"),
    "batch": (lambda: sweep(question(), batch=1), "batch=1 is too small"),
    "nothing to recover": (lambda: sweep(question("recovered", corrupted=CLEAN)), "nothing to recover; give prompts"),
}


def sweep(asked: Question, positions: Any = None, length: int = LENGTH, batch: int = 4) -> SweepResult:
    return Sweeper(toy(), length, batch=batch, inner="eager").run(asked, positions)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_swept_is_refused(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(SpecError) as error:
        make()
    assert text in str(error.value).splitlines()[0]


def test_a_hook_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(SiteNotFound, match="mhc_streams_final"):
        patch_sweep(toy(), question(), ("mhc_streams_final",), inner="eager")


def test_the_picture(tmp_path: Any) -> None:
    grids = {hook: ((0.0, 0.5), (None, -1.0)) for hook in HOOKS[:2]}
    result = SweepResult("recovered", "logprob", -1.0, -3.0, (0, 4), (2, 3), grids, 0, 2, 2, 0.0, 0.0)
    draw_sweep(tmp_path / "new" / "a.png", result, ["$a$", "b/c"], "a model")
    assert (tmp_path / "new" / "a.png").read_bytes()[:4] == b"\x89PNG"
