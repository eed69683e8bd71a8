"""The choice of the lowering, and graphs with the template against graphs with plain operators, on the CPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steer_compile import LoweringError, SteerBackend, SteerSpec, steer_backend
from steer_compile.coverage import zoo
from steer_compile.ir import Edit, Plan
from steer_compile.kernels.site_costs import site_costs
from steer_compile.passes import lower_edits, plan_edits

HOOKS = ("post_attn", "post_block")
Model = Any


def tiny(name: str) -> Model:
    return zoo.tiny_model(name)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The op runs its reference on the CPU, so that the rewritten graphs run everywhere."""
    monkeypatch.setattr(lower_edits, "DEVICES", ("cpu",))


def run(model: nn.Module, spec: SteerSpec, inner: str = "eager") -> tuple[SteerBackend, dict[Any, Tensor]]:
    """Logits and captures with a vector at every site."""
    torch._dynamo.reset()
    backend = steer_backend(spec, inner=inner)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    ids = torch.arange(64).view(2, 32) % 50
    generator = torch.Generator().manual_seed(3)
    found: dict[Any, Tensor] = {}
    with torch.no_grad():
        compiled(ids, use_cache=False)
        sites = backend.runtime.tables.steered()
        vectors = {site: torch.randn(backend.runtime.tables.width(site) or 0, generator=generator) for site in sites}
        with backend.runtime.steer(vectors), backend.runtime.capture() as log:
            found["logits"] = compiled(ids, use_cache=False).logits
    found |= {site: log[site] for site in log}
    return backend, found


def spec(lowering: str, **more: Any) -> SteerSpec:
    return SteerSpec(steer=HOOKS, capture=("post_block",), max_tokens=128, lowering=lowering, **more)


TEMPLATES = {"llama": 2, "qwen3": 2, "gemma2": 2, "gpt2": 2, "mixtral": 1, "olmo2": 2, "granite": 2}
"""Model -> sites of a layer that the template takes when it may choose."""


@pytest.mark.behaviour(13)
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("lowering", ["auto", "template"])
@pytest.mark.usefixtures("on_cpu")
def test_both_lowerings_agree(name: str, lowering: str) -> None:
    model = tiny(name)
    _, expected = run(model, spec("compiler"))
    backend, got = run(model, spec(lowering))
    assert expected.keys() == got.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5)
    edits = [e for e in backend.plans[0].edits if e.lowering == "template"]
    layers = len({e.site.layer for e in backend.plans[0].edits})
    wanted = layers * (2 if lowering == "template" else TEMPLATES[name])
    first = name == "gpt2" and lowering == "auto"  # its first add reads a sum of two embeddings
    assert len(edits) == wanted - first


@pytest.mark.usefixtures("on_cpu")
def test_the_add_and_the_norm_leave_the_graph() -> None:
    seen: list[str] = []

    def inner(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(n.target) for n in gm.graph.nodes)
        return gm

    model = tiny("llama")
    backend = steer_backend(SteerSpec(steer=HOOKS, lowering="auto"), inner=inner)
    torch.compile(model, backend=backend)(torch.arange(64).view(2, 32) % 50, use_cache=False)
    assert seen.count("steer_compile.site.default") == 2 * len(model.model.layers)
    assert sum("rsqrt" in name for name in seen) == 1  # the first block's norm reads the embedding
    texts = [edit.text() for edit in backend.plans[0].edits]
    assert all("by template, fused with" in text for text in texts)


@pytest.mark.usefixtures("on_cpu")
def test_a_site_at_the_norms_result_keeps_the_norm() -> None:
    model = tiny("llama")
    both = SteerSpec(steer=(*HOOKS, "mlp_in"), capture=("attn_in",), max_tokens=128, lowering="auto")
    backend, got = run(model, both)
    _, expected = run(
        model, SteerSpec(steer=(*HOOKS, "mlp_in"), capture=("attn_in",), max_tokens=128, lowering="compiler")
    )
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-5)


def test_the_template_is_refused_where_it_cannot_run() -> None:
    model = tiny("llama")
    with pytest.raises(LoweringError, match=r"^layers\.0\.post_attn cannot be lowered to the template: it is on cpu"):
        run(model, spec("template"))
    backend, _ = run(model, spec("auto"))
    assert {e.lowering for e in backend.plans[0].edits} == {"compiler"}
    assert all("it is on cpu" in e.why for e in backend.plans[0].edits)


@pytest.mark.usefixtures("on_cpu")
def test_the_cost_table_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def costs(ops: tuple[str, ...], tokens: int | None, width: int) -> tuple[float, float]:
        return (2.0, 1.0) if tokens == 1 else (1.0, 2.0)

    monkeypatch.setattr(lower_edits, "site_costs", costs)
    model = tiny("llama")
    for ids, lowering in ((torch.ones(1, 1, dtype=torch.long), "compiler"), (torch.ones(4, 16).long(), "template")):
        torch._dynamo.reset()
        backend = steer_backend(SteerSpec(steer=HOOKS), inner="eager")
        with torch.no_grad():
            torch.compile(model, backend=backend, dynamic=False)(ids, use_cache=False)
        assert {e.lowering for e in backend.plans[0].edits} == {lowering}
        assert all("by the cost table" in e.why for e in backend.plans[0].edits)


@pytest.mark.usefixtures("on_cpu")
def test_training_keeps_the_compiler() -> None:
    model = tiny("llama").train().requires_grad_()
    backend = steer_backend(spec("auto"), inner="aot_eager")
    compiled: Any = torch.compile(model, backend=backend)
    logits = compiled(torch.arange(4)[None], use_cache=False).logits
    logits.sum().backward()
    assert {e.lowering for e in backend.plans[0].edits} == {"compiler"}


@pytest.mark.parametrize("ops", [("add", "tier", "monitor"), ("add", "row_monitor"), ("clamp",), ("tier",)])
@pytest.mark.usefixtures("on_cpu")
def test_every_family_in_both_lowerings(ops: tuple[str, ...]) -> None:
    from benchmarks.site_kinds import Kind, activate

    model, results = tiny("llama"), []
    for lowering in ("compiler", "template"):
        torch._dynamo.reset()
        kind = Kind(ops, True, lowering)
        backend = steer_backend(kind.spec(64), inner="eager")
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        activate(backend.runtime, kind, 2, model.config.hidden_size)
        with torch.no_grad():
            results.append(compiled(torch.arange(10).view(2, 5), use_cache=False).logits)
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        plain = model(torch.arange(10).view(2, 5), use_cache=False).logits
    assert not torch.allclose(results[0], plain, atol=1e-3)


def edits_of(name: str, **options: Any) -> list[Edit]:
    """Edits of a tiny model in the eager inner compiler, vectors at both stream hooks."""
    torch._dynamo.reset()
    backend = steer_backend(SteerSpec(**{"steer": HOOKS, "max_tokens": 128, **options}), inner="eager")
    with torch.no_grad():
        torch.compile(tiny(name), backend=backend)(torch.arange(64).view(2, 32) % 50, use_cache=False)
    return list(backend.plans[0].edits)


@pytest.mark.parametrize(
    ("name", "norm_behind", "branch"),
    [("gemma2", True, "rms_wide"), ("olmo2", False, "rms_wide"), ("granite", True, None), ("llama", True, None)],
)
@pytest.mark.usefixtures("on_cpu")
def test_norm_and_multiplier_of_the_branch_are_taken_over(name: str, norm_behind: bool, branch: str | None) -> None:
    edits = edits_of(name)
    for edit in edits[:-1]:  # the model's last norm is behind the last
        fusion = edit.fusion
        assert (fusion.branch_norm.kind if fusion.branch_norm else None) == branch
        assert (fusion.norm is not None) == norm_behind
        assert (fusion.branch_scale != 1) == (name == "granite")
    text = edits[1].text()
    assert (" of " in text) == (branch is not None)
    assert (" * " in text) == (name == "granite")


@pytest.mark.usefixtures("on_cpu")
def test_a_branch_that_is_steered_keeps_its_norm() -> None:
    for edit in edits_of("gemma2", steer=(*HOOKS, "attn_out")):
        if edit.site.hook == "post_attn":
            assert edit.fusion.branch_norm is None
        if edit.site.hook == "post_block":
            assert edit.fusion.branch_norm is not None


@pytest.mark.usefixtures("on_cpu")
def test_reductions_take_an_unfused_template_where_nothing_matches() -> None:
    plain = [e for e in edits_of("mixtral") if e.lowering == "compiler"]
    clamped = edits_of("mixtral", ops=("add", "clamp"))
    assert plain
    assert {e.lowering for e in clamped} == {"template"}
    unfused = [e for e in clamped if e.site.name in {p.site.name for p in plain}]
    assert all(e.why.startswith("unfused: ") for e in (*plain, *unfused))
    assert all("by template, " in e.text() and e.fusion.branch is None for e in unfused)


def test_rows_that_are_wider_than_registers_have_costs_of_their_own() -> None:
    assert site_costs(("add",), 4096, 28672) != site_costs(("add",), 4096, 2048)
    assert site_costs(("monitor",), None, 28672) < site_costs(("monitor",), None, 28672)[::-1]
    for width, better in ((28672, True), (32769, False)):
        template, compiler = site_costs(("add", "capture"), 4096, width)
        assert (template < compiler) == better  # a store alone is no reason for the kernel in chunks


@pytest.mark.usefixtures("on_cpu")
def test_what_does_not_fit_the_kernel_is_refused_with_the_sites_name(monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan_edits.plan_edits

    def broken(*given: Any) -> Plan:
        plan = planned(*given)
        return replace(plan, banks=tuple(replace(bank, width=bank.width - 1) for bank in plan.banks))

    monkeypatch.setattr("steer_compile.backend.plan_edits", broken)
    with pytest.raises(LoweringError, match=r"^layers\.0\.post_attn: table of the site template is "):
        edits_of("llama")


@pytest.mark.usefixtures("on_cpu")
def test_more_clamps_than_the_kernel_takes_stay_with_the_compiler() -> None:
    edits = edits_of("llama", ops=("add", "clamp"), clamps=17)
    assert {e.lowering for e in edits} == {"compiler"}
    assert all("it has 17 clamps for each row, more than 16" in e.why for e in edits)
    with pytest.raises(LoweringError, match=r"cannot be lowered to the template: it has 17 clamps"):
        edits_of("llama", ops=("clamp",), clamps=17, lowering="template")
