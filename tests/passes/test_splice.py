"""The spliced graph, read line by line: what stands behind what, and that nobody reads the unsteered value."""

from typing import Any

import pytest
import torch
from torch import fx, nn

from steer_compile import HookSelection, SteerSpec
from steer_compile.canon import canonical_text
from steer_compile.errors import LoweringError
from steer_compile.ir import Plan
from steer_compile.passes.find_sites import find_sites
from steer_compile.passes.plan_edits import plan_edits
from steer_compile.passes.splice import attach, splice
from tests._filecheck import filecheck
from tests._graphs import trace
from tests._models import spec, tokens, toy
from tests._toys import make


def spliced(asked: SteerSpec, model: nn.Module | None = None, *inputs: Any) -> tuple[fx.GraphModule, Plan]:
    gm, _ = trace(model or toy(), *(inputs or (tokens(),)))
    plan = plan_edits(asked, find_sites(gm))
    splice(gm, plan)
    return gm, plan


def at(hook: str, layer: int, **options: Any) -> SteerSpec:
    return spec(HookSelection(hook, [layer]), **options)


def test_everything_behind_a_steered_stream_value_reads_the_new_one() -> None:
    # CHECK:      [[BANK:%[0-9]+]] = getitem($steer_bank_0, 0)
    # CHECK-NOT:  @
    # CHECK:      [[ROWS:%[0-9]+]] = view(
    # CHECK-NEXT: [[VECTOR:%[0-9]+]] = getitem([[BANK]], [[ROWS]])
    # CHECK-NEXT: [[SCALES:%[0-9]+]] = getitem($steer_scale, [[ROWS]])
    # CHECK-NEXT: [[FACTOR:%[0-9]+]] = unsqueeze([[SCALES]], -1)
    # CHECK-NEXT: [[TERM:%[0-9]+]] = mul([[VECTOR]], [[FACTOR]])
    # CHECK-NEXT: [[SUM:%[0-9]+]] = add([[OLD:%[0-9]+]], [[TERM]])
    # CHECK-NEXT: [[NEW:%[0-9]+]] = to([[SUM]], f32)
    # CHECK-NEXT: rms_norm([[NEW]], {{.*}}@ model.layers.1.input_layernorm
    # CHECK-NOT:  {{[( ]}}[[OLD]]{{[,)]}}
    # CHECK:      add([[NEW]], {{.*}} @ model.layers.1
    # CHECK-NOT:  {{[( ]}}[[OLD]]{{[,)]}}
    # CHECK:      return
    gm, _ = spliced(at("post_block", 0))
    filecheck(canonical_text(gm.graph), test_everything_behind_a_steered_stream_value_reads_the_new_one)


def test_a_capture_stands_in_front_of_the_steer_and_reads_the_old_value() -> None:
    # CHECK:      linear({{.*}} @ model.layers.0.mlp.2
    # CHECK-NEXT: [[OLD:%[0-9]+]] = add({{.*}} @ model.layers.0
    # CHECK-NEXT: [[SLOT:%[0-9]+]] = getitem($steer_bank_0, 0)
    # CHECK:      [[PLACE:%[0-9]+]] = narrow([[SLOT]], 0, 0, [[TOKENS:%[0-9]+]])
    # CHECK-NEXT: [[VALUE:%[0-9]+]] = detach([[OLD]])
    # CHECK:      [[FLAT:%[0-9]+]] = reshape([[VALUE]], [[TOKENS]],
    # CHECK-NEXT: copy_([[PLACE]], [[FLAT]])
    # CHECK-NEXT: getitem($steer_bank_1, 0)
    # CHECK:      [[SUM:%[0-9]+]] = add([[OLD]],
    # CHECK:      [[NEW:%[0-9]+]] = to([[SUM]],
    # CHECK-NEXT: rms_norm([[NEW]],
    # CHECK-NOT:  {{[( ]}}[[OLD]]{{[,)]}}
    # CHECK:      return
    gm, _ = spliced(at("post_block", 0, capture=[HookSelection("post_block", [0])]))
    filecheck(canonical_text(gm.graph), test_a_capture_stands_in_front_of_the_steer_and_reads_the_old_value)


def test_after_the_norm_only_the_skip_path_reads_the_new_value() -> None:
    # CHECK:      [[SUM:%[0-9]+]] = add([[OLD:%[0-9]+]], %{{[0-9]+}}){{$}}
    # CHECK:      [[NEW:%[0-9]+]] = to([[SUM]],
    # CHECK-NOT:  {{[( ]}}[[NEW]]{{[,)]}}
    # CHECK:      rms_norm([[OLD]], {{.*}}@ model.layers.1.input_layernorm
    # CHECK-NOT:  {{[( ]}}[[OLD]]{{[,)]}}
    # CHECK:      add([[NEW]], {{.*}} @ model.layers.1
    # CHECK-NOT:  {{[( ]}}[[OLD]]{{[,)]}}
    # CHECK:      return
    gm, _ = spliced(at("pre_attn", 1, placement="after_norm"))
    filecheck(canonical_text(gm.graph), test_after_the_norm_only_the_skip_path_reads_the_new_value)


def test_the_input_of_a_branch_changes_for_that_branch_alone() -> None:
    # CHECK:      [[STREAM:%[0-9]+]] = add({{.*}} @ model.layers.0
    # CHECK-NEXT: [[OLD:%[0-9]+]] = rms_norm([[STREAM]], {{.*}}@ model.layers.0.post_attention_layernorm
    # CHECK:      [[SUM:%[0-9]+]] = add([[OLD]],
    # CHECK:      [[NEW:%[0-9]+]] = to([[SUM]],
    # CHECK-NEXT: linear([[NEW]], {{.*}}@ model.layers.0.mlp.0
    # CHECK-NOT:  {{[( ]}}[[OLD]]{{[,)]}}
    # CHECK:      add([[STREAM]], {{.*}} @ model.layers.0
    gm, _ = spliced(at("mlp_in", 0))
    filecheck(canonical_text(gm.graph), test_the_input_of_a_branch_changes_for_that_branch_alone)


def test_the_exit_of_a_block_comes_in_front_of_the_entry_of_the_next() -> None:
    # CHECK:      [[OLD:%[0-9]+]] = add({{.*}} @ model.layers.0{{$}}
    # CHECK:      [[OLD:%[0-9]+]] = add({{.*}} @ model.layers.0{{$}}
    # CHECK-NEXT: getitem($steer_bank_0, 0)
    # CHECK:      [[SUM:%[0-9]+]] = add([[OLD]],
    # CHECK:      [[LEFT:%[0-9]+]] = to([[SUM]],
    # CHECK-NEXT: getitem($steer_bank_0, 1)
    # CHECK:      [[SUM:%[0-9]+]] = add([[LEFT]],
    # CHECK:      [[ENTERED:%[0-9]+]] = to([[SUM]],
    # CHECK-NEXT: rms_norm([[ENTERED]],
    # CHECK-NOT:  {{[( ]}}[[LEFT]]{{[,)]}}
    # CHECK:      return
    gm, _ = spliced(spec(HookSelection("post_block", [0]), HookSelection("pre_attn", [1])))
    filecheck(canonical_text(gm.graph), test_the_exit_of_a_block_comes_in_front_of_the_entry_of_the_next)


def test_an_in_place_write_has_its_new_value_read() -> None:
    # CHECK:      add_({{.*}}
    # CHECK:      [[OLD:%[0-9]+]] = add_({{.*}}
    # CHECK:      [[SUM:%[0-9]+]] = add([[OLD]],
    # CHECK:      [[NEW:%[0-9]+]] = to([[SUM]],
    # CHECK-NEXT: layer_norm([[NEW]],
    # CHECK-NOT:  {{[( ]}}[[OLD]]{{[,)]}}
    # CHECK:      return
    model = make("inplace_method")
    gm, _ = spliced(at("post_block", 0), model, *model.inputs())
    filecheck(canonical_text(gm.graph), test_an_in_place_write_has_its_new_value_read)


def test_a_stream_with_the_time_in_front_gets_its_rows_transposed() -> None:
    # CHECK:      [[ROWS:%[0-9]+]] = view(
    # CHECK-NEXT: [[TURNED:%[0-9]+]] = transpose([[ROWS]], 0, 1)
    # CHECK-NEXT: getitem(%{{[0-9]+}}, [[TURNED]])
    # CHECK-NEXT: getitem($steer_scale, [[TURNED]])
    model = make("time_first")
    gm, _ = spliced(at("post_block", 0), model, *model.inputs())
    filecheck(canonical_text(gm.graph), test_a_stream_with_the_time_in_front_gets_its_rows_transposed)


def test_the_row_index_is_computed_once() -> None:
    gm, plan = spliced(spec("post_block", "attn_out", "mlp_out"))
    text = canonical_text(gm.graph)
    assert len(plan.edits) == 6
    assert text.count("= narrow($steer_rows,") == 1
    assert text.count("= getitem($steer_bank_0,") == 6


def test_what_the_graph_takes_and_gives_stays() -> None:
    gm, _ = trace(toy(), tokens())
    before = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
    plan = plan_edits(at("post_block", 1), find_sites(gm))
    names = splice(gm, plan)
    assert set(names) == {"steer_bank_0", "steer_rows", "steer_scale"}
    attach(gm, {name: torch.zeros(1) for name in names})
    assert [n.target for n in gm.graph.nodes if n.op == "placeholder"] == before
    assert set(dict(gm.named_buffers())) == set(names)


def test_a_graph_that_was_not_planned_is_refused() -> None:
    gm, plan = spliced(spec("post_block"))
    with pytest.raises(LoweringError, match="another steer_backend has instrumented this graph"):
        splice(gm, plan)
    other, _ = trace(toy(layers=1), tokens())
    with pytest.raises(LoweringError, match=r"layers\.1\.post_block is planned at \w+, which this graph does not have"):
        splice(other, plan)
