"""Pictures of the kernel and site tables.

python -m benchmarks.plots     # docs/images/{kernels,decode,sites_1b,sites_8b}.png
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.records import RESULTS

GOALS = {
    "idle": 0.3,
    "add": 0.5,
    "monitor": 0.7,
    "row_monitor": 1.0,
    "clamp": 2.0,
    "capture": 3.0,
    "score": 1.0,
    "row_monitor_score": 1.0,
    "cross_layer": 1.0,
    "memory": 1.0,
}
"""Most percent over the model without this package."""
IMAGES = Path(__file__).parents[1] / "docs" / "images"


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def plot_kernels() -> None:
    """Achieved share of the copy bandwidth, template and Inductor, by family and tokens at one width."""
    rows = [r for r in _rows("kernels.csv") if r["width"] == "2048" and r["dtype"] == "bfloat16"]
    counts = sorted({int(r["tokens"]) for r in rows})
    figure, axes = plt.subplots(1, len(counts), figsize=(4.2 * len(counts), 3.6), sharey=True)
    for axis, count in zip(axes, counts, strict=True):
        found = list({r["family"]: r for r in rows if int(r["tokens"]) == count}.values())
        for i, (name, colour) in enumerate((("template", "#2a6f97"), ("inductor", "#bbbbbb"))):
            heights = [float(r[f"{name}_of_copy_percent"] or 0) for r in found]
            axis.bar([x + 0.4 * i for x in range(len(found))], heights, 0.38, label=name, color=colour)
        axis.axhline(85, color="black", linewidth=0.8, linestyle="--")
        axis.set_xticks([x + 0.2 for x in range(len(found))], [r["family"] for r in found], rotation=35, ha="right")
        axis.set_title(f"{count} token{'s' if count > 1 else ''}")
    axes[0].set_ylabel("% of a copy of as many bytes")
    axes[0].set_ylim(0, 150)  # room for the legend
    axes[0].legend(loc="upper left", frameon=False)
    figure.suptitle(f"One site, 2048 x bf16, {rows[0]['card']}: residual add + edits + RMSNorm")
    figure.tight_layout()
    figure.savefig(IMAGES / "kernels.png", dpi=110)
    plt.close(figure)


def plot_decode() -> None:
    """Microseconds of one site in a decoding step: the plain add and norm, the edits by Inductor, by the template."""
    rows = _rows("decode.csv")
    counts = sorted({int(r["tokens"]) for r in rows})
    figure, axes = plt.subplots(1, len(counts), figsize=(4.2 * len(counts), 3.6), sharey=True)
    for axis, count in zip(axes, counts, strict=True):
        found = [r for r in rows if int(r["tokens"]) == count]
        for i, (name, colour) in enumerate((("plain", "#dddddd"), ("inductor", "#999999"), ("template", "#2a6f97"))):
            heights = [float(r[f"{name}_us"] or 0) for r in found]
            axis.bar([x + 0.28 * i for x in range(len(found))], heights, 0.26, label=name, color=colour)
        axis.set_xticks([x + 0.28 for x in range(len(found))], [r["family"] for r in found], rotation=35, ha="right")
        axis.set_title(f"{count} token{'s' if count > 1 else ''}")
    axes[0].set_ylabel("GPU time of one site, us")
    axes[0].legend(loc="upper left", frameon=False)
    figure.suptitle(f"A site between matrix products, 2048 x bf16, {rows[0]['card']}: residual add + edits + RMSNorm")
    figure.tight_layout()
    figure.savefig(IMAGES / "decode.png", dpi=110)
    plt.close(figure)


def plot_sites(model: str, title: str) -> None:
    """GPU kernel time of the whole model over plain, by kind and tokens, with quartiles and goals."""
    rows = [r for r in _rows(f"sites_{model}.csv") if not r["red"] and r["kind"] not in ("plain", "add_opaque")]
    counts = sorted({int(r["tokens"]) for r in rows})
    across = min(len(counts), 3)
    down = -(-len(counts) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.6 * across, 3.4 * down), squeeze=False)
    for axis, count in zip(axes.flat, counts, strict=False):
        found = [r for r in rows if int(r["tokens"]) == count]
        middle = [float(r["kernel_over_percent"]) for r in found]
        spans = [[float(x) for x in r["kernel_over_quartiles"].split("..")] for r in found]
        errors = [[m - low for m, (low, _) in zip(middle, spans, strict=True)],
                  [high - m for m, (_, high) in zip(middle, spans, strict=True)]]  # fmt: skip
        axis.bar(range(len(found)), middle, 0.7, yerr=errors, color="#2a6f97", capsize=3)
        for i, row in enumerate(found):
            if row["kind"] in GOALS:
                axis.plot([i - 0.4, i + 0.4], [GOALS[row["kind"]]] * 2, color="#c1121f", linewidth=1.5)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(found)), [r["kind"] for r in found], rotation=35, ha="right")
        axis.set_title(f"{count} token{'s' if count > 1 else ''}")
        axis.set_ylabel("GPU kernel time over plain, %")
    for axis in axes.flat[len(counts) :]:
        axis.set_visible(False)
    figure.suptitle(f"{title}, template at every site, CUDA graphs, {rows[0]['card']}; red: goals")
    figure.tight_layout()
    figure.savefig(IMAGES / f"sites_{model}.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    plot_kernels()
    plot_decode()
    plot_sites("1b", "Llama 1B shape, 32 sites")
    plot_sites("8b", "Llama 8B shape, 6 layers, 12 sites")
