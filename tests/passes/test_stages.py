"""A decoder cut in pipeline stages steers as the whole one does, each site in one stage."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional

from steer_compile import HookSelection, SteerSpec
from steer_compile.canon import canonical_text
from steer_compile.errors import LoweringError, SiteNotFound, VectorError
from steer_compile.ir import Site
from steer_compile.passes import lower_edits
from steer_compile.passes.find_sites import find_sites
from steer_compile.passes.fused_norms import opened_sums
from steer_compile.passes.stages import summed_end
from steer_compile.runtime.gates import Clamp, Monitor
from steer_compile.runtime.steering import Steering
from steer_compile.vllm.model import Shape, SteeredModel, own_part
from tests._graphs import trace
from tests._vllm_ir import EPS, WIDTH, Decoder, by_hand, define

LAYERS = 4
HOOKS = ("pre_attn", "post_attn", "post_block", "attn_in", "attn_out", "mlp_in", "mlp_out")
CUTS = {"halves": (0, 2, 4), "a layer each": (0, 1, 2, 3, 4), "most first": (0, 3, 4)}
IDS = torch.arange(24) % 50
POSITIONS = torch.arange(24)
CPU = torch.device("cpu")


class SummingBlock(nn.Module):
    """A block that hands its stream on as one value."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, residual: None) -> tuple[Tensor, None]:
        x = x + self.block.attention(functional.rms_norm(x, (WIDTH,), self.block.entry.weight, EPS))
        return x + self.block.mlp(functional.rms_norm(x, (WIDTH,), self.block.middle.weight, EPS)), None


class Stage(nn.Module):
    """Some layers of a decoder under their own numbers, as vLLM builds the models of its stages."""

    def __init__(self, whole: Decoder, layers: range) -> None:
        super().__init__()
        self.own, self.last = layers, layers.stop == LAYERS
        self.layers = nn.ModuleList(block if n in layers else nn.Identity() for n, block in enumerate(whole.layers))
        self.embed = whole.embed if not layers.start else nn.Identity()
        self.norm: Any = whole.norm if self.last else nn.Identity()
        self.head: Any = whole.head if self.last else nn.Identity()

    def forward(self, ids: Tensor, positions: Tensor, parts: tuple[Tensor, ...] = ()) -> Any:
        x, residual = (*parts, None)[:2] if self.own.start else (self.embed(ids), None)
        for n in self.own:
            x, residual = self.layers[n](x, residual)
        if not self.last:
            return (x,) if residual is None else (x, residual)
        x = self.norm(x) if residual is None else self.norm(x, residual)[0]
        return self.head(x), positions


def decoder(dtype: torch.dtype = torch.float32, summing: bool = False, **options: Any) -> Decoder:
    define()
    torch.manual_seed(0)
    whole = Decoder(layers=LAYERS, **options).to(dtype).requires_grad_(False)
    if summing:
        whole.layers = nn.ModuleList(SummingBlock(block) for block in whole.layers)
    return whole


class Pipeline:
    """Stages that are steered, and run one behind the other."""

    def __init__(self, whole: Decoder, spec: SteerSpec, cuts: tuple[int, ...]) -> None:
        self.stages = []
        for start, stop in zip(cuts, cuts[1:], strict=False):
            shape = Shape(WIDTH, whole.head.weight.dtype, range(start, stop), LAYERS)
            steered, stage = SteeredModel(spec, shape, CPU), Stage(whole, shape.layers)
            steered.attach(stage)
            self.stages.append((steered, self._compiled(steered, stage)))

    @staticmethod
    def _compiled(steered: SteeredModel, stage: nn.Module) -> Any:
        def backend(gm: fx.GraphModule, inputs: Any) -> Any:
            steered.splice(gm)
            return gm

        return torch.compile(stage, backend=backend, fullgraph=True)

    def run(self, steering: Steering, everyone: bool = False) -> Tensor:
        """Logits with every second token steered, or all."""
        parts: Any = ()
        rows = set[int]()
        for steered, stage in self.stages:
            handle = steered.registry.register(steering)
            rows.add(handle.rows["prefill"])
            with torch.no_grad():
                steered.registry.tables.index(
                    np.where(everyone | (POSITIONS.numpy() % 2 == 1), max(rows), 1).astype(np.int32)
                )
                parts = stage(IDS, POSITIONS, parts)
            steered.registry.release(handle)
        assert len(rows) == 1  # all stages count the same rows
        logits: Tensor = parts[0]
        return logits


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def drawn(hook: str, layers: list[int]) -> dict[tuple[str, int], Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {(hook, n): torch.randn(WIDTH, generator=generator) for n in layers}


def at(hook: str, *layers: int) -> HookSelection:
    return HookSelection(hook, list(layers))


def spec(*hooks: Any, **options: Any) -> SteerSpec:
    return SteerSpec(**{"steer": hooks, "max_tokens": 64, "lowering": "compiler", **options})


MODELS = pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"gemma": True, "dtype": torch.bfloat16}, {"summing": True}],
    ids=["llama", "gemma", "summing"],
)


@MODELS
@pytest.mark.parametrize("cut", CUTS)
def test_stages_steer_as_the_whole_model_does(cut: str, options: dict[str, Any]) -> None:
    whole = decoder(**options)
    near = sorted({n + side for n in CUTS[cut][1:-1] for side in (-1, 0)} | {LAYERS - 1})
    uncut, stages = (Pipeline(whole, spec(*HOOKS), cuts) for cuts in ((0, LAYERS), CUTS[cut]))
    seen = []
    for hook in HOOKS:
        for layers in [[n] for n in near] if cut == "halves" else [near]:
            seen.append(uncut.run(Steering(base=drawn(hook, layers))))
            assert torch.equal(stages.run(Steering(base=drawn(hook, layers))), seen[-1])
    assert len({float(logits.double().sum()) for logits in seen}) >= len(HOOKS)  # the vectors do something
    sites = [site for steered, _ in stages.stages for site in steered.registry.tables.steered()]
    assert sorted(sites) == sorted((hook, n) for hook in HOOKS for n in range(LAYERS))  # each in one stage


@pytest.mark.behaviour(24)
@pytest.mark.parametrize("options", [{}, {"placement": "after_norm"}, {"ops": ("add", "clamp", "row_monitor")}])
@pytest.mark.parametrize("hook", ["post_block", "pre_attn", "post_attn"])
def test_a_hook_alone_with_placements_and_families(hook: str, options: dict[str, Any]) -> None:
    whole = decoder(torch.bfloat16)
    uncut, stages = (Pipeline(whole, spec(hook, **options), cuts) for cuts in ((0, LAYERS), CUTS["halves"]))
    sites: Any = drawn(hook, [0, 1, 2, 3])
    more: dict[str, Any] = {}
    if "ops" in options:
        more["clamps"] = {site: [Clamp(v.flip(0), -0.2, 0.2)] for site, v in sites.items()}
        more["monitors"] = {site: Monitor(v.roll(3), 0.1, 2.0) for site, v in sites.items()}
    seen = uncut.run(Steering(base=sites, **more))
    assert torch.equal(stages.run(Steering(base=sites, **more)), seen)
    assert not torch.allclose(seen, uncut.run(Steering()), atol=0.1)


@pytest.mark.parametrize("lowering", ["compiler", "template"])
@pytest.mark.parametrize("gemma", [False, True])
def test_stages_give_what_the_arithmetic_by_hand_gives(
    gemma: bool, lowering: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lower_edits, "DEVICES", ("cpu",))
    whole = decoder(torch.bfloat16, gemma=gemma)
    hooks = ("post_attn", "post_block")
    stages = Pipeline(whole, spec(*hooks, lowering=lowering), CUTS["halves"])
    for site in [(hook, n) for hook in hooks for n in range(LAYERS)]:
        vectors = drawn(*(site[0], [site[1]]))
        assert torch.equal(stages.run(Steering(base=vectors), everyone=True), by_hand(whole, IDS, vectors)[0])
    for steered, _ in stages.stages:
        assert {edit.lowering for edit in steered.plans[0].edits} == {lowering}


def test_a_stage_in_which_nothing_is_steered_runs_as_it_is() -> None:
    whole, vectors = decoder(), drawn("post_attn", [3])
    uncut, stages = (Pipeline(whole, spec(at("post_attn", -1)), cuts) for cuts in ((0, LAYERS), CUTS["halves"]))
    assert torch.equal(stages.run(Steering(base=vectors)), uncut.run(Steering(base=vectors)))
    assert [len(steered.plans) for steered, _ in stages.stages] == [0, 1]


@pytest.mark.behaviour(44)
def test_everyone_gets_the_same_in_all_stages() -> None:
    whole, vectors = decoder(), drawn("post_block", [1, 2])
    uncut, stages = (Pipeline(whole, spec("post_block"), cuts) for cuts in ((0, LAYERS), CUTS["halves"]))
    for steered, _ in (*uncut.stages, *stages.stages):
        steered.registry.set_global(base=vectors)
    own = Steering(base=drawn("post_block", [0, 1]))
    assert torch.equal(stages.run(own), uncut.run(own))


@pytest.mark.behaviour(44)
def test_what_is_of_no_stage_is_refused() -> None:
    first = SteeredModel(spec(at("post_block", 0, 1)), Shape(WIDTH, torch.float32, range(2), LAYERS), CPU)
    first.registry.register(Steering(base=drawn("post_block", [1])))  # the next stage's
    with pytest.raises(VectorError, match=r"layers\.0\.post_block has 3 numbers"):
        first.registry.register(Steering(base={("post_block", 0): torch.ones(3)}))
    for site in (("post_block", 2), ("post_block", 7), ("pre_attn", 1)):
        with pytest.raises(SiteNotFound, match="the spec does not steer"):
            first.registry.register(Steering(base={site: torch.ones(WIDTH)}))
    for layers in (range(2), range(2, 4)):
        with pytest.raises(SiteNotFound, match=r"no site layers\.9\.post_block: the model has layers 0 to 3"):
            SteeredModel(spec(at("post_block", 9)), Shape(WIDTH, torch.float32, layers, LAYERS), CPU)


@pytest.mark.parametrize("layers", [range(2), range(2, 4), range(1, 3), range(4)])
def test_a_spec_is_parted_between_stages(layers: range) -> None:
    shape = Shape(WIDTH, torch.float32, layers, LAYERS)
    owned = {("post_block", n) for n in range(LAYERS) if shape.owns(("post_block", n))}
    starts = {n - 1 for n in layers if n} | ({LAYERS - 1} & set(layers))
    assert owned == {("post_block", n) for n in starts}
    assert not any(shape.owns(site) and shape.elsewhere(site) for site in owned)
    part = own_part(spec("post_block", at("pre_attn", -1, 0, 2), at("post_attn", 3)), shape)
    assert {(s.hook, n) for s in part.steer for n in s.layers} == {
        (hook, n)
        for hook, numbers in {"post_block": range(4), "pre_attn": (0, 2, 3), "post_attn": (3,)}.items()
        for n in numbers
        if shape.owns((hook, n))
    }


def test_the_sum_behind_a_stage_is_named_by_the_next_one() -> None:
    stages = Pipeline(decoder(), spec("write_1"), CUTS["halves"])
    with pytest.raises(BackendCompilerFailed, match=r"no site layers\.1\.write_1: (?s:.*) name it post_block"):
        stages.run(Steering())
    summing = Pipeline(decoder(summing=True), spec("write_1"), CUTS["halves"])
    uncut = Pipeline(decoder(summing=True), spec("post_block"), (0, LAYERS))
    for layer in range(LAYERS):
        left, right = (Steering(base=drawn(hook, [layer])) for hook in ("write_1", "post_block"))
        assert torch.equal(summing.run(left), uncut.run(right))


def traced(layers: range, *parts: Tensor) -> fx.GraphModule:
    return trace(Stage(decoder(), layers), IDS, POSITIONS, parts)[0]


def test_a_graph_that_is_not_the_stage_has_no_sites() -> None:
    parts = tuple(torch.randn(2, 24, WIDTH).unbind())
    gm = traced(range(2, 4), *parts)
    with opened_sums(gm):
        assert find_sites(gm, cut=range(2, 4)).layers == (2, 3)
        (miss,) = find_sites(gm, cut=range(1, 3)).misses
        assert miss.reason == "the stage has the layers 1 to 2, and its graph has blocks of the modules 2, 3"
        total = next(n for n in gm.graph.nodes if n.target is operator.add)
        with gm.graph.inserting_before(gm.graph.output_node()):
            gm.graph.call_function(operator.neg, (total.args[0],)).meta["example_value"] = parts[0]
        (miss,) = find_sites(gm, cut=range(2, 4)).misses  # one part of the stream is read alone
        assert "neither the stream nor two values that add up to it" in miss.reason


def test_a_summed_end_goes_back_to_what_it_was() -> None:
    gm = traced(range(2))
    before = canonical_text(gm.graph)
    with opened_sums(gm), summed_end(gm) as name:
        assert [n.name for n in gm.graph.output_node().all_input_nodes] == [name]
        assert isinstance(find_sites(gm, cut=range(2)).find("mlp_in", 1), Site)
    assert canonical_text(gm.graph) == before
    end = gm.graph.output_node()
    end.args = ((*end.args[0], *end.args[0][0].all_input_nodes[:1]),)  # type: ignore[index, misc, union-attr]
    with pytest.raises(LoweringError, match="a pipeline stage hands on 3 values"), summed_end(gm):
        pass
