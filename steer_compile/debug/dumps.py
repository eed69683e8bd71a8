"""Dumps: a text of each graph in front of and behind every pass, in a folder and in torch's structured trace.

::

    <folder>/<compile>/00.find_sites.before.txt      # before find_sites | steer_compile 0.1.0 | torch 2.13.0 | ...
    <folder>/<compile>/01.find_sites.after.txt       and so on, `splice` last

``STEER_COMPILE_TRACE=<folder>`` in the environment has every process that imports the package write them, a vLLM
engine's workers too.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from steer_compile import torch_compat, watch
from steer_compile._version import __version__
from steer_compile.canon import canonical_text
from steer_compile.errors import DumpError

VARIABLE = "STEER_COMPILE_TRACE"
"""Environment variable that names the folder."""
_FILE = re.compile(r"(\d+)\.(\w+)\.(before|after)\.txt")
_HEAD = re.compile(r"# (before|after) (\w+) \| steer_compile (\S+) \| torch (\S+) \| plan (\S+)")


class Dump:
    """An onlooker (`watch.look_on`) that writes each graph that it sees.

    Raises:
        DumpError: the folder cannot be made, said here and not in the middle of a compile.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DumpError(f"dumps cannot be written to {folder}: {error}; name another folder") from error
        self.folder = folder
        self._counts: Counter[str] = Counter()

    def __call__(self, seen: watch.Seen) -> None:
        compilation = seen.compile_id.replace("/", "_") or "graph"
        name = f"{self._counts[compilation]:02}.{seen.step}.{seen.when}"
        self._counts[compilation] += 1
        text = text_of(seen)
        folder = self.folder / f"{os.getpid()}_{compilation}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        torch_compat.trace_artifact(f"steer_compile_{name}", text)


def text_of(seen: watch.Seen) -> str:
    """A dump's text: where it comes from, what was found and planned, and the canonical graph."""
    plan = seen.plan.digest() if seen.plan is not None else "none"
    head = f"# {seen.when} {seen.step} | steer_compile {__version__} | torch {torch.__version__} | plan {plan}"
    found = seen.table.text().splitlines() if seen.table is not None else []
    planned = seen.plan.text().splitlines() if seen.plan is not None else []
    return "\n".join([head, *(f"# {line}" for line in (*found, *planned)), canonical_text(seen.gm.graph)])


def dump_where_asked() -> None:
    """Dump what this process compiles, if the environment names a folder."""
    folder = os.environ.get(VARIABLE)
    if folder:
        watch.look_on(Dump(Path(folder)))


@dataclass(frozen=True)
class DumpFile:
    """One dump that was read back."""

    path: Path
    number: int
    step: str
    when: str
    versions: str
    plan: str
    values: int
    """Lines of the graph."""
    edits: int
    """Reads of the package's buffers."""


def read_dumps(folder: Path) -> dict[str, list[DumpFile]]:
    """Dumps of a folder by compilation, in order.

    Raises:
        DumpError: none there, or a damaged one.
    """
    found: dict[str, list[DumpFile]] = {}
    for path in sorted(folder.glob("*/*.txt")):
        named = _FILE.fullmatch(path.name)
        if named is not None:
            found.setdefault(path.parent.name, []).append(_read(path, int(named[1]), named[2], named[3]))
    for files in found.values():
        files.sort(key=lambda file: file.number)
    if not found:
        raise DumpError(f"{folder} holds no dumps; write some with `steer-compile trace MODEL --out {folder}`")
    return found


def _read(path: Path, number: int, step: str, when: str) -> DumpFile:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DumpError(f"the dump {path} cannot be read: {error}") from error
    head = _HEAD.match(lines[0]) if lines else None
    if head is None or (head[2], head[1]) != (step, when):
        raise DumpError(f"the dump {path} is damaged: its first line is not that of a dump {when} {step}; trace again")
    body = [line for line in lines if not line.startswith("#")]
    if not body or not body[-1].startswith("return"):
        raise DumpError(f"the dump {path} is damaged: the graph does not end in a return; trace again")
    edits = sum(line.count("$steer_") for line in body)
    return DumpFile(path, number, step, when, f"steer_compile {head[3]}, torch {head[4]}", head[5], len(body), edits)
