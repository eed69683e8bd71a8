"""The API reference says what the source says, and every export of the package is in it."""

import inspect
import re
import subprocess
import sys
from importlib import import_module

import pytest

from tests import _tree

PAGES = _tree.ROOT / "docs" / "api"
EXPORTERS = ("steer_compile", "steer_compile.dynamic", "steer_compile.sae", "steer_compile.sweep", "steer_compile.vllm")
"""Each has the page of the last part of its name."""

EXPORTS = [(module, name) for module in EXPORTERS for name in import_module(module).__all__]


def test_pages_are_up_to_date() -> None:
    command = [sys.executable, "scripts/api_reference.py", "--check"]
    result = subprocess.run(command, cwd=_tree.ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("module", EXPORTERS)
def test_every_export_has_an_entry(module: str) -> None:
    page = (PAGES / f"{module.rpartition('.')[2]}.md").read_text(encoding="utf-8")
    entries = set(re.findall(r"^## (?:class )?`(\w+)`$", page, re.MULTILINE))
    assert entries == set(import_module(module).__all__)


@pytest.mark.parametrize(("module", "name"), EXPORTS)
def test_every_export_has_a_docstring(module: str, name: str) -> None:
    exported = getattr(import_module(module), name)
    if not (inspect.isclass(exported) or inspect.isfunction(exported)):
        return  # a constant's text is in the script
    text = exported.__doc__ or ""
    assert text.strip()
    assert not text.startswith(f"{name}(")  # what a dataclass makes by itself


def test_errors_are_all_there() -> None:
    errors = import_module("steer_compile.errors")
    page = (PAGES / "errors.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^## class `(\w+)`$", page, re.MULTILINE)) == {
        name for name, value in vars(errors).items() if inspect.isclass(value) and value.__module__ == errors.__name__
    }
