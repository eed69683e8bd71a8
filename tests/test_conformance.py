"""docs/conformance.md and the markers of the tests say the same: which test shows the behaviour of which number."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest

from tests import _tree

DOCUMENT = "docs/conformance.md"
NUMBERS = frozenset(range(1, 92))
REASONS = ("Differs: ", "Missing: ", "Partly missing: ")
MARKER = "behaviour"

_ROW = re.compile(r"^\| (\d+) \|([^|]+)\|([^|]*)\|([^|]*)\|$", re.MULTILINE)
_WITHOUT = re.compile(r"^\| (\d+)(?:-(\d+))? \| [^|`]+ \| ([^|]+) \|$", re.MULTILINE)
_TEST = re.compile(r"`([^`]+)`")

Markers = Mapping[str, tuple[int, ...]]
"""Test as ``kernels/test_site.py::test_all_stages`` -> numbers of its marker, empty without one."""


class Row(NamedTuple):
    """A behaviour of the document."""

    number: int
    text: str
    tests: tuple[str, ...]
    reason: str


def rows_of(document: str) -> list[Row]:
    found = _ROW.findall(document)
    return [Row(int(n), text.strip(), tuple(_TEST.findall(tests)), reason.strip()) for n, text, tests, reason in found]


def left_out(document: str) -> dict[int, str]:
    """Numbers without a row, and why."""
    _, _, tail = document.partition("## Numbers without a row")
    return {
        number: why
        for first, last, why in _WITHOUT.findall(tail)
        for number in range(int(first), int(last or first) + 1)
    }


def _is_marker(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == MARKER and ast.unparse(node) == f"pytest.mark.{MARKER}"


def numbers_of(test: ast.FunctionDef | ast.AsyncFunctionDef) -> tuple[int, ...]:
    """Numbers of a test's own marker."""
    calls = [call for call in test.decorator_list if isinstance(call, ast.Call) and _is_marker(call.func)]
    given = [arg.value for call in calls for arg in call.args if isinstance(arg, ast.Constant)]
    return tuple(number for number in given if isinstance(number, int))


def functions_of(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """The tests of a file."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            yield node


def markers_of(name: str, source: str) -> dict[str, tuple[int, ...]]:
    """Tests of a file with their numbers. A marker anywhere else than at a test would be counted nowhere."""
    tree = ast.parse(source)
    found = {f"{name}::{test.name}": numbers_of(test) for test in functions_of(tree)}
    everywhere = sum(_is_marker(node) for node in ast.walk(tree))
    at_tests = sum(bool(numbers) for numbers in found.values())
    assert everywhere == at_tests, f"{name} has {everywhere} markers and {at_tests} of them at tests, with numbers"
    return found


def flaws(document: str, markers: Markers) -> list[str]:
    """What the document and the markers do not agree on."""
    rows, without = rows_of(document), left_out(document)
    counted = Counter([*(row.number for row in rows), *without])
    found = [f"{number} is there {counted[number]} times" for number in sorted(NUMBERS) if counted[number] != 1]
    found += [f"{number} is no number of the list" for number in sorted(counted.keys() - NUMBERS)]
    for row in rows:
        if row.reason and not row.reason.startswith(REASONS):
            found.append(f"{row.number} has a reason that begins with none of {', '.join(REASONS)}")
        if not row.tests and not row.reason:
            found.append(f"{row.number} has neither tests nor a reason")
        for test in row.tests:
            if test not in markers:
                found.append(f"{row.number} names {test}, which is no test")
            elif row.number not in markers[test]:
                found.append(f"{row.number} names {test}, whose marker lacks the number")
    named = {(row.number, test) for row in rows for test in row.tests}
    marked = {(number, test) for test, numbers in markers.items() for number in numbers}
    return found + [f"{test} is marked {number}, whose row lacks it" for number, test in sorted(marked - named)]


def all_markers() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for path in _tree.files(".py"):
        if path.parts[0] == "tests" and path.name.startswith("test_"):
            name = path.relative_to("tests").as_posix()
            found |= markers_of(name, (_tree.ROOT / path).read_text(encoding="utf-8"))
    return found


def test_the_document_and_the_markers_agree() -> None:
    document, markers = (_tree.ROOT / DOCUMENT).read_text(encoding="utf-8"), all_markers()
    assert flaws(document, markers) == []
    assert sum(bool(numbers) for numbers in markers.values()) > 100


def test_every_line_of_a_table_is_read() -> None:
    """A row that the pattern misses would be checked by nothing."""
    document = (_tree.ROOT / DOCUMENT).read_text(encoding="utf-8")
    lines = re.findall(r"^\| \d.*$", document, re.MULTILINE)
    tail = document.partition("## Numbers without a row")[2]
    assert len(lines) == len(rows_of(document)) + len(_WITHOUT.findall(tail))
    assert all(why.strip() for why in left_out(document).values())


def sample(row: str, without: str = "| 2-91 | the rest | not built |") -> str:
    return f"{row}\n\n## Numbers without a row\n\n{without}\n"


GOOD = "| 1 | adds | `a.py::test_x` | |"


@pytest.mark.parametrize(
    ("document", "marked", "flaw"),
    [
        (sample(GOOD, "| 2-90 | the rest | not built |"), (1,), "91 is there 0 times"),
        (sample(f"{GOOD}\n{GOOD}"), (1,), "1 is there 2 times"),
        (sample(GOOD, "| 2-92 | the rest | not built |"), (1,), "92 is no number"),
        (sample(GOOD, "| 1-91 | the rest | not built |"), (1,), "1 is there 2 times"),
        (sample("| 1 | adds | | |"), (), "1 has neither tests nor a reason"),
        (sample("| 1 | adds | `a.py::test_x` | Perhaps. |"), (1,), "1 has a reason that begins with none"),
        (sample("| 1 | adds | `a.py::test_y` | |"), (), "1 names a.py::test_y, which is no test"),
        (sample(GOOD), (), "1 names a.py::test_x, whose marker lacks the number"),
        (sample("| 1 | adds | | Missing: not built. |"), (1,), "a.py::test_x is marked 1, whose row lacks it"),
        (sample(GOOD), (1, 2), "a.py::test_x is marked 2, whose row lacks it"),
    ],
)
def test_a_flaw_is_found(document: str, marked: tuple[int, ...], flaw: str) -> None:
    found = flaws(document, {"a.py::test_x": marked})
    assert len(found) == 1
    assert found[0].startswith(flaw)


def test_what_agrees_passes() -> None:
    assert flaws(sample(GOOD), {"a.py::test_x": (1,), "a.py::test_z": ()}) == []
    assert flaws(sample("| 1 | adds | | Missing: not built. |"), {}) == []


@pytest.mark.parametrize(
    "source",
    [
        "pytestmark = pytest.mark.behaviour(1)\n",
        "@pytest.mark.behaviour(1)\ndef helper(): ...\n",
        "@pytest.mark.behaviour(1)\nclass TestX: ...\n",
        "@pytest.mark.behaviour()\ndef test_x(): ...\n",
        "@pytest.mark.behaviour\ndef test_x(): ...\n",
        "@pytest.mark.behaviour(N)\ndef test_x(): ...\n",
    ],
)
def test_a_marker_that_would_not_count_is_found(source: str) -> None:
    with pytest.raises(AssertionError, match=r"a\.py has 1 markers and 0 of them at tests"):
        markers_of("a.py", source)


def test_markers_are_read() -> None:
    source = "@pytest.mark.behaviour(1, 12)\n@other\nasync def test_x(): ...\ndef test_y(): ...\n"
    assert markers_of("a.py", source) == {"a.py::test_x": (1, 12), "a.py::test_y": ()}
