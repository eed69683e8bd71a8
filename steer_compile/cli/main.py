"""`steer-compile`: the command line. One module for each verb."""

from __future__ import annotations

import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from steer_compile import torch_compat
from steer_compile._version import __version__
from steer_compile.cli.bisect import bisect
from steer_compile.cli.coverage import coverage
from steer_compile.cli.demo import demo
from steer_compile.cli.diff import diff
from steer_compile.cli.doctor import doctor
from steer_compile.cli.explain import explain
from steer_compile.cli.graph import graph
from steer_compile.cli.load import first_line
from steer_compile.cli.patch_sweep import patch_sweep
from steer_compile.cli.plan import plan
from steer_compile.cli.sites import sites
from steer_compile.cli.trace import trace
from steer_compile.cli.verify import verify
from steer_compile.errors import SteerError

FOREIGN_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError, NameError, OSError,
    RuntimeError, SyntaxError, TypeError, ValueError,
)  # fmt: skip
"""What a user's model, file or compiler may raise. The package's own errors are ValueErrors."""


class _Group(TyperGroup):
    """Errors become one message on standard error and exit code 2; ``--debug`` adds the traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):  # they are RuntimeErrors
            raise
        except FOREIGN_ERRORS as error:
            if ctx.params.get("debug"):
                typer.echo("".join(traceback.format_exception(error)), err=True)
            typer.echo(message(error, bool(ctx.params.get("debug"))), err=True)
            raise typer.Exit(2) from error


def message(error: BaseException, debug: bool = False) -> str:
    """What the user reads about an error."""
    if isinstance(error, SteerError):
        return f"{type(error).__name__}: {error}"
    if isinstance(error, torch_compat.DynamoError):
        return f"the model does not compile: {torch_compat.untraceable(error)}"
    hint = "" if debug else " (steer-compile --debug shows where)"
    return f"{type(error).__name__}: {first_line(error)}{hint}"


app = typer.Typer(
    name="steer-compile",
    cls=_Group,
    help="Steer, monitor and capture the residual stream of compiled language models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (sites, plan, explain, diff, bisect, trace, doctor, verify, coverage, demo, graph, patch_sweep):
    app.command()(command)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steer-compile {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
) -> None:
    """Steer, monitor and capture the residual stream of compiled language models.

    Example: steer-compile sites models/demo
    """


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
