"""Records of the summary from the tables of the site template.

python -m benchmarks.site_claims     # results/{sites_*,kernels}.csv -> results/summary.json
"""

from __future__ import annotations

import csv
from typing import Any

from benchmarks import records
from benchmarks.plots import GOALS

TABLES = {
    "sites_1b.csv": "32 sites, 1B shape",
    "sites_8b.csv": "12 sites, 8B shape with 6 layers",
    "sites_1b_no_graphs.csv": "32 sites, 1B shape, no CUDA graphs",
}


def _rows(name: str) -> list[dict[str, str]]:
    with (records.RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def model_claims(rows: list[dict[str, str]], shape: str) -> list[dict[str, Any]]:
    """Kernel time and kernel count of each variant that has a goal, and of the opaque operator."""
    found = []
    for row in rows:
        if row["kind"] not in GOALS and row["kind"] != "add_opaque":
            continue
        where = f"{row['kind']}, template at {shape}, {row['tokens']} tokens"
        goal = f"<= {GOALS[row['kind']]} %" if row["kind"] in GOALS else "for comparison"
        over = float(row["kernel_over_percent"])
        found.append(records.claim(f"GPU kernel time, {where}", goal, over, "%", spread=row["kernel_over_quartiles"]))
        extra = round(float(row["extra_kernels"]))
        found.append(records.claim(f"extra kernels, {where}", "0" if row["kind"] in GOALS else goal, extra, "kernels"))
    return found


def kernel_claims(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Share of the copy bandwidth of each measured site of at least 4096 tokens."""
    return [
        records.claim(
            f"site template, {r['family']}, {r['tokens']} x {r['width']} {r['dtype']}, of a copy in the same run",
            ">= 85 %", float(r["template_of_copy_percent"]), "%", spread=f"Inductor {r['inductor_of_copy_percent']} %",
        )
        for r in rows if int(r["tokens"]) >= 4096
    ]  # fmt: skip


def main() -> None:
    """Update the summary."""
    for name, shape in TABLES.items():
        rows = _rows(name)
        for commit in dict.fromkeys(row["commit"] for row in rows):
            same = [row for row in rows if row["commit"] == commit]
            records.update_summary(model_claims(same, shape), same[0], "python -m benchmarks.sites", records.SUMMARY)
    rows = _rows("kernels.csv")
    records.update_summary(kernel_claims(rows), rows[0], "python -m benchmarks.kernels", records.SUMMARY)


if __name__ == "__main__":
    main()
