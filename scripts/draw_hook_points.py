"""Draw where the hook points lie in each kind of block: docs/images/hook_points.png.

python scripts/draw_hook_points.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from draw_streams import CAPTURED, INK, STEERED, STREAMS, arrow, box, branch, station
from matplotlib import pyplot

PATH = Path(__file__).parents[1] / "docs" / "images" / "hook_points.png"
STREAM, BRANCH = 3.0, 1.4  # heights of the stream and of what is computed beside it
MIXER, OTHER = "#fdf3e1", "#e6f0e8"


def panel(axes: Any, title: str, note: str = "") -> None:
    """A stream from left to right, with room for branches below it."""
    axes.set_xlim(-0.3, 12.4)
    axes.set_ylim(-0.35, 4.35)
    axes.axis("off")
    axes.text(-0.2, 4.1, title, fontsize=10, weight="bold", color=INK)
    axes.text(-0.2, -0.2, note, fontsize=8, color=INK)
    axes.plot([-0.1, 11.9], [STREAM] * 2, color=STREAMS[0], lw=2.4, zorder=0)
    axes.annotate("", (12.25, STREAM), (11.8, STREAM), arrowprops={"arrowstyle": "-|>", "color": STREAMS[0], "lw": 2})


def write(axes: Any, x: float) -> None:
    """The add of a branch to the stream."""
    axes.plot([x], [STREAM], "o", ms=12, color="white", mec=INK, mew=1.0, zorder=5)
    axes.text(x, STREAM - 0.01, "+", ha="center", va="center", fontsize=10, color=INK, zorder=6)


def path(axes: Any, start: float, boxes: tuple[tuple[float, str], ...], end: float, y: float = BRANCH) -> None:
    """A branch: down from the stream, through its boxes, and up into the add."""
    arrow(axes, (start, STREAM), (start, y), (boxes[0][0] - half(boxes[0][1]), y))
    for (x, text), (then, following) in zip(boxes, boxes[1:], strict=False):
        arrow(axes, (x + half(text), y), (then - half(following), y))
    arrow(axes, (boxes[-1][0] + half(boxes[-1][1]), y), (end, y), (end, STREAM - 0.18))
    for x, text in boxes:
        box(axes, x, y, text, 2 * half(text) - 0.08, color(text))
    write(axes, end)


def half(text: str) -> float:
    """Half of a box's width, its rim included."""
    return {"norm": 0.36, "MLP": 0.36, "attn": 0.36}.get(text, 0.68)


def color(text: str) -> str:
    return {"norm": "#eef1f4", "MLP": OTHER}.get(text, MIXER)


def above(axes: Any, x: float, names: str) -> None:
    station(axes, x, STREAM, names, 0.34 + 0.14 * names.count("\n"))


def below(axes: Any, x: float, name: str, y: float = BRANCH) -> None:
    station(axes, x, y, name, -0.45)


def pre_norm(axes: Any) -> None:
    panel(axes, "Pre-norm (Llama, GPT-2)", "post_block is the pre_attn of the next block")
    path(axes, 1.1, ((1.85, "norm"), (3.7, "attn")), 5.3)
    path(axes, 6.8, ((7.55, "norm"), (9.1, "MLP")), 10.7)
    for x, names in ((0.5, "pre_attn"), (6.2, "post_attn\nwrite_0"), (11.4, "post_block\nwrite_1")):
        above(axes, x, names)
    for x, name in ((2.6, "attn_in"), (4.7, "attn_out"), (8.3, "mlp_in"), (10.1, "mlp_out")):
        below(axes, x, name)


def post_norm(axes: Any) -> None:
    panel(axes, "Post-norm (BERT)", "the stream is the norm's output; the bare sum has no hook")
    path(axes, 1.1, ((2.9, "attn"),), 4.5)
    path(axes, 7.1, ((8.5, "MLP"),), 9.55)
    for x in (5.3, 10.3):
        box(axes, x, STREAM, "norm", 0.62, "#eef1f4")
    for x, names in ((0.5, "pre_attn"), (6.3, "post_attn\nwrite_0"), (11.35, "post_block\nwrite_1")):
        above(axes, x, names)
    for x, name in ((1.75, "attn_in"), (4.0, "attn_out"), (7.6, "mlp_in"), (9.1, "mlp_out")):
        below(axes, x, name)


def sandwich(axes: Any) -> None:
    panel(axes, "Sandwich (Gemma 2)", "attn_out and mlp_out are what is added: behind the second norm")
    path(axes, 0.95, ((1.5, "norm"), (3.0, "attn"), (4.1, "norm")), 5.35)
    path(axes, 6.6, ((7.15, "norm"), (8.5, "MLP"), (9.45, "norm")), 10.65)
    for x, names in ((0.4, "pre_attn"), (6.1, "post_attn\nwrite_0"), (11.4, "post_block\nwrite_1")):
        above(axes, x, names)
    for x, name in ((2.15, "attn_in"), (4.95, "attn_out"), (7.8, "mlp_in"), (10.2, "mlp_out")):
        below(axes, x, name)


def parallel(axes: Any) -> None:
    panel(axes, "Parallel (GPT-J, NeoX, Falcon)", "both adds are one write: there is no post_attn between them")
    path(axes, 1.4, ((2.15, "norm"), (5.0, "attn")), 7.6, 1.9)
    arrow(axes, (2.9, 1.9), (2.9, 0.75), (4.6, 0.75))
    box(axes, 5.0, 0.75, "MLP", 0.72, OTHER)
    arrow(axes, (5.4, 0.75), (8.6, 0.75), (8.6, STREAM - 0.18))
    write(axes, 8.6)
    above(axes, 0.7, "pre_attn")
    above(axes, 10.3, "post_block\nwrite_0")
    for x, name, y in ((3.7, "attn_in", 1.9), (6.4, "attn_out", 1.9), (3.7, "mlp_in", 0.75), (6.4, "mlp_out", 0.75)):
        below(axes, x, name, y)


def three_writes(axes: Any) -> None:
    panel(axes, "Three writes (decoder with cross-attention)", "the cross-attention's ends have no hook; write_1 does")
    path(axes, 0.95, ((1.45, "norm"), (2.8, "attn")), 4.1)
    path(axes, 5.0, ((5.55, "norm"), (6.85, "cross attn")), 7.8)
    path(axes, 8.65, ((9.13, "norm"), (10.2, "MLP")), 11.15)
    for x, names in (
        (0.45, "pre_attn"),
        (4.6, "post_attn\nwrite_0"),
        (8.25, "write_1"),
        (11.75, "post_block\nwrite_2"),
    ):
        above(axes, x, names)
    for x, name in ((2.05, "attn_in"), (3.6, "attn_out"), (9.62, "mlp_in"), (10.85, "mlp_out")):
        below(axes, x, name)


def many_streams(axes: Any) -> None:
    axes.set_xlim(-0.9, 17.2)
    axes.set_ylim(0.55, 6.0)
    axes.axis("off")
    axes.text(-0.8, 5.7, "Parallel streams (hyper-connections), here four", fontsize=10, weight="bold", color=INK)
    attention = ("mhc_streams_pre_attn", "pre_attn", "post_attn\n= attn_out", "mhc_attn_post_mix", "mhc_attn_res_mix")
    branch(axes, 0, "attention", attention)
    branch(axes, 8.1, "MLP", ("mhc_streams_pre_mlp", "mlp_in", "mlp_out", "mhc_ffn_post_mix", "mhc_ffn_res_mix"))
    box(axes, 13.1, 1.5, "MLP", 1.0, OTHER)
    station(axes, 4.1, 1.5, "attn_in", -0.45)
    for i, shade in enumerate(STREAMS):
        y = 4.6 - 0.22 * i
        axes.plot([7.6, 8.1], [y] * 2, color=shade, lw=2.0, zorder=0)
        axes.annotate("", (16.6, y), (15.7, y), arrowprops={"arrowstyle": "-|>", "color": shade})
    station(axes, 16.0, 4.82, "mhc_streams_final", 0.3)
    axes.text(16.0, 5.4, "behind the last block", ha="center", fontsize=7.5, color=INK)
    axes.plot([16.0] * 2, [3.8, 4.82], color=STEERED, lw=1.0, zorder=4)


def legend(axes: Any) -> None:
    axes.set_xlim(0, 10)
    axes.set_ylim(0, 4.4)
    axes.axis("off")
    lines = (
        (STEERED, "a hook that is steered and captured"),
        (CAPTURED, "captured only: weights by which streams are mixed"),
    )
    for i, (shade, text) in enumerate(lines):
        axes.plot([1.0], [3.0 - 0.5 * i], "o", color=shade, ms=7)
        axes.text(1.4, 3.0 - 0.5 * i, text, fontsize=9, va="center", color=INK)
    axes.plot([0.8, 1.2], [2.0, 2.0], color=STREAMS[0], lw=2.4)
    axes.text(1.4, 2.0, "the residual stream", fontsize=9, va="center", color=INK)
    box(axes, 1.0, 1.5, "", 0.3, MIXER, 0.22)
    axes.text(1.4, 1.5, "mixes token positions (attention, SSM, convolution)", fontsize=9, va="center", color=INK)
    box(axes, 1.0, 1.0, "", 0.3, OTHER, 0.22)
    axes.text(1.4, 1.0, "does not (MLP, experts)", fontsize=9, va="center", color=INK)


def main() -> None:
    """Write the picture."""
    figure = pyplot.figure(figsize=(16.5, 13.2), dpi=110)
    grid = figure.add_gridspec(4, 2, height_ratios=(1, 1, 1, 1.45), hspace=0.1, wspace=0.06)
    cells = ((pre_norm, post_norm), (sandwich, parallel), (three_writes, legend))
    for row, pair in enumerate(cells):
        for column, draw in enumerate(pair):
            draw(figure.add_subplot(grid[row, column]))
    many_streams(figure.add_subplot(grid[3, :]))
    figure.savefig(PATH, bbox_inches="tight", metadata={"Software": None})


if __name__ == "__main__":
    main()
