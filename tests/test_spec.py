"""`SteerSpec`: what can be written, what it means, how it travels as text, and what is refused with which words."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile import HookSelection, SteerSpec, steer_backend
from steer_compile.errors import SpecError
from steer_compile.hooks import BRANCH_HOOKS, COEFFICIENT_HOOKS, HOOKS, is_stream_hook, parse_hook, parse_site
from steer_compile.spec import LOWERINGS, NEEDS, OP_FAMILIES, PLACEMENTS, LayersLike, Selections, parse_layers

LAYERS = st.one_of(st.just("all"), st.lists(st.integers(-40, 90), min_size=1, max_size=5, unique=True))
ALONE = [op for op in OP_FAMILIES if op not in NEEDS]
FAMILIES = st.lists(st.sampled_from(ALONE), min_size=1, unique=True) | st.just(["score", "row_monitor"])
STEERED = tuple(hook for hook in HOOKS if hook not in COEFFICIENT_HOOKS)
WRITES = st.integers(0, 12).map(lambda n: f"write_{n}")


@st.composite
def selections(draw: st.DrawFn, least: int, hooks: tuple[str, ...]) -> list[HookSelection]:
    names = draw(st.lists(st.sampled_from(hooks) | WRITES, min_size=least, max_size=4, unique=True))
    return [HookSelection(name, draw(LAYERS), draw(FAMILIES)) for name in names]


@st.composite
def specs(draw: st.DrawFn) -> SteerSpec:
    capture = draw(selections(0, HOOKS))
    return SteerSpec(
        steer=draw(selections(1, STEERED)),
        capture=capture,
        layers=draw(LAYERS),
        rows=draw(st.integers(1, 10**6)),
        max_tokens=draw(st.integers(1, 10**7)),
        dtype=draw(st.sampled_from([None, "float32", "bfloat16", torch.float16])),
        placement=draw(st.sampled_from(PLACEMENTS)),
        ops=draw(FAMILIES),
        clamps=draw(st.integers(1, 64)),
        lowering=draw(st.sampled_from(LOWERINGS)),
        overrides=draw(st.integers(0, 64)),
        sequences=draw(st.integers(1, 10**4)),
        cross_layer=draw(st.booleans()),
        capture_rows=draw(st.integers(0, 4)) if capture else 0,
    )


@given(specs())
def test_text_forms_are_inverse(spec: SteerSpec) -> None:
    for again in (SteerSpec.from_json(spec.to_json()), SteerSpec.from_toml(spec.to_toml())):
        assert again == spec
        assert hash(again) == hash(spec)
    assert SteerSpec.from_dict(spec.to_dict()) == spec
    assert json.loads(json.dumps(spec.to_dict())) == spec.to_dict()


@given(specs(), specs())
def test_equal_specs_are_those_of_equal_text(one: SteerSpec, other: SteerSpec) -> None:
    assert (one == other) == (one.to_json() == other.to_json())
    assert len({one, other}) == (1 if one == other else 2)


def test_text_written_by_hand() -> None:
    text = 'steer = ["post_block", {hook = "mlp_out", layers = [1], ops = "add"}]\nlayers = "0-2"\nrows = 3'
    assert SteerSpec.from_toml(text) == SteerSpec(
        steer=[HookSelection("post_block", (0, 1, 2)), HookSelection("mlp_out", [1])], layers=[0, 1, 2], rows=3
    )


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("all", "all"),
        (3, (3,)),
        (-1, (-1,)),
        ([4, 0, 4], (4, 0)),
        (range(2, 8, 2), (2, 4, 6)),
        ({5}, (5,)),
        ("7", (7,)),
        ("0-3,7,-1", (0, 1, 2, 3, 7, -1)),
        (" 1 , 2 ", (1, 2)),
        ("2:8:2", (2, 4, 6)),
        (":3", (0, 1, 2)),
        ("-3--1", (-3, -2, -1)),
        ("-3:-1", (-3, -2)),
    ],
)
def test_layers(given: LayersLike, meant: object) -> None:
    assert parse_layers(given) == meant
    assert HookSelection("post_block", given).layers == meant
    assert SteerSpec(steer="post_block", layers=given).steer[0].layers == meant


@pytest.mark.parametrize(
    "given", ["", ",", "x", "1-", "3-1", "0,3-1", "2:", "2:8:0", "1:2:3:4", "-2-3", "-2:3", "1.5", "all,1", "0--1"]
)
def test_layers_that_cannot_be_read(given: str) -> None:
    with pytest.raises(SpecError, match="write for example '0-3,7,-1'") as error:
        parse_layers(given)
    assert repr(given) in str(error.value)


@pytest.mark.parametrize("given", [None, 1.5, True, [], range(0), [1, "2"], [True], {"a": 1}, [1.0]])
def test_layers_of_another_type(given: Any) -> None:
    with pytest.raises(SpecError, match=r"use 'all', a number|give whole numbers") as error:
        parse_layers(given)
    assert repr(given) in str(error.value)


@pytest.mark.parametrize(
    ("alias", "hook"),
    [
        ("hook_resid_pre", "pre_attn"),
        ("hook_resid_mid", "post_attn"),
        ("hook_resid_post", "post_block"),
        ("resid_pre", "pre_attn"),
        ("resid_mid", "post_attn"),
        ("resid_post", "post_block"),
        ("hook_attn_out", "attn_out"),
        ("hook_mlp_out", "mlp_out"),
        *((hook, hook) for hook in (*STEERED, "write_0", "write_11")),
    ],
)
def test_names_of_transformer_lens(alias: str, hook: str) -> None:
    assert parse_hook(alias) == hook
    assert SteerSpec(steer=alias) == SteerSpec(steer=(hook,))
    assert parse_site(f"blocks.3.{alias}") == parse_site(f"layers.3.{hook}") == (hook, 3)
    assert is_stream_hook(hook) == (hook not in BRANCH_HOOKS)


@pytest.mark.parametrize("text", ["", "3.post_block", "layers.x.post_block", "layers.3", "blocks.-1.post_block.x"])
def test_sites_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SpecError, match=r"write it as layers\.<n>\.<hook>") as error:
        parse_site(text)
    assert repr(text) in str(error.value)


def test_op_families_of_hooks_given_by_name() -> None:
    spec = SteerSpec(
        steer=["post_block", HookSelection("mlp_out"), {"hook": "mlp_in"}, {"hook": "attn_in", "ops": "clamp"}],
        capture="post_block",
        ops=("monitor", "tier", "monitor"),
    )
    assert [s.ops for s in spec.steer] == [("tier", "monitor"), ("add",), ("tier", "monitor"), ("clamp",)]
    assert SteerSpec(steer="post_block", ops="clamp").steer[0].ops == ("clamp",)
    plain = SteerSpec(steer="post_block")
    assert (plain.ops, plain.clamps, plain.lowering) == (("add",), 4, "auto")
    text = 'steer = ["post_block"]\nops = ["add", "clamp"]\nclamps = 2\nlowering = "template"'
    assert SteerSpec.from_toml(text) == SteerSpec(
        steer="post_block", ops=("add", "clamp"), clamps=2, lowering="template"
    )


def test_one_hook_needs_no_list() -> None:
    whole = SteerSpec(steer=("post_block",), capture=("mlp_out",), layers=2)
    forms: list[Selections] = ["mlp_out", HookSelection("mlp_out", [2]), ["mlp_out"], iter(["mlp_out"])]
    for form in forms:
        assert SteerSpec(steer="post_block", capture=form, layers="2") == whole
    assert SteerSpec(steer="post_block", layers=2).with_capture("hook_mlp_out") == whole


def test_dtype_of_the_tables() -> None:
    assert SteerSpec(steer="post_block").table_dtype(torch.bfloat16) == torch.bfloat16
    for dtype in ("float32", "torch.float32", torch.float32):
        spec = SteerSpec(steer="post_block", dtype=dtype)
        assert spec.dtype == "float32"
        assert spec.table_dtype(torch.bfloat16) == torch.float32


def test_a_spec_is_frozen() -> None:
    spec = SteerSpec(steer="post_block")
    with pytest.raises(AttributeError, match="rows"):
        spec.rows = 4  # type: ignore[misc]
    with pytest.raises(AttributeError, match="hook"):
        spec.steer[0].hook = "mlp_in"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("make", "value", "cure"),
    [
        (lambda: SteerSpec(), "no hook", "give steer="),
        (lambda: SteerSpec(steer="resid"), "'resid'", "the hooks are pre_attn"),
        (lambda: SteerSpec(steer="write_"), "'write_'", "write_0"),
        (lambda: HookSelection(3), "3", "the hooks are pre_attn"),  # type: ignore[arg-type]
        (lambda: SteerSpec(steer=7), "steer=7", "give for example steer="),  # type: ignore[arg-type]
        (lambda: SteerSpec(steer=[7]), "7", "HookSelection(hook, layers)"),  # type: ignore[list-item]
        (lambda: SteerSpec(steer=[{"layers": 1}]), "{'layers': 1}", "HookSelection(hook, layers)"),
        (lambda: SteerSpec(steer={"hook": "mlp_in", "at": 1}), "'at'", "HookSelection(hook, layers)"),
        (lambda: SteerSpec(steer=["resid_post", "post_block"]), "post_block twice", "merge"),
        (lambda: SteerSpec(capture=[HookSelection("post_block", n) for n in (1, 2)]), "post_block twice", "merge"),
        (lambda: HookSelection("post_block", ops="scale"), "['scale']", "the families are patch, add"),
        (lambda: HookSelection("post_block", ops=()), "()", "the families are patch, add"),
        (lambda: SteerSpec(steer="post_block", rows=0), "rows=0", "at least 1"),
        (lambda: SteerSpec(steer="post_block", rows=True), "rows=True", "whole number"),
        (lambda: SteerSpec(steer="post_block", max_tokens=-8), "max_tokens=-8", "at least 1"),
        (lambda: SteerSpec(steer="post_block", rows=1.5), "rows=1.5", "whole number"),  # type: ignore[arg-type]
        (
            lambda: SteerSpec(steer="post_block", ops=("add", "scale")),
            "ops: unknown op family ['scale']",
            "the families",
        ),
        (
            lambda: SteerSpec(steer="post_block", ops=()),
            "()",
            "the families are patch, add, tier, monitor, row_monitor, clamp",
        ),
        (lambda: SteerSpec(steer="post_block", ops=3), "[3]", "the families are patch, add"),  # type: ignore[arg-type]
        (lambda: SteerSpec(steer="post_block", clamps=0), "clamps=0", "at least 1"),
        (lambda: SteerSpec(steer="post_block", clamps=True), "clamps=True", "whole number"),
        (lambda: SteerSpec(steer="post_block", lowering="triton"), "lowering='triton'", "choose one of auto"),
        (lambda: SteerSpec(capture="post_block", capture_rows=-1), "capture_rows=-1", "at least 0"),
        (lambda: SteerSpec(steer="post_block", capture_rows=4), "capture_rows=4", "give capture=('post_block',)"),
        (lambda: SteerSpec(steer="post_block", clamp=4), "'clamp'", "the keys are capture, capture_rows, clamps"),  # type: ignore[call-arg]
        (lambda: SteerSpec(steer="post_block", dtype="int8"), "'int8'", "choose one of float32"),
        (lambda: SteerSpec(steer="post_block", dtype=torch.float64), "float64", "choose one of float32"),
        (lambda: SteerSpec(steer="post_block", placement="norm"), "'norm'", "choose one of before_norm"),
        (lambda: SteerSpec.from_dict({"steer": "post_block", "layer": 1}), "'layer'", "the keys are capture"),
        (lambda: SteerSpec.from_json("{"), "not JSON", "to_json"),
        (lambda: SteerSpec.from_json("[1]"), "JSON list", "give an object"),
        (lambda: SteerSpec.from_toml("steer = "), "not TOML", "to_toml"),
        (lambda: steer_backend({"steer": "post_block"}), "dict", "build SteerSpec"),  # type: ignore[arg-type]
    ],
)
def test_a_refusal_names_the_value_and_the_cure(make: Callable[[], object], value: str, cure: str) -> None:
    with pytest.raises(SpecError) as error:
        make()
    first = str(error.value).splitlines()[0]
    assert value in first
    assert cure in first


def test_the_spec_of_a_backend_cannot_be_changed() -> None:
    backend = steer_backend(SteerSpec(steer="post_block"))
    with pytest.raises(SpecError, match="make a new backend"):
        backend.spec = SteerSpec(steer="mlp_in")
    assert backend.spec == SteerSpec(steer="post_block")
