"""`Latches`: what conversations hold on to, bounded in entries and bytes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Generic, TypeVar

from steer_compile.errors import SpecError

T = TypeVar("T")
MOST_CONVERSATIONS, MOST_BYTES = 1024, 256 << 20


class Latches(Generic[T]):
    """Values by conversation; the one that was not used for longest goes first. The same calls evict the same ones."""

    def __init__(self, most: int = MOST_CONVERSATIONS, most_bytes: int = MOST_BYTES) -> None:
        if most < 1 or most_bytes < 1:
            raise SpecError(
                f"latches have room for {most} conversations and {most_bytes} bytes; give at least 1 of each"
            )
        self._most, self._most_bytes = most, most_bytes
        self._held: OrderedDict[str, tuple[T, int]] = OrderedDict()
        self.bytes = 0
        self.evicted = 0

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[str]:
        """Conversations, the one that goes first in front."""
        return iter(list(self._held))

    def get(self, conversation: str) -> T | None:
        """What a conversation holds; it counts as used."""
        found = self._held.get(conversation)
        if found is None:
            return None
        self._held.move_to_end(conversation)
        return found[0]

    def put(self, conversation: str, value: T, size: int) -> bool:
        """Hold a value of ``size`` bytes; False where it is larger than all the room."""
        self.drop(conversation)
        if size > self._most_bytes:
            return False
        self._held[conversation] = (value, size)
        self.bytes += size
        while len(self._held) > self._most or self.bytes > self._most_bytes:
            _, (_, gone) = self._held.popitem(last=False)
            self.bytes -= gone
            self.evicted += 1
        return True

    def drop(self, conversation: str) -> None:
        """Let go of what a conversation holds."""
        found = self._held.pop(conversation, None)
        if found is not None:
            self.bytes -= found[1]
