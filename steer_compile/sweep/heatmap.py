"""A sweep as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from steer_compile.sweep.result import SweepResult


def draw_sweep(path: Path, result: SweepResult, labels: Sequence[str], title: str = "") -> None:
    """Draw layers against positions, one panel for each hook.

    Args:
        path: PNG file to write.
        labels: of each position of the result.
        title: in front of the values of both runs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grids = {
        hook: np.array([[np.nan if v is None else v for v in line] for line in grid], dtype=np.float64)
        for hook, grid in result.grids.items()
    }
    reach = max((float(np.nanmax(np.abs(grid - result.baseline))) for grid in grids.values()), default=0.0) or 1.0
    wide = min(4.0 + 0.26 * len(labels), 24.0)
    tall = 1.3 + len(grids) * (0.8 + 0.22 * len(result.layers))
    figure = Figure(figsize=(wide, tall), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(grids), 1, squeeze=False)[:, 0]
    shown = None
    for axes, (hook, grid) in zip(panels, grids.items(), strict=True):
        shown = axes.imshow(
            grid, aspect="auto", origin="lower", interpolation="nearest", cmap="RdBu_r",
            vmin=result.baseline - reach, vmax=result.baseline + reach,
        )  # fmt: skip
        axes.set_yticks(range(len(result.layers)), [str(layer) for layer in result.layers], fontsize=8)
        axes.set_xticks(range(len(labels)), [label.replace("$", r"\$") for label in labels], fontsize=8)
        axes.tick_params(axis="x", labelrotation=90 if max(map(len, labels), default=0) > 2 else 0)
        axes.set_ylabel(f"{hook}\nlayer", fontsize=9)
    panels[-1].set_xlabel("position (clean token, and the corrupted one where it differs)", fontsize=9)
    name = f"recovered share of {result.measure}" if result.metric == "recovered" else result.metric
    if shown is not None:
        figure.colorbar(shown, ax=list(panels), label=name, fraction=0.05, pad=0.02)
    runs = f"{result.measure}: clean {result.clean:.3f}, corrupted {result.corrupted:.3f}"
    figure.suptitle(f"{title}\n{runs}" if title else runs, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
