"""A feature as a probe: the monitor of a site that opens where the feature is active."""

from __future__ import annotations

from typing import Any

import torch

from steer_compile.errors import SAEError
from steer_compile.runtime.gates import Monitor
from steer_compile.sae.checks import whole
from steer_compile.sae.model import SAE
from steer_compile.sae.normalise import LayerNorm
from steer_compile.sae.packing import encoder_rows, feature_settings


def feature_monitor(sae: SAE, feature: int, above: float = 0.0, kind: str = "step", **options: Any) -> Monitor:
    """A monitor whose score is the feature's pre-activation, so that it gates steering in the same forward.

    A feature with a limit of its own is active where ``h . probe > threshold``, with ``probe`` its encoder row times
    the factor of the rows, and ``threshold`` its limit less its bias. A gated feature opens where its gate does.

    Args:
        above: how far the pre-activation has to be above the limit, in its own units.
        kind, options: as in `Monitor`; ``step`` is open exactly where the feature is active (``above=0``).

    Raises:
        SAEError: a feature that the autoencoder does not have; encoders that choose the largest of all features, or
            that normalise rows, whose features are no function of one projection.
    """
    if not 0 <= whole(sae.name, "feature", feature) < sae.d_sae:
        raise SAEError(f"{sae.name} has no feature {feature}; its features are 0 to {sae.d_sae - 1}; choose one")
    if sae.activation.kind == "topk" or isinstance(sae.normalisation, LayerNorm):
        why = "are the largest of all" if sae.activation.kind == "topk" else "depend on a layer norm of the row"
        raise SAEError(
            f"{sae.name}: its features {why}, so none is a projection with a limit; log them with mode='log', or "
            "monitor a vector"
        )
    index = torch.tensor([feature], device=sae.W_enc.device)
    bias, limit, _, _, factor, *_ = feature_settings(sae, index)[0].double().tolist()
    probe = encoder_rows(sae, index)[0].double() * factor
    return Monitor(probe.float(), limit - bias + above, kind=kind, **options)
