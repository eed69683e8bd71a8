"""File names from what clients call their requests and tags."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from steer_compile.errors import CaptureError

POLICIES = ("error", "suffix", "replace")
"""What happens where a name is taken: `CaptureError`, another name, or the new file in place of the old one."""
MOST_NAME = 100
_OTHER = re.compile(r"[^A-Za-z0-9_-]+")
_NUMBERED = re.compile(r"(.+)-(\d+)")
_MOST_STEMS = 65536


def slug(text: str) -> str:
    """A file's stem: letters, digits, hyphens and underscores, at most 109 of them; never empty, never a path.

    A text that is no stem as it stands gets a digest at its end, so other texts have other stems.
    """
    kept = _OTHER.sub("-", text).strip("-")[:MOST_NAME]
    if kept == text and kept:
        return kept
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{kept or 'x'}-{digest}"


def checked_policy(policy: str) -> str:
    """The policy itself.

    Raises:
        CaptureError: there is no such policy.
    """
    if policy not in POLICIES:
        raise CaptureError(f"collisions={policy!r} is unknown; choose one of {', '.join(POLICIES)}")
    return policy


class Stems:
    """Stems to try one after the other for a file: ``a``, and with ``suffix`` ``a-1``, ``a-2`` and so on."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._next: dict[str, int] = {}

    def of(self, stem: str, folder: str = "") -> Iterator[str]:
        """Those of a stem in a folder, from the one on that was not tried yet."""
        if self._policy != "suffix":
            yield stem
            return
        if len(self._next) > _MOST_STEMS:
            self._next.clear()  # the disk knows what is taken
        key = f"{folder}/{stem}"
        while True:
            number = self._next.get(key, 0)
            self._next[key] = number + 1
            yield f"{stem}-{number}" if number else stem


class Numbers:
    """Stems of shards, ``a-00003``: each number once, and with ``suffix`` until one is free."""

    def __init__(self, policy: str) -> None:
        self._policy = policy
        self._next: dict[str, int] = {}

    def of(self, stem: str, first: Callable[[], int]) -> Iterator[str]:
        """Those of a stem; ``first`` gives the number to begin with."""
        if stem not in self._next:
            self._next[stem] = first()
        while True:
            number = self._next[stem]
            self._next[stem] = number + 1
            yield f"{stem}-{number:05d}"
            if self._policy != "suffix":
                return


def in_order(path: Path) -> tuple[str, str, int]:
    """Sorts files as they were made: ``a``, ``a-1``, ``a-2``, ``a-10``."""
    found = _NUMBERED.fullmatch(path.stem)
    return (str(path.parent), found[1], int(found[2])) if found else (str(path.parent), path.stem, -1)
