"""Score, gain and projection over steps, as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steer_compile.demo.dynamic_run import Trace

COLORS = {"unsteered": "#9aa5b1", "proportional": "#1f4e79", "latched": "#b5542b", "held": "#1f4e79"}
_PANELS = ("score", "gain", "projection")


def draw_traces(
    path: Path, traces: Sequence[Trace], titles: Mapping[str, str], labels: Mapping[str, str], lines: Mapping[str, Any]
) -> None:
    """One column for each request, one row for score, gain and projection, one line for each run.

    Args:
        path: PNG file to write.
        titles: title of the column of each request.
        labels: label of the axis of ``score``, ``gain`` and ``projection``.
        lines: dashed lines in a panel: ``{panel: [(from step, to step, height)]}``, None for the ends.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 4.6 * len(titles), 6.4), dpi=140, layout="constrained")
    FigureCanvasAgg(figure)
    grid: Any = figure.subplots(3, len(titles), sharex=True, sharey="row", squeeze=False)
    for column, (request, title) in enumerate(titles.items()):
        grid[0][column].set_title(title, fontsize=10, loc="left")
        for row, panel in enumerate(_PANELS):
            _draw_panel(grid[row][column], panel, traces, request, lines.get(panel, ()))
            if column == 0:
                grid[row][column].set_ylabel(labels[panel], fontsize=9)
        grid[2][column].set_xlabel("step (0 is the prompt)")
    grid[0][-1].legend(frameon=False, fontsize=8, loc="upper right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_panel(axes: Any, panel: str, traces: Sequence[Trace], request: str, lines: Sequence[Any]) -> None:
    for trace in traces:
        values = [getattr(point, panel) for point in trace.points[request]]
        color = COLORS[trace.name]
        if panel == "projection":
            axes.plot(values, color=color, linewidth=0.6, alpha=0.35)
            axes.plot(_smooth(values), color=color, linewidth=1.8, label=trace.name)
        else:
            axes.plot(values, color=color, linewidth=1.5, label=trace.name)
    if panel == "projection":  # single tokens reach far beyond what the means do
        means = [value for trace in traces for value in _smooth([p.projection for p in trace.points[request]])]
        low, high = axes.get_ylim() if axes.get_autoscaley_on() is False else (0.0, 0.0)
        axes.set_ylim(min(low, min(means) - 1.0), max(high, max(means) + 1.0))
    for begin, end, height in lines:
        last = max(len(trace.points[request]) for trace in traces)
        axes.plot([begin or 0, end or last], [height, height], color="#333333", linewidth=1.0, linestyle="--")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _smooth(values: Sequence[float], span: int = 16) -> list[float]:
    """Mean over the last steps."""
    return [sum(values[max(0, i - span + 1) : i + 1]) / (i + 1 - max(0, i - span + 1)) for i in range(len(values))]
