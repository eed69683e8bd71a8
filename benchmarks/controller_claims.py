"""Records of the summary from the table of controllers.

python -m benchmarks.controller_claims     # results/controllers.csv -> results/summary.json
"""

from __future__ import annotations

import csv
from typing import Any

from benchmarks import records
from benchmarks.plots import GOALS
from benchmarks.site_kinds import KINDS

GATES = ("score", "row_monitor_score", "cross_layer", "memory")


def claims(row: dict[str, str]) -> list[dict[str, Any]]:
    """What a controller adds to a step, its copies, the queue; and the graphs that have not been measured yet."""
    where = f"{row['tokens']} requests, 1B shape"
    waiting = "not run yet: python -m benchmarks.sites --kinds " + " ".join(GATES)
    found = [
        records.claim(f"wall time that a controller with a probe adds to a step, {where}", "<= 100 us",
                      float(row["controller_wall_us"]), "us", spread=row["controller_wall_quartiles"]),
        records.claim(f"copies to the host for a controller, {where}", "1", float(row["with_copies"]), "copies a step"),
        records.claim("submission of an action", "< 5 us", float(row["submit_us"]), "us"),
    ]  # fmt: skip
    for kind in GATES:
        name = f"GPU kernel time, {kind}, {KINDS[kind].lowering} at 32 sites, 1B shape"
        found.append(records.claim(name, f"<= {GOALS[kind]} %", None, "%", reason=waiting))
    return found


def main() -> None:
    """Update the summary."""
    with (records.RESULTS / "controllers.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            records.update_summary(claims(row), row, "python -m benchmarks.controllers", records.SUMMARY)


if __name__ == "__main__":
    main()
