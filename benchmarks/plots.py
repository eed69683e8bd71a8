"""Pictures of the kernel, site and autoencoder tables.

python -m benchmarks.plots     # docs/images/{kernels,decode,sites_1b,sites_8b,sae_reconstruction,sae_doses}.png
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


def plot_sae_reconstruction() -> None:
    """Next-byte loss of the demo model with a site as it is, reconstructed, at its mean, and zeroed."""
    rows = [r for r in _rows("sae_reconstruction.csv") if r["style"] != "both"]
    names = list(dict.fromkeys(r["sae"] for r in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(3.6 * len(names), 3.6), sharey=True)
    kinds = (("plain", "#dddddd"), ("reconstructed", "#2a6f97"), ("mean", "#999999"), ("zeroed", "#555555"))
    for axis, name in zip(axes, names, strict=True):
        found = [r for r in rows if r["sae"] == name]
        for i, (kind, colour) in enumerate(kinds):
            places = [x + 0.21 * i for x in range(len(found))]
            bars = axis.bar(places, [float(r[kind]) for r in found], 0.2, label=kind, color=colour)
            axis.bar_label(bars, fmt="%.2f", fontsize=7)
        axis.set_xticks([x + 0.31 for x in range(len(found))], [r["style"] for r in found])
        axis.set_title(f"{name}, {found[0]['site']}", fontsize=10)
    axes[0].set_ylabel("next-byte loss, nats")
    axes[0].set_ylim(0, 1.35 * max(float(r[kind]) for r in rows for kind, _ in kinds))  # room for the legend
    axes[0].legend(loc="upper left", frameon=False, fontsize=8, ncols=2)
    figure.suptitle("Demo model, held-out passages, one layer's stream replaced")
    figure.tight_layout()
    figure.savefig(IMAGES / "sae_reconstruction.png", dpi=110)
    plt.close(figure)


def plot_sae_doses() -> None:
    """Style of samples, their loss under the plain model, and the loss of passages, by a clamped feature's value."""
    rows = _rows("sae_doses.csv")
    (plain,) = [r for r in rows if r["mode"] == "none"]
    features = list(dict.fromkeys(r["feature_of"] for r in rows if r["mode"] != "none"))
    panels = (
        ("style", "style score of 12 samples\n(scripture below 0, code above)"),
        ("loss_of_text", "loss of the samples under\nthe plain model, nats"),
        ("loss_code", "loss of code passages, nats"),
        ("loss_scripture", "loss of scripture passages, nats"),
    )
    figure, axes = plt.subplots(
        len(panels), len(features), figsize=(4.6 * len(features), 10.5), sharey="row", sharex=True
    )
    for across, feature in enumerate(features):
        own = [r for r in rows if r["feature_of"] == feature]
        for down, (key, label) in enumerate(panels):
            axis = axes[down][across]
            for mode, colour, text in (
                ("delta", "#2a6f97", "error term kept (delta)"),
                ("reconstruct", "#c1121f", "error term dropped (reconstruct)"),
            ):
                found = [r for r in own if r["mode"] == mode]
                doses, values = [float(r["dose"]) for r in found], [float(r[key]) for r in found]
                axis.plot(doses, values, marker="o", markersize=4, color=colour, label=text)
                if key == "style":
                    spreads = [float(r["style_spread"]) for r in found]
                    low, high = ([v + sign * s for v, s in zip(values, spreads, strict=True)] for sign in (-1, 1))
                    axis.fill_between(doses, low, high, color=colour, alpha=0.12, linewidth=0)
            axis.axhline(float(plain[key]), color="black", linewidth=0.8, linestyle="--", label="no steering")
            if across == 0:
                axis.set_ylabel(label, fontsize=9)
        axes[0][across].set_title(f"feature {own[0]['feature']}, of {feature}", fontsize=10)
        axes[-1][across].set_xlabel("clamped to, in multiples of its largest activation")
    axes[1][0].legend(loc="upper left", frameon=False, fontsize=8)
    figure.suptitle("One feature clamped at every token (JumpReLU autoencoder, layers.3.post_block)")
    figure.tight_layout()
    figure.savefig(IMAGES / "sae_doses.png", dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    IMAGES.mkdir(parents=True, exist_ok=True)
    plot_kernels()
    plot_decode()
    plot_sites("1b", "Llama 1B shape, 32 sites")
    plot_sites("8b", "Llama 8B shape, 6 layers, 12 sites")
    plot_sae_reconstruction()
    plot_sae_doses()
