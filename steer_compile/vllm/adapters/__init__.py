"""What this package leans on inside vLLM, one file for each place: `missing` says what a version lacks, `install`
puts the package's own function around vLLM's. Run on vLLM 0.32.0 (CPU, runner V1) and 0.26.0
(CUDA, both runners); once on 0.28.0 and 0.30.0 (CPU)."""

from __future__ import annotations

from typing import Protocol


class Adapter(Protocol):
    """A module of this package."""

    __name__: str

    def missing(self) -> str:
        """What this version of vLLM lacks, or nothing."""

    def install(self) -> None:
        """Put the adapter's functions in place."""
