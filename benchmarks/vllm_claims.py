"""Records of the summary from the table of vLLM's steps.

python -m benchmarks.vllm_claims     # results/vllm_steps.csv -> results/summary.json
"""

from __future__ import annotations

import csv
from typing import Any

from benchmarks import records
from benchmarks.vllm_steps import SCENARIOS

GOALS = {s.name: s.goal for s in SCENARIOS if s.goal}
QUANTITIES = {
    "kernel_us": "GPU kernel time",
    "execute_us": "host time of running",
    "schedule_us": "host time of scheduling",
}
NAMES = {
    "plain_again": "a second plain engine", "add_nothing": "add installed, nothing active",
    "add_one": "add at 32 sites, one configuration", "add_own": "add at 32 sites, a configuration for each request",
    "row_monitor_one": "add and row monitors, one configuration",
    "capture_one_last": "capture of one layer, last token of each prompt",
    "capture_all_last": "capture of all layers, last token of each prompt",
}  # fmt: skip


def claims(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Step times over the plain engine's in the same rounds."""
    found = []
    for row in rows:
        if row["scenario"] not in NAMES or row["quantity"] not in QUANTITIES:
            continue
        name = f"vLLM step, {row['phase']}, {QUANTITIES[row['quantity']]}: {NAMES[row['scenario']]}"
        spread = f"95 %: {row['over_95_percent_interval']}, {row['rounds']} rounds"
        found.append(records.claim(name, GOALS[row["scenario"]], float(row["over_percent"]), "%", spread=spread))
    return found


def submission(rows: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Milliseconds to submit a request with vectors at 32 sites, in the latest run."""
    latest = max(row["date"] for row in rows)
    return [
        records.claim(f"vLLM, submission of vectors at 32 sites of 2048, {row['phase']}", "<= 2 ms (28 layers)",
                      float(row["median"]), "ms", spread=f"{row['rounds']} rounds")
        for row in rows
        if (row["scenario"], row["quantity"], row["date"]) == ("add_own", "submit_ms", latest)
    ]  # fmt: skip


def main() -> None:
    """Update the summary: of step times the run of most rounds of each scenario, of submissions the latest."""
    with (records.RESULTS / "vllm_steps.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    best: dict[tuple[str, str, str], dict[str, str]] = {}
    for row in rows:
        key = row["scenario"], row["phase"], row["quantity"]
        if key not in best or int(row["rounds"]) > int(best[key]["rounds"]):
            best[key] = row
    newest = max(rows, key=lambda row: row["date"])
    records.update_summary(submission(rows), newest, "python -m benchmarks.vllm_steps", records.SUMMARY, newest["vllm"])
    for commit in dict.fromkeys(row["commit"] for row in best.values()):
        same = [row for row in best.values() if row["commit"] == commit]
        records.update_summary(
            claims(same), same[0], "python -m benchmarks.vllm_steps", records.SUMMARY, same[0]["vllm"]
        )


if __name__ == "__main__":
    main()
