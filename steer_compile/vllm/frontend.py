"""`FrontEnd`: checks a request's steering in the process that takes it, so that no bad one reaches the engine core."""

from __future__ import annotations

from typing import Any

import torch

from steer_compile.errors import TableFull
from steer_compile.runtime.registry import Registry
from steer_compile.vllm.model import Shape, expected_banks
from steer_compile.vllm.requests import parse
from steer_compile.vllm.settings import Settings, load_vectors
from steer_compile.vllm.transport import sent


class FrontEnd:
    """The engine's spec and named vectors beside tables of the right shapes that hold nothing."""

    def __init__(self, settings: Settings, shape: Shape) -> None:
        self._rows = settings.spec.rows
        self._registry = Registry(settings.spec)
        self._registry.reserve(expected_banks(settings.spec, shape), torch.device("meta"))
        for name, path in settings.vectors:
            self._registry.register_vectors(name, load_vectors(path))

    def checked(self, given: object) -> tuple[dict[str, Any], dict[str, str]]:
        """A request's steering as data for the engine, and the digest of what it adds in each phase ("" for nothing).

        Raises:
            SpecError, VectorError, SiteNotFound, UnknownName: what the engine cannot do. TableFull: more rows than
                the spec has in all.
        """
        steering = parse(given)
        made = self._registry.preview(steering)
        tokens = "" if steering.tokens is None else repr(steering.tokens)
        digests = {phase: contents.digest() + tokens if contents else "" for phase, contents in made.items()}
        needed = sum(bool(digest) for digest in digests.values())
        if needed > self._rows:
            raise TableFull(f"the request needs {needed} rows, one for each phase, and the spec has rows={self._rows}")
        return sent(made, steering.tokens), digests
