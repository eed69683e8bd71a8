"""File names from what clients call their requests and tags."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from uuid import uuid4

from steer_compile.errors import CaptureError

POLICIES = ("error", "suffix", "replace")
"""What happens where a name is taken: `CaptureError`, another name, or the new file in place of the old one."""
MOST_NAME = 100
_OTHER = re.compile(r"[^A-Za-z0-9_-]+")
_NUMBERED = 10


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


def stems(stem: str, policy: str) -> Iterator[str]:
    """Stems to try one after the other: ``a``, and with ``suffix`` ``a-1`` to ``a-9``, then one that nobody has."""
    yield stem
    if policy == "suffix":
        yield from (f"{stem}-{number}" for number in range(1, _NUMBERED))
        yield f"{stem}-{uuid4().hex[:12]}"


def numbered(stem: str, first: int, policy: str) -> Iterator[str]:
    """Stems of shards: ``a-00003``, and with ``suffix`` the numbers behind it."""
    number = first
    while True:
        yield f"{stem}-{number:05d}"
        if policy != "suffix":
            return
        number += 1
