"""Result files: where a number was measured, and the summary of claims against goals."""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
SUMMARY = RESULTS / "summary.json"
FIELDS = {
    "claim": (str,), "goal": (str,), "measured": (int, float, type(None)), "unit": (str,), "spread": (str, type(None)),
    "card": (str,), "torch": (str,), "triton": (str, type(None)), "vllm": (str, type(None)), "commit": (str,),
    "command": (str,),
}  # fmt: skip
"""Fields of a summary record and their types. ``reason`` is added where ``measured`` is null."""


def begin(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Options of a GPU benchmark, ``--commit`` and ``--out`` among them, and where it runs. Ends without a device."""
    parser.add_argument("--commit", default=None)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    where = environment(options.commit)
    print(json.dumps(where), flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    return options, where


def problems(records: object) -> list[str]:
    """What is wrong with the content of a summary file; empty when it keeps the schema."""
    if not isinstance(records, list):
        return ["the summary is not a list"]
    found = []
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            found.append(f"record {i} is no object")
            continue
        where = f"record {i} ({record.get('claim')})"
        for field, types in FIELDS.items():
            if field not in record:
                found.append(f"{where} lacks {field}")
            elif not isinstance(record[field], types) or isinstance(record[field], bool):
                found.append(f"{where}: {field} is {record[field]!r}")
        found += [f"{where} has an unknown field {f}" for f in record if f not in FIELDS and f != "reason"]
        if record.get("measured") is None and not record.get("reason"):
            found.append(f"{where} has no measurement and no reason")
    claims = [r.get("claim") for r in records if isinstance(r, dict)]
    return found + [f"the claim {c!r} is there twice" for c in sorted({str(c) for c in claims if claims.count(c) > 1})]


def environment(commit: str | None = None) -> dict[str, Any]:
    """Card, driver, versions, date and commit."""
    import transformers

    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()[0]
    return {
        "card": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "driver": driver,
        "torch": str(torch.__version__),
        "triton": _triton(),
        "transformers": str(transformers.__version__),
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit or _commit(),
    }


def _triton() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def _commit() -> str:
    """The commit of a clean checkout, else ``uncommitted``."""
    root = Path(__file__).parents[1]
    if not shutil.which("git"):
        return "uncommitted"
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=False)
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return head.stdout.strip() if changed.returncode == 0 == head.returncode and not changed.stdout else "uncommitted"


def claim(name: str, goal: str, measured: float | None, unit: str, **more: Any) -> dict[str, Any]:
    """The part of a summary record that a benchmark knows; ``more``: ``spread``, ``reason``."""
    value = round(measured, 4) if isinstance(measured, float) else measured
    return {"claim": name, "goal": goal, "measured": value, "unit": unit, "spread": None, **more}


def update_summary(
    claims: Iterable[Mapping[str, Any]], where: Mapping[str, Any], command: str, path: Path, vllm: str | None = None
) -> None:
    """Put claims into the summary file; a claim of the same name is replaced."""
    old = json.loads(path.read_text()) if path.exists() else []
    common = {key: where[key] for key in ("card", "torch", "triton", "commit")}
    new = {c["claim"]: {**c, **common, "vllm": vllm, "command": command} for c in claims}
    records = [new.pop(r["claim"], r) for r in old] + list(new.values())
    ordered = [{f: r[f] for f in (*FIELDS, "reason") if f in r} for r in records]
    wrong = problems(ordered)
    if wrong:
        raise ValueError("; ".join(wrong))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(ordered, indent=1) + "\n")


def write_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """A table with the first row's columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def merge_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Put rows into a table in place of those of the same model and number of tokens."""
    kept: list[Mapping[str, Any]] = []
    if path.exists():
        fresh = {(str(r["model"]), str(r["tokens"])) for r in rows}
        with path.open(newline="") as file:
            kept = [r for r in csv.DictReader(file) if (r["model"], r["tokens"]) not in fresh]
    write_csv(sorted([*kept, *rows], key=lambda r: int(r["tokens"])), path)
