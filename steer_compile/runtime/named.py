"""`NamedVectors`: vector sets by name."""

from __future__ import annotations

from steer_compile.errors import UnknownName, VectorError
from steer_compile.runtime.vectors import VectorSet


class NamedVectors:
    """Names are for what comes; what is live keeps the vectors that its names had."""

    def __init__(self) -> None:
        self._sets: dict[str, VectorSet] = {}

    def check(self, name: str, vectors: VectorSet, replace: bool, users: int) -> None:
        """Raise `VectorError` where a name is taken by other content, and in use or not to be replaced."""
        old = self._sets.get(name)
        if old is None or old == vectors:
            return
        if users:
            raise VectorError(f"vector set {name!r} is used by {users} live handles; release them first")
        if not replace:
            raise VectorError(f"vector set {name!r} exists with other content; pass replace=True to change it")

    def put(self, name: str, vectors: VectorSet) -> None:
        """Name a set."""
        self._sets[name] = vectors

    def get(self, name: str) -> VectorSet:
        """The set of a name.

        Raises:
            UnknownName: there is none.
        """
        if name not in self._sets:
            known = ", ".join(sorted(self._sets)) or "none"
            raise UnknownName(f"no vector set is named {name!r}; registered are: {known}")
        return self._sets[name]

    def pop(self, name: str) -> None:
        """Take a name away.

        Raises:
            UnknownName: there is none.
        """
        self.get(name)
        del self._sets[name]

    def digests(self) -> dict[str, str]:
        """Content digest by name."""
        return {name: vectors.digest for name, vectors in self._sets.items()}
