"""Draw one block of a model with four parallel streams and its hook points: docs/images/streams.png.

python scripts/draw_streams.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.patches import FancyBboxPatch

PATH = Path(__file__).parents[1] / "docs" / "images" / "streams.png"
STREAMS = ("#2f6690", "#3a7d44", "#b5651d", "#7b4b94")
INK, STEERED, CAPTURED = "#22272b", "#c1121f", "#5c6770"


def box(
    axes: Any, x: float, y: float, text: str, width: float = 1.3, color: str = "#eef1f4", height: float = 0.44
) -> None:
    patch = FancyBboxPatch(
        (x - width / 2, y - height / 2), width, height, boxstyle="round,pad=0.04", fc=color, ec=INK, lw=0.9
    )
    axes.add_patch(patch)
    axes.text(x, y, text, ha="center", va="center", fontsize=7.6, color=INK, zorder=5)


def arrow(axes: Any, *points: tuple[float, float]) -> None:
    xs, ys = zip(*points, strict=True)
    axes.plot(xs[:-1], ys[:-1], color=INK, lw=1.0, zorder=1)
    axes.annotate("", points[-1], points[-2], arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.0}, zorder=1)


def station(axes: Any, x: float, y: float, name: str, above: float, steered: bool = True) -> None:
    color = STEERED if steered else CAPTURED
    axes.plot([x], [y], "o", color=color, ms=6.5, zorder=6, mec="white", mew=0.8)
    axes.text(
        x if above else x + 0.95,
        y + above,
        name,
        ha="center",
        va="center",
        fontsize=8,
        color=color,
        family="monospace",
        zorder=6,
    )


def branch(axes: Any, left: float, kind: str, hooks: tuple[str, ...]) -> None:
    """One write: streams in front, the mixed input, norm and branch, weights and map."""
    streams, one, out, place, mix = hooks
    for i, color in enumerate(STREAMS):
        y = 4.6 - 0.22 * i
        axes.plot([left, left + 7.6], [y, y], color=color, lw=2.0, zorder=0)
    station(axes, left + 0.5, 4.82, streams, 0.3)
    axes.plot([left + 0.5] * 2, [3.72, 4.82], color=STEERED, lw=1.0, zorder=4)
    box(axes, left + 3.9, 4.27, "mix by a map (m, m)", 2.1, "white", 0.9)
    station(axes, left + 3.9, 3.4, mix, 0.0, steered=False)
    box(axes, left + 1.1, 2.9, "stream weights", 1.75)
    arrow(axes, (left + 1.1, 3.9), (left + 1.1, 3.14))
    arrow(axes, (left + 2.0, 2.9), (left + 3.9, 2.9), (left + 3.9, 3.77))
    arrow(axes, (left + 2.0, 2.9), (left + 6.6, 2.9), (left + 6.6, 3.77))
    station(axes, left + 5.3, 2.9, place, -0.27, steered=False)
    box(axes, left + 1.1, 1.5, "weighted sum", 1.3)
    arrow(axes, (left + 1.1, 2.66), (left + 1.1, 1.74))
    arrow(axes, (left + 1.75, 1.5), (left + 3.0, 1.5))
    station(axes, left + 2.3, 1.5, one, -0.3)
    box(axes, left + 3.4, 1.5, "norm", 0.8)
    arrow(axes, (left + 3.8, 1.5), (left + 4.5, 1.5))
    box(axes, left + 5.0, 1.5, kind, 1.0, "#fdf3e1")
    arrow(axes, (left + 5.5, 1.5), (left + 7.1, 1.5), (left + 7.1, 3.77))
    station(axes, left + 6.3, 1.5, out, -0.3)
    box(axes, left + 6.9, 4.27, "place", 0.9, "white", 0.9)


def main() -> None:
    """Write the picture."""
    figure, axes = pyplot.subplots(figsize=(14.5, 4.9), dpi=130)
    branch(axes, 0, "attention", ("mhc_streams_pre_attn", "pre_attn", "post_attn", "mhc_attn_post_mix",
                                  "mhc_attn_res_mix"))  # fmt: skip
    branch(axes, 8.1, "MLP", ("mhc_streams_pre_mlp", "mlp_in", "mlp_out", "mhc_ffn_post_mix", "mhc_ffn_res_mix"))
    for i, color in enumerate(STREAMS):
        axes.plot([7.6, 8.1], [4.6 - 0.22 * i] * 2, color=color, lw=2.0, zorder=0)
        axes.annotate(
            "", (16.6, 4.6 - 0.22 * i), (15.7, 4.6 - 0.22 * i), arrowprops={"arrowstyle": "-|>", "color": color}
        )
    station(axes, 16.0, 4.82, "mhc_streams_final", 0.3)
    axes.text(16.0, 5.4, "behind the last block", ha="center", fontsize=7.5, color=INK)
    axes.plot([16.0] * 2, [3.8, 4.82], color=STEERED, lw=1.0, zorder=4)
    axes.text(0.1, 0.55, "red: steered and captured    grey: captured only (fp32 weights)", fontsize=8.5, color=INK)
    axes.set_xlim(-0.9, 17.2)
    axes.set_ylim(0.35, 5.65)
    axes.axis("off")
    figure.savefig(PATH, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
