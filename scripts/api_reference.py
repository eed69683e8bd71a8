"""Write the API reference, docs/api/*.md, from the package's signatures and docstrings.

python scripts/api_reference.py            write the pages
python scripts/api_reference.py --check    exit with 1 where they differ from what would be written

The source is read and not imported, so the pages do not depend on the Python, on torch or on what else is installed.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import griffe
from api_text import WIDTH, Resolve, anchor, documentation, inline, item, wrapped

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "api"
COMMAND = "python scripts/api_reference.py"


class Page(NamedTuple):
    stem: str
    title: str
    about: str
    names: tuple[tuple[str, str], ...]
    """A module of the package and names of it, separated by spaces; no names: what it exports; a star: its classes."""


PAGES = (
    Page("steer_compile", "steer_compile", "What programs import first: the spec, the backend and what it is given.",
         (("", ""),)),
    Page("runtime", "Run time", "Objects that the runtime hands out or takes, beside those of `steer_compile`.",
         (("dynamic.plain", "DynamicRuntime"), ("runtime.capture", "CaptureLog"), ("capture.log", "RowLog"),
          ("runtime.vectors", "VectorSet"), ("runtime.gates", "Hidden"), ("runtime.sae_store", "SAEStore TopFeatures"),
          ("runtime.rows", "Step"), ("runtime.packed", "PackedCall"))),
    Page("graphs", "Graphs", "What `SteerBackend.tables` and `SteerBackend.plans` hold, and how names are read.",
         (("ir", "SiteTable Site Miss HookSchema Plan Edit Bank Slot"), ("hooks", "parse_hook parse_site"),
          ("spec", "parse_layers"))),
    Page("errors", "Errors", "All errors that the package raises for what it is given.",
         (("errors", "*"),)),
    Page("capture", "Captured rows", "Rows with labels, what is kept of them, and where they go.",
         (("capture.plain", "capture_to About"), ("capture.rows", "Rows joined"),
          ("capture.selection", "Selection Top"), ("capture.reduce", "Reduction"),
          ("capture.pipeline", "Pipeline"), ("capture.step", "Limits StepRows"), ("capture.results", "Result"),
          ("capture.consumer", "Consumer Meta Began Ended make_consumer consumer_names"),
          ("capture.consumers.memory", "MemoryConsumer"),
          ("capture.read", "read published merged Sidecar RequestInfo Captured"), ("capture.dataset", "RowDataset"),
          ("capture.store", "ActivationStore Source Counters captured_prompts prompt_key"))),
    Page("dynamic", "steer_compile.dynamic", "Controllers, gates and actions.", (("dynamic", ""),)),
    Page("sae", "steer_compile.sae", "Sparse autoencoders.", (("sae", ""),)),
    Page("sweep", "steer_compile.sweep", "Patch sweeps.", (("sweep", ""),)),
    Page("vllm", "steer_compile.vllm", "What is imported beside vLLM; it needs no vLLM itself.", (("vllm", ""),)),
)  # fmt: skip

CONSTANTS = {
    "__version__": "The version of the package, a text.",
    "METRICS": "Names of what a `Question` may measure.",
}
"""Texts of exported names that can have no docstring."""

DECORATORS = ("contextmanager", "classmethod", "staticmethod", "abstractmethod")


class Entry(NamedTuple):
    name: str
    object: Any
    page: str

    @property
    def title(self) -> str:
        return f"class `{self.name}`" if self.object.is_class else f"`{self.name}`"


class Reference:
    """All entries, and where each is."""

    def __init__(self) -> None:
        extensions = griffe.load_extensions(griffe.UnpackTypedDictExtension)
        self.package = griffe.load(
            "steer_compile", search_paths=[str(ROOT)], resolve_aliases=True, resolve_external=False,
            extensions=extensions,
        )  # fmt: skip
        self.entries = [
            Entry(name, self._object(module, name), page.stem)
            for page in PAGES
            for module, names in page.names
            for name in (self._classes(module) if names == "*" else names.split() or self._exports(module))
        ]
        self.paths = {entry.object.path for entry in self.entries}

    def _module(self, name: str) -> Any:
        return self.package[name] if name else self.package

    def _exports(self, module: str) -> list[str]:
        return sorted((str(name) for name in self._module(module).exports), key=lambda name: (name.lower(), name))

    def _classes(self, module: str) -> list[str]:
        return [
            name for name, member in self._module(module).members.items() if not member.is_alias and member.is_class
        ]

    def _object(self, module: str, name: str) -> Any:
        found = self._module(module)
        imported = found.imports.get(name)  # a module and a function in it may share a name
        if imported:
            found, name = self.package, imported.removeprefix("steer_compile.")
        member = found[name]
        return member.final_target if member.is_alias else member

    def on(self, page: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.page == page]

    def resolver(self, page: str, owner: Any = None) -> Resolve:
        """How a name in a text becomes a link: to a method of the class, the same page, or another one."""
        near = sorted(self.entries, key=lambda entry: entry.page != page)
        known = {entry.name: entry for entry in reversed(near)}

        def resolve(name: str) -> str | None:
            first, _, member = name.partition(".")
            if owner is not None and any(method.name == name for method in documented(self, owner)):
                return f"#{anchor(f'{owner.name}.{name}')}"
            if first not in known:
                return None
            entry = known[first]
            whole = member and entry.object.is_class and any(m.name == member for m in documented(self, entry.object))
            if member and not whole:
                return None
            place = anchor(name if member else entry.title)
            return f"#{place}" if entry.page == page else f"{entry.page}.md#{place}"

        return resolve


# -- members ------------------------------------------------------------------------------------------------------


def members(reference: Reference, owner: Any) -> Iterator[Any]:
    """Public members of a class: its own, then those of bases that have no entry."""
    seen: set[str] = set()
    for cls in (owner, *owner.mro()):
        if cls is not owner and (cls.path in reference.paths or not cls.path.startswith("steer_compile.")):
            continue
        for name, member in cls.members.items():
            if not name.startswith("_") and name not in seen and not member.is_alias:
                seen.add(name)
                yield member


def docstring(member: Any) -> Any:
    """Its docstring, or that of what it overrides."""
    if member.docstring is None and member.parent is not None and member.parent.is_class:
        for base in member.parent.mro():
            inherited = base.members.get(member.name)
            if inherited is not None and not inherited.is_alias and inherited.docstring is not None:
                return inherited.docstring
    return member.docstring


def documented(reference: Reference, owner: Any) -> list[Any]:
    """The methods that have a heading."""
    return [member for member in members(reference, owner) if member.is_function and docstring(member) is not None]


# -- signatures ---------------------------------------------------------------------------------------------------


def parameters(given: Iterable[Any]) -> list[str]:
    """Parameters as they are written, with the marks of positional and keyword-only ones."""
    texts: list[str] = []
    kind = ""
    for each in given:
        former, kind = kind, each.kind.value
        if former == "positional-only" != kind:
            texts.append("/")
        if kind == "keyword-only" and former not in ("keyword-only", "variadic positional"):
            texts.append("*")
        stars = {"variadic positional": "*", "variadic keyword": "**"}.get(kind, "")
        text = stars + each.name + (f": {each.annotation}" if each.annotation is not None else "")
        if each.default is not None and not stars:
            default = re.sub(r"'([^'\"]*)'", r'"\1"', str(each.default))
            text += f" = {default}" if each.annotation is not None else f"={default}"
        texts.append(text)
    return texts


def definition(name: str, given: Sequence[str], returns: object, indent: str = "") -> str:
    """``def name(...) -> ...: ...``, on lines of their own where it is long."""
    end = f"){f' -> {returns}' if returns is not None else ''}: ..."
    line = f"{indent}def {name}({', '.join(given)}{end}"
    if len(line) <= WIDTH - 20:
        return line
    inner = "".join(f"{indent}    {each},\n" for each in given)
    return f"{indent}def {name}(\n{inner}{indent}{end}"


def function_code(function: Any, returns: object) -> str:
    names = [str(each.value).rpartition(".")[2] for each in function.decorators]
    marks = "".join(f"@{name}\n" for name in names if name in DECORATORS)
    return marks + definition(function.name, parameters(function.parameters), returns)


def class_code(cls: Any) -> str:
    bases = [str(base) for base in cls.bases]
    head = f"class {cls.name}({', '.join(bases)}):" if bases else f"class {cls.name}:"
    if "NamedTuple" in bases:
        fields = [m for m in cls.members.values() if m.is_attribute and "property" not in m.labels]
        given = [f"{m.name}: {m.annotation}" + (f" = {m.value}" if m.value is not None else "") for m in fields]
        return f"{head}\n{definition('__new__', ['cls', *given], None, '    ')}"
    given = parameters(cls.parameters)
    if len(given) < 2:
        return f"{head} ..."
    return f"{head}\n{definition('__init__', given, 'None', '    ')}"


def code(entry: Entry) -> str:
    it = entry.object
    if it.is_class:
        return class_code(it)
    if it.is_function:
        return function_code(it, it.returns)
    return f"{it.name}: str" if it.name == "__version__" else f"{it.name} = {it.value}"


# -- pages --------------------------------------------------------------------------------------------------------


def annotations(cls: Any) -> dict[str, str]:
    found = {}
    for base in reversed((cls, *cls.mro())):
        found |= {m.name: str(m.annotation) for m in base.members.values() if m.is_attribute and m.annotation}
    return found


def class_parts(reference: Reference, cls: Any, resolve: Resolve) -> list[str]:
    """Properties and methods of a class."""
    parts, short = [], []
    for member in members(reference, cls):
        text = docstring(member)
        if member.is_attribute and text is not None:
            body = " ".join(" ".join(documentation(text, resolve, {})).replace("\n* ", " ").split())
            kind = f" (`{member.annotation}`)" if member.annotation else ""
            short.append(item(f"`{member.name}`{kind}: {body}"))
    if short:
        parts.append("Properties:\n\n" + "\n".join(short))
    for method in documented(reference, cls):
        parts.append(f"### `{cls.name}.{method.name}`")
        parts.append(f"```python\n{function_code(method, method.returns)}\n```")
        parts += documentation(docstring(method), resolve, {})
    bare = [m for m in members(reference, cls) if m.is_function and docstring(m) is None]
    if bare:
        lines = (
            f"* `{m.name}({', '.join(parameters(m.parameters)[1:])}){f' -> {m.returns}' if m.returns else ''}`"
            for m in bare
        )
        parts.insert(1 if short else 0, "Methods without a text:\n\n" + "\n".join(lines))
    return parts


def entry_parts(reference: Reference, entry: Entry) -> list[str]:
    it = entry.object
    resolve = reference.resolver(entry.page, it if it.is_class else None)
    parts = [f"## {entry.title}", f"```python\n{code(entry)}\n```"]
    if entry.name in CONSTANTS:
        return [*parts, inline(CONSTANTS[entry.name], resolve)]
    parts += documentation(it.docstring, resolve, annotations(it) if it.is_class else {})
    return parts + (class_parts(reference, it, resolve) if it.is_class else [])


def summary(entry: Entry, resolve: Resolve) -> str:
    """The first sentence of an entry."""
    text = CONSTANTS.get(entry.name) or (entry.object.docstring.value if entry.object.docstring else "")
    first = re.split(r"(?<=\.)\s(?=[A-Z])(?=(?:[^`]*`[^`]*`)*[^`]*$)", " ".join(text.split("\n\n")[0].split()))[0]
    return inline(first.rstrip(":"), resolve).replace("|", "\\|")


def contents(reference: Reference, page: str, prefix: str) -> str:
    """A table of the names of a page."""
    rows = [
        f"| [`{e.name}`]({prefix}#{anchor(e.title)}) | {summary(e, lambda name: None)} |" for e in reference.on(page)
    ]
    return "\n".join(["| name | what it is |", "|---|---|", *rows])


def render() -> dict[str, str]:
    """Texts of the pages by file name."""
    reference = Reference()
    note = f"Made from the docstrings by `{COMMAND}` (`make docs`): change those, not this page."
    pages = {}
    index = ["# API reference", note]
    for page in PAGES:
        parts = [f"# {page.title}", inline(page.about, lambda name: None), wrapped(f"{note} [All pages](README.md)")]
        parts.append(contents(reference, page.stem, ""))
        for entry in reference.on(page.stem):
            parts += entry_parts(reference, entry)
        pages[f"{page.stem}.md"] = "\n\n".join(parts) + "\n"
        index += [f"## [{page.title}]({page.stem}.md)", page.about, contents(reference, page.stem, f"{page.stem}.md")]
    return {"README.md": "\n\n".join(index) + "\n", **pages}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the API reference from the docstrings.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where a page differs")
    check = parser.parse_args().check
    pages = render()
    stale = [path for path in sorted(FOLDER.glob("*.md")) if path.name not in pages]
    stale += [FOLDER / name for name, text in pages.items()
              if not (FOLDER / name).exists() or (FOLDER / name).read_text(encoding="utf-8") != text]  # fmt: skip
    if check:
        for path in stale:
            print(f"{path.relative_to(ROOT)} differs from the docstrings; run: {COMMAND}", file=sys.stderr)
        return 1 if stale else 0
    FOLDER.mkdir(parents=True, exist_ok=True)
    for path in stale:
        path.unlink(missing_ok=True)
    for name, text in pages.items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
