"""`steer-compile explain`: why a site is where it is, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

import typer

from steer_compile.cli.graphs import read_graphs
from steer_compile.cli.load import Loaded
from steer_compile.cli.output import JSON_HELP, console, notes, print_json, progress
from steer_compile.debug.explaining import Explanation, NodeView, parse_site
from steer_compile.debug.explaining import explain as explained
from steer_compile.ir import Site


def explain(
    site: Annotated[
        str, typer.Argument(help="Site, such as layers.3.post_block; layer -1 is the last, * the first that has it.")
    ],
    model: Annotated[str, typer.Argument(help="Hugging Face directory, config.json, or module:function.")],
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Say which node a site is, where it comes from and who reads it, or why there is none. Exit code 1: none.

    Example: steer-compile explain layers.3.post_block models/demo
    """
    hook, layer = parse_site(site)
    with progress(None) as step:
        step("tracing the model", 0)
        loaded, graphs = read_graphs(model)
        found = explained(graphs, hook, layer)
    if as_json:
        print_json(_plain(loaded, found))
    else:
        _print(loaded, found)
    raise typer.Exit(0 if isinstance(found.found, Site) else 1)


def _plain(loaded: Loaded, told: Explanation) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "note": loaded.note,
        "graph": told.graph,
        "found": isinstance(told.found, Site),
        "text": told.found.text(),
        "node": told.node.to_dict() if told.node else None,
        "path": [view.to_dict() for view in told.path],
        "readers": [{**view.to_dict(), "kind": kind} for view, kind in told.readers],
        "near": [view.to_dict() for view in told.near],
        "have": dict(told.have),
        "breaks": list(told.breaks),
    }


def _print(loaded: Loaded, told: Explanation) -> None:
    if loaded.note:
        notes().print(loaded.note)
    for line in (told.found.text(), *(_of_site(told, told.node) if told.node is not None else _of_miss(told))):
        console().print(line, markup=False, highlight=False, soft_wrap=True)


def _shown(views: Iterable[NodeView]) -> list[str]:
    return [line for view in views for line in (f"  {view.line}", *([f"      {view.code}"] if view.code else []))]


def _of_site(told: Explanation, node: NodeView) -> list[str]:
    lines = [f"in graph {told.graph}, by the module {node.module or 'of the model itself'}:", *_shown([node])]
    if told.path:
        lines += ["from a site in front of it:", *_shown(told.path)]
    lines.append("read by:" if told.readers else "read by nothing but the result")
    return lines + [f"  [{kind}] {view.line}" for view, kind in told.readers]


def _of_miss(told: Explanation) -> list[str]:
    lines = [f"graph break: {reason}" for reason in told.breaks]
    lines += ["nearest nodes:", *_shown(told.near)] if told.near else []
    have = ", ".join(f"{hook} at {node}" for hook, node in told.have)
    return [*lines, f"this layer has {have}"] if have else lines
