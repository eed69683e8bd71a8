"""Measured cost of a site by either lowering: what ``lowering="auto"`` decides by.

The table is written by ``python -m benchmarks.costs`` and holds, by op family and number of tokens, microseconds of
the template and of Inductor's kernels for the same add, edits and norm, at 2048 numbers of bf16 on one card, and at
28,672 for wide rows. Other widths and cards scale both sides alike; a spec's ``lowering`` overrides the choice.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib.resources import files
from typing import Any

from steer_compile.kernels.site_launch import MAX_ROW

TABLE = "tuned/nvidia-h200.json"


@cache
def cost_table() -> dict[str, Any]:
    """``costs`` by family and tokens as ``[template, compiler]`` in microseconds, and where they were measured."""
    loaded: dict[str, Any] = json.loads((files("steer_compile.kernels") / TABLE).read_text())
    return loaded


def family_of(ops: tuple[str, ...]) -> str:
    """The row of the table that stands for a set of op families."""
    reductions = [op for op in ("monitor", "row_monitor", "clamp") if op in ops]
    if "sae" in ops:
        return "all"  # by plain operators every call multiplies by all features, clamped or not
    if len(reductions) > 1:
        return "all"
    return reductions[0] if reductions else "capture" if "capture" in ops else "add"


def site_costs(ops: tuple[str, ...], tokens: int | None, width: int) -> tuple[float, float]:
    """Microseconds of the template and of the compiler, at the nearest number of tokens that was measured.

    Args:
        tokens: None where the graph serves any number; the largest stands for it.
        width: rows that are wider than `MAX_ROW` have a table of their own, as another kernel serves them. A family
            that it lacks is taken for all of them together if it reduces the row, and else for vectors alone. Rows
            that registers no longer hold and nothing reduces stay with the compiler, which has one pass over them.
    """
    table: dict[str, dict[str, list[float]]] = cost_table()["wide" if width > MAX_ROW else "costs"]
    family = family_of(ops)
    row = table.get(family, table["add" if family == "capture" else "all"])
    counts = sorted(int(count) for count in row)
    wanted = counts[-1] if tokens is None else min(counts, key=lambda n: abs(n.bit_length() - tokens.bit_length()))
    template, compiler = row[str(wanted)]
    chunks = width > 2 * MAX_ROW and family in ("add", "capture")
    return math.inf if chunks else template, compiler
