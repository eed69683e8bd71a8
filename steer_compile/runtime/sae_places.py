"""Where an autoencoder finds room at its site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from steer_compile.errors import SAEError, TableFull
from steer_compile.runtime.gates import SiteLike
from steer_compile.runtime.sae_tables import Attached
from steer_compile.runtime.vectors import site_key
from steer_compile.sae.checks import whole as whole_number
from steer_compile.sae.model import SAE
from steer_compile.spec import SteerSpec


def placed(
    spec: SteerSpec, attached: Mapping[str, Attached], name: str, sae: SAE, features: Iterable[int] | None,
    whole: bool, site: SiteLike | None,
) -> Attached:  # fmt: skip
    """An autoencoder at the first places that are free beside the attached ones, by name.

    Raises:
        SAEError, TableFull: as `SAEStore.attach`.
    """
    check_name(name, attached)
    if not isinstance(sae, SAE):
        raise SAEError(f"{name!r} is a {type(sae).__name__}; give an SAE, as steer_compile.sae.load returns it")
    own = sae.site if site is None else site_key(site)
    if own is None or (sae.site is not None and own != sae.site):
        said = f"belongs to {sae.key}, not to {site!r}" if sae.site else "does not say which site it belongs to"
        raise SAEError(f"{sae.source or name}: the autoencoder {said}; give attach(..., site=(hook, layer)) of it")
    if not isinstance(features, Iterable | None) or isinstance(features, str):
        raise SAEError(f"features={features!r} of {name!r} is no list; give the numbers of features, or None")
    wanted = tuple(features or ())
    if not wanted and not whole:
        raise SAEError(f"nothing of {name!r} would be loaded; give features=[...] to clamp, or whole=True, or both")
    _check_features(name, sae, wanted)
    here = [one for one in attached.values() if one.site == own]
    slots = _free(spec.features, [slot for one in here for slot in one.slots], len(wanted))
    places = _free(spec.saes, [one.whole for one in here if one.whole is not None], int(whole))
    if slots is None or places is None:
        used = sum(len(one.slots) for one in here)
        raise TableFull(
            f"layers.{own[1]}.{own[0]} has no room for {name!r}: {used} of features={spec.features} and "
            f"{sum(one.whole is not None for one in here)} of saes={spec.saes} are taken by "
            f"{', '.join(one.name for one in here) or 'nothing'}; detach one, or raise them and compile again"
        )
    return Attached(name, sae, own, wanted, slots, places[0] if whole else None)


def check_name(name: str, attached: Mapping[str, Attached]) -> None:
    """Raise `SAEError` for a name that no autoencoder can take."""
    if not isinstance(name, str) or not name or name in attached:
        raise SAEError(f"the name {name!r} of an autoencoder is taken or no text; detach it first, or give another")


def check_places(made: Attached, attached: Mapping[str, Attached]) -> None:
    """Raise `SAEError` for a name that is taken, `TableFull` for places that others have."""
    check_name(made.name, attached)
    for one in attached.values():
        shared = set(one.slots) & set(made.slots)
        if one.site == made.site and (shared or (made.whole is not None and one.whole == made.whole)):
            raise TableFull(f"{made.place}: the places of {made.name!r} are those of {one.name!r}; detach that first")


def _check_features(name: str, sae: SAE, wanted: Sequence[int]) -> None:
    if sae.activation.batch_dependent:
        raise SAEError(
            f"{sae.source or name}: the features of {name!r} depend on the batch, so a token's steering would "
            "depend on other tokens; give BatchTopK(k, threshold=...)"
        )
    if wanted and sae.activation.kind == "topk":
        raise SAEError(
            f"{sae.source or name}: the features of {name!r} are the largest of all its features, so none can be "
            "loaded alone; attach it with whole=True at a site with the op family 'sae_full'"
        )
    bad = [n for n in wanted if not 0 <= whole_number(name, "a feature", n) < sae.d_sae]
    if bad or len(set(wanted)) < len(wanted):
        what = f"no feature {bad[0]}" if bad else "a feature given twice"
        raise SAEError(f"{sae.source or name}: {name!r} has {what}; its features are 0 to {sae.d_sae - 1}, each once")


def _free(count: int, taken: Sequence[int], wanted: int) -> tuple[int, ...] | None:
    """The first free places, None where there are not enough."""
    free = sorted(set(range(count)) - set(taken))[:wanted]
    return tuple(free) if len(free) == wanted else None
