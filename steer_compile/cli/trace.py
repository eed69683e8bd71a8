"""`steer-compile trace`: dumps of every pass, read back as well; vLLM's cache; and who owns the pass slots."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from steer_compile import torch_compat, watch
from steer_compile.cli.graphs import read_graphs
from steer_compile.cli.load import load
from steer_compile.cli.output import INNER_HELP, JSON_HELP, check_inner, console, notes, print_json, progress, shown
from steer_compile.cli.sites import joined
from steer_compile.cli.verify import default_spec, read_spec
from steer_compile.debug.bisecting import run_once
from steer_compile.debug.dumps import VARIABLE, Dump, DumpFile, read_dumps
from steer_compile.debug.engine_cache import Entry, default_cache, read_cache
from steer_compile.errors import DumpError


def trace(
    model: Annotated[str | None, typer.Argument(help="Model to compile and dump; none to read what is there.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the dumps.")] = Path("out/trace"),
    spec: Annotated[Path | None, typer.Option(help="SteerSpec; without it every stream hook is steered.")] = None,
    inner: Annotated[str, typer.Option(help=INNER_HELP, callback=check_inner)] = "eager",
    read: Annotated[Path | None, typer.Option(help="Read the dumps in this folder.")] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Read this compile cache of vLLM, such as ~/.cache/vllm/torch_compile_cache.")
    ] = None,
    slots: Annotated[bool, typer.Option("--slots", help="Say who owns each of Inductor's slots for a pass.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Write the graph behind every pass to a folder, and to torch's structured trace (TORCH_TRACE).

    Of the first pass and of the one that changes the graph there is the graph in front as well.

    A process that runs already is started again with STEER_COMPILE_TRACE=FOLDER; its workers write there as well.

    Example: steer-compile trace models/demo --out out/trace
    """
    told: dict[str, Any] = {}
    if model is not None and read is not None:
        raise DumpError(f"{model} is to be dumped to {out}, and {read} to be read; give MODEL or --read, not both")
    if model is not None:
        read = _dumped(model, out, spec, inner)
    if read is not None:
        told["dumps"] = read_dumps(read)
    if cache is not None:
        told["cache"] = read_cache(cache)
    if slots:
        told["slots"] = {name: owner(value) for name, value in torch_compat.pass_slots().items()}
    if not told:
        raise DumpError(
            f"nothing to do: give a MODEL, --read FOLDER, --cache {default_cache()} or --slots; "
            f"{VARIABLE}=FOLDER in the environment dumps a running process"
        )
    if as_json:
        print_json(_plain(told))
    else:
        _print(told)


def _dumped(model: str, out: Path, spec: Path | None, inner: str) -> Path:
    """Compile a model, and dump what its passes see."""
    if out.is_dir() and any(out.iterdir()):
        raise DumpError(f"the folder {out} is not empty; give another --out, or delete it")
    dump, given = Dump(out), read_spec(spec) if spec is not None else None
    with progress(None) as step:
        if given is None:
            step("tracing the model", 0)
            loaded, graphs = read_graphs(model)
            given = default_spec(joined(graphs), loaded.inputs)
        step("reading the model", 0)
        loaded = load(model)
        step("compiling the model", 0)
        with watch.looking_on(dump):
            run_once(loaded.model, loaded.inputs, given, inner)
    return out


def owner(value: object) -> str:
    """Module and name of what is in a slot, "" for a free one."""
    if value is None:
        return ""
    kind = value if isinstance(value, type) or hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def _plain(told: dict[str, Any]) -> dict[str, Any]:
    dumps: dict[str, list[DumpFile]] = told.get("dumps", {})
    entries: list[Entry] = told.get("cache", [])
    return {
        "dumps": {
            name: [{"file": str(f.path), "step": f.step, "when": f.when, "plan": f.plan, "lines": f.values,
                    "reads": f.edits} for f in files]
            for name, files in dumps.items()
        },
        "cache": [
            {"path": str(e.path), "key": e.key, "part": e.part, "kind": e.kind, "pieces": e.pieces, "tables": e.tables,
             "calls": e.calls, "hashes": e.hashes} for e in entries
        ],
        "slots": told.get("slots", {}),
    }  # fmt: skip


def _print(told: dict[str, Any]) -> None:
    if "dumps" in told:
        _print_dumps(told["dumps"])
    if "cache" in told:
        _print_cache(told["cache"])
    if "slots" in told:
        table = Table(title="Inductor's slots for a pass", title_justify="left")
        table.add_column("slot")
        table.add_column("owner")
        for name, who in told["slots"].items():
            table.add_row(name, who or "free")
        console().print(table)
        console().print("this package takes none of them: its passes run in front of Inductor", highlight=False)


def _print_dumps(dumps: dict[str, list[DumpFile]]) -> None:
    for name, files in dumps.items():
        table = Table(title=f"{name}: {files[0].versions}", title_justify="left")
        for column in ("file", "plan", "lines", "reads of our tables"):
            table.add_column(column, justify="left" if column in ("file", "plan") else "right")
        for file in files:
            table.add_row(escape(shown(file.path)), file.plan, str(file.values), str(file.edits))
        console().print(table)


def _print_cache(entries: list[Entry]) -> None:
    table = Table(title="vLLM's compile cache", title_justify="left")
    for column in ("key", "part", "kind", "pieces", "our tables", "our operators"):
        table.add_column(column, overflow="fold", justify="right" if column in ("pieces", "our tables") else "left")
    for entry in entries:
        table.add_row(entry.key, entry.part, entry.kind, str(entry.pieces), *_ours(entry))
    console().print(table)
    graphs = [entry for entry in entries if entry.tables is not None]
    steered = sum(bool(entry.tables) for entry in graphs)
    notes().print(f"{steered} of {len(graphs)} graphs are steered", highlight=False)
    if len(graphs) < len(entries):
        notes().print(f"artifacts are binary and not opened; {VARIABLE}=FOLDER dumps what is compiled into them")


def _ours(entry: Entry) -> tuple[str, str]:
    """What of this package is in an entry."""
    if entry.tables is None:
        return "not opened", "not opened"
    calls = ", ".join(f"{count} {name}" for name, count in sorted(entry.calls.items()))
    return str(entry.tables), calls or "none"
