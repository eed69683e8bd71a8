"""Logged features of autoencoders, as one more thing that requests capture.

Where a site has the op family ``sae_log``, the graph stores the largest features of each token whose row logs: indices,
then activations. What is stored of site ``layers.3.post_block`` is captured as ``layers.3.post_block.features``. The
lines of other tokens are those of earlier steps, so a request captures features of tokens alone that it logs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from steer_compile.capture.reduce import Reduction
from steer_compile.capture.selection import Selection
from steer_compile.errors import SpecError
from steer_compile.ir import Bank
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.vectors import SiteKey, TokenSelection, site_key

_SUFFIX = ".features"


def captured_as(bank: Bank) -> SiteKey | None:
    """What captures the values that a graph stores in a bank, None where none are for requests."""
    hook, layer = bank.sites[0]
    return {"capture": (hook, layer), "full_log": (hook + _SUFFIX, layer)}.get(bank.kind)


def capture_key(given: object) -> SiteKey:
    """A captured site, or what captures features of one, from its name or from hook and layer.

    Raises:
        SpecError: it names no site.
    """
    first, *layer = given if isinstance(given, tuple) and len(given) == 2 else (given,)
    plain = str(first).removesuffix(_SUFFIX)
    found = site_key((plain, *layer) if layer else plain)
    return found if plain == str(first) else (found[0] + _SUFFIX, found[1])


def is_log(site: SiteKey) -> bool:
    """Whether it captures features."""
    return site[0].endswith(_SUFFIX)


def key_text(site: SiteKey) -> str:
    """``layers.3.post_block.features``"""
    return f"layers.{site[1]}.{site[0]}"


@dataclass(frozen=True)
class Logs:
    """What a request logs.

    Attributes:
        phases: in which it logs, by what captures that.
        steered: its tokens that read its rows, None for all.
    """

    phases: Mapping[SiteKey, tuple[str, ...]]
    steered: TokenSelection | None = None

    @classmethod
    def of(cls, made: Mapping[str, Contents], steered: TokenSelection | None = None) -> Logs:
        """That of a request's contents by phase."""
        found: dict[SiteKey, tuple[str, ...]] = {}
        for phase, contents in made.items():
            for (hook, layer), one in contents.features.decodings:
                if one.log:
                    key = (hook + _SUFFIX, layer)
                    found[key] = (*found.get(key, ()), phase)
        return cls(found, steered)

    def everything(self, captured: Iterable[SiteKey]) -> tuple[SiteKey, ...]:
        """What a request that names no sites captures: all of an engine's captured sites, and what it logs.

        Raises:
            SpecError: features alone can be captured, and it logs none.
        """
        there = tuple(captured)
        found = tuple(site for site in there if not is_log(site) or site in self.phases)
        if there and not found:
            raise SpecError(
                f"the request captures, and logs no features, which are all that can be captured here "
                f"({key_text(there[0])}); give it features with mode 'log' or log=true, or leave capture out"
            )
        return found

    def check_kept(self, sites: Iterable[SiteKey]) -> None:
        """Raise `SpecError` for what is logged and not captured."""
        lost = [key_text(site) for site in self.phases if site not in sites]
        if lost:
            raise SpecError(
                f"the request logs features that it does not capture; give it a capture with {lost[0]!r} among its "
                "sites, or leave the log out"
            )

    def check(self, sites: tuple[SiteKey, ...], tokens: Selection, keep: Reduction) -> None:
        """Raise `SpecError` unless a request captures what it logs, and features of no token that it does not log."""
        self.check_kept(sites)
        for site in filter(is_log, sites):
            name = key_text(site)
            if keep.kinds != ("rows",):
                raise SpecError(
                    f"{name} is captured with reduce={list(keep.kinds)}, and of features nothing is reduced; leave "
                    "reduce out, or name other sites"
                )
            _check_phases(name, self.phases.get(site, ()), tokens)
            if self.steered is not None and (tokens.tokens != self.steered or tokens.positions):
                raise SpecError(
                    f"{name} is captured at other tokens than the request steers, where nothing is logged; give "
                    "capture the same tokens, with every or top at most, or leave the request's tokens out"
                )


def _check_phases(name: str, phases: tuple[str, ...], tokens: Selection) -> None:
    generated = bool(tokens.positions) or (tokens.tokens is not None and tokens.tokens.generated)
    if not phases:
        raise SpecError(
            f"{name} is captured by a request that logs no features there; give it features with mode 'log' or "
            "log=true of an autoencoder of that site, or leave it out of sites"
        )
    if "prefill" not in phases and tokens.in_prompt:
        raise SpecError(
            f"{name} is captured at prompt tokens, and the request logs features of generated ones only; give capture "
            "tokens {'generated': true}, or the features phase 'both'"
        )
    if "decode" not in phases and generated:
        raise SpecError(
            f"{name} is captured at generated tokens, and the request logs features of its prompt only; give capture "
            "tokens of the prompt, such as {'spans': [[0, null]]}, or the features phase 'both'"
        )
