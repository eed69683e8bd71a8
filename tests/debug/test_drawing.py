"""The drawing of a model's graphs: stations, tracks, what was spliced in, and how it is written down."""

import dataclasses
import inspect
import json
import re
from xml.etree import ElementTree

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from steer_compile import SteerSpec
from steer_compile.debug.dot import dot, structure
from steer_compile.debug.draw import draw
from steer_compile.debug.drawing import Drawing, Layer, Line, Op, last_frames, names_of
from steer_compile.debug.metro import svg
from steer_compile.debug.tracing import Staged, Traced, stage, trace
from steer_compile.debug.webpage import page
from steer_compile.errors import SiteNotFound
from tests import _streams
from tests._toys import make

TOYS = ("prenorm_rmsnorm", "postnorm", "parallel_two_norms", "unet_skips", "looped", "functional", "inplace_operator")


def traced(name: str) -> list[Traced]:
    if name in _streams.MODELS:
        pytest.importorskip("transformers")
        return trace(_streams.MODELS[name](), {"input_ids": _streams.tokens()})
    toy = make(name)
    return trace(toy, dict(zip(inspect.signature(toy.forward).parameters, toy.inputs(), strict=False)))


def staged(name: str, **given: object) -> list[Staged]:
    hooks = ("mhc_streams_pre_attn", "attn_out") if name in _streams.MODELS else ("post_block", "attn_out")
    options = {"steer": hooks, "capture": hooks, "max_tokens": 64, **given}
    return stage(traced(name), SteerSpec(**options))  # type: ignore[arg-type]


def tracks(line: Line) -> list[list[tuple[str, bool, int]]]:
    return [[(track.kind, track.parallel, track.streams) for track in layer.tracks] for layer in line.layers]


def drawn(line: Line) -> set[str]:
    return {*line.before, *line.after, *line.data, *(name for layer in line.layers for name in names_of(layer))}


@pytest.mark.parametrize("name", [*TOYS, "deepseek_v4"])
def test_every_site_is_a_station_and_every_op_is_drawn(name: str) -> None:
    graphs = staged(name)
    for made, line in zip(graphs, draw(name, graphs).lines, strict=True):
        sites = {(site.layer, site.hook, site.node) for site in made.traced.table}
        assert {(s.layer, s.hook, s.node) for s in line.stations} == sites
        old = {node.name for node in made.traced.gm.graph.nodes}
        new = {node.name for node in made.gm.graph.nodes}
        assert {op.name for op in line.ops if op.origin == "spliced"} == new - old
        assert new - old <= drawn(line)
        assert {op.name for op in line.ops if op.computes} - drawn(line) == set()
        assert [op.name for op in line.ops if op.origin != "removed"] == [n.name for n in made.gm.graph.nodes]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prenorm_rmsnorm", [("attention", False, 0), ("mlp", False, 0)]),
        ("postnorm", [("attention", False, 0), ("mlp", False, 0)]),
        ("parallel_two_norms", [("mlp", True, 0), ("attention", True, 0)]),
        ("ssm_one_write", [("mixer", False, 0)]),
        ("deepseek_v4", [("attention", False, 4), ("mlp", False, 4)]),
    ],
)
def test_branches_have_their_kinds(name: str, expected: list[tuple[str, bool, int]]) -> None:
    (line,) = draw(name, traced(name), "find_sites").lines
    assert len(line.layers) == 3
    assert tracks(line) == [expected] * 3


def test_what_a_plan_does_stands_at_its_stations() -> None:
    (line,) = draw("toy", staged("prenorm_rmsnorm")).lines
    for layer in line.layers:
        applied = {s.hook: s.applied for s in layer.stations if s.applied}
        assert {hook: [a.ops for a in given] for hook, given in applied.items()} == {
            "post_block": [("capture",), ("add",)],
            "attn_out": [("capture",), ("add",)],
        }
        for captured, steered in applied.values():
            assert {line.op(name).acts for name in captured.nodes} == {"capture"}
            assert {line.op(name).acts for name in steered.nodes} == {"steer"}
            assert {line.op(name).layer for name in (*captured.nodes, *steered.nodes)} == {layer.number}
            assert line.op(captured.nodes[-1]).op == "copy"
            assert "cpu" in steered.why
    assert dict(line.change)["copy"] == 6


def test_a_step_before_the_splice_shows_the_plan_alone() -> None:
    graphs = staged("prenorm_rmsnorm")
    found, planned = (draw("toy", graphs, step).lines[0] for step in ("find_sites", "plan_edits"))
    for line in (found, planned):
        assert not [op for op in line.ops if op.origin != "kept"]
    assert not any(station.applied for station in found.stations)
    assert sum(bool(station.applied) for station in planned.stations) == 6
    assert all(not applied.nodes for station in planned.stations for applied in station.applied)


def test_a_template_shows_what_it_takes_over() -> None:
    pytest.importorskip("triton")
    (line,) = draw(
        "toy", stage(traced("prenorm_rmsnorm"), SteerSpec(steer=("post_block",), max_tokens=64), "cuda")
    ).lines
    (applied,) = next(s for s in line.layers[0].stations if s.hook == "post_block").applied
    assert applied.lowering == "template"
    assert applied.fusion.startswith("fused with ")
    assert "site" in {line.op(name).op for name in applied.nodes}
    removed = [op for op in line.ops if op.origin == "removed"]
    assert removed
    assert {op.name for op in removed} <= drawn(line)


def test_an_op_has_its_line_place_and_stack_trace() -> None:
    (line,) = draw("toy", traced("prenorm_rmsnorm"), "find_sites", {"add": ("kernel_1",)}, ("kernel_1",)).lines
    op = next(op for op in line.ops if op.op == "gelu")
    assert re.fullmatch(r"%\d+ = gelu\(.*\) : f32\[2, 5, \d+\] @ layers\.0\.mlp.*", op.line)
    assert f"%{op.name} : [num_users=1] = call_function" in op.source
    assert op.layer == 0
    assert op.dtype == "f32"
    assert 1 <= len(op.frames) <= 2
    assert "tests/_toys_base.py:" in op.frames[-1]
    assert line.op("add").kernels == ("kernel_1",)


def test_frames_are_those_next_to_the_operation() -> None:
    trace = "".join(f'  File "/x/site-packages/pkg/m.py", line {n}, in f{n}\n    y = {n}\n    ^^^\n' for n in (1, 2, 3))
    assert last_frames(trace) == ("pkg/m.py:2 in f2: y = 2", "pkg/m.py:3 in f3: y = 3")
    assert last_frames(None) == ()


def test_a_graph_without_a_stream_says_why() -> None:
    drawing = draw("toy", traced("reversible"), "find_sites")
    (line,) = drawing.lines
    assert line.layers == ()
    assert "two streams feed each other" in line.misses[0].reason
    assert "two streams feed each other" in page(drawing)
    with pytest.raises(SiteNotFound, match="no layers"):
        drawing.only(0)


def test_a_parallel_block_says_which_hook_it_lacks() -> None:
    (line,) = draw("toy", traced("parallel_two_norms"), "find_sites").lines
    assert all([miss.hook for miss in layer.misses] == ["post_attn"] for layer in line.layers)


def test_one_layer_of_a_drawing() -> None:
    drawing = draw("toy", staged("prenorm_rmsnorm"))
    (line,) = drawing.only(-1).lines
    assert [layer.number for layer in line.layers] == [2]
    assert {op.layer for op in line.ops if op.layer is not None} <= {1, 2}  # the stream comes from the layer before
    with pytest.raises(SiteNotFound, match="layers 0 to 2"):
        drawing.only(3)
    for write in (svg, dot, page):
        assert write(drawing.only(1))


class Cut(nn.Module):
    """A toy of four layers with a graph break in its middle."""

    def __init__(self) -> None:
        super().__init__()
        self.toy = make("prenorm_rmsnorm")
        self.toy.layers.extend(make("prenorm_rmsnorm").layers[:1])

    def forward(self, ids: Tensor) -> Tensor:
        layers = self.toy.layers
        x = layers[1](layers[0](self.toy.start(ids), 0), 1)
        torch._dynamo.graph_break()
        return self.toy.finish(layers[3](layers[2](x, 2), 3))


def test_a_model_cut_by_a_graph_break_has_several_lines() -> None:
    model = Cut()
    graphs = stage(trace(model, {"ids": model.toy.inputs()[0]}), SteerSpec(steer=("post_block",), max_tokens=64))
    drawing = draw("toy", graphs)
    assert [[layer.number for layer in line.layers] for line in drawing.lines] == [[0, 1], [2, 3]]
    assert drawing.summary()["graphs"] == 2
    assert drawing.summary()["steered"] == 4
    assert [line.name for line in drawing.only(2).lines] == [drawing.lines[1].name]
    assert json.loads(json.dumps(drawing.plain()))["summary"]["model"] == "toy"
    text = page(drawing)
    assert text.count("<h2>graph ") == 2
    numbers = re.findall(r'data-b="(\d+)"', text)
    assert len(numbers) == len(set(numbers))


def test_the_structure_is_one_way_from_the_first_stop_to_the_last() -> None:
    (line,) = draw("toy", staged("prenorm_rmsnorm")).lines
    graph = structure(line)
    assert nx.is_directed_acyclic_graph(graph)
    assert nx.is_weakly_connected(graph)
    stops = [s.node for s in line.stations if s.hook in ("pre_attn", "post_block")]
    assert nx.has_path(graph, stops[0], stops[-1])


EVIL = '</script><b title="x">&\'\\'


def evil() -> Drawing:
    """A drawing whose every text is hostile."""
    drawing = draw("toy", staged("prenorm_rmsnorm"))

    def changed(op: Op) -> Op:
        named = dataclasses.replace(op, line=op.line + EVIL, source=EVIL, module=EVIL, shape=EVIL)
        return dataclasses.replace(named, op=EVIL if op.layer else op.op, frames=(EVIL,), kernels=(EVIL,))

    def layer(one: Layer) -> Layer:
        stations = tuple(dataclasses.replace(s, shape=EVIL) for s in one.stations)
        parts = tuple(dataclasses.replace(track, module=EVIL) for track in one.tracks)
        return dataclasses.replace(one, module=EVIL, stations=stations, tracks=parts)

    lines = [
        dataclasses.replace(line, name=EVIL, ops=tuple(map(changed, line.ops)), layers=tuple(map(layer, line.layers)))
        for line in drawing.lines
    ]
    return dataclasses.replace(drawing, model=EVIL, lines=tuple(lines), kernels=(EVIL,))


def test_what_a_model_says_cannot_leave_its_place() -> None:
    text = page(evil())
    assert text.count("</script>") == 2
    assert "<b " not in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert EVIL in json.loads(data)["strings"]
    ElementTree.fromstring(svg(evil()))
    assert all(line.count('"') % 2 == 0 for line in dot(evil()).replace("\\\\", "").replace('\\"', "").splitlines())


@pytest.mark.parametrize("name", [*TOYS, "reversible"])
def test_a_picture_is_well_formed(name: str) -> None:
    root = ElementTree.fromstring(svg(draw(name, traced(name), "find_sites")))
    assert root.tag.endswith("svg")
    assert float(root.get("height", 0)) > 40


def test_texts_are_packed_as_patterns_and_come_back() -> None:
    (data,) = re.findall(r'id="data">(.*?)</script>', page(draw("toy", staged("prenorm_rmsnorm"))), re.DOTALL)
    packed = json.loads(data)
    assert 0 < len(packed["patterns"]) < len(packed["strings"])
    strings = set()
    for text in packed["strings"]:
        if not isinstance(text, str):
            first, *pieces = packed["patterns"][text[0]].split("\t")
            text = first + "".join(f"{number}{piece}" for number, piece in zip(text[1:], pieces, strict=True))
        strings.add(text)
    (line,) = draw("toy", staged("prenorm_rmsnorm")).lines
    assert {op.source for op in line.ops} <= strings
    assert {frame for op in line.ops for frame in op.frames} <= strings


def test_a_page_refers_to_nothing_outside() -> None:
    text = page(draw("toy", staged("prenorm_rmsnorm")))
    assert not re.findall(r"""(?:src|href)=["'](?!data:)|@import|url\((?!data:)|https?://""", text)
