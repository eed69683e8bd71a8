"""`steer-compile diff`: what a pass, or another spec, changes in a model's graphs."""

from __future__ import annotations

import difflib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from steer_compile.canon import canonical_text
from steer_compile.cli.graphs import read_graphs
from steer_compile.cli.load import Loaded, load
from steer_compile.cli.output import DEVICE_HELP, JSON_HELP, check_device, console, notes, print_json, progress
from steer_compile.cli.sites import joined
from steer_compile.cli.verify import default_spec, read_spec
from steer_compile.debug.kernels import compiled_kernels
from steer_compile.debug.tracing import PASSES, Traced, op_counts, stage
from steer_compile.errors import SpecError
from steer_compile.spec import SteerSpec


@dataclass(frozen=True)
class Change:
    """Two texts of the same graphs, how often each operator is called in them, and their kernels where counted."""

    before: str
    after: str
    old: Counter[str]
    new: Counter[str]
    names: tuple[str, str]
    kernels: tuple[int, int] | None = None

    def ops(self) -> dict[str, tuple[int, int]]:
        """Operators whose number differs."""
        every = sorted({*self.old, *self.new})
        return {op: (self.old[op], self.new[op]) for op in every if self.old[op] != self.new[op]}

    def lines(self, context: int) -> list[str]:
        """Unified diff."""
        before, after = self.before.splitlines(), self.after.splitlines()
        return list(difflib.unified_diff(before, after, *self.names, n=context, lineterm=""))


def diff(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, config.json, or module:function.")],
    step: Annotated[str, typer.Option("--pass", help=f"What this pass changes: {', '.join(PASSES[1:])}.")] = "splice",
    spec: Annotated[
        list[Path] | None, typer.Option(help="SteerSpec; twice: what the second changes against the first.")
    ] = None,
    context: Annotated[int, typer.Option(min=0, help="Lines around each change.")] = 2,
    device: Annotated[
        str, typer.Option(help=f"{DEVICE_HELP} With --kernels it is the one that is here.", callback=check_device)
    ] = "cuda",
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Compile both and count kernels; reads the weights.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Show what changes in a model's graphs: operator counts, canonical text, kernels. Exit code 1: nothing changes.

    Without a spec every hook of the stream is steered.

    Example: steer-compile diff models/demo --spec spec.json
    """
    if step not in PASSES[1:]:
        raise SpecError(f"{step!r} is no pass; the passes are {', '.join(PASSES[1:])}")
    given = [read_spec(path) for path in spec or ()]
    if len(given) > 2:
        raise SpecError(f"{len(given)} specs were given; diff compares one with the model, or two with each other")
    if len(given) == 2 and step != "splice":
        raise SpecError(f"two specs are compared behind splice, so --pass {step} means nothing; leave it out")
    with progress(None) as tell:
        tell("tracing the model", 0)
        loaded, graphs = read_graphs(model)
        specs = given or [default_spec(joined(graphs), loaded.inputs)]
        device = "" if kernels else device
        change = _two(graphs, specs, device) if len(specs) == 2 else _one(graphs, specs[0], step, device)
        if kernels:
            tell("compiling both", 0)
            change = _counted(load(model), specs, change)
    if as_json:
        print_json(_plain(loaded, change, context))
    else:
        _print(loaded, change, context)
    raise typer.Exit(0 if change.before != change.after else 1)


def _one(graphs: list[Traced], spec: SteerSpec, step: str, device: str) -> Change:
    staged = stage(graphs, spec, device)
    front = PASSES[PASSES.index(step) - 1]
    texts = ["".join(made.report_after(name) for made in staged) for name in (front, step)]
    counts = [
        sum((op_counts(made.graph_after(name).graph) for made in staged), Counter[str]()) for name in (front, step)
    ]
    return Change(texts[0], texts[1], counts[0], counts[1], (f"before {step}", f"after {step}"))


def _two(graphs: list[Traced], specs: list[SteerSpec], device: str) -> Change:
    both = [[made.gm.graph for made in stage(graphs, spec, device)] for spec in specs]
    texts = ["".join(canonical_text(graph, True) for graph in made) for made in both]
    counts = [sum((op_counts(graph) for graph in made), Counter[str]()) for made in both]
    return Change(texts[0], texts[1], counts[0], counts[1], ("first spec", "second spec"))


def _counted(loaded: Loaded, specs: list[SteerSpec], change: Change) -> Change:
    pair: list[SteerSpec | None] = [*specs] if len(specs) == 2 else [None, specs[0]]
    found = [len(compiled_kernels(loaded.model, loaded.inputs, spec).names) for spec in pair]
    return Change(change.before, change.after, change.old, change.new, change.names, (found[0], found[1]))


def _plain(loaded: Loaded, change: Change, context: int) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "note": loaded.note,
        "ops": {op: {"before": old, "after": new} for op, (old, new) in change.ops().items()},
        "diff": change.lines(context),
        "kernels": None if change.kernels is None else {"before": change.kernels[0], "after": change.kernels[1]},
    }


def _print(loaded: Loaded, change: Change, context: int) -> None:
    if loaded.note:
        notes().print(loaded.note)
    out = console()
    table = Table(title=f"{change.names[0]} -> {change.names[1]}: operators", title_justify="left")
    for name in ("operator", "before", "after", "change"):
        table.add_column(name, justify="left" if name == "operator" else "right")
    for op, (old, new) in change.ops().items():
        table.add_row(op, str(old), str(new), f"{new - old:+d}")
    out.print(table if change.ops() else "the same operators, as often as before")
    colours = {"+": "green", "-": "red", "@": "cyan"}
    for line in change.lines(context):
        out.print(line, style=colours.get(line[:1], ""), markup=False, highlight=False, soft_wrap=True)
    if change.kernels is not None:
        old, new = change.kernels
        out.print(f"kernels: {old} before, {new} after ({new - old:+d})", highlight=False)
