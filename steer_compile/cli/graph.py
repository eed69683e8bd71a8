"""`steer-compile graph`: the graphs of a model behind a pass, as text, as a drawing, or as a page to click through."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer

from steer_compile.cli.graphs import read_graphs
from steer_compile.cli.load import Loaded, load
from steer_compile.cli.output import DEVICE_HELP, JSON_HELP, check_device, notes, print_json, progress, shown
from steer_compile.cli.verify import read_spec
from steer_compile.debug.dot import dot
from steer_compile.debug.draw import PLANNED, draw
from steer_compile.debug.drawing import Drawing
from steer_compile.debug.kernels import Kernels, compiled_kernels
from steer_compile.debug.metro import svg
from steer_compile.debug.tracing import PASSES, Staged, Traced, stage, trace
from steer_compile.debug.webpage import page
from steer_compile.errors import SpecError, SteerError
from steer_compile.spec import SteerSpec

FORMATS: dict[str, Callable[[Drawing], str]] = {"dot": dot, "svg": svg, "html": page}


def _known_format(name: str) -> str:
    if name not in ("text", *FORMATS):
        raise typer.BadParameter(f"{name!r} is none of text, {', '.join(FORMATS)}")
    return name


def graph(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, config.json, or module:function.")],
    spec: Annotated[Path | None, typer.Option(help="SteerSpec as .json or .toml.")] = None,
    after: Annotated[
        str | None, typer.Option(help=f"Pass behind which to look: {', '.join(PASSES)}; the last one by default.")
    ] = None,
    layer: Annotated[int | None, typer.Option(help="Show this layer only; -1 is the last.")] = None,
    form: Annotated[str, typer.Option("--format", callback=_known_format, help="text, dot, svg or html.")] = "text",
    out: Annotated[Path | None, typer.Option(help="File to write; standard output by default.")] = None,
    device: Annotated[str, typer.Option(help=f"{DEVICE_HELP} The model's by default.", callback=check_device)] = "",
    kernels: Annotated[bool, typer.Option(help="Compile the model, and name the kernels of each node.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Show a model's graphs: the residual stream, its hook points and branches, and what a spec puts there.

    No weights are read unless the kernels are asked for. With --json the drawing is printed as JSON, and --out still
    gets the format.

    Example: steer-compile graph models/demo --format html --out page.html
    """
    wanted = read_spec(spec) if spec is not None else None
    step_name = _checked_pass(after, wanted)
    with progress(None) as step:
        step("reading and tracing the model", 0)
        loaded, graphs = _with_weights(model) if kernels else read_graphs(model)
        planned = wanted is not None and step_name in PLANNED
        staged = stage(graphs, wanted, device) if planned and wanted else [Staged(g, None, g.gm) for g in graphs]
        step("compiling the model" if kernels else "drawing", 0)
        compiled = _kernels(loaded, wanted if step_name == "splice" else None, device) if kernels else Kernels()
        drawing = draw(loaded.name, staged, step_name, compiled.of_node, compiled.names)
        drawing = drawing if layer is None else drawing.only(layer)
        made = _text(staged, drawing, layer) if form == "text" else FORMATS[form](drawing)
    if loaded.note:
        notes().print(f"no kernels: {loaded.note}" if kernels else loaded.note, markup=False)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(made, encoding="utf-8")
        notes().print(f"wrote {shown(out)} ({len(made.encode()) / 1000:.0f} kB)", highlight=False, markup=False)
    if as_json:
        print_json(drawing.plain())
    elif out is None:
        typer.echo(made, nl=False)


def _with_weights(model: str) -> tuple[Loaded, list[Traced]]:
    loaded = load(model)
    return loaded, trace(loaded.model, loaded.inputs)


def _checked_pass(after: str | None, spec: SteerSpec | None) -> str:
    """The pass to look behind.

    Raises:
        SpecError: there is no such pass, or it needs a spec.
    """
    step = after or ("find_sites" if spec is None else "splice")
    if step not in PASSES:
        raise SpecError(f"there is no pass {step!r}; the passes are {', '.join(PASSES)}")
    if step in PLANNED and spec is None:
        raise SpecError(f"the pass {step} needs a spec: give --spec, or look behind {' or '.join(PASSES[:2])}")
    return step


def _kernels(loaded: Loaded, spec: SteerSpec | None, device: str) -> Kernels:
    """The kernels of a model; none where it has no weights of its own.

    Raises:
        SteerError: the plan is for another device than that of the model.
    """
    if loaded.note:
        return Kernels()
    own = next((p.device.type for p in loaded.model.parameters()), "cpu")
    if device not in ("", own):
        raise SteerError(f"kernels are those of the model's device, {own}: leave --device {device} out")
    return compiled_kernels(loaded.model, loaded.inputs, spec)


def _text(staged: list[Staged], drawing: Drawing, layer: int | None) -> str:
    if layer is None:
        texts = [(one.traced.name, one.text_after(drawing.step)) for one in staged]
    else:
        by_name = {one.traced.name: one for one in staged}
        texts = [(line.name, "".join(_lines(by_name[line.name], drawing.step, drawing))) for line in drawing.lines]
    if len(staged) == 1:
        return texts[0][1]
    return "".join(f"# graph {name}\n{text}" for name, text in texts)


def _lines(staged: Staged, step: str, drawing: Drawing) -> Iterator[str]:
    """What was found in a layer, and the lines of its nodes."""
    line = next(line for line in drawing.lines if line.name == staged.traced.name)
    mine = re.compile(rf"\blayers\.{line.layers[0].number}\.\w+ [=:]")
    for text in staged.text_after(step).splitlines():
        if text.startswith("#") and mine.search(text):
            yield f"{text}\n"
    number = line.layers[0].number
    values = {station.node for station in line.stations}
    for op in line.ops:
        if (op.layer == number or op.name in values) and not op.state and op.origin != "removed":
            yield f"{op.line}\n"
