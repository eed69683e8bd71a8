"""`Consumer`: what captured rows go to, and how consumers are found by name.

A pipeline calls the methods of a consumer one after the other, in one thread, in the order of what happened: `began`
of a request is before its rows, and `ended` behind the last of them. Any method may be ``async def``; the pipeline
awaits it before it goes on. What a consumer raises is its own affair: the requests concerned have the result ``error``
for this consumer, and other requests and consumers go on.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Awaitable
from concurrent.futures import Future
from dataclasses import dataclass
from importlib import metadata
from typing import Any, TypeAlias

from steer_compile.capture.rows import Rows
from steer_compile.errors import SpecError, UnknownName

GROUP = "steer_compile.capture_consumers"
"""Entry points of this group are consumers: a subclass of `Consumer`, or a function that makes one."""

BUILT_IN = {
    "memory": "steer_compile.capture.consumers.memory:MemoryConsumer",
    "files": "steer_compile.capture.consumers.files:files",
    "parquet": "steer_compile.capture.consumers.parquet:ParquetConsumer",
    "log": "steer_compile.capture.consumers.log:LogConsumer",
    "callback": "steer_compile.capture.consumers.callback:CallbackConsumer",
}
"""The package's own consumers; a checkout that is not installed has them as well."""


@dataclass(frozen=True)
class Meta:
    """What the rows of a request were computed with.

    Attributes:
        model: digest or name of the model's weights, "" where the host gives none.
        spec: digest of what was compiled in and of what steered the request.
        prompt_length: tokens of the prompt, padding excluded; 0 where it is not known.
    """

    model: str = ""
    spec: str = ""
    prompt_length: int = 0


@dataclass(frozen=True)
class Began:
    """A request whose rows come next."""

    request: str
    tag: str = ""
    meta: Meta = Meta()


@dataclass(frozen=True)
class Ended:
    """A request of which no more rows come.

    Attributes:
        dropped: rows that never came, as there was no room for them; 0 where the request is complete.
    """

    request: str
    tag: str = ""
    dropped: int = 0
    meta: Meta = Meta()

    @property
    def complete(self) -> bool:
        return self.dropped == 0


Kept: TypeAlias = "str | Future[str] | None"
"""Where a request's rows are (a path, a key, "" or None), or a future of it where they are published later."""


class Consumer(ABC):
    """Takes the rows of requests. The values are its own: nobody writes to them later, and it may keep them."""

    def began(self, begun: Began) -> Awaitable[None] | None:
        """A request begins; requests of one name follow one another, and never run at the same time."""
        return None

    @abstractmethod
    def rows(self, rows: Rows) -> Awaitable[None] | None:
        """Rows of one step, of one or more requests that have begun. Those of a step come in one or more pieces."""

    @abstractmethod
    def ended(self, end: Ended) -> Kept | Awaitable[Kept]:
        """A request has ended. Returns where its rows are; they are durable there when this, or the future, returns."""

    def forget(self, request: str) -> Awaitable[None] | None:
        """A request was given up, or failed in this consumer: `ended` does not come for it."""
        return None

    def flush(self) -> Awaitable[None] | None:
        """Publish what has ended and waits for more."""
        return None

    def close(self) -> Awaitable[None] | None:
        """No more calls come: publish what is there, and let go of files and memory."""
        return None


def consumer_names() -> list[str]:
    """Names that `make_consumer` knows."""
    return sorted({*BUILT_IN, *(point.name for point in metadata.entry_points(group=GROUP))})


def make_consumer(name: str, **options: Any) -> Consumer:
    """A new consumer by name, as in ``make_consumer("files", root="out/rows")``.

    Raises:
        UnknownName: there is none of the name. SpecError: options that it does not take, or it makes no consumer.
    """
    points = [point for point in metadata.entry_points(group=GROUP) if point.name == name]
    if name in BUILT_IN:  # a package cannot take the name of a built-in consumer
        points = [metadata.EntryPoint(name, BUILT_IN[name], GROUP)]
    if not points:
        raise UnknownName(
            f"no capture consumer is named {name!r}; there are {', '.join(consumer_names())}; "
            f"a package adds others by entry points of the group {GROUP!r}"
        )
    factory = points[0].load()
    signature = inspect.signature(factory)
    try:
        signature.bind(**options)
    except TypeError as error:
        raise SpecError(
            f"the capture consumer {name!r} does not take these options: {error}; it takes {signature}"
        ) from error
    made = factory(**options)
    if not isinstance(made, Consumer):
        raise SpecError(f"the capture consumer {name!r} is a {type(made).__name__}; subclass Consumer")
    return made
