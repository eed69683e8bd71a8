"""`steer-compile patch-sweep`: which layers and positions carry a model's answer."""

from __future__ import annotations

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import nn

from steer_compile.cli.load import Loaded, load
from steer_compile.cli.output import INNER_HELP, JSON_HELP, check_inner, console, notes, print_json, progress, shown
from steer_compile.demo.hf_tokenizer import HfTokenizer
from steer_compile.demo.inputs import bundled_model, tokenizer_of
from steer_compile.demo.subject import Tokenizer
from steer_compile.errors import SpecError, SteerError
from steer_compile.sweep.heatmap import draw_sweep
from steer_compile.sweep.question import METRICS, Question
from steer_compile.sweep.result import SweepResult
from steer_compile.sweep.run import BATCH, Sweeper

IDS = "ids:"
"""In front of token ids that are given in place of a text."""
STRONGEST = 12
VISIBLE = {" ": "\u2423", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


def patch_sweep(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, config.json, or module:function.")] = "",
    clean: Annotated[str, typer.Option(help="Prompt whose values are put in place; 'ids:1,2' gives token ids.")] = "",
    corrupted: Annotated[str, typer.Option(help="Prompt that is patched, of as many tokens.")] = "",
    answer: Annotated[str, typer.Option(help="What the clean prompt is answered with, one token.")] = "",
    foil: Annotated[str, typer.Option(help="What it is compared with, one token.")] = "",
    metric: Annotated[str, typer.Option(help=f"{', '.join(METRICS)}.")] = "recovered",
    hook: Annotated[list[str] | None, typer.Option(help="Hook to sweep, may be repeated; post_block.")] = None,
    layers: Annotated[str, typer.Option(help="'all', or such as '0-3,7'.")] = "all",
    batch: Annotated[int, typer.Option(help="Cells of one forward.")] = BATCH,
    inner: Annotated[str, typer.Option(help=INNER_HELP, callback=check_inner)] = "inductor",
    out: Annotated[Path, typer.Option(help="Folder of patch_sweep.json and patch_sweep.png.")] = Path("out/patch"),
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Patch each layer and position of a clean run into a corrupted run, in batches, and measure the answer.

    Example: steer-compile patch-sweep models/demo --clean "as f: x = " --corrupted "as g: x = " --answer f
    """
    if not clean or not corrupted or not answer:
        raise typer.BadParameter("give --clean, --corrupted and --answer")
    if importlib.util.find_spec("matplotlib") is None:
        raise SteerError("the sweep draws with matplotlib: pip install 'steer-compile[demo]'")
    with progress(None) as step:
        step("reading the model", 0)
        loaded = load(model or str(bundled_model()), torch.float32)
    texts = _Texts(loaded)
    prompts = (texts.prompt(clean), texts.prompt(corrupted))
    tokens = (texts.token(answer, "answer"), texts.token(foil, "foil") if foil else None)
    question = Question(*prompts, *tokens, metric)
    _check_room(loaded.model, question)
    sweeper = Sweeper(loaded.model, len(question.clean), tuple(hook or ("post_block",)), layers, batch, inner)
    with progress(100) as step, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step("compiling, and the clean run", 0)
        done = 0

        def advance(cells: int, total: int) -> None:
            nonlocal done
            percent = 100 * cells // total
            step(f"{cells} of {total} cells", percent - done)
            done = percent

        result = sweeper.run(question, step=advance)
    labels = [texts.label(a, b) for a, b in zip(question.clean, question.corrupted, strict=True)]
    _finish(out, result, labels, _plain(loaded, question, result, labels), as_json)


class _Texts:
    """Token ids of what the user typed, and labels of token ids."""

    def __init__(self, loaded: Loaded) -> None:
        self._tokenizer: Tokenizer | None = None
        if loaded.folder is not None:
            self._tokenizer = tokenizer_of(loaded.model, loaded.folder)
        self._name = loaded.name

    def _encode(self, text: str, bos: bool) -> list[int]:
        if text.startswith(IDS):
            parts = [part.strip() for part in text.removeprefix(IDS).split(",")]
            if not all(part.isdecimal() for part in parts):
                raise SpecError(f"{text!r} holds no token ids; write such as 'ids:5,17'")
            return [int(part) for part in parts]
        if self._tokenizer is None:
            raise SpecError(f"{self._name} is a function and has no tokenizer; give token ids such as 'ids:5,17'")
        ids = self._tokenizer.encode(text, bos)
        if isinstance(self._tokenizer, HfTokenizer) and self._tokenizer.unknown in ids:
            raise SpecError(f"a part of {text!r} is no token of {self._name}; give text that its tokenizer knows")
        return ids

    def prompt(self, text: str) -> tuple[int, ...]:
        return tuple(self._encode(text, True))

    def token(self, text: str, what: str) -> int:
        """The one token of an answer.

        Raises:
            SpecError: it has none, or several.
        """
        ids = self._encode(text, False)
        if len(ids) != 1:
            raise SpecError(
                f"the {what} {text!r} has {len(ids)} tokens ({ids}); give text of one, or its id as 'ids:5'"
            )
        return ids[0]

    def label(self, clean: int, corrupted: int) -> str:
        one, other = self._piece(clean), self._piece(corrupted)
        return one if clean == corrupted else f"{one}/{other}"

    def _piece(self, token: int) -> str:
        text = "" if self._tokenizer is None else self._tokenizer.decode(torch.tensor([token]))
        visible = "".join(VISIBLE.get(character, character) for character in text)
        return visible if visible and visible.isprintable() and "\ufffd" not in visible else f"<{token}>"


def _check_room(model: nn.Module, question: Question) -> None:
    """Raise `SpecError` for prompts that are longer than the model's positions."""
    config: Any = getattr(model, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and len(question.clean) > most:
        raise SpecError(
            f"the prompts have {len(question.clean)} tokens and the model has {most} positions; shorten them"
        )


def _plain(loaded: Loaded, question: Question, result: SweepResult, labels: list[str]) -> dict[str, Any]:
    return {"model": loaded.name, "note": loaded.note, "question": vars(question), "labels": labels, **result.to_dict()}


def _finish(out: Path, result: SweepResult, labels: list[str], data: dict[str, Any], as_json: bool) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "patch_sweep.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    draw_sweep(out / "patch_sweep.png", result, labels, f"{data['model']}: clean values patched into the corrupted run")
    if as_json:
        print_json(data)
        return
    if data["note"]:
        notes().print(data["note"])
    runs = f"{result.measure}: clean {result.clean:.4f}, corrupted {result.corrupted:.4f}"
    table = Table(
        title=f"{escape(data['model'])}: the cells that move {result.metric} most; {runs}", title_justify="left"
    )
    for name in ("hook", "layer", "position", "token", result.metric):
        table.add_column(name, justify="left" if name in ("hook", "token") else "right")
    for cell in result.strongest(STRONGEST):
        place = (cell.hook, str(cell.layer), str(cell.position), escape(labels[cell.position]))
        table.add_row(*place, f"{cell.value:.4f}")
    console().print(table)
    cells, files = sum(1 for _ in result), (shown(out / "patch_sweep.json"), shown(out / "patch_sweep.png"))
    notes().print(
        f"{cells} cells, {result.equal} of them equal in both runs, in {result.forwards} forwards: "
        f"{result.seconds:.2f} s, and {result.compile_seconds:.1f} s to compile; wrote {' and '.join(files)}",
        highlight=False,
    )
