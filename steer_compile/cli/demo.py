"""`steer-compile demo`: steer the style of a small bundled language model, in one batch and without recompiling."""

from __future__ import annotations

import importlib.util
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from steer_compile.cli.load import load
from steer_compile.cli.output import INNER_HELP, JSON_HELP, check_inner, console, notes, print_json, progress, shown
from steer_compile.demo.inputs import bundled_model, read_styles, style_scorer, tokenizer_of
from steer_compile.demo.plot import draw_response
from steer_compile.demo.report import report, show
from steer_compile.demo.run import CURVE, QUICK_CURVE, Demo, Result, Styles
from steer_compile.demo.subject import Sampling, Shapes, Subject
from steer_compile.errors import CheckpointError, SteerError

STRENGTH = 2.5
LAYER_SHARE = 0.25
"""The default layer, as a share of the depth: chosen on the bundled model."""
TEMPERATURE = 0.7
FULL = Shapes(rows=12, prompt=128, new_tokens=100)
QUICK = Shapes(rows=3, prompt=64, new_tokens=32)
PASSAGES, QUICK_PASSAGES = 48, 6
SMALL = 50_000_000
"""Parameters below which several threads cost more than they gain."""


def demo(
    model: Annotated[str, typer.Argument(help="Hugging Face directory; the bundled demo model by default.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of strength.png and report.json.")] = Path("out/demo"),
    strength: Annotated[float, typer.Option(help="Multiple of the difference of the styles' means.")] = STRENGTH,
    layer: Annotated[int | None, typer.Option(help="Layer that is steered; -1 is the last.")] = None,
    inner: Annotated[str, typer.Option(help=INNER_HELP, callback=check_inner)] = "inductor",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter texts, and no comparison compile.")] = False,
    positive: Annotated[
        Path | None, typer.Option(help="Text file, passages separated by blank lines: the style to steer toward.")
    ] = None,
    negative: Annotated[Path | None, typer.Option(help="Passages of the style to steer away from.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Derive a style direction from captures, steer generation with it both ways, and measure what it costs.

    Exit code 1: a row of the mixed batch differs from its own run, a change of steering recompiled, or the style
    does not follow.

    Example: steer-compile demo --strength 2 --out out/demo
    """
    if not 0 < strength < inf:
        raise typer.BadParameter("give a positive number", param_hint="--strength")
    if importlib.util.find_spec("matplotlib") is None:
        raise SteerError("the demo draws with matplotlib: pip install 'steer-compile[demo]'")
    shapes = QUICK if quick else FULL
    with progress(None) as step:
        step("reading the model", 0)
        loaded = load(model or str(bundled_model()), torch.float32)
    folder = loaded.folder
    if folder is None:
        raise CheckpointError(f"{model} is a function; the demo generates text and takes a Hugging Face directory")
    styles = read_styles(folder, positive, negative, QUICK_PASSAGES if quick else PASSAGES, shapes.rows)
    scorer = style_scorer(folder) if positive is None else None
    curve = QUICK_CURVE if quick else CURVE
    compare = inner == "inductor" and not quick
    with progress(6 + compare + len(curve)) as step, _settings(loaded.model):
        chosen = layer if layer is not None else default_layer(loaded.model)
        subject = Subject(
            loaded.model, tokenizer_of(loaded.model, folder), shapes, (chosen,), inner, Sampling(TEMPERATURE)
        )
        run = Demo(subject, styles, lambda text: step(text, 1))
        if compare:
            run.run_plain(inner)
        result = run.run(strength, scorer, curve)
    _finish(out, result, styles, report(shown(folder), result, styles, inner), as_json)
    raise typer.Exit(0 if result.ok else 1)


def _finish(out: Path, result: Result, styles: Styles, data: dict[str, Any], as_json: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    draw_response(out / "strength.png", result.curve, result.natural, (styles.positive, styles.negative))
    if as_json:
        print_json(data)
        return
    show(console(), result, styles)
    notes().print(f"wrote {shown(out / 'strength.png')} and {shown(out / 'report.json')}", highlight=False)


@contextmanager
def _settings(model: nn.Module) -> Iterator[None]:
    """No gradients, no warnings of the compiler, and one thread for a small model."""
    threads = torch.get_num_threads()
    if sum(p.numel() for p in model.parameters()) < SMALL:
        torch.set_num_threads(1)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)


def default_layer(model: nn.Module) -> int:
    """A layer at a quarter of the depth."""
    config: Any = model.config
    return int(config.get_text_config().num_hidden_layers * LAYER_SHARE)
