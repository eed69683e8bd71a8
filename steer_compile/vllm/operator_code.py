"""Controllers of an engine: code of whoever starts it, named in its settings and loaded on every rank."""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from steer_compile.dynamic.codec import fields_of, plain_text_of, text_of
from steer_compile.dynamic.controller import Controller
from steer_compile.errors import SpecError

MOST_CONTROLLERS = 16
"""Most controllers of an engine."""


@dataclass(frozen=True)
class ControllerSpec:
    """A controller by name: ``module:Class`` and the keyword arguments of its constructor, as JSON text."""

    name: str
    path: str
    arguments: str = "{}"

    def made(self) -> Controller:
        """The controller. Where its constructor takes ``name``, it gets that.

        Raises:
            SpecError: there is no such class, it is none of a controller, or it does not take the arguments.
        """
        module, _, attribute = self.path.partition(":")
        given = json.loads(self.arguments)
        try:
            cls = vars(importlib.import_module(module))[attribute]
        except (ImportError, KeyError) as error:
            raise SpecError(
                f"the controller {self.name!r} is {self.path!r}, which cannot be imported ({error!r}); give "
                "'module:Class' of a module that the engine's processes can import"
            ) from error
        if not (isinstance(cls, type) and issubclass(cls, Controller)):
            raise SpecError(f"{self.path!r} of the controller {self.name!r} is no subclass of Controller; give one")
        named = {"name": self.name} if "name" in inspect.signature(cls).parameters else {}
        try:
            made = cls(**{**named, **given})
        except TypeError as error:
            raise SpecError(f"the controller {self.name!r} does not take its args: {error}") from error
        made.name = self.name
        return made


def controller_specs(given: object) -> tuple[ControllerSpec, ...]:
    """Controllers of ``{name: {"class": "module:Class", "args": {...}}}``; nothing is imported.

    Raises:
        SpecError: data of another form, or too much of it.
    """
    if not isinstance(given, Mapping) or len(given) > MOST_CONTROLLERS:
        raise SpecError(
            f"controllers are {len(given) if isinstance(given, Mapping) else type(given).__name__}; give "
            f"{{name: {{'class': 'module:Class', 'args': {{...}}}}}}, {MOST_CONTROLLERS} at most"
        )
    return tuple(_spec(text_of("the name of a controller", name), item) for name, item in sorted(given.items()))


def _spec(name: str, given: object) -> ControllerSpec:
    data = fields_of(f"the controller {name!r}", given, ("class", "args"), ("class",))
    path = text_of(f"the class of the controller {name!r}", data["class"])
    if not all(part.isidentifier() for part in path.replace(":", ".", 1).split(".")) or ":" not in path:
        raise SpecError(f"the class of the controller {name!r} is {path!r}; give 'module:Class'")
    arguments = plain_text_of(f"the args of the controller {name!r}", data.get("args", {}))
    return ControllerSpec(name, path, arguments)


def loaded(specs: Iterable[ControllerSpec]) -> tuple[Controller, ...]:
    """The controllers; raises as `ControllerSpec.made`."""
    return tuple(spec.made() for spec in specs)


def to_data(specs: Iterable[ControllerSpec]) -> dict[str, Any]:
    """The plain data of `controller_specs`."""
    return {spec.name: {"class": spec.path, "args": json.loads(spec.arguments)} for spec in specs}
