"""From measured shapes to rows of a table and claims of the summary."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.records import claim
from benchmarks.timing import Spread, percent_over

Samples = Mapping[str, Mapping[str, list[float]]]
"""Variant -> quantity (``kernel``, ``kernels``, ``wall``, ``host``) -> one number a round."""

QUANTITIES = {"kernel": "GPU kernel time", "wall": "wall clock"}


def table(shape: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row for each variant of a shape: medians, and percent over ``plain`` with quartiles, round by round."""
    samples: Samples = shape["samples"]
    rows = []
    for variant, found in samples.items():
        row: dict[str, Any] = {"shape": shape["shape"], "tokens": shape["tokens"], "variant": variant}
        for name in ("kernel", "wall", "host"):
            spread = Spread.of(found[name])
            row[f"{name}_us"] = round(spread.median, 2)
            row[f"{name}_us_quartiles"] = f"{spread.low:.2f}..{spread.high:.2f}"
        for name in ("kernel", "wall", "host"):
            over = percent_over(found[name], samples["plain"][name])
            row[f"{name}_over_percent"] = round(over.median, 3)
            row[f"{name}_over_quartiles"] = f"{over.low:.3f}..{over.high:.3f}"
        generated = _generated(samples, variant)
        row["generated_over_percent"] = round(generated.median, 3)
        row["generated_over_quartiles"] = f"{generated.low:.3f}..{generated.high:.3f}"
        row["kernels"] = Spread.of(found["kernels"]).median
        row["extra_kernels"] = row["kernels"] - Spread.of(samples["plain"]["kernels"]).median
        rows.append(row)
    return rows


def _generated(samples: Samples, variant: str) -> Spread:
    """Time that Inductor's own kernels take more than in ``plain``, in percent of all kernel time of ``plain``."""
    plain = samples["plain"]
    rounds = zip(samples[variant]["generated"], plain["generated"], plain["kernel"], strict=True)
    return Spread.of([100 * (own - base) / total for own, base, total in rounds])


def _over(shape: Mapping[str, Any], variant: str, name: str, base: str = "plain") -> tuple[float, str]:
    """Percent over ``base``, and its quartiles beside what two builds of the plain model differ by."""
    samples: Samples = shape["samples"]
    over = percent_over(samples[variant][name], samples[base][name])
    text = f"quartiles {over.low:.2f} to {over.high:.2f} over {len(samples[base][name])} rounds"
    if "plain_again" in samples:
        noise = percent_over(samples["plain_again"][name], samples["plain"][name])
        text += f"; a second build of the plain model {noise.median:+.2f} ({noise.low:.2f} to {noise.high:.2f})"
    return over.median, text


def _extra(shape: Mapping[str, Any], variant: str) -> float:
    samples: Samples = shape["samples"]
    return Spread.of(samples[variant]["kernels"]).median - Spread.of(samples["plain"]["kernels"]).median


GOALS = {
    "idle": ("instrumented at 32 sites, nothing active", "<= 0.3 %"),
    "active": ("one vector at each of 32 sites for every token", "<= 1 %"),
    "rows": ("a configuration of its own for every sequence at each of 32 sites", "<= 1 %"),
    "capture": ("capture of post_block at all layers", "<= 3 %"),
    "steer_capture": ("one vector at each of 32 sites and capture of post_block at all layers", "<= 3 %"),
}


def shape_claims(shape: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Claims about one shape."""
    name = shape["shape"]
    for variant, (what, goal) in GOALS.items():
        if variant not in shape["samples"]:
            continue
        percent, spread = _over(shape, variant, "kernel")
        generated = _generated(shape["samples"], variant)
        spread += (
            f"; Inductor's own kernels alone {generated.median:+.2f} ({generated.low:.2f} to {generated.high:.2f})"
        )
        yield claim(f"GPU kernel time, {what}, {name}", goal, percent, "% over plain", spread=spread)
        yield claim(f"extra kernels, {what}, {name}", "0", _extra(shape, variant), "kernels a call")
        percent, spread = _over(shape, variant, "wall")
        wall = "<= 2 %" if name == "decode_1" else "none, beside the kernel time"
        yield claim(f"wall clock, {what}, {name}", wall, percent, "% over plain", spread=spread)
    if "rows" in shape["samples"]:
        percent, spread = _over(shape, "rows", "kernel", "active")
        count = min(256, shape["batch"])
        yield claim(f"GPU kernel time, {count} configurations against 1, {name}", "<= 1 %", percent, "%", spread=spread)
    if "greedy" in shape:
        same, total = shape["greedy"]["same"], shape["greedy"]["tokens"]
        yield claim(f"greedy tokens equal, idle against plain, {name}", f"{total}", same, f"of {total} tokens")
    for kind, seen in shape.get("changes", {}).items():
        spread = f"{seen['changes']} changes of vectors, rows, scales, globals and capture between replays"
        for field, text in {
            "compiled": "recompiles",
            "recorded": "CUDA graphs recorded again",
            "without_graph": "calls outside the CUDA graph",
            "skipped": "CUDA graphs skipped",
            "unseen": "changes that a replay did not see",
        }.items():
            yield claim(f"{text}, {kind}, {name}", "0", seen[field], "events", spread=spread)
    if "events" in shape:
        text = f"compiles, recordings and calls outside a CUDA graph during all rounds, {name}"
        yield claim(text, "0", sum(shape["events"].values()), "events")
    host = shape.get("host", {})
    for kind, cost in host.items():
        yield claim(f"host time of the wrapper, {kind}, {name}", "none, part of the wall clock", cost, "us a call")


def compile_claims(shapes: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Time to the first result with empty caches, instrumented against plain, over all shapes."""
    for kind in ("steer", "capture", "steer_capture"):
        plain, built = [], []
        for shape in shapes.values():
            seconds = shape["compile_seconds"]
            if kind in seconds:
                both = [seconds[k] for k in ("plain", "plain_again") if k in seconds]
                plain.append(sum(both) / len(both))
                built.append(seconds[kind])
        if built:
            over = percent_over(built, plain)
            spread = (
                f"quartiles {over.low:.1f} to {over.high:.1f} over {len(built)} shapes; {sum(built) / len(built):.1f} s"
            )
            spread += f" against {sum(plain) / len(plain):.1f} s"
            yield claim(f"compile time added, {kind}", "<= 10 %", over.median, "% over plain", spread=spread)


def text_table(rows: list[dict[str, Any]]) -> str:
    """The table as Markdown."""
    lines = [
        "| shape | variant | kernel us | over plain (quartiles) | Inductor's own | kernels | wall us | over plain | "
        "host us |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        quartiles = r["kernel_over_quartiles"].replace("..", " to ")
        cells = [
            r["shape"], r["variant"], f"{r['kernel_us']:.1f}", f"{r['kernel_over_percent']:+.2f} % ({quartiles})",
            f"{r['generated_over_percent']:+.2f} %", f"{r['kernels']:.0f} ({r['extra_kernels']:+.0f})",
            f"{r['wall_us']:.0f}", f"{r['wall_over_percent']:+.2f} %", f"{r['host_us']:.0f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
