"""Docstrings as Markdown: the texts of scripts/api_reference.py."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import griffe

WIDTH = 120
_SPAN = re.compile(r"``(.+?)``|`([^`]+)`", re.DOTALL)
_GLUED = re.compile(r"`[^`]*`|\[[^\]]*\]\([^)]*\)| (?=[-+*=>#]+ )")
_TABLE = re.compile(r"=+(  +=+)+")
_ERROR = re.compile(r"(?:(?<=^)|(?<=[.;] ))([A-Z]\w+(?:, [A-Z]\w+)*): ")

Resolve = Callable[[str], "str | None"]
"""What a name in single backticks links to, None for nothing."""


def anchor(title: str) -> str:
    """GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def inline(text: str, resolve: Resolve) -> str:
    """A text of a docstring in Markdown: code, links, and what is neither with its signs escaped."""
    done, parts = 0, []
    for span in _SPAN.finditer(text):
        parts.append(re.sub(r"([<*])", r"\\\1", text[done : span.start()]))
        literal = " ".join((span[1] or span[2]).split())
        target = None if span[1] else resolve(literal)
        parts.append(f"[`{literal}`]({target})" if target else f"`{literal}`")
        done = span.end()
    parts.append(re.sub(r"([<*])", r"\\\1", text[done:]))
    return "".join(parts)


def wrapped(text: str, first: str = "", then: str = "") -> str:
    """Lines of at most `WIDTH` columns, broken neither inside of code nor of links."""
    glued = _GLUED.sub(lambda found: found[0].replace(" ", "\0"), " ".join(text.split()))
    lines = textwrap.wrap(glued, WIDTH, initial_indent=first, subsequent_indent=then,
                          break_long_words=False, break_on_hyphens=False)  # fmt: skip
    return "\n".join(lines).replace("\0", " ")


def item(text: str) -> str:
    return wrapped(text, "* ", "  ")


def table(lines: Sequence[str], resolve: Resolve) -> str:
    """A Markdown table of a simple table of reStructuredText."""
    starts = [found.start() for found in re.finditer(r"=+", lines[0])]
    ends = [*starts[1:], None]
    rows: list[list[str]] = []
    for line in lines[1:]:
        if _TABLE.fullmatch(line):
            continue
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if cells[0] or not rows:
            rows.append(cells)
        else:
            rows[-1] = [f"{old} {new}".strip() for old, new in zip(rows[-1], cells, strict=True)]
    written = ["| " + " | ".join(inline(cell, resolve).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([written[0], "|" + "---|" * len(starts), *written[1:]])


def prose(text: str, resolve: Resolve) -> str:
    """Paragraphs, tables, lists and indented code of a docstring."""
    found = []
    for block in re.split(r"\n\s*\n", text.strip("\n")):
        lines = block.rstrip().split("\n")
        if _TABLE.fullmatch(lines[0]):
            found.append(table(lines, resolve))
        elif lines[0].startswith("    "):
            found.append(f"```text\n{textwrap.dedent(block).rstrip()}\n```")
        elif lines[0].startswith(("* ", "- ")):
            parts = re.split(r"^[*-] ", block, flags=re.MULTILINE)[1:]
            found.append("\n".join(item(inline(part, resolve)) for part in parts))
        elif block.strip() != "::":
            found.append(wrapped(inline(re.sub(r"::$", ":", block.strip()), resolve)))
    return "\n\n".join(found)


def raised(items: Iterable[Any]) -> Iterator[tuple[str, str]]:
    """Errors and when they come; further ones of a line follow the first, as ``Name: when``."""
    for each in items:
        parts = _ERROR.split(f"{each.annotation}: {each.description}")
        for names, when in zip(parts[1::2], parts[2::2], strict=True):
            yield names, " ".join(when.split())


def fields(items: Iterable[Any], types: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Names, with their type, and text of documented parameters or attributes; several names may share a text."""
    for each in items:
        given = each.name
        if given.endswith(","):  # "low, high: text": what follows the first name was read as a type
            given = f"{given} {each.annotation}"
        names = given.split(", ")
        kinds = {types.get(name, "") for name in names}
        kind = kinds.pop() if len(kinds) == 1 else ""
        yield ", ".join(f"`{name}`" for name in names) + (f" (`{kind}`)" if kind else ""), each.description


def sections(documentation: Any, resolve: Resolve, types: dict[str, str]) -> Iterator[tuple[str, str]]:
    """``(kind, Markdown)`` of each section of a docstring.

    Raises:
        ValueError: a section that this script does not write.
    """
    options: dict[str, Any] = {"warnings": False, "returns_named_value": False, "returns_multiple_items": False}
    for section in documentation.parse(griffe.Parser.google, **options):
        kind, value = section.kind.value, section.value
        if kind == "text":
            yield kind, prose(value, resolve)
        elif kind == "raises":
            lines = (f"{', '.join(f'`{n}`' for n in names.split(', '))}: {when}" for names, when in raised(value))
            yield kind, "\n".join(item(inline(line, resolve)) for line in lines)
        elif kind in ("parameters", "attributes"):
            shown = types if kind == "attributes" else {}  # a signature has those of its parameters
            yield kind, "\n".join(item(f"{head}: {inline(text, resolve)}") for head, text in fields(value, shown))
        elif kind in ("returns", "yields"):
            yield kind, prose(" ".join(each.description for each in value), resolve)
        else:
            raise ValueError(f"{documentation.parent.path}: a section {kind!r} in the docstring; add it here")


TITLES = {"parameters": "Arguments", "attributes": "Attributes", "raises": "Raises", "returns": "Returns",
          "yields": "Yields"}  # fmt: skip


def documentation(text: Any, resolve: Resolve, types: dict[str, str]) -> list[str]:
    if text is None:
        return []
    return [
        body if kind == "text" else f"{TITLES[kind]}:\n\n{body}"
        for kind, body in sections(text, resolve, types)
        if body
    ]
