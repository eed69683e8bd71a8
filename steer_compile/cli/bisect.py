"""`steer-compile bisect`: which pass or site makes a steered model's numbers wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.table import Table

from steer_compile.cli.load import Loaded, load
from steer_compile.cli.output import INNER_HELP, JSON_HELP, check_inner, console, notes, print_json, progress
from steer_compile.cli.verify import logits_of, read_spec
from steer_compile.debug.bisecting import Bisection, Verdict


def bisect(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, config.json, or module:function.")],
    spec: Annotated[Path, typer.Argument(help="SteerSpec as .json or .toml.")],
    inner: Annotated[str, typer.Option(help=INNER_HELP, callback=check_inner)] = "inductor",
    tolerance: Annotated[
        float, typer.Option(min=0.0, help="Largest difference, relative to the largest logit.")
    ] = 1e-3,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Turn compilers, lowerings and sites off until the numbers agree with a judge that runs the graph node by node.

    Exit code 1: something is wrong, and it is named.

    Example: steer-compile bisect models/demo spec.json --inner eager
    """
    wanted = read_spec(spec)
    with progress(None) as step:
        step("reading the model", 0)
        loaded = load(model, torch.float32)
        step("tracing the model", 0)
        bisection = Bisection(
            loaded.model, loaded.inputs, wanted, logits_of, tolerance, lambda line: step(f"trying {line}", 0)
        )
        verdict = bisection.run(inner)
    if as_json:
        print_json(_plain(loaded, verdict, tolerance))
    else:
        _print(loaded, verdict)
    raise typer.Exit(1 if verdict.culprit else 0)


def _names(sites: tuple[tuple[str, int], ...]) -> list[str]:
    return [f"layers.{layer}.{hook}" for hook, layer in sites]


def _plain(loaded: Loaded, verdict: Verdict, tolerance: float) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "note": loaded.note,
        "tolerance": tolerance,
        "culprit": verdict.culprit,
        "sites": _names(verdict.sites),
        "text": verdict.text,
        "trials": [
            {
                "inner": t.inner, "lowering": t.lowering, "sites": _names(t.sites),
                "difference": None if t.difference == float("inf") else t.difference, "error": t.error,
            }
            for t in verdict.trials
        ],
    }  # fmt: skip


def _print(loaded: Loaded, verdict: Verdict) -> None:
    if loaded.note:
        notes().print(loaded.note)
    out = console()
    table = Table(title="what was tried", title_justify="left")
    for name in ("compiler", "lowering", "sites", "difference"):
        table.add_column(name, justify="right" if name in ("sites", "difference") else "left")
    for trial in verdict.trials:
        told = trial.error or f"{trial.difference:.1e}"
        table.add_row(trial.inner, trial.lowering, str(len(trial.sites)), told)
    out.print(table)
    verdict_line = f"[red]{verdict.culprit}[/red]" if verdict.culprit else "[green]nothing is wrong[/green]"
    out.print(f"{verdict_line}: {verdict.text}", highlight=False)
    if verdict.sites:
        out.print(f"the fewest sites with which it shows: {', '.join(_names(verdict.sites))}", highlight=False)
