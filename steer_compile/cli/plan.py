"""`steer-compile plan`: what a spec would do to a model, where its data lies, and what it costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from steer_compile.cli.graphs import read_graphs
from steer_compile.cli.load import Loaded
from steer_compile.cli.output import DEVICE_HELP, JSON_HELP, check_device, console, notes, print_json, progress
from steer_compile.cli.verify import read_spec
from steer_compile.debug.costs import Cost, bank_bytes, costs
from steer_compile.debug.tracing import Staged, stage
from steer_compile.ir import Edit

GIB, GB = 2**30, 10**9


def plan(
    spec: Annotated[Path, typer.Argument(help="SteerSpec as .json or .toml.")],
    model: Annotated[str, typer.Argument(help="Hugging Face directory, config.json, or module:function.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step, for the estimate of its cost.")] = 256,
    bandwidth: Annotated[float, typer.Option(min=0.001, help="Memory bandwidth in TB/s, for the same.")] = 3.0,
    device: Annotated[str, typer.Option(help=DEVICE_HELP, callback=check_device)] = "cuda",
    text: Annotated[bool, typer.Option("--text", help="Print the plan's own text, which is its cache key.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Show the edits of a spec, their lowering and why, the tables and their bytes, and the bytes that a step moves.

    No weights are read, and no GPU is needed to see what is planned for one.

    Example: steer-compile plan spec.json models/demo --bandwidth 3.35
    """
    wanted = read_spec(spec)
    with progress(None) as step:
        step("tracing the model", 0)
        loaded, graphs = read_graphs(model, (1, tokens))
        step("planning", 0)
        staged = [made for made in stage(graphs, wanted, device) if made.plan is not None]
    found = [costs(made.plan, tokens) for made in staged if made.plan is not None]
    for line in _beside(staged, tokens, wanted.max_tokens):
        notes().print(line, highlight=False)
    if as_json:
        print_json(_plain(loaded, staged, found, tokens, bandwidth))
    elif text:
        for made in staged:
            typer.echo(made.plan.text() if made.plan is not None else "")
    else:
        _print(loaded, staged, found, tokens, bandwidth)


def _beside(staged: list[Staged], tokens: int, most: int) -> list[str]:
    """What differs from a step of ``tokens`` tokens in what was traced and in what may run."""
    dims = [dim for made in staged[:1] for dim in made.traced.table.sites[0].shape]
    traced = math.prod(dim for dim in dims if isinstance(dim, int))
    lines = [] if traced == tokens else [f"lowerings are chosen for the {traced} tokens of the model's own example"]
    if tokens > most:
        lines.append(f"a call of {tokens} tokens is refused at run time: the spec has max_tokens={most}")
    return lines


def _us(cost: Cost, bandwidth: float) -> float:
    return cost.active / (bandwidth * 1e12) * 1e6


def _plain(
    loaded: Loaded, staged: list[Staged], found: list[list[Cost]], tokens: int, bandwidth: float
) -> dict[str, Any]:
    graphs = []
    for made, rows in zip(staged, found, strict=True):
        assert made.plan is not None
        edits = [
            {
                "layer": edit.site.layer, "hook": edit.site.hook, "node": edit.site.node, "ops": list(edit.ops),
                "lowering": edit.lowering, "why": edit.why, "fused": edit.fusion.text(),
                "slots": [slot.text() for slot in edit.slots], "idle_bytes": cost.idle, "active_bytes": cost.active,
                "microseconds": round(_us(cost, bandwidth), 3),
            }
            for edit, cost in zip(made.plan.edits, rows, strict=True)
        ]  # fmt: skip
        banks = [{"bank": bank.text(), "sites": len(bank.sites), "bytes": bank_bytes(bank)} for bank in made.plan.banks]
        graphs.append({"graph": made.traced.name, "digest": made.plan.digest(), "edits": edits, "banks": banks})
    return {"model": loaded.name, "note": loaded.note, "tokens": tokens, "tb_per_s": bandwidth, "graphs": graphs}


def _print(loaded: Loaded, staged: list[Staged], found: list[list[Cost]], tokens: int, bandwidth: float) -> None:
    if loaded.note:
        notes().print(loaded.note)
    out = console()
    for made, rows in zip(staged, found, strict=True):
        assert made.plan is not None
        title = f"{escape(loaded.name)}, graph {made.traced.name}: {len(made.plan.edits)} edits, {made.plan.digest()}"
        table = Table(title=title, title_justify="left")
        for name in ("layer", "hook", "operations", "value", "lowering", "MB a step", "us"):
            table.add_column(name, justify="right" if name in ("layer", "MB a step", "us") else "left")
        for edit, cost in zip(made.plan.edits, rows, strict=True):
            moved = f"{cost.active / 1e6:.2f}", f"{_us(cost, bandwidth):.2f}"
            table.add_row(
                str(edit.site.layer), edit.site.hook, "+".join(edit.ops), edit.site.node, edit.lowering, *moved
            )
        out.print(table)
        _print_reasons(made.plan.edits)
    _print_banks(staged[-1])
    total = sum((cost.active for rows in found for cost in rows), 0)
    us = total / (bandwidth * 1e12) * 1e6
    out.print(
        f"a step of {tokens} tokens moves {total / 1e6:.1f} MB more than the model alone: at least {us:.1f} us at "
        f"{bandwidth} TB/s; where a kernel of the model is taken over, its own bytes are not counted",
        highlight=False,
    )


def _print_reasons(edits: tuple[Edit, ...]) -> None:
    """Why each lowering was chosen; equal reasons once."""
    reasons: dict[tuple[str, str], int] = {}
    for edit in edits:
        key = edit.lowering, edit.why or "the spec asks for it, or there is no template for this device"
        reasons[key] = reasons.get(key, 0) + 1
    for (lowering, why), count in reasons.items():
        console().print(f"  {count} by {lowering}: {why}", highlight=False, markup=False)


def _print_banks(made: Staged) -> None:
    assert made.plan is not None
    table = Table(title="tables on the device", title_justify="left")
    for name in ("bank", "sites", "bytes"):
        table.add_column(name, justify="left" if name == "bank" else "right")
    groups: dict[str, tuple[int, int, int]] = {}
    for bank in made.plan.banks:
        banks, sites, size = groups.get(bank.text(), (0, 0, 0))
        groups[bank.text()] = banks + 1, sites + len(bank.sites), size + bank_bytes(bank)
    for text, (banks, sites, size) in groups.items():
        table.add_row(escape(text if banks == 1 else f"{banks} x {text}"), str(sites), f"{size:,}")
    total = sum(size for _, _, size in groups.values())
    console().print(table)
    console().print(f"{total:,} bytes of device memory ({total / GIB:.3f} GiB)", highlight=False)
