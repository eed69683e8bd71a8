"""The files of this checkout, read from the disk (a source archive has no git metadata)."""

import os
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("passes", "kernels")
"""Top-level folders that the package sees through links of the same name."""

_NOT_SOURCE = {"out", "build", "dist", "__pycache__", "torch_compile_debug"}


def files(suffix: str) -> Iterator[Path]:
    """Every file of the checkout with this suffix, once and by its real place, relative to the root."""
    for folder, subfolders, names in os.walk(ROOT):
        subfolders[:] = sorted(
            name
            for name in subfolders
            if not name.startswith(".") and not name.endswith(".egg-info") and name not in _NOT_SOURCE
        )
        for name in sorted(names):
            if name.endswith(suffix):
                yield Path(folder, name).relative_to(ROOT)


def module_name(path: Path) -> str:
    """The one import name of a file: `passes/splice.py` is `steer_compile.passes.splice`."""
    parts = list(path.with_suffix("").parts)
    if parts[0] in LINKED:
        parts.insert(0, "steer_compile")
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)
