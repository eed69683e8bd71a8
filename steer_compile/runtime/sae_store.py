"""`SAEStore`: autoencoders that are attached to sites, and where their features and weights lie."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from steer_compile.errors import NotSteered, SAEError, TableFull, UnknownName
from steer_compile.runtime.features import Decoding, Features, SAESteering, SlotClamp
from steer_compile.runtime.gates import SiteLike
from steer_compile.runtime.sae_places import check_places, placed
from steer_compile.runtime.sae_tables import Attached, SAETables
from steer_compile.runtime.scope import Scope
from steer_compile.runtime.tables import TableSet
from steer_compile.runtime.vectors import site_key
from steer_compile.sae.model import SAE
from steer_compile.spec import SteerSpec

WRITTEN = {"keep_error": 2, "reconstruct": 1, "log": 0}
"""Number of each mode in a row of the tables."""


@dataclass(frozen=True)
class TopFeatures:
    """The largest features of each token, the largest first: ``indices`` (batch, length, L) int64, -1 where fewer are
    active, and ``activations`` in fp32, 0 there. On the model's device."""

    indices: torch.Tensor
    activations: torch.Tensor


class SAEStore:
    """Attaches and detaches autoencoders between calls. Every change happens as a whole or not at all.

    Room is what the spec declares, and is allocated once: no change compiles anything or moves a tensor.
    """

    def __init__(
        self, spec: SteerSpec, tables: TableSet, scope: Scope, lock: threading.RLock,
        users: Callable[[str], int], shape: Callable[[], tuple[int, int]],
    ) -> None:  # fmt: skip
        self._spec = spec
        self._tables = tables
        self._places = SAETables(tables)
        self._scope = scope
        self._lock = lock
        self._users = users
        self._shape = shape
        self._attached: dict[str, Attached] = {}

    @property
    def attached(self) -> dict[str, Attached]:
        """Attached autoencoders by name."""
        with self._lock:
            return dict(self._attached)

    def attach(
        self, name: str, sae: SAE, features: Iterable[int] | None = None, whole: bool = False,
        site: SiteLike | None = None,
    ) -> Attached:  # fmt: skip
        """Load an autoencoder into the room that the spec has at its site.

        Args:
            name: what `SAESteering` calls it.
            features: features to load one by one, which then can be clamped by the site's own kernel.
            whole: load all of it, to decode values, to log features, and for encoders that choose among all features.
            site: hook and layer, where its file does not say.

        Raises:
            SAEError: a name that is taken, no site or another one, nothing to load, features that it does not have or
                that depend on others. SiteNotFound: a site without ``sae`` (features) or ``sae_full`` (whole).
            VectorError: the site has another width. TableFull: no room for so many features or autoencoders.
        """
        with self._lock:
            return self.adopt(placed(self._spec, self._attached, name, sae, features, whole, site))

    def adopt(self, made: Attached) -> Attached:
        """Load an autoencoder at the places that it has in another process, or had here before.

        Raises:
            SAEError: a name that is taken, or weights that overflow the tables. SiteNotFound, VectorError, TableFull:
                as in `attach`; a place that is taken is no room.
        """
        with self._lock, torch.no_grad():
            check_places(made, self._attached)
            self._check(made)
            try:
                self._places.write(made)
            except (RuntimeError, SAEError):  # no room to stage the weights, or numbers beyond the table's range
                self._places.clear(made)
                raise
            self._attached[made.name] = made
            return made

    def detach(self, name: str) -> None:
        """Give an autoencoder's room back.

        Raises:
            UnknownName: none of this name. SAEError: a configuration, or everyone, uses it.
        """
        with self._lock, torch.no_grad():
            found = self.get(name)
            used = self._users(name)
            if used:
                raise SAEError(
                    f"the autoencoder {name!r} at {found.place} is in use by {used} rows; release the configurations "
                    "or clear the global tier that name it first"
                )
            del self._attached[name]
            self._places.clear(found)

    def users(self, name: str) -> int:
        """Rows that use an autoencoder, those of everyone included."""
        with self._lock:
            return self._users(name)

    def get(self, name: str) -> Attached:
        """The autoencoder of a name.

        Raises:
            UnknownName: there is none.
        """
        if name not in self._attached:
            have = ", ".join(sorted(self._attached)) or "none"
            raise UnknownName(f"no autoencoder {name!r} is attached; attached are {have}; attach it first")
        return self._attached[name]

    def resolve(self, steering: Sequence[SAESteering], phase: str) -> Features:
        """What configurations put into a row of a phase.

        Raises:
            UnknownName: an autoencoder that is not attached. SAEError: a feature that it does not have or that is not
                loaded, or two that do not go together. SiteNotFound: it is not loaded as a whole, or nothing is logged.
        """
        found = Features()
        for one in steering:
            if one.acts(phase):
                found = found + self._resolved(one)
        found.check_room(self._spec.features)
        return found

    def top_features(self, site: SiteLike) -> TopFeatures:
        """The largest features of the last call's tokens at a site with the op family ``sae_log``.

        Of tokens that are not logged the numbers are those of earlier calls.

        Raises:
            SiteNotFound: no such site, or without ``sae_log``. NotSteered: no call yet.
        """
        key, (batch, length) = site_key(site), self._shape()
        self._tables.check("sae_log", key)
        if not batch * length:
            raise NotSteered("no compiled graph ran yet, so no features are stored; call the model")
        stored = self._tables.captured(batch * length, "full_log")[key].view(batch, length, -1)
        indices, activations = stored.chunk(2, -1)
        return TopFeatures(indices.long(), activations.clone())

    def check_all(self, whole: bool = False) -> None:
        """Raise for what is attached and does not fit (``whole``: all parts of the model ran)."""
        for one in self._attached.values():
            self._check(one, whole)

    def bind(self) -> None:
        """Write all that is attached."""
        for one in self._attached.values():
            self._places.write(one)

    # -- resolving ------------------------------------------------------------------------------------------------

    def _resolved(self, one: SAESteering) -> Features:
        at = self.get(one.sae)
        content = at.sae.digest[:32]
        for clamp in one.clamps:
            if clamp.feature >= at.sae.d_sae:
                raise SAEError(
                    f"{one.sae!r} has no feature {clamp.feature}; its features are 0 to {at.sae.d_sae - 1}; choose one"
                )
        loaded = dict(zip(at.features, at.slots, strict=True))
        missing = [clamp.feature for clamp in one.clamps if clamp.feature not in loaded]
        if one.mode == "delta" and one.clamps and not one.log and not missing:
            clamps = tuple(SlotClamp.of(one.sae, clamp, loaded[clamp.feature], content) for clamp in one.clamps)
            return Features(clamps=((at.site, clamps),))
        if at.whole is None:
            what = f"feature {missing[0]} of {one.sae!r} is not loaded" if missing else f"{one.sae!r} has features only"
            have = ", ".join(map(str, at.features[:8])) + (", ..." if len(at.features) > 8 else "")
            raise SAEError(
                f"{what} at {at.place}, and it is not attached as a whole; loaded are {have or 'none'}; attach it with "
                f"features=[...] that hold it, or with whole=True, which mode={one.mode!r}, log={one.log} may need"
            )
        if one.log:
            self._scope.check("sae_log", at.site)
        mode = WRITTEN.get(one.mode, 2 if one.clamps else 0)
        clamps = tuple(SlotClamp.of(one.sae, clamp, clamp.feature, content) for clamp in one.clamps)
        decoding = Decoding(at.whole, mode, one.log or one.mode == "log", one.sae, clamps, content)
        return Features(decodings=((at.site, decoding),))

    def _check(self, one: Attached, whole: bool = False) -> None:
        if one.features:
            self._scope.check("sae", one.site, one.sae.d_model, whole)
        if one.whole is None:
            return
        self._scope.check("sae_full", one.site, one.sae.d_model, whole)
        if one.sae.d_sae > self._spec.sae_features:
            raise TableFull(
                f"{one.name!r} has {one.sae.d_sae} features and the spec has sae_features={self._spec.sae_features} at "
                f"{one.place}; raise it and compile again"
            )
