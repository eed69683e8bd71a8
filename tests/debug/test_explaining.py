"""Every miss of the coverage table, explained by the nodes and lines of its model."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
from steer_compile.coverage.zoo import tiny_inputs, tiny_model
from steer_compile.debug.explaining import explain, parse_site
from steer_compile.debug.tracing import trace
from steer_compile.errors import SpecError
from steer_compile.ir import Miss

TABLE = json.loads((Path(__file__).parents[2] / "docs" / "coverage.json").read_text())
REFUSED = [row["type"] for row in TABLE if row["compiles"] and not row["sites"]]
FAST = ("gemma3n_text", "hrm_text")


def slowly(kind: str) -> Any:
    return kind if kind in FAST else pytest.param(kind, marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", [slowly(kind) for kind in REFUSED])
def test_a_refused_model_is_explained_by_its_nodes(kind: str) -> None:
    model = tiny_model(kind)
    graphs = trace(model.eval().requires_grad_(False), tiny_inputs(model, kind))
    told = explain(graphs, "post_block", 0)
    assert isinstance(told.found, Miss)
    names = {node.name for traced in graphs for node in traced.gm.graph.nodes}
    assert told.near
    assert {view.name for view in told.near} <= names
    assert all(view.line.startswith("%") for view in told.near)
    if any(traced.broken for traced in graphs):
        assert any(".py:" in reason for reason in told.breaks)


def test_the_table_has_refused_models() -> None:
    assert set(FAST) <= set(REFUSED)


def test_names_of_sites() -> None:
    assert parse_site("layers.3.post_block") == parse_site("3.post_block") == ("post_block", 3)
    assert parse_site("blocks.3.hook_resid_mid") == ("post_attn", 3)
    assert parse_site("layers.-1.write_0") == ("write_0", -1)
    assert parse_site("layers.*.write@add_3") == ("write@add_3", None)
    with pytest.raises(SpecError, match="names no site"):
        parse_site("post_block")
