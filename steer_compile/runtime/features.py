"""What a row holds of sparse autoencoders: clamped features by slot, and which autoencoder decodes its values."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any, TypeAlias

import torch

from steer_compile.errors import SAEError, TableFull
from steer_compile.kernels.sae_delta import ADD, ADD_ACTIVE, SET, SET_ACTIVE
from steer_compile.runtime.vectors import PHASES, SiteKey
from steer_compile.sae.steer import FeatureClamp

MODES = ("delta", "keep_error", "reconstruct", "log")
_CODES = {("set", False): SET, ("add", False): ADD, ("set", True): SET_ACTIVE, ("add", True): ADD_ACTIVE}


@dataclass(frozen=True)
class SAESteering:
    """How one attached autoencoder acts on a request's tokens, at its own site.

    ===========  ==================================================================================================
    mode         value behind
    ===========  ==================================================================================================
    delta        ``h + step(sum_i (f'_i - f_i) W_dec[i])`` over the clamped features; the error term is kept. Features
                 that are loaded take part in the site's own kernel; others need the autoencoder as a whole.
    keep_error   the same, by the kernels that have the whole autoencoder
    reconstruct  ``decode(f')`` of all features; the error term is dropped. Clamps are optional.
    log          the value as it is
    ===========  ==================================================================================================

    Attributes:
        sae: name under which it is attached.
        clamps: clamped features, each once.
        mode: see above. All but ``delta`` need the autoencoder as a whole (``sae_full``).
        phase: ``prefill``, ``decode`` or ``both``.
        log: the largest features of each token are stored, where the spec has ``sae_log``.

    Raises:
        SAEError: an unknown mode or phase, something that is no clamp, a feature that is clamped twice, or nothing at
            all to do.
    """

    sae: str
    clamps: Sequence[FeatureClamp] = ()
    mode: str = "delta"
    phase: str = "both"
    log: bool = False

    def __post_init__(self) -> None:
        where = f"steering by the autoencoder {self.sae!r}"
        given: object = self.clamps
        items = (given,) if isinstance(given, FeatureClamp) or not isinstance(given, Iterable) else tuple(given)
        object.__setattr__(self, "clamps", items)
        if not isinstance(self.log, bool):
            raise SAEError(f"{where} has log={self.log!r}; give true or false")
        if not isinstance(self.sae, str) or not self.sae:
            raise SAEError(f"{self.sae!r} is no name of an autoencoder; give the text under which it is attached")
        for what, value, known in (("mode", self.mode, MODES), ("phase", self.phase, (*PHASES, "both"))):
            if value not in known:
                raise SAEError(f"{where} has {what}={value!r}; choose one of {', '.join(known)}")
        wrong = [type(clamp).__name__ for clamp in self.clamps if not isinstance(clamp, FeatureClamp)]
        if wrong:
            raise SAEError(f"{where} holds a {wrong[0]}; give FeatureClamp(feature, value)")
        numbers = [clamp.feature for clamp in self.clamps]
        twice = [number for number in numbers if numbers.count(number) > 1]
        if twice:
            raise SAEError(f"{where} clamps feature {twice[0]} twice; give one clamp for each feature")
        if not self.clamps and self.mode in ("delta", "keep_error") and not self.log:
            raise SAEError(f"{where} in mode {self.mode!r} clamps nothing and would do nothing; give clamps")
        if self.clamps and self.mode == "log":
            raise SAEError(f"{where} in mode 'log' leaves values alone, and has clamps; take mode='delta'")

    def acts(self, phase: str) -> bool:
        """Whether it acts in a phase."""
        return self.phase in (phase, "both")


def sae_steering(given: object) -> tuple[SAESteering, ...]:
    """Raises `SAEError` for what is no list of `SAESteering`."""
    items = (given,) if isinstance(given, SAESteering) else tuple(given) if isinstance(given, Iterable) else (given,)
    wrong = [type(item).__name__ for item in items if not isinstance(item, SAESteering)]
    if wrong:
        raise SAEError(f"features hold a {wrong[0]}; give [SAESteering(name, clamps=[FeatureClamp(...)]), ...]")
    return items


@dataclass(frozen=True)
class SlotClamp:
    """A clamp of one feature, resolved: where the feature lies.

    Attributes:
        slot: of the site's loaded features, or the feature's index within a whole autoencoder.
        sae, feature: what it is, for errors.
        content: digest of the autoencoder, so that another one of the same name is never taken for it.
    """

    slot: int
    code: int
    value: float
    sae: str
    feature: int
    content: str = ""

    @classmethod
    def of(cls, sae: str, clamp: FeatureClamp, slot: int, content: str) -> SlotClamp:
        return cls(slot, _CODES[clamp.kind, clamp.only_if_active], clamp.value, sae, clamp.feature, content)


@dataclass(frozen=True)
class Decoding:
    """Which whole autoencoder acts on a row's values at a site.

    Attributes:
        slot: of the site's whole autoencoders.
        mode: 0 the value is left alone, 1 reconstruct, 2 keep the error.
        log: whether the largest features are stored.
        content: digest of the autoencoder.
    """

    slot: int
    mode: int
    log: bool
    sae: str
    clamps: tuple[SlotClamp, ...] = ()
    content: str = ""

    def goes_with(self, other: Decoding) -> bool:
        """Whether a row can hold both: the same autoencoder, and not with and without the error term."""
        return self.slot == other.slot and (self.mode == other.mode or not (self.mode and other.mode))


Slots: TypeAlias = tuple[tuple[SiteKey, tuple[SlotClamp, ...]], ...]
Decodings: TypeAlias = tuple[tuple[SiteKey, Decoding], ...]


@dataclass(frozen=True)
class Features:
    """What one row holds of autoencoders, by site."""

    clamps: Slots = ()
    decodings: Decodings = ()

    def __bool__(self) -> bool:
        return bool(self.clamps or self.decodings)

    def __add__(self, own: Features) -> Features:
        """Both together.

        Raises:
            SAEError: both clamp one feature, or decode a site's values differently.
        """
        if not (self and own):
            return own or self
        clamps = dict(self.clamps)
        for site, each in own.clamps:
            clamps[site] = _joined(site, clamps.get(site, ()), each)
        decodings = dict(self.decodings)
        for site, one in own.decodings:
            decodings[site] = _decoded(site, decodings[site], one) if site in decodings else one
        return Features(tuple(clamps.items()), tuple(decodings.items()))

    @property
    def names(self) -> frozenset[str]:
        """Names of the autoencoders."""
        clamped = [clamp.sae for _, each in self.clamps for clamp in each]
        return frozenset((*clamped, *(one.sae for _, one in self.decodings)))

    def digest(self) -> str:
        """Equal features of autoencoders of equal content have equal digests."""
        return repr((sorted(self.clamps), sorted(self.decodings, key=lambda item: item[0]))) if self else ""

    def yielding(self, own: Features) -> Features:
        """What is left of these beside ``own``, which comes first: clamps of other features, and decodings that go with
        its own."""
        clamps, decodings = dict(own.clamps), dict(own.decodings)
        kept = ((site, _others(each, clamps.get(site, ()))) for site, each in self.clamps)
        beside = ((site, one, decodings.get(site)) for site, one in self.decodings)
        return Features(
            tuple((site, each) for site, each in kept if each),
            tuple(
                (site, one if then is None else replace(one, clamps=_others(one.clamps, then.clamps)))
                for site, one, then in beside
                if then is None or one.goes_with(then)
            ),
        )

    def check_apart(self, own: Features) -> None:
        """Raise `SAEError` where both clamp one feature, or decode a site's values differently."""
        _ = self + own

    def to_data(self) -> list[Any]:
        """Plain data, in pieces that cross processes."""
        clamps = [[*site, [list(astuple(clamp)) for clamp in each]] for site, each in self.clamps]
        return [clamps, [[*site, list(astuple(one))] for site, one in self.decodings]]

    @classmethod
    def of_data(cls, data: Any) -> Features:
        """Those of `to_data`."""
        clamps, decodings = data

        def read(each: Any) -> tuple[SlotClamp, ...]:
            return tuple(SlotClamp(*clamp) for clamp in each)

        found = (
            ((hook, layer), Decoding(slot, mode, log, sae, read(each), content))
            for hook, layer, (slot, mode, log, sae, each, content) in decodings
        )
        return cls(tuple(((hook, layer), read(each)) for hook, layer, each in clamps), tuple(found))

    def check_room(self, most: int) -> None:
        """Raise `TableFull` for more clamps of a whole autoencoder than a row has room for."""
        for (hook, layer), one in self.decodings:
            if len(one.clamps) > most:
                raise TableFull(
                    f"{len(one.clamps)} features of {one.sae!r} are clamped at layers.{layer}.{hook}, global ones "
                    f"included, and there is room for {most}; raise features in the spec and compile again, or give "
                    "fewer"
                )

    def lines(self, most: int) -> dict[str, dict[SiteKey, torch.Tensor]]:
        """Lines of the row by kind of bank and site, fp32 on the CPU; ``most``: clamps that one has room for."""
        clamped = {site: _spread({c.slot: c for c in each}, most) for site, each in self.clamps}
        rows = {site: _numbers((d.slot + 1, d.mode, d.log, 0)) for site, d in self.decodings}
        listed = {site: _listed(d.clamps, most) for site, d in self.decodings}
        return {"sae_clamp": clamped, "full_row": rows, "full_clamp": listed}


def _joined(site: SiteKey, first: Sequence[SlotClamp], then: Sequence[SlotClamp]) -> tuple[SlotClamp, ...]:
    taken = {clamp.slot: clamp for clamp in first}
    for clamp in then:
        if clamp.slot in taken:
            raise SAEError(
                f"feature {clamp.feature} of {clamp.sae!r} at layers.{site[1]}.{site[0]} is clamped twice in a phase: "
                f"by {taken[clamp.slot].sae!r} to {taken[clamp.slot].value:g} (global or first) and by {clamp.sae!r} "
                f"to {clamp.value:g}; take one away, or give them different phases"
            )
    return (*first, *then)


def _others(clamps: Sequence[SlotClamp], own: Sequence[SlotClamp]) -> tuple[SlotClamp, ...]:
    taken = {clamp.slot for clamp in own}
    return tuple(clamp for clamp in clamps if clamp.slot not in taken)


def _decoded(site: SiteKey, first: Decoding, then: Decoding) -> Decoding:
    if not first.goes_with(then):
        raise SAEError(
            f"the values of layers.{site[1]}.{site[0]} are decoded by {first.sae!r} and by {then.sae!r} in one phase, "
            "or with and without the error term; give one autoencoder and one mode for each site"
        )
    clamps = _joined(site, first.clamps, then.clamps)
    return replace(first, mode=first.mode or then.mode, log=first.log or then.log, clamps=clamps)


def _numbers(given: Iterable[Any]) -> torch.Tensor:
    return torch.tensor([float(number) for number in given], dtype=torch.float32, device="cpu")


def _spread(clamps: Mapping[int, SlotClamp], slots: int) -> torch.Tensor:
    """Codes, then values of all slots."""
    line = torch.zeros(2, slots, dtype=torch.float32, device="cpu")
    for slot, clamp in clamps.items():
        line[0, slot], line[1, slot] = clamp.code, clamp.value
    return line.flatten()


def _listed(clamps: Sequence[SlotClamp], most: int) -> torch.Tensor:
    """Features, codes and values of a list of clamps."""
    line = torch.zeros(3, most, dtype=torch.float32, device="cpu")
    for i, clamp in enumerate(clamps):
        line[0, i], line[1, i], line[2, i] = clamp.slot, clamp.code, clamp.value
    return line.flatten()
