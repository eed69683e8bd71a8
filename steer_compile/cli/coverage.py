"""`steer-compile coverage`: the table over the model types of the installed transformers."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table

from steer_compile.cli.output import INNER_HELP, JSON_HELP, check_inner, console, notes, print_json, progress, shown
from steer_compile.errors import SteerError, UnknownName

if TYPE_CHECKING:
    from steer_compile.coverage.check import Record


def coverage(
    types: Annotated[str, typer.Option(help="Model types, comma-separated; all of them by default.")] = "",
    inner: Annotated[str, typer.Option(help=INNER_HELP, callback=check_inner)] = "eager",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 2,
    journal: Annotated[
        Path | None,
        typer.Option(help="File of finished types; a run goes on from it. Without it, interrupted runs go on."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of coverage.md and coverage.json.")] = Path("docs"),
    publish: Annotated[bool, typer.Option("--publish", help="Write the two files.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Check tiny random models of every causal-LM type against forward hooks. Exit code 1: a type does not pass.

    Example: steer-compile coverage --types llama,gpt2,gpt_neox
    """
    try:
        from steer_compile.coverage import table, zoo
    except ImportError as error:
        raise SteerError("the coverage table needs transformers: pip install 'steer-compile[hf]'") from error
    wanted = _chosen(types, zoo.model_types())
    file = journal or Path("out") / f"coverage-{inner}.jsonl"
    resumed = sum(r.type in wanted for r in table.read_journal(file))
    with progress(len(wanted)) as step, _quiet():
        step("checking", 0)
        records = table.run_types(wanted, inner, file, lambda record: step(record.type, 1), workers)
    if resumed:
        notes().print(f"{resumed} of {len(wanted)} types were in the journal {shown(file)}", highlight=False)
    if journal is None:  # it serves interrupted runs; a finished one is checked anew next time
        file.unlink()
    if publish:
        table.publish(records, out, inner)
    passed = sum(r.passed for r in records)
    if as_json:
        print_json({"inner": inner, "passed": passed, "types": [r.to_dict() | {"passed": r.passed} for r in records]})
    else:
        _print(records, passed, table.COLUMNS)
        if publish:
            console().print(f"wrote {shown(out / 'coverage.md')} and {shown(out / 'coverage.json')}", highlight=False)
    raise typer.Exit(0 if passed == len(records) else 1)


def _chosen(types: str, known: tuple[str, ...]) -> list[str]:
    names = list(dict.fromkeys(name.strip() for name in types.split(",") if name.strip()))
    unknown = [name for name in names if name not in known]
    if unknown:
        near = [name for name in known if name[:3] == unknown[0][:3]][:6]
        raise UnknownName(f"transformers has no causal-LM type {unknown[0]!r}; close are {', '.join(near) or 'none'}")
    return names or list(known)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Worker processes write their own warnings nowhere."""
    before = os.environ.get("PYTHONWARNINGS")
    os.environ["PYTHONWARNINGS"] = "ignore"
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONWARNINGS"]
        else:
            os.environ["PYTHONWARNINGS"] = before


def _print(records: list[Record], passed: int, columns: tuple[str, ...]) -> None:
    out = console()
    shown_records = records if len(records) <= 20 else [r for r in records if not r.passed]
    if shown_records:
        table = Table(title="checked types" if len(records) <= 20 else "types that do not pass", title_justify="left")
        for name in ("type", *columns, "blocks", "reason"):
            table.add_column(name, overflow="fold")
        marks = {True: "yes", False: "[red]NO[/red]", None: "-"}
        for r in shown_records:
            cells = [marks[r.to_dict()[c]] for c in columns]
            table.add_row(r.type, *cells, str(r.layers), escape(r.reason))
        out.print(table)
    out.print(f"{passed} of {len(records)} types pass every column", highlight=False)
