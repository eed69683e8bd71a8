"""vLLM's compile cache and debug dumps, read without vLLM: which entries hold a steered graph, and what is in it.

::

    <cache>/<key>/rank_0_0/backbone/{cache_key_factors.json, computation_graph.py}       pieces
    <cache>/torch_aot_compile/<key>/{rank_0_0/model, inductor_cache/...}                 whole artifacts
    <debug_dump_path>/.../*.py                                                           graphs that were dumped

The layout is that of vLLM 0.22 to 0.32. A whole artifact is a pickle, and is never opened.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steer_compile.errors import DumpError

FACTORS, GRAPH, ARTIFACT, KERNELS = "cache_key_factors.json", "computation_graph.py", "model", "inductor_cache"
_CALL = re.compile(r"torch\.ops\.steer_compile\.(\w+)")
_TABLE = re.compile(r"steer_(?:bank_\d+(?:_\d+)?|rows|scale|gain|decode|slot)(?=_?\b)")
_PIECE = re.compile(r"^    class submod_\d+", re.MULTILINE)


@dataclass(frozen=True)
class Entry:
    """One graph that was kept, or one artifact.

    Attributes:
        key: name of the cache's folder, vLLM's hash of its configuration, the steering's spec among it.
        part: where it is behind the key.
        kind: ``graph`` or ``artifact``.
        pieces: graphs into which it was cut, or files of kernels of an artifact.
        tables: buffers of this package that the graph reads, 0 for one that is not steered; None for an artifact.
        calls: how often each of the package's own operators is called.
        hashes: parts of the key, where vLLM wrote them down.
    """

    path: Path
    key: str
    part: str
    kind: str
    pieces: int
    tables: int | None
    calls: dict[str, int]
    hashes: dict[str, str]


def default_cache() -> Path:
    """Where vLLM keeps its cache, by its environment variable or its default."""
    root = os.environ.get("VLLM_CACHE_ROOT") or Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vllm"
    return Path(root) / "torch_compile_cache"


def read_cache(folder: Path) -> list[Entry]:
    """Entries of a cache folder, of one key's folder, or of a folder of dumps.

    Raises:
        DumpError: none there, or one that cannot be read.
    """
    found = [*_graphs(folder), *_artifacts(folder)]
    if not found:
        raise DumpError(
            f"{folder} holds no graph and no artifact, so it is no compile cache or dump of vLLM; its default is "
            f"{default_cache()}"
        )
    return found


def _graphs(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).parts
        if KERNELS in parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DumpError(f"the dump {path} is damaged: {error}; delete it, and vLLM compiles again") from error
        if "class GraphModule" not in text:
            if path.name == GRAPH:
                raise DumpError(f"the dump {path} is damaged: it holds no graph; delete it, and vLLM compiles again")
            continue
        key, part = _place(folder, path)
        # what is in a signature alone, or renamed, is not read
        read = "\n".join(line for line in text.splitlines() if "(" in line and "def forward" not in line)
        tables, calls = len(set(_TABLE.findall(read))), dict(Counter(_CALL.findall(text)))
        yield Entry(path, key, part, "graph", len(_PIECE.findall(text)), tables, calls, _hashes(path.parent / FACTORS))


def _artifacts(folder: Path) -> Iterator[Entry]:
    for path in sorted(folder.rglob(f"rank_*/{ARTIFACT}")):
        kernels = path.parent.parent / KERNELS
        files = sum(file.suffix in (".py", ".cpp", ".cu") for file in kernels.rglob("*")) if kernels.is_dir() else 0
        key, part = _place(folder, path)
        yield Entry(path, key, part, "artifact", files, None, {}, {})


def _place(folder: Path, path: Path) -> tuple[str, str]:
    """Key of an entry, the folder in front of that of its rank, and what is behind."""
    parts = (folder.resolve().name, *path.relative_to(folder).parts)
    rank = next((i for i, name in enumerate(parts) if name.startswith("rank_")), 1)
    return parts[max(rank - 1, 0)], "/".join(parts[rank:])


def _hashes(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        factors = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DumpError(f"{path} is damaged: {error}; delete the entry, and vLLM compiles again") from error
    if not isinstance(factors, dict):
        raise DumpError(f"{path} is damaged: it holds no names; delete the entry, and vLLM compiles again")
    return {name: str(value) for name, value in factors.items() if name.endswith("_hash")}
