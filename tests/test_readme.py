"""What the documents say can be typed, compiled and followed: code blocks, make targets, commands, links."""

import ast
import doctest
import re
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import _tree

DOCUMENTS = [path for path in _tree.files(".md") if path.parts[0] == "docs" or len(path.parts) == 1]
SHELL = ("bash", "console")
LANGUAGES = ("python", "pycon", "text", "json", "toml", "make", "diff", *SHELL)

_FENCE = re.compile(r"^( *)(```+)([^\n`]*)\n(.*?)^\1\2 *$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(\s*<?([^)\s>]+)>?[^)]*\)|^\[[^\]]+\]:\s*(\S+)", re.MULTILINE)
_HEADING = re.compile(r"^#+ +(.*?) *#*$", re.MULTILINE)
_MAKE = re.compile(r"\bmake((?: +[A-Z_]+=\S+)*)((?: +[a-z][a-z-]*)*)")


class Block(NamedTuple):
    line: int
    language: str
    text: str


def _blocks(markdown: str) -> list[Block]:
    return [
        Block(markdown.count("\n", 0, found.start()) + 2, found[3].strip(), found[4])
        for found in _FENCE.finditer(markdown)
    ]


def _prose(markdown: str) -> str:
    return _FENCE.sub("", markdown)


def _anchors(markdown: str) -> set[str]:
    """GitHub's anchors of the headings."""
    titles = (re.sub(r"[^\w\- ]", "", found[1].lower()) for found in _HEADING.finditer(_prose(markdown)))
    return {title.strip().replace(" ", "-") for title in titles}


def _make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", (_tree.ROOT / "Makefile").read_text(), re.MULTILINE))


def flaws(path: Path, markdown: str) -> list[str]:
    """What in a document does not hold, one line each."""
    return [*_code_flaws(markdown), *_make_flaws(markdown), *_link_flaws(path, markdown)]


def _code_flaws(markdown: str) -> list[str]:
    found = []
    for block in _blocks(markdown):
        if block.language not in LANGUAGES:
            found.append(f"line {block.line}: a code block in {block.language!r}, not one of {', '.join(LANGUAGES)}")
        try:
            if block.language == "python":
                ast.parse(block.text)
            elif block.language == "pycon":
                for example in doctest.DocTestParser().get_examples(block.text):
                    ast.parse(example.source)
        except SyntaxError as error:
            found.append(f"line {block.line + (error.lineno or 1) - 1}: {error.msg}")
    if markdown.count("```") != sum(2 for _ in _blocks(markdown)):
        found.append("a code block is not closed")
    return found


def _make_flaws(markdown: str) -> list[str]:
    code = [block.text for block in _blocks(markdown) if block.language in SHELL]
    code += _INLINE.findall(_prose(markdown))
    named = {target for text in code for call in _MAKE.finditer(text) for target in call[2].split()}
    return [f"make has no target {target!r}" for target in sorted(named - _make_targets())]


def _link_flaws(path: Path, markdown: str) -> list[str]:
    found = []
    for match in _LINK.finditer(_INLINE.sub("", _prose(markdown))):
        link = match[1] or match[2]
        if "://" in link or link.startswith("mailto:"):
            continue  # another machine's business
        name, _, anchor = link.partition("#")
        target = _tree.ROOT / path.parent / name if name else _tree.ROOT / path
        if name and not target.exists():
            found.append(f"link to {link}: no such file")
        elif anchor and target.suffix == ".md" and anchor not in _anchors(target.read_text() if name else markdown):
            found.append(f"link to {link}: no such heading")
    return found


def test_there_is_a_readme() -> None:
    assert Path("README.md") in DOCUMENTS


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_document_holds(path: Path) -> None:
    assert flaws(path, (_tree.ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("target", ["demo", "test"])
def test_readme_names_the_main_targets(target: str) -> None:
    assert f"make {target}" in (_tree.ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("markdown", "flaw"),
    [
        ("```python\nx = (\n```\n", "line 2: '(' was never closed"),
        ("```pycon\n>>> x = = 1\n```\n", "line 2: invalid syntax"),
        ("```\nx\n```\n", "line 2: a code block in ''"),
        ("```python\nx = 1\n", "a code block is not closed"),
        ("run `make tea`", "make has no target 'tea'"),
        ("```bash\nmake PYTHON=python3 test tea\n```\n", "make has no target 'tea'"),
        ("[a](no/such.md)", "link to no/such.md: no such file"),
        ("# Title\n[a](#titel)", "link to #titel: no such heading"),
        ("[a]: no-such.md", "link to no-such.md: no such file"),
    ],
)
def test_a_flaw_is_found(markdown: str, flaw: str) -> None:
    found = flaws(Path("README.md"), markdown)
    assert len(found) == 1
    assert found[0].startswith(flaw)


def test_what_holds_passes() -> None:
    markdown = (
        "# The `one` title\nrun `make test`, see [it](#the-one-title) and [that](LICENSE)\n```python\nx = 1\n```\n"
    )
    assert flaws(Path("README.md"), markdown) == []
