"""The finder against toy models that know their own stream: found and right, or refused with a reason."""

from functools import cache

import pytest
import torch
from torch import Tensor

from steer_compile.ir import Miss, SiteTable
from steer_compile.passes.find_sites import find_sites
from tests._graphs import node_values, trace
from tests._toys import TOYS, Toy, make
from tests._toys_judge import Verdict, equal, judge

DYNAMIC = [
    *("prenorm_rmsnorm", "postnorm", "parallel_left", "ssm_one_write", "hybrid_one_write", "inplace_method"),
    *("deferred", "through_view", "functional", "looped", "rotary", "moe", "time_first", "encoder_decoder"),
    "reversible",
]


@cache
def examine(name: str, dynamic: bool = False) -> tuple[Toy, SiteTable, Verdict, dict[str, Tensor]]:
    """Run, trace, find and judge one toy; the graph must be left as it was."""
    toy = make(name)
    with torch.no_grad():
        toy(*toy.inputs())
    gm, args = trace(toy, *toy.inputs(), dynamic=dynamic)
    before = str(gm.graph)
    table = find_sites(gm)
    assert str(gm.graph) == before
    assert find_sites(gm) == table
    values = node_values(gm, args)
    return toy, table, judge(toy, table, values), values


def check(toy: Toy, table: SiteTable, verdict: Verdict) -> None:
    assert not verdict.wrong, "\n".join([*verdict.wrong, table.text()])
    if toy.expect == "found":
        assert not verdict.missed, "\n".join([f"missed {verdict.missed}", table.text()])
    elif toy.expect == "refused":
        assert not verdict.found, table.text()


@pytest.mark.parametrize("name", TOYS)
def test_sites_are_true_or_refused(name: str) -> None:
    toy, table, verdict, _ = examine(name)
    check(toy, table, verdict)


@pytest.mark.parametrize("name", DYNAMIC)
def test_sites_are_true_or_refused_with_dynamic_shapes(name: str) -> None:
    toy, table, verdict, _ = examine(name, dynamic=True)
    check(toy, table, verdict)


@pytest.mark.parametrize("name", ["parallel_left", "parallel_sum_first", "parallel_two_norms"])
def test_parallel_block_says_why_it_has_no_post_attn(name: str) -> None:
    _, table, _, _ = examine(name)
    for layer in range(table.n_layers):
        miss = table.find("post_attn", layer)
        assert isinstance(miss, Miss)
        assert "parallel" in miss.reason


@pytest.mark.parametrize("name", TOYS)
def test_truth_is_in_the_graph(name: str) -> None:
    """The oracle itself: the graph's output is the toy's, and the true values are values of its nodes."""
    toy, _, _, values = examine(name)
    with torch.no_grad():
        logits = toy(*toy.inputs())
    assert any(equal(value, logits) for value in values.values())
    if toy.expect == "found":
        for key, right in toy.truth.items():
            if key not in toy.tape.optional:
                shaped = (value for value in values.values() if value.numel() == right.numel())
                assert any(equal(value.reshape(right.shape).float(), right.float()) for value in shaped), key


@pytest.mark.parametrize("name", TOYS)
def test_edit_moves_the_logits(name: str) -> None:
    """The oracle of the steering tests: the toy's own edit is felt."""
    toy = make(name)
    with torch.no_grad():
        plain = toy(*toy.inputs())
        keys = [(hook, min(1, toy.n_blocks - 1)) for hook in ("post_block", "mhc_streams_pre_attn")]
        key = next((key for key in keys if key in toy.truth), None)
        if key is None:
            assert toy.expect == "refused"
            return
        width = toy.truth[key].shape[1 if toy.layout == "channels_first" else -1]
        toy.edit[key] = torch.linspace(-1, 1, width) ** 3
        assert not torch.allclose(toy(*toy.inputs()), plain, atol=1e-4)
