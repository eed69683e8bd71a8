"""`SAETables`: weights and settings of attached autoencoders in the tensors that compiled graphs read."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from steer_compile.errors import SAEError
from steer_compile.kernels.sae_delta import NO_FEATURE
from steer_compile.runtime.tables import TableSet, numbers
from steer_compile.runtime.vectors import SiteKey
from steer_compile.sae.model import SAE
from steer_compile.sae.packing import decoder_rows, encoder_rows, feature_settings


@dataclass(frozen=True)
class Attached:
    """An autoencoder at a site.

    Attributes:
        features: the features that are loaded one by one, and ``slots``, where each lies.
        whole: slot of the whole autoencoder, None where it is not loaded as a whole.
    """

    name: str
    sae: SAE
    site: SiteKey
    features: tuple[int, ...]
    slots: tuple[int, ...]
    whole: int | None

    @property
    def place(self) -> str:
        return f"layers.{self.site[1]}.{self.site[0]}"


class SAETables:
    """Writes and clears the places of autoencoders. The caller holds the lock."""

    def __init__(self, tables: TableSet) -> None:
        self._tables = tables
        self._features = tables.spec.features
        self._width = tables.spec.sae_features

    def _held(self, one: Attached) -> bool:
        """Whether the site's tensors are here, and hold something."""
        device = self._tables.device
        return device is not None and device.type != "meta" and bool(self._tables.families(one.site))

    def write(self, one: Attached) -> None:
        if not self._held(one):
            return
        if one.features:
            index, slots = (torch.tensor(some, device="cpu") for some in (one.features, one.slots))
            rows, settings = self._tables.view("sae", one.site), self._tables.view("sae_set", one.site)
            encoder, decoder = encoder_rows(one.sae, index), decoder_rows(one.sae, index)
            _check_range(one, rows.dtype, (encoder, decoder))
            for start, part in ((0, encoder), (self._features, decoder)):
                rows[(slots + start).to(rows.device)] = part.to(rows.device, rows.dtype)
            settings[slots.to(rows.device)] = feature_settings(one.sae, index).to(rows.device)
        if one.whole is not None:
            self._write_whole(one, one.whole)

    def _write_whole(self, one: Attached, slot: int) -> None:
        every, count = torch.arange(one.sae.d_sae, device="cpu"), self._width
        at = slice(slot * count, slot * count + one.sae.d_sae)
        encoder, decoder = encoder_rows(one.sae, every), decoder_rows(one.sae, every)
        _check_range(one, self._tables.view("full_encoder", one.site).dtype, (encoder, decoder))
        self._tables.view("full_encoder", one.site)[at].copy_(encoder)
        self._tables.view("full_decoder", one.site)[at].copy_(decoder)
        self._tables.view("full_set", one.site)[at].copy_(feature_settings(one.sae, every))
        self._tables.view("full_bias", one.site)[slot].copy_(one.sae.b_dec)
        k = one.sae.activation.settings().get("k", 0) if one.sae.activation.kind == "topk" else 0
        self._tables.view("full_sae", one.site)[slot].copy_(numbers((one.sae.d_sae, k, 0, 0)))

    def clear(self, one: Attached) -> None:
        if not self._held(one):
            return
        neutral = numbers(NO_FEATURE)
        if one.slots:
            slots = torch.tensor(one.slots, device=self._tables.device)
            rows, settings = self._tables.view("sae", one.site), self._tables.view("sae_set", one.site)
            rows[torch.cat([slots, slots + self._features])] = 0
            settings[slots] = neutral.to(settings.device)
        if one.whole is not None:
            count = self._width
            part = slice(one.whole * count, (one.whole + 1) * count)
            for kind in ("full_encoder", "full_decoder"):
                self._tables.view(kind, one.site)[part].zero_()
            self._tables.view("full_set", one.site)[part].copy_(neutral)
            for kind in ("full_bias", "full_sae"):
                self._tables.view(kind, one.site)[one.whole].zero_()


def _check_range(one: Attached, dtype: torch.dtype, weights: Iterable[torch.Tensor]) -> None:
    """Raise `SAEError` for weights that overflow the dtype of the tables."""
    if not all(bool(torch.isfinite(part.to(dtype)).all()) for part in weights):
        raise SAEError(
            f"{one.sae.source or one.name}: weights of {one.name!r} overflow the table's dtype {dtype}; set "
            "dtype='float32' in the spec and compile again"
        )
