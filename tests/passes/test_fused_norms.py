"""Graphs whose norms make the residual adds, as vLLM writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from steer_compile import LoweringError, SteerBackend, SteerSpec, steer_backend
from steer_compile.canon import canonical_text
from steer_compile.errors import SiteNotFound
from steer_compile.passes import lower_edits
from steer_compile.passes.find_sites import find_sites
from steer_compile.passes.fused_norms import opened_sums
from tests._graphs import trace
from tests._vllm_ir import WIDTH, Decoder, by_hand, define

HOOKS = ("post_attn", "post_block")
SITES = [(hook, n) for n in range(3) for hook in HOOKS]
IDS = torch.arange(64).view(2, 32) % 50
BF16, FP32 = torch.bfloat16, torch.float32


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lower_edits, "DEVICES", ("cpu",))


def decoder(dtype: torch.dtype = BF16, **options: Any) -> Decoder:
    torch.manual_seed(0)
    return Decoder(**options).to(dtype).requires_grad_(False)


def compiled(model: nn.Module, **options: Any) -> tuple[SteerBackend, Any, list[str]]:
    """The backend, the compiled model, and what its graph calls."""
    seen: list[str] = []

    def inner(gm: fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return gm

    torch._dynamo.reset()
    backend = steer_backend(SteerSpec(**{"steer": HOOKS, "max_tokens": 64, **options}), inner=inner)
    return backend, torch.compile(model, backend=backend, fullgraph=True), seen


def drawn(sites: list[tuple[str, int]] = SITES) -> dict[tuple[str, int], Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {site: torch.randn(WIDTH, generator=generator) for site in sites}


def how(backend: SteerBackend) -> set[str]:
    return {edit.lowering for edit in backend.plans[0].edits}


MODELS = pytest.mark.parametrize(
    ("options", "dtype"),
    [({}, BF16), ({"inplace": False}, BF16), ({"gemma": True}, BF16), ({}, FP32), ({"gemma": True}, FP32)],
    ids=["llama", "llama functional", "gemma", "llama fp32", "gemma fp32"],
)


@pytest.mark.behaviour(32)
@MODELS
@pytest.mark.parametrize("flat", [False, True], ids=["batched", "flat"])
@pytest.mark.parametrize("lowering", ["auto", "template", "compiler"])
@pytest.mark.usefixtures("on_cpu")
def test_idle_steered_and_captured_values_are_those_of_the_model(
    options: dict[str, Any], dtype: torch.dtype, flat: bool, lowering: str
) -> None:
    model, ids = decoder(dtype, **options), IDS.flatten() if flat else IDS
    backend, run, seen = compiled(model, lowering=lowering, capture=HOOKS)
    with backend.runtime.capture() as log:
        assert torch.equal(run(ids), model(ids))
    idle = by_hand(model, ids, {})[1]
    assert how(backend) == {"compiler" if lowering == "compiler" else "template"}
    assert not any("fused_add_rms_norm" in name or "norm_of_sum" in name for name in seen)
    with backend.runtime.steer(drawn()), backend.runtime.capture() as steered_log:
        logits = run(ids)
    wanted, values = by_hand(model, ids, drawn())
    assert torch.equal(logits, wanted)
    assert not torch.allclose(logits, model(ids), atol=0.1)
    for site in SITES:
        assert torch.equal(log[site].view_as(idle[site]), idle[site])
        assert torch.equal(steered_log[site].view_as(values[site]), values[site])


@pytest.mark.usefixtures("on_cpu")
def test_the_plan_tells_what_is_taken_over() -> None:
    backend, run, _ = compiled(decoder(gemma=True))
    run(IDS)
    for edit in backend.plans[0].edits:
        assert edit.fusion.branch_norm is not None
        assert edit.fusion.norm is not None
        assert (edit.fusion.norm.exact, edit.fusion.branch_norm.exact) == (True, False)
        assert (edit.fusion.norm.offset, edit.fusion.branch_norm.offset) == (1.0, 1.0)
        assert edit.text().count("rms_wide") == 2
        assert "before rounding" in edit.text()


@pytest.mark.usefixtures("on_cpu")
def test_calls_without_an_edit_stay_as_they_were() -> None:
    model = decoder()
    backend, run, seen = compiled(model, layers=(1,))
    assert torch.equal(run(IDS), model(IDS))
    assert sum("fused_add_rms_norm.maybe_inplace" in name for name in seen) == 4
    only = [site for site in SITES if site[1] == 1]
    with backend.runtime.steer(drawn(only)):
        assert torch.equal(run(IDS), by_hand(model, IDS, drawn(only))[0])


def test_an_opened_graph_closes_to_what_it_was() -> None:
    for model in (decoder(), decoder(inplace=False), decoder(gemma=True)):
        gm, args = trace(model, IDS)
        before, expected = canonical_text(gm.graph), gm(*args)
        with opened_sums(gm):
            assert "fused_add_rms_norm" not in canonical_text(gm.graph)
            table = find_sites(gm)
        assert canonical_text(gm.graph) == before
        assert all(torch.equal(a, b) for a, b in zip(gm(*args), expected, strict=True))
        assert [(s.hook, s.layer) for s in table if s.hook in HOOKS] == SITES
        assert {s.dtype for s in table} == {BF16}


@pytest.mark.usefixtures("on_cpu")
def test_any_number_of_tokens() -> None:
    """``dynamic=True`` makes eps an input of the graph, and the kernel takes it as a constant."""
    model = decoder(inplace=False)
    for dynamic, lowering in ((True, "compiler"), (None, "template")):
        torch._dynamo.reset()
        backend = steer_backend(SteerSpec(steer=HOOKS, max_tokens=128), inner="aot_eager")
        run = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
        for count in (5, 64, 33):
            ids = IDS.flatten()[:count].clone()
            torch._dynamo.mark_dynamic(ids, 0)
            assert torch.equal(run(ids), model(ids))
            with backend.runtime.steer(drawn()):
                assert torch.equal(run(ids), by_hand(model, ids, drawn())[0])
        assert how(backend) == {lowering}


def test_captures_leave_the_calls_alone() -> None:
    model = decoder()
    backend, run, seen = compiled(model, steer=(), capture=HOOKS)
    with backend.runtime.capture() as log:
        assert torch.equal(run(IDS), model(IDS))
    assert sum("fused_add_rms_norm.maybe_inplace" in name for name in seen) == 6
    assert all(torch.equal(log[site], value) for site, value in by_hand(model, IDS, {})[1].items())


def test_edits_beside_the_stream_leave_the_calls_alone() -> None:
    model = decoder(gemma=True)
    backend, run, seen = compiled(model, steer=("attn_in", "attn_out", "mlp_in", "mlp_out"))
    assert torch.equal(run(IDS), model(IDS))
    assert sum("fused_add_rms_norm.default" in name for name in seen) == 6
    with backend.runtime.steer(drawn([("mlp_out", 1)])):
        vector = drawn([("mlp_out", 1)])["mlp_out", 1].to(BF16)
        steered = run(IDS)
    block: Any = model.layers[1]
    mlp = block.mlp
    block.mlp = lambda x: (mlp(x).float() + vector.float()).to(BF16)
    assert torch.equal(steered, by_hand(model, IDS, {})[0])


def test_several_edits_of_one_sum_round_once() -> None:
    model = decoder()
    backend, run, _ = compiled(model, steer=("post_block", "pre_attn"), lowering="compiler")
    pair = drawn([("post_block", 0), ("pre_attn", 1)])
    with backend.runtime.steer(pair):
        steered = run(IDS)
    together = torch.stack([v.to(BF16).float() for v in pair.values()]).sum(0)
    expected = by_hand(model, IDS, {("post_block", 0): together})[0]
    torch.testing.assert_close(steered, expected, rtol=0.02, atol=0.02)  # the vectors' sum is rounded there
    assert torch.equal(run(IDS), model(IDS))


def test_after_the_norm_only_the_skip_path_changes_and_the_calls_stay() -> None:
    model = decoder()
    backend, run, seen = compiled(model, steer=("post_attn",), placement="after_norm")
    assert torch.equal(run(IDS), model(IDS))
    assert sum("fused_add_rms_norm.maybe_inplace" in name for name in seen) == 6


@pytest.mark.usefixtures("on_cpu")
def test_a_site_at_the_norms_result_keeps_the_unrounded_sum() -> None:
    model = decoder()
    backend, run, _ = compiled(model, capture=("mlp_in",))
    assert torch.equal(run(IDS), model(IDS))
    by_hook = {e.site.hook: e for e in backend.plans[0].edits if "capture" not in e.ops}
    assert by_hook["post_attn"].lowering == "compiler"
    assert by_hook["post_attn"].why.startswith("its norm reads the unrounded sum")
    assert by_hook["post_block"].lowering == "template"
    with backend.runtime.steer(drawn()):
        assert torch.equal(run(IDS), by_hand(model, IDS, drawn())[0])
    _, run, _ = compiled(model, capture=("mlp_in",), lowering="template")
    with pytest.raises(LoweringError, match=r"^layers\.0\.post_attn cannot .* its norm reads the unrounded sum"):
        run(IDS)


class Plain(nn.Module):
    """Two blocks of an attention and an MLP whose normed inputs ``quantise`` turns into 8 bits."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        define()
        torch.manual_seed(0)
        self.inner: Any = decoder(layers=2)
        self.norm = norm

    def forward(self, ids: Tensor) -> Any:
        h = residual = self.inner.embed(ids)
        h, branches = h, [f for block in self.inner.layers for f in (block.attention, block.mlp)]
        for branch in branches:
            normed, residual = self.norm(h, residual)
            h = branch(normed.to(BF16))
        return self.inner.head(h + residual)


@pytest.mark.usefixtures("on_cpu")
def test_norms_that_quantise_are_no_part_of_the_stream() -> None:
    """The one operator hides its add, so there is no site, and the call says why."""

    def norm(x: Tensor, residual: Tensor) -> Any:
        weight = torch.ones(WIDTH, dtype=BF16)
        return torch.ops.vllm_ir.fused_add_rms_norm_static_fp8_quant(x, residual, weight, 1e-6)

    _, run, _ = compiled(Plain(norm))
    with pytest.raises(SiteNotFound, match="no site in this model"):
        run(IDS)


@pytest.mark.usefixtures("on_cpu")
def test_a_norm_whose_result_is_quantised_stays() -> None:
    def norm(x: Tensor, residual: Tensor) -> Any:
        total = x + residual
        wide = total.float() * torch.rsqrt(total.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        return wide.to(BF16).to(torch.float8_e4m3fn), total

    model = Plain(norm)
    backend, run, seen = compiled(model, layers=(0,))
    assert torch.equal(run(IDS), model(IDS))
    assert all(
        edit.fusion.norm is None and "no norm that the template knows" in edit.why for edit in backend.plans[0].edits
    )
    assert "steer_compile.site.default" not in seen
