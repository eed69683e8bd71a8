"""A consumer that waits, and pipelines that are closed behind a test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from steer_compile.capture.pipeline import Pipeline
from tests.capture._gate import Gate


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def making() -> Iterator[Callable[..., Pipeline]]:
    """Pipelines that are closed behind the test."""
    made: list[Pipeline] = []

    def make(*args: Any, **options: Any) -> Pipeline:
        made.append(Pipeline(*args, **options))
        return made[-1]

    yield make
    for pipeline in made:
        pipeline.close(5)
