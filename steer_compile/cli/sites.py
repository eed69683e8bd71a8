"""`steer-compile sites`: the hook points of a model, and why others have none."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table
from torch import nn

from steer_compile.cli.graphs import read_graphs
from steer_compile.cli.load import Loaded
from steer_compile.cli.output import JSON_HELP, console, notes, print_json, progress
from steer_compile.debug.tracing import Traced, breaks, trace
from steer_compile.hooks import parse_hook
from steer_compile.ir import Miss, Site, SiteTable, dtype_text


def sites(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, config.json, or module:function.")],
    hook: Annotated[str | None, typer.Option(help="Show this hook only, such as post_block or resid_post.")] = None,
    layer: Annotated[int | None, typer.Option(help="Show this layer only; -1 is the last.")] = None,
    misses: Annotated[bool, typer.Option("--misses", help="Show every hook without a value, and why.")] = False,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Leave sizes open, so that shapes are symbolic.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List where a model can be steered and captured. Exit code 1: nowhere.

    Example: steer-compile sites models/demo --hook post_block
    """
    wanted = parse_hook(hook) if hook is not None else None
    with progress(None) as step:
        step("tracing the model", 0)
        loaded, graphs = read_graphs(model, dynamic=dynamic or None)
        table = joined(graphs)
    if layer is not None and layer < 0:
        layer += table.n_layers
    chosen = table.where(lambda s: wanted in (None, s.hook) and layer in (None, s.layer))
    missing = [m for m in table.misses if wanted in (None, m.hook) or m.hook == "*"]
    missing = [m for m in missing if layer in (None, m.layer) or m.layer is None]
    if not chosen.sites and not missing and layer is not None:
        missing = [_as_miss(table.find(wanted or "*", layer))]
    if as_json:
        print_json({**_plain(loaded, chosen, missing), "breaks": breaks(graphs)})
    else:
        _print(loaded, table, chosen, missing, misses)
        for reason in breaks(graphs):
            notes().print(f"graph break: {reason}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(0 if chosen.sites else 1)


def _as_miss(found: Site | Miss) -> Miss:
    return found if isinstance(found, Miss) else Miss(found.layer, found.hook, "no such value")


def collect_sites(
    model: nn.Module, inputs: dict[str, Any], shapes: AbstractContextManager[Any] | None = None
) -> SiteTable:
    """Sites of all graphs of one call, without compiling or changing any of them."""
    return joined(trace(model, inputs, shapes))


def joined(graphs: Sequence[Traced]) -> SiteTable:
    """Sites of several graphs together, each (layer, hook) once; a graph without any counts where no other has some."""
    tables = [traced.table for traced in graphs]
    tables = [table for table in tables if table.sites] or tables[:1]
    found = {(s.layer, s.hook): s for table in reversed(tables) for s in reversed(table.sites)}
    sites = tuple(dict.fromkeys(found[s.layer, s.hook] for table in tables for s in table.sites))
    misses = tuple(dict.fromkeys(miss for table in tables for miss in table.misses))
    layers = tuple(sorted({layer for layer, _ in found}))
    return SiteTable(sites, misses, layers, any(traced.partial for traced in graphs))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _dims(site: Site) -> str:
    return "[" + ", ".join(str(d) for d in (*site.shape, site.width)) + "]"


def _plain(loaded: Loaded, chosen: SiteTable, missing: list[Miss]) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "note": loaded.note,
        "layers": chosen.n_layers,
        "graph_breaks": chosen.partial,
        "sites": [
            {
                "layer": s.layer, "hook": s.hook, "width": s.width, "dtype": dtype_text(s.dtype),
                "shape": [str(d) for d in s.shape], "layout": s.layout, "node": s.node,
            }
            for s in chosen
        ],
        "misses": [{"layer": m.layer, "hook": m.hook, "reason": m.reason, "near": list(m.near)} for m in missing],
    }  # fmt: skip


def _print(loaded: Loaded, table: SiteTable, chosen: SiteTable, missing: list[Miss], every: bool) -> None:
    if loaded.note:
        notes().print(loaded.note)
    out = console()
    kind = "several graphs" if table.partial else "one graph"
    if chosen.sites:
        rows = Table(
            title=f"{loaded.name}: {_counted(len(chosen), 'site')}, {_counted(table.n_layers, 'layer')}, {kind}",
            title_justify="left",
        )
        for name in ("layer", "hook", "width", "dtype", "shape", "layout", "node"):
            rows.add_column(name, justify="right" if name in ("layer", "width") else "left")
        for s in chosen:
            cells = (str(s.layer), s.hook, str(s.width), dtype_text(s.dtype), escape(_dims(s)), s.layout, s.node)
            rows.add_row(*cells)
        out.print(rows)
    else:
        out.print(f"{escape(loaded.name)}: no site")
    if not missing:
        return
    if chosen.sites and not every:
        out.print(f"without a value: {_counted(len(missing), 'hook')}; --misses says why")
        return
    why = Table(title="without a value", title_justify="left")
    for name in ("layer", "hook", "reason", "near"):
        why.add_column(name, overflow="fold")
    for m in missing:
        why.add_row("all" if m.layer is None else str(m.layer), m.hook, escape(m.reason), escape(", ".join(m.near)))
    out.print(why)
