"""Features of captured rows: of each token the largest, with the labels kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from steer_compile.capture.rows import Rows
from steer_compile.errors import SAEError, SiteNotFound
from steer_compile.runtime.vectors import SiteKey, site_key
from steer_compile.sae.activation import top_mask
from steer_compile.sae.checks import whole
from steer_compile.sae.model import SAE

BATCH_BYTES = 64 << 20
"""What the features of one batch take; the encoder's working memory is a small multiple of it."""


@dataclass(frozen=True, eq=False)
class FeatureRows:
    """The largest features of each captured token, in the order of the rows.

    Attributes:
        requests, request, positions, token_ids, steps: labels as in `Rows`.
        indices: features of each token (n, k) int64, the largest first and of equal ones the lowest index first; -1
            where fewer than k are active.
        activations: theirs (n, k) fp32, or fp64 for fp64 rows; 0 where there is none.
    """

    requests: tuple[str, ...]
    request: Tensor
    positions: Tensor
    token_ids: Tensor
    steps: Tensor
    indices: Tensor
    activations: Tensor

    def __len__(self) -> int:
        return self.request.numel()


def features(
    rows: Rows, sae: SAE, top: int, batch: int | None = None, site: SiteKey | str | None = None
) -> FeatureRows:
    """Per token the largest features of an autoencoder.

    Args:
        rows: captured rows that hold the autoencoder's site, one vector for each token.
        top: how many features to keep of each token.
        batch: rows that are encoded at once; None bounds their features to 64 MiB.
        site: hook and layer to read where the autoencoder does not say its own.

    Raises:
        SiteNotFound: the site is not among the captured. SpecError: ``site`` is none.
        SAEError: no site is known, or two are; rows of another width; ``top`` or ``batch`` out of range; features that
            depend on the batch.
    """
    if not 1 <= whole(sae.name, "top", top) <= sae.d_sae:
        raise SAEError(f"{sae.name} has {sae.d_sae} features, of which {top} cannot be kept; give top=1 to {sae.d_sae}")
    if batch is not None and whole(sae.name, "batch", batch) < 1:
        raise SAEError(f"{sae.name}: batches of {batch} rows; give batch=1 or more, or None")
    if sae.activation.batch_dependent:
        raise SAEError(f"{sae.name}: its features depend on the batch; give BatchTopK(k, threshold=...)")
    values = _values(rows, sae, site)
    size = batch or max(1, BATCH_BYTES // (sae.d_sae * 4))
    parts = [_largest(sae.encode(part), top) for part in values.split(size)]
    return FeatureRows(
        rows.requests,
        rows.request,
        rows.positions,
        rows.token_ids,
        rows.steps,
        torch.cat([indices for indices, _ in parts]),
        torch.cat([found for _, found in parts]),
    )


def logged(values: Tensor) -> tuple[Tensor, Tensor]:
    """The largest features of tokens that a request of vLLM logged and captured.

    Args:
        values: of a key such as ``layers.3.post_block.features`` (n, 2L) fp32.

    Returns:
        Indices (n, L) int64, the largest first, -1 where fewer are active; and activations (n, L), 0 there.

    Raises:
        SAEError: values of another form.
    """
    if values.dim() != 2 or values.size(1) % 2 or values.dtype != torch.float32:
        raise SAEError(
            f"values of {values.dtype}{list(values.shape)} are no log of features; give those of a key that ends in "
            ".features, float32 (n, 2L)"
        )
    indices, activations = values.chunk(2, 1)
    return indices.long(), activations.clone()


def _values(rows: Rows, sae: SAE, site: SiteKey | str | None) -> Tensor:
    own = sae.site if site is None else site_key(site)
    if own is None or (sae.site is not None and own != sae.site):
        said = f"belongs to {sae.key}, not to {site!r}" if sae.site else "does not say which site it belongs to"
        raise SAEError(f"{sae.name} {said}; give features(..., site=(hook, layer)) of its rows")
    key = f"layers.{own[1]}.{own[0]}"
    if key not in rows.values:
        raise SiteNotFound(f"{key} of {sae.name} is not captured; captured are {', '.join(rows.values) or 'none'}")
    value = rows.values[key]
    if value.dim() != 2 or value.size(1) != sae.d_model:
        found = tuple(value.shape)
        raise SAEError(f"{key} has rows of shape {found}; {sae.name} takes (n, {sae.d_model}), whole rows of its model")
    return value


def _largest(f: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Indices and values of the largest features (n, d_sae) of each token; NaN counts as the largest."""
    ranked = torch.where(f.isnan(), torch.inf, f)
    index = top_mask(ranked, top).nonzero()[:, 1].view(len(f), top)  # ascending, so a stable sort breaks ties by index
    order = ranked.gather(1, index).argsort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    found = f.gather(1, index)
    return torch.where(found == 0, -1, index), found
