"""Errors of the package. The first line of each says what is wrong, where, what exists instead and the cure."""

from __future__ import annotations


class SteerError(ValueError):
    """Base of every error that the package raises for a user's input."""


class SpecError(SteerError):
    """A spec that cannot be meant: unknown hook, empty selection, capacity below one, changed after compile."""


class SiteNotFound(SteerError):
    """A requested hook and layer has no value in the compiled graph."""


class VectorError(SteerError):
    """A vector of the wrong width, shape or dtype, or with NaN or infinity."""


class UnknownName(SteerError):
    """A vector set, hook or layer that was never registered."""


class ChangedSet(VectorError):
    """A named vector set that has other content than when something was decided by its name."""


class TableFull(SteerError):
    """No row is free for another distinct steering configuration."""


class TooManyTokens(SteerError):
    """A call with more tokens than the spec's ``max_tokens``."""


class NotSteered(SteerError):
    """Steering or capture was asked for, but no compiled graph ran that could apply it."""


class CaptureError(SteerError):
    """Captured rows that cannot be labelled, kept, written or read."""


class LoweringError(SteerError):
    """A site whose value cannot be steered or captured: shape, layout or dtype."""


class DumpError(SteerError):
    """A folder without dumps, or a damaged dump or cache entry."""


class CheckpointError(SteerError):
    """A model or vector file that is missing, damaged or not safetensors."""


class SAEError(SteerError):
    """A sparse autoencoder or a file of one that is damaged, incomplete, or asks for mathematics that is not here."""
