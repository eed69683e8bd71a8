"""What a run of the demo says, as plain data and for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steer_compile.demo.run import Result, Styles

SHOWN_PROMPTS = 4
_COLUMNS = ("negative", "unsteered", "positive")


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def report(name: str, result: Result, styles: Styles, inner: str) -> dict[str, Any]:
    """Everything that was measured, as plain data."""
    direction = result.direction
    return {
        "model": name,
        "inner": inner,
        "styles": {"positive": styles.positive, "negative": styles.negative},
        "direction": {
            "site": f"layers.{direction.layer}.post_block",
            "length": float(direction.vector.norm()),
            "stream_length": direction.stream,
            "separation": direction.separation,
        },
        "strength": result.strength,
        "score": {name: _mean(values) for name, values in result.scores.items()},
        "score_of_passages": result.natural,
        "prompts": list(styles.prompts),
        "texts": result.texts,
        "scores": result.scores,
        "mixed": result.mixed,
        "curve": [{"strength": s, "mean": _mean(v), "scores": v} for s, v in result.curve],
        "cost": {
            "graphs": result.graphs,
            "recompiles": result.recompiles,
            "changes": result.changes,
            "kernels": result.kernels or None,
            "plain_equal": result.plain,
        },
        "seconds": round(result.seconds, 1),
        "torch": torch.__version__.partition("+")[0],
        "ok": result.ok,
    }


def labels(styles: Styles) -> dict[str, str]:
    """What the kinds of steering are called."""
    return {
        "negative": f"toward {styles.negative}",
        "unsteered": "unsteered",
        "positive": f"toward {styles.positive}",
    }


def show(out: Console, result: Result, styles: Styles) -> None:
    """Texts side by side, the mixed batch, and the cost."""
    direction, names = result.direction, labels(styles)
    out.print(
        f"Direction: {styles.positive} minus {styles.negative} at layers.{direction.layer}.post_block, length "
        f"{float(direction.vector.norm()):.1f} in a stream of length {direction.stream:.1f}; it separates "
        f"{100 * direction.separation:.0f} % of the passages."
    )
    out.print(_side_by_side(result, styles, names))
    out.print(_mixed(result, names))
    for line in summary(result, styles):
        out.print(line)


def _side_by_side(result: Result, styles: Styles, names: dict[str, str]) -> Table:
    table = Table(title=f"The same prompts at strength {result.strength:g}", title_justify="left", show_lines=True)
    for name in _COLUMNS:
        table.add_column(f"{names[name]}\nmean score {_mean(result.scores[name]):+.2f}", ratio=1, overflow="fold")
    for i in range(min(SHOWN_PROMPTS, len(styles.prompts))):
        cells = (_cell(styles.prompts[i], result.texts[n][i], f"{result.scores[n][i]:+.2f}") for n in _COLUMNS)
        table.add_row(*cells)
    return table


def _mixed(result: Result, names: dict[str, str]) -> Table:
    table = Table(title="One batch, a steering for each row", title_justify="left", show_lines=True)
    for name in ("row", "steering", "text", "equals its own run"):
        table.add_column(name, ratio=1 if name == "text" else None, overflow="fold")
    for row in result.mixed[: 2 * len(_COLUMNS)]:
        same = "yes" if row["equal"] else "[red]NO[/red]"
        table.add_row(str(row["row"]), names[row["steering"]], _cell(row["prompt"], row["text"]), same)
    return table


def _cell(prompt: str, text: str, score: str = "") -> Text:
    """Prompt in bold, its continuation as printable text, and the score."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    cell = Text(prompt, style="bold")
    cell.append(shown.rstrip(), style="not bold")
    if score:
        cell.append(f"\n[{score}]", style="not bold dim")
    return cell


def summary(result: Result, styles: Styles) -> list[str]:
    """The findings, a line each."""
    means = {name: _mean(values) for name, values in result.scores.items()}
    equal, rows = sum(row["equal"] for row in result.mixed), len(result.mixed)
    lines = [
        f"Style score: {means['negative']:+.2f} toward {styles.negative}, {means['unsteered']:+.2f} unsteered, "
        f"{means['positive']:+.2f} toward {styles.positive} (passages: {result.natural['negative']:+.2f} and "
        f"{result.natural['positive']:+.2f}).",
        f"Mixed batch: {equal} of {rows} rows give the text of the run in which every row is steered as they are.",
        f"Recompiles: {result.recompiles} over {result.changes['vectors']} changes of vectors, "
        f"{result.changes['rows']} of rows and {result.changes['scales']} of scales; {result.graphs} graphs in all.",
    ]
    if result.kernels:
        plain, steered = result.kernels["plain"], result.kernels["steered"]
        lines.append(
            f"Kernels: {plain} without the backend, {steered} with steering and capture ({steered - plain:+d})."
        )
    if result.plain is not None:
        lines.append(f"Idle: {result.plain} of {rows} texts equal those of the model compiled without the backend.")
    lines.append(f"Time: {result.seconds:.0f} s.")
    return lines
