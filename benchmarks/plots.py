"""Pictures of the kernel and site tables.

python -m benchmarks.plots     # docs/images/kernels.png and docs/images/sites.png
"""

from __future__ import annotations

import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.records import RESULTS

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
    axes[0].legend(loc="upper left", frameon=False)
    figure.suptitle(f"One site, 2048 x bf16, {rows[0]['card']}: residual add + edits + RMSNorm")
    figure.tight_layout()
    figure.savefig(IMAGES / "kernels.png", dpi=110)
    plt.close(figure)


def plot_sites() -> None:
    """GPU kernel time of the whole model over plain, by kind and tokens, with quartiles."""
    rows = [r for r in _rows("sites_1b.csv") if not r["red"] and r["kind"] != "plain"]
    counts = sorted({int(r["tokens"]) for r in rows})
    figure, axes = plt.subplots(1, len(counts), figsize=(4.6 * len(counts), 3.6))
    for axis, count in zip(axes, counts, strict=True):
        found = [r for r in rows if int(r["tokens"]) == count]
        middle = [float(r["kernel_over_percent"]) for r in found]
        spans = [[float(x) for x in r["kernel_over_quartiles"].split("..")] for r in found]
        errors = [[m - low for m, (low, _) in zip(middle, spans, strict=True)],
                  [high - m for m, (_, high) in zip(middle, spans, strict=True)]]  # fmt: skip
        axis.bar(range(len(found)), middle, 0.7, yerr=errors, color="#2a6f97", capsize=3)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xticks(range(len(found)), [r["kind"] for r in found], rotation=35, ha="right")
        axis.set_title(f"{count} token{'s' if count > 1 else ''}")
        axis.set_ylabel("GPU kernel time over plain, %")
    figure.suptitle(f"Llama 1B shape, 32 sites, template, CUDA graphs, {rows[0]['card']}")
    figure.tight_layout()
    figure.savefig(IMAGES / "sites.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    plot_kernels()
    plot_sites()
