"""Records of the summary from the tables of the site template.

python -m benchmarks.site_claims     # results/{sites_1b,kernels,decode}.csv -> results/summary.json
"""

from __future__ import annotations

import csv
from typing import Any

from benchmarks import records
from benchmarks.plots import GOALS

NOT_MEASURED = (
    ("sites_1b, 256 tokens", "the run ended before this shape's turn"),
    ("sites_8b", "the run's table was lost: it came back without it"),
    ("sites_1b without CUDA graphs", "the run ended before this shape's turn"),
    ("compute-sanitizer racecheck", "the run's report was lost: it came back without it"),
)


def _rows(name: str) -> list[dict[str, str]]:
    with (records.RESULTS / name).open(newline="") as file:
        return list(csv.DictReader(file))


def model_claims(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Kernel time and kernel count of each variant that has a goal, and of the opaque operator."""
    found = []
    for row in rows:
        if row["kind"] not in GOALS and row["kind"] != "add_opaque":
            continue
        where = f"{row['kind']}, template at 32 sites, 1B shape, {row['tokens']} tokens"
        goal = f"<= {GOALS[row['kind']]} %" if row["kind"] in GOALS else "for comparison"
        over = float(row["kernel_over_percent"])
        found.append(records.claim(f"GPU kernel time, {where}", goal, over, "%", spread=row["kernel_over_quartiles"]))
        extra = int(row["extra_kernels"])
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
    path = records.SUMMARY
    for name, make in (("sites_1b.csv", model_claims), ("kernels.csv", kernel_claims)):
        rows = _rows(name)
        module = "sites" if make is model_claims else "kernels"
        records.update_summary(make(rows), rows[0], f"python -m benchmarks.{module}", path)
    missing = [records.claim(name, "measured", None, "%", reason=why) for name, why in NOT_MEASURED]
    records.update_summary(missing, _rows("sites_1b.csv")[0], "python -m benchmarks.sites", path)


if __name__ == "__main__":
    main()
