"""Every call of a run has a variant in the warm-up's set, told by Triton's own keys, without a GPU."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from steer_compile import SteerSpec, steer_backend
from steer_compile.coverage import zoo
from steer_compile.kernels import site, site_warmup
from steer_compile.kernels.site import ARGUMENTS, SiteArgs, check
from steer_compile.kernels.site_launch import FEW_TOKENS
from steer_compile.kernels.site_warmup import variants, zeros
from steer_compile.passes import lower_edits
from steer_compile.runtime.tables import ALIGNMENT
from tests import _models, _tree
from tests.kernels.site_inputs import FAMILIES, PACKED
from tests.kernels.site_plans import DTYPE_NAMES, ROWS, SITES, Setup, run_args, run_time_calls, tables_of
from tests.kernels.triton_keys import Call, key, keys, recorded

CPU = torch.device("cpu")
COUNTS = (1, 2, 15, 16, 17, FEW_TOKENS, FEW_TOKENS + 1, 4096)
WIDTHS = (64, 96, 1000, 2048, 17)
OP_SETS = [c for n in (1, 2, 7) for c in itertools.combinations(FAMILIES, n) if c != ("branch",)]
OP_SETS += [(PACKED,), ("branch", PACKED, "add")]
BANKS = ("table", "tier", "probe", "probe_set", "rowprobe", "rowprobe_set", "clamp", "clamp_set", "capture")


def warmed(setup: Setup) -> set[tuple[str, str]]:
    """Keys that the warm-up of a plan leaves in Triton's cache."""
    return set().union(*(keys(zeros(a, CPU)) for a in variants(setup.plan(), setup.weights())))


def outside(setup: Setup, counts: tuple[int, ...] = COUNTS) -> list[Call]:
    """Launches of a run that would compile again."""
    known = warmed(setup)
    return [call for a in run_time_calls(setup, counts) for call in recorded(a) if key(call) not in known]


@pytest.mark.behaviour(79)
@pytest.mark.parametrize("families", OP_SETS, ids="+".join)
def test_a_run_compiles_nothing_new(families: tuple[str, ...]) -> None:
    for width, norm in ((64, ""), (17, "rms")):
        setup = Setup(families, width, norm=norm)
        assert outside(setup) == []
        assert len(warmed(setup)) == 2  # for few tokens and for many, whatever the site


@settings(max_examples=60, deadline=None)
@given(
    families=st.sampled_from(OP_SETS),
    width=st.sampled_from(WIDTHS),
    dtype=st.sampled_from(list(DTYPE_NAMES)),
    table=st.sampled_from(list(DTYPE_NAMES)),
    norm=st.sampled_from(["", "rms", "rms_wide", "layer"]),
    weight=st.sampled_from([None, torch.float32, torch.bfloat16]),
    bias=st.sampled_from([None, torch.float32]),
)
def test_any_kind_of_site(**options: Any) -> None:
    assert outside(Setup(**options), (1, 16, FEW_TOKENS, 300)) == []


@pytest.mark.parametrize("width", [20480, 7168])
def test_wide_rows_have_two_variants_too(width: int) -> None:
    setup = Setup(width=width, max_tokens=FEW_TOKENS + 1)
    assert outside(setup, (1, 16, FEW_TOKENS + 1)) == []
    assert {name for name, _ in warmed(setup)} == {"site_wide" if width > 16384 else "site_row"}
    assert len(warmed(setup)) == 2


def test_a_plan_without_room_for_many_tokens_has_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(max_tokens=16)
    assert outside(setup, (1, 16)) == []
    known = warmed(setup)
    monkeypatch.setattr(site, "FEW_TOKENS", 0)  # as in a graph for any number of tokens
    assert all(keys(a) <= known for a in run_time_calls(setup, (1, 16)))


@pytest.mark.parametrize("norm", ["", "layer"])
def test_the_warm_up_is_what_the_record_says(norm: str) -> None:
    setup = Setup(width=24, norm=norm, weight=torch.float32, bias=torch.bfloat16)
    plan = setup.plan()
    real = run_args(setup, plan, tables_of(plan), plan.edits[0], 1)
    few, many = variants(plan, setup.weights())
    check(real)
    for argument in ARGUMENTS:
        made, run = (getattr(a, argument.name) for a in (few, real))
        assert (made is None) == (run is None), argument
        if run is not None:
            assert (made.dtype, made.is_meta) == (run.dtype, True)
            assert argument.name == "capture" or made.shape == run.shape, argument
    assert few[len(ARGUMENTS) :] == real[len(ARGUMENTS) :]
    assert (few.stream.size(0), many.stream.size(0)) == (1, FEW_TOKENS + 1)


@pytest.mark.parametrize("dtype", list(DTYPE_NAMES))
@pytest.mark.parametrize("width", [17, 3, 64])
def test_the_parts_of_a_bank_are_read_where_they_lie(width: int, dtype: torch.dtype) -> None:
    setup = Setup(width=width, dtype=dtype, table=dtype, max_tokens=5)
    plan = setup.plan()
    tables = tables_of(plan)
    for edit in plan.edits:
        a = run_args(setup, plan, tables, edit, 5)
        (call,) = recorded(a)
        passed = {x.data_ptr() for x in call.args if isinstance(x, Tensor)}
        for name in BANKS:
            part = getattr(a, name)
            assert part.is_contiguous()
            assert part.data_ptr() % ALIGNMENT == 0
            assert part.data_ptr() in passed, f"{name} is copied in every call"
    assert len({tables.view("rowprobe_set", ("post_block", n)).data_ptr() for n in range(SITES)}) == SITES


def in_one_piece(tensor: Tensor) -> Tensor:
    return tensor.contiguous()


def test_a_bank_without_its_pitch_would_be_copied_or_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    setup = Setup(("add",), 17, norm="")
    plan = setup.plan()
    tables = tables_of(plan)
    tables.tensors[0] = tables.tensors[0].contiguous()
    a = run_args(setup, plan, tables, plan.edits[1], 4)
    assert a.table is not None
    (call,) = recorded(a)
    assert a.table.data_ptr() not in {x.data_ptr() for x in call.args if isinstance(x, Tensor)}
    monkeypatch.setattr(site, "aligned", in_one_piece)
    assert not keys(a) <= warmed(setup)
    assert keys(run_args(setup, plan, tables_of(plan), plan.edits[1], 4)) <= warmed(setup)


def test_a_misaligned_stream_would_compile_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site, "aligned", in_one_piece)
    assert outside(Setup(), (4,)) != []


def test_no_number_is_an_argument() -> None:
    """The tokens are the grid: Triton would specialise a count on 1 and on multiples of 16."""
    for a in run_time_calls(Setup(width=8, max_tokens=4096), COUNTS):
        for call in recorded(a):
            assert all(isinstance(x, Tensor) for x in call.args)


@pytest.mark.parametrize("change", [{"eps": 1}, {"clamps": 0}, {"exact": True}, {"branch_scale": 1}, {"offset": 1.0}])
def test_other_constants_would_compile_again(change: dict[str, Any]) -> None:
    setup = Setup()
    a = next(run_time_calls(setup, (4,)))
    assert not keys(a._replace(**change)) <= warmed(setup)


@pytest.fixture
def graph_calls(monkeypatch: pytest.MonkeyPatch) -> list[SiteArgs]:
    """Arguments that compiled graphs hand to the op; the template is taken on the CPU, where its reference runs."""
    monkeypatch.setattr(lower_edits, "DEVICES", ("cpu",))
    calls: list[SiteArgs] = []
    reference = site.reference

    def watched(a: SiteArgs) -> tuple[Tensor, Tensor]:
        calls.append(a)
        return reference(a)

    monkeypatch.setattr(site, "reference", watched)
    return calls


ALL = ("add", "tier", "monitor", "row_monitor", "clamp")


@pytest.mark.behaviour(79)
@pytest.mark.parametrize(
    ("name", "ops", "capture"),
    [
        ("llama", ("add",), ()),
        ("llama", ALL, ("post_block",)),
        ("gpt2", ("tier", "clamp"), ("post_block",)),
        ("gemma2", ALL, ()),
    ],
)
def test_compiled_graphs_keep_to_the_variants(
    name: str, ops: tuple[str, ...], capture: tuple[str, ...], graph_calls: list[SiteArgs]
) -> None:
    model: Any = zoo.tiny_model(name)
    spec = SteerSpec(
        steer=("post_attn", "post_block"), capture=capture, ops=ops, rows=ROWS, clamps=2, max_tokens=512,
        lowering="template", dtype="bfloat16",
    )  # fmt: skip
    backend = steer_backend(spec, inner="eager")
    compiled: Any = torch.compile(model, backend=backend)
    with torch.no_grad():
        for batch, length in ((1, 1), (2, 8), (10, 29)):
            compiled(torch.ones(batch, length, dtype=torch.long), use_cache=False)
    known: set[tuple[str, str]] = set()
    for plan, weights, _ in backend._launched:
        known |= set().union(*(keys(zeros(a, CPU)) for a in variants(plan, weights)))
    assert len(graph_calls) >= 3 * 2 * len(model.model.layers if name != "gpt2" else model.transformer.h)
    assert all(keys(a) <= known for a in graph_calls)
    assert backend.warm_up() == 0  # on a CPU there is nothing to compile


@pytest.mark.parametrize(
    ("inner", "warmed_up"), [("eager", 1), ("aot_eager", 1), (lambda gm, _: gm, 1), ("inductor", 0)]
)
def test_the_backend_warms_up_unless_inductor_does(inner: Any, warmed_up: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def warm_up(*args: Any) -> int:
        asked.append(args)
        return 2

    monkeypatch.setattr(site_warmup, "warm_up", warm_up)
    setup, backend = Setup(), steer_backend(SteerSpec(steer=("post_block",)), inner=inner)
    plan, weights, gpu = setup.plan(), setup.weights(), torch.device("cuda", 0)
    backend._launched += [(plan, weights, gpu), (plan, weights, CPU), (replace(plan, edits=()), {}, gpu)]
    assert backend.warm_up() == 2 * warmed_up
    assert asked == [(plan, weights, gpu)] * warmed_up


def in_a_process(folder: Path) -> list[dict[str, Any]]:
    """The variants that `compile_sm90` compiles in a process of its own, with a cache on disk."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(_tree.ROOT)}
    command = [sys.executable, "-m", "tests.kernels.compile_sm90"]
    run = subprocess.run(command, env=env, cwd=_tree.ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.behaviour(79)
def test_the_kernels_compile_for_a_gpu_and_only_once(tmp_path: Path) -> None:
    first, files = in_a_process(tmp_path), sorted(tmp_path.rglob("*"))
    for variant in first:
        print(variant)
        assert variant["spilled"] == 0
    assert {v["kernel"] for v in first} == {"site_row", "site_wide"}
    assert not any(v["cached"] for v in first)
    again = in_a_process(tmp_path)
    assert all(v["cached"] for v in again)
    assert sorted(tmp_path.rglob("*")) == files


def test_the_launches_of_traced_graphs_are_warmed_up() -> None:
    """``aot_eager`` launches through torch's own call, which names options that are defaults."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.traced_launches", "eager", "aot_eager"]
    run = subprocess.run(command, env=env, cwd=_tree.ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    for inner, (launches, unknown) in found.items():
        assert (launches, unknown) == (2 * _models.LAYERS, 0), inner
