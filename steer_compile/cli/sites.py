"""`steer-compile sites`: the hook points of a model, and why others have none."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import fx, nn

from steer_compile import torch_compat
from steer_compile.backend import steer_backend
from steer_compile.cli.load import Loaded, load
from steer_compile.cli.output import JSON_HELP, console, notes, print_json, progress
from steer_compile.hooks import parse_hook
from steer_compile.ir import Miss, Site, SiteTable, dtype_text
from steer_compile.passes.find_sites import find_sites
from steer_compile.spec import SteerSpec


def sites(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, config.json, or module:function.")],
    hook: Annotated[str | None, typer.Option(help="Show this hook only, such as post_block or resid_post.")] = None,
    layer: Annotated[int | None, typer.Option(help="Show this layer only; -1 is the last.")] = None,
    misses: Annotated[bool, typer.Option("--misses", help="Show every hook without a value, and why.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List where a model can be steered and captured. Exit code 1: nowhere.

    Example: steer-compile sites models/demo --hook post_block
    """
    wanted = parse_hook(hook) if hook is not None else None
    with progress(None) as step:
        step("reading the model", 0)
        loaded = load(model)
        step("tracing the model", 0)
        table = collect_sites(loaded.model, loaded.inputs)
    if layer is not None and layer < 0:
        layer += table.n_layers
    chosen = table.where(lambda s: wanted in (None, s.hook) and layer in (None, s.layer))
    missing = [m for m in table.misses if wanted in (None, m.hook) or m.hook == "*"]
    missing = [m for m in missing if layer in (None, m.layer) or m.layer is None]
    if not chosen.sites and not missing and layer is not None:
        missing = [_as_miss(table.find(wanted or "*", layer))]
    if as_json:
        print_json(_plain(loaded, chosen, missing))
    else:
        _print(loaded, table, chosen, missing, misses)
    raise typer.Exit(0 if chosen.sites else 1)


def _as_miss(found: Site | Miss) -> Miss:
    return found if isinstance(found, Miss) else Miss(found.layer, found.hook, "no such value")


def collect_sites(model: nn.Module, inputs: dict[str, Any]) -> SiteTable:
    """Sites of all graphs of one call, without compiling or changing any of them."""
    backend = steer_backend(SteerSpec(steer=("post_block",)), inner="eager")
    partial = False

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        nonlocal partial
        partial |= torch_compat.is_partial(gm)
        table = find_sites(gm, partial)
        if table.sites or not backend.tables:
            backend.tables.append(table)
        forward: Callable[..., Any] = gm.forward
        return forward

    torch.compiler.reset()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(model, backend=collect)(**inputs)
    torch.compiler.reset()
    return backend.sites


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
        out.print(f"{len(missing)} hooks have no value; --misses says why")
        return
    why = Table(title="without a value", title_justify="left")
    for name in ("layer", "hook", "reason", "near"):
        why.add_column(name, overflow="fold")
    for m in missing:
        why.add_row("all" if m.layer is None else str(m.layer), m.hook, escape(m.reason), escape(", ".join(m.near)))
    out.print(why)
