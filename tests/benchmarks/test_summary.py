"""The committed benchmark results: the summary keeps its schema, and the schema check finds what does not."""

from __future__ import annotations

import csv
import json
from typing import Any

import pytest

from benchmarks.records import RESULTS, SUMMARY, problems


@pytest.fixture
def records() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(SUMMARY.read_text())
    return found


def test_the_summary_keeps_its_schema(records: list[dict[str, Any]]) -> None:
    assert records
    assert problems(records) == []


def test_every_command_of_the_summary_exists(records: list[dict[str, Any]]) -> None:
    for record in records:
        words = record["command"].split()
        assert words[:2] == ["python", "-m"]
        assert (RESULTS.parents[1] / (words[2].replace(".", "/") + ".py")).exists()


def test_the_table_has_every_measured_shape() -> None:
    shapes = json.loads((RESULTS / "overhead.json").read_text())["shapes"]
    with (RESULTS / "overhead.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["shape"] for row in rows} == set(shapes)
    assert all(check["green"] for shape in shapes.values() for check in shape["gate"])


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"measured": None}, "no measurement and no reason"),
        ({"measured": True}, "measured is True"),
        ({"card": 3}, "card is 3"),
        ({"extra": 1}, "unknown field extra"),
    ],
)
def test_a_bad_record_is_found(records: list[dict[str, Any]], change: dict[str, Any], problem: str) -> None:
    assert any(problem in text for text in problems([{**records[0], **change}]))


def test_missing_fields_and_repeated_claims_are_found(records: list[dict[str, Any]]) -> None:
    first = records[0]
    assert any("lacks goal" in text for text in problems([{k: v for k, v in first.items() if k != "goal"}]))
    assert any("there twice" in text for text in problems([first, first]))
    assert problems({}) == ["the summary is not a list"]
