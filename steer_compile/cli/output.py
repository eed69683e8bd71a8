"""What all verbs share: consoles, JSON, progress bars."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

INNER_HELP = "Compiler of the graphs: inductor, aot_eager or eager."
INNERS = ("inductor", "aot_eager", "eager")
DEVICES = ("cuda", "cpu")
DEVICE_HELP = "Kind of device to plan for, cuda or cpu; it need not be there."
JSON_HELP = "Print JSON on standard output, nothing else."


def console() -> Console:
    """Standard output; tables keep their columns when it is a file."""
    found = Console()
    return found if found.is_terminal else Console(width=max(found.width, 120))


def notes() -> Console:
    """Standard error, for everything that is not the result."""
    return Console(stderr=True)


def print_json(data: Any) -> None:
    """The only line of standard output under ``--json``."""
    typer.echo(json.dumps(data, indent=1))


def check_inner(inner: str) -> str:
    """Raises `typer.BadParameter` for a compiler that the commands do not offer."""
    if inner not in INNERS:
        raise typer.BadParameter(f"{inner!r} is none of {', '.join(INNERS)}")
    return inner


def check_device(device: str) -> str:
    """Raises `typer.BadParameter` for a kind of device that nothing is planned for; "" is the graph's own."""
    if device not in ("", *DEVICES):
        raise typer.BadParameter(f"{device!r} is none of {', '.join(DEVICES)}")
    return device


@contextmanager
def progress(total: int | None) -> Iterator[Callable[[str, int], None]]:
    """A progress bar on standard error; yields ``step(description, advance)``. Without a total it only spins."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn())
    counted = (*columns[:3], MofNCompleteColumn(), columns[3])
    with Progress(*(counted if total else columns), console=notes(), transient=True) as bar:
        task = bar.add_task("", total=total)

        def step(description: str, advance: int = 1) -> None:
            bar.update(task, description=description, advance=advance, refresh=True)

        yield step


def shown(path: Path) -> str:
    """A path as the user would type it from here."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
