"""The planner's cost table from the measured kernels.

    python -m benchmarks.costs     # results/decode.csv and results/kernels.csv -> kernels/tuned/

Up to 256 tokens the times are those of a decoding step, where tables are not in the cache, above them those of one
site. Rows that failed the correctness gate are left out.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

from benchmarks.kernels import WIDE
from benchmarks.records import RESULTS
from steer_compile.kernels.site_costs import TABLE

TUNED = Path(__file__).parents[1] / "kernels" / TABLE
FEW = 256


Costs = dict[str, dict[str, list[float]]]


def _rows(name: str) -> list[dict[str, str]]:
    with (RESULTS / name).open(newline="") as file:
        return [r for r in csv.DictReader(file) if r.get("dtype", "bfloat16") == "bfloat16"]


def _costs(rows: list[dict[str, str]]) -> Costs:
    costs: Costs = {}
    for row in rows:
        if not (row.get("template_red") or row.get("inductor_red")):
            times = [float(row["template_us"]), float(row["inductor_us"])]
            costs.setdefault(row["family"], {}).setdefault(row["tokens"], times)
    return costs


def main() -> None:
    """Write the table."""
    decode, kernels = _rows("decode.csv"), _rows("kernels.csv")
    narrow = [r for r in decode if int(r["tokens"]) <= FEW]
    narrow += [r for r in kernels if int(r["tokens"]) > FEW and r["width"] == "2048"]
    wide = [r for r in kernels if r["width"] == str(WIDE)]
    measured = {key: kernels[0][key] for key in ("card", "torch", "triton", "commit", "date")}
    table = {"measured": measured, "costs": _costs(narrow), "wide": _costs(wide)}
    TUNED.write_text(json.dumps(table, indent=1) + "\n")
    print(f"wrote {TUNED}")


if __name__ == "__main__":
    main()
