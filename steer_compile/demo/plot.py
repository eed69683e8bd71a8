"""The strength-response curve as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_BLUE, _GREY, _WARM, _COOL = "#1f4e79", "#9aa5b1", "#b5542b", "#2b7a5b"


def draw_response(
    path: Path, curve: Sequence[tuple[float, Sequence[float]]], natural: Mapping[str, float], names: tuple[str, str]
) -> None:
    """Score against strength: each prompt, their mean and standard deviation, and what passages of the styles score.

    Args:
        path: PNG file to write.
        curve: strengths, and the score of each prompt's continuation.
        natural: mean score of the passages, by ``positive`` and ``negative``.
        names: the positive and the negative style.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    strengths = [strength for strength, _ in curve]
    for prompt in zip(*(scores for _, scores in curve), strict=True):
        axes.plot(strengths, prompt, color=_GREY, linewidth=0.7, alpha=0.6, zorder=1)
    means = [sum(scores) / len(scores) for _, scores in curve]
    spreads = [
        (sum((s - m) ** 2 for s in scores) / len(scores)) ** 0.5 for m, (_, scores) in zip(means, curve, strict=True)
    ]
    low = [m - s for m, s in zip(means, spreads, strict=True)]
    high = [m + s for m, s in zip(means, spreads, strict=True)]
    axes.fill_between(strengths, low, high, color=_BLUE, alpha=0.15, linewidth=0, zorder=2)
    axes.plot(strengths, means, color=_BLUE, linewidth=2.2, marker="o", markersize=4.5, zorder=3)
    for key, name, color, edge in (("positive", names[0], _WARM, 0.0), ("negative", names[1], _COOL, 1.0)):
        axes.axhline(natural[key], color=color, linewidth=1.2, linestyle="--", zorder=1)
        axes.annotate(
            f"passages of {name}", (edge, natural[key]), xycoords=("axes fraction", "data"), xytext=(6 - 12 * edge, 4),
            textcoords="offset points", ha="right" if edge else "left", color=color, fontsize=9,
        )  # fmt: skip
    axes.axvline(0.0, color=_GREY, linewidth=0.8, zorder=0)
    axes.set_xlabel(f"strength (multiples of the difference of means; + is toward {names[0]})")
    axes.set_ylabel(f"style score of the continuation\n({names[1]} below, {names[0]} above)")
    axes.set_title(
        f"{len(curve[0][1])} prompts: mean, one standard deviation, and each prompt", fontsize=10.5, loc="left"
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
