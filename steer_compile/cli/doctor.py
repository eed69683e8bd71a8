"""`steer-compile doctor`: what this machine has, and what to do about what it lacks."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from steer_compile.cli.load import load
from steer_compile.cli.output import JSON_HELP, console, print_json, progress
from steer_compile.cli.verify import read_spec
from steer_compile.debug.checkup import FAULT, NOTE, check_up, skips_of
from steer_compile.errors import SpecError
from steer_compile.spec import SteerSpec

COLOURS = {FAULT: "red", NOTE: "yellow"}


def doctor(
    model: Annotated[
        str | None, typer.Argument(help="Compile this model with CUDA graphs, and say which are skipped.")
    ] = None,
    spec: Annotated[
        Path | None, typer.Option(help="SteerSpec for the model; without it post_block is steered.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Check versions, GPU, Triton, vLLM, compilers, caches and CUDA graphs. Exit code 1: a fault.

    Example: steer-compile doctor
    """
    if spec is not None and model is None:
        raise SpecError(f"--spec {spec} is for a MODEL, and none was given; name the model that it steers")
    skips = None
    if model is not None:
        with progress(None) as step:
            step("compiling with CUDA graphs", 0)
            loaded = load(model)
            wanted = read_spec(spec) if spec else SteerSpec(steer=("post_block",))
            skips = skips_of(loaded.model, loaded.inputs, wanted)
    found = check_up(skips)
    if as_json:
        print_json([asdict(finding) for finding in found])
    else:
        table = Table(show_header=False, box=None)
        for finding in found:
            colour = COLOURS.get(finding.state, "green")
            told = escape(finding.text) + (f"\n[dim]-> {escape(finding.cure)}[/dim]" if finding.cure else "")
            table.add_row(finding.topic, f"[{colour}]{finding.state}[/{colour}]", told)
        console().print(table)
    raise typer.Exit(1 if any(finding.state == FAULT for finding in found) else 0)
