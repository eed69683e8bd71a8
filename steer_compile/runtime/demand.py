"""`Demand`: the tokens and sites that a reader of packed captures wants of each call."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from steer_compile.errors import NotSteered, SpecError
from steer_compile.hooks import parse_hook, parse_site
from steer_compile.runtime.vectors import SiteKey

T = TypeVar("T")


@runtime_checkable
class Choice(Protocol):
    """Chooses tokens of a sequence: a `TokenSelection`, or anything else that has its ``mask``."""

    def mask(self, first: int, length: int, prompt_length: int) -> npt.NDArray[np.bool_]:
        """Which of ``length`` tokens from position ``first`` on are chosen, after a prompt of ``prompt_length``."""
        ...


@dataclass(frozen=True)
class _Every:
    """Every token of a sequence, or none."""

    chosen: bool

    def mask(self, first: int, length: int, prompt_length: int) -> npt.NDArray[np.bool_]:
        return np.full(length, self.chosen)


NO_TOKENS = _Every(False)


@dataclass(frozen=True)
class Sites:
    """A set of captured sites.

    Attributes:
        names: ``(hook, layer)``, or ``(hook, None)`` for all captured layers of a hook; None for all captured sites.
    """

    names: frozenset[tuple[str, int | None]] | None = None

    def __contains__(self, site: SiteKey) -> bool:
        return self.names is None or site in self.names or (site[0], None) in self.names

    def __bool__(self) -> bool:
        return self.names != frozenset()

    def __or__(self, other: Sites) -> Sites:
        if self.names is None or other.names is None:
            return Sites()
        return Sites(self.names | other.names)


@dataclass(frozen=True)
class Demand:
    """Tokens and sites of every sequence, or of each one."""

    tokens: Choice | tuple[Choice, ...]
    sites: Sites | tuple[Sites, ...]

    def of(self, batch: int) -> list[tuple[Choice, Sites]]:
        """Tokens and sites of each of ``batch`` sequences.

        Raises:
            NotSteered: they are given for another number of sequences.
        """
        return list(zip(_each("tokens", self.tokens, batch), _each("sites", self.sites, batch), strict=True))

    def named(self) -> Iterable[tuple[str, int | None]]:
        """Every hook and site that is asked for by name, once."""
        each = set(self.sites) if isinstance(self.sites, tuple) else {self.sites}
        return sorted(set().union(*(sites.names or () for sites in each)), key=str)


def demand(tokens: object = None, sites: object = None) -> Demand:
    """Check what a reader asks for.

    Args:
        tokens: a `Choice`, None for every token, or a list with one for each sequence, in which None is no token.
        sites: hooks (all their captured layers) and sites (``("post_block", 3)``, ``"layers.3.post_block"``), None for
            all that is captured, or a list with one such list or None for each sequence.

    Raises:
        SpecError: something else, or sites without a layer of their own.
    """
    each: Choice | tuple[Choice, ...]
    if isinstance(tokens, list | tuple):
        each = tuple(NO_TOKENS if item is None else _choice(item) for item in tokens)
    else:
        each = _Every(True) if tokens is None else _choice(tokens)
    if isinstance(sites, list | tuple) and sites and all(_is_list(item) for item in sites):
        return Demand(each, tuple(_sites(item) for item in sites))
    chosen = _sites(sites)
    if not chosen:
        raise SpecError(f"sites={sites!r} names no site; name hooks or sites, or leave it out for all")
    return Demand(each, chosen)


def _each(what: str, given: T | tuple[T, ...], batch: int) -> Sequence[T]:
    if not isinstance(given, tuple):
        return [given] * batch
    if len(given) != batch:
        raise NotSteered(
            f"capture has {what} for {len(given)} sequences but the call has {batch}; give one entry for each"
        )
    return given


def _choice(item: object) -> Choice:
    if not isinstance(item, Choice):
        raise SpecError(
            f"tokens holds {item!r}, which chooses no tokens; give a TokenSelection, None or a list of them"
        )
    return item


def _is_site(item: object) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], int)


def _is_list(item: object) -> bool:
    return item is None or (isinstance(item, list | tuple | set | frozenset) and not _is_site(item))


def _sites(given: object) -> Sites:
    if given is None:
        return Sites()
    items = [given] if isinstance(given, str) or _is_site(given) else given
    if not isinstance(items, Iterable):
        raise SpecError(f"sites={given!r} is no list of sites; give for example sites=[('post_block', 3)]")
    return Sites(frozenset(_name(item) for item in items))


def _name(item: object) -> tuple[str, int | None]:
    if isinstance(item, str) and "." not in item:
        return parse_hook(item), None
    if isinstance(item, str):
        hook, layer = parse_site(item)
    elif isinstance(item, tuple) and _is_site(item):
        hook, layer = parse_hook(item[0]), item[1]
    else:
        raise SpecError(f"{item!r} names no site; write ('post_block', 3), 'layers.3.post_block' or 'post_block'")
    if layer < 0:
        raise SpecError(f"layers.{layer}.{hook} counts from the last layer; give the layer's number")
    return hook, layer
