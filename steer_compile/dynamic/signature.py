"""Signature of what steers a request's decoded tokens, for keys of caches of what was computed with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from steer_compile.dynamic.codec import digest_of
from steer_compile.dynamic.overrides import Override
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.gates import Monitor
from steer_compile.runtime.vectors import SiteKey, VectorSet


@dataclass(frozen=True)
class Effective:
    """All that acts on a request's decoded tokens.

    Attributes:
        everyone: what every decoded token gets.
        own: what the request adds, with factors.
        scale: factor of the row that it reads without an override.
        override: what it gets instead, None without.
        tier, gain: the dynamic tier.
        monitors: monitors of sites, and whether each gates rows.
    """

    everyone: Contents = Contents()
    own: Contents = Contents()
    scale: float = 1.0
    override: Override | None = None
    tier: VectorSet = VectorSet()
    gain: float = 1.0
    monitors: Mapping[SiteKey, tuple[Monitor, bool]] = field(default_factory=dict)

    def signature(self) -> str:
        """Digest of it; "" where nothing acts.

        Each part is hashed under its own name and each monitor under its site, so equal ones do not cancel. Named sets
        count by their content. A request with an override does not read its own row, so that has no part then.
        """
        everyone, own = _bare(self.everyone), _bare(self.own)
        row = (own.digest(), self.scale) if self.override is None else ()
        override = self.override.digest() if self.override is not None else None
        tier = (self.tier.digest, self.gain) if self.tier else ()
        monitors = sorted((site, monitor.digest, gates) for site, (monitor, gates) in self.monitors.items())
        if override is None and not (everyone or own or tier):
            return ""
        return digest_of(
            "everyone", everyone.digest(), "row", row, "override", override, "tier", tier, "monitors", monitors
        )


def _bare(contents: Contents) -> Contents:
    """The contents without empty vector sets."""
    return replace(contents, parts=tuple((vectors, scale) for vectors, scale in contents.parts if vectors))
