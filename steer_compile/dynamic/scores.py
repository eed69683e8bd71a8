"""`ProbeBank`: scores of probes on the host, one copy a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from steer_compile.dynamic.views import StepView
from steer_compile.errors import SiteNotFound, VectorError
from steer_compile.runtime.gates import Monitor
from steer_compile.runtime.vectors import SiteKey


class ProbeBank:
    """Probes by site. `means` gives the mean score of each request in a step."""

    def __init__(self, probes: Mapping[SiteKey, Sequence[torch.Tensor]]) -> None:
        self.sites = tuple(probes)
        self._probes = {
            site: torch.stack([Monitor(probe).probe for probe in each]) for site, each in probes.items() if each
        }
        self._placed: dict[SiteKey, torch.Tensor] = {}

    def means(self, view: StepView) -> dict[SiteKey, list[list[float]]]:
        """Mean over each request's tokens of ``h . probe`` in fp32: by site, a list of the requests for each probe.

        Raises:
            SiteNotFound: a site that is not captured. VectorError: a probe of another width.
        """
        if not self._probes or not view.requests:
            return {}
        sums = [view_scores for site in self._probes for view_scores in self._scores(site, view)]
        lines = torch.stack(sums).cpu().double()  # the step's one copy to the host
        spans = [(request.start, request.end) for request in view.requests]
        if all(end - start == 1 for start, end in spans):
            picked = lines[:, [start for start, _ in spans]].tolist()
        else:
            picked = [[float(line[start:end].mean()) if end > start else 0.0 for start, end in spans] for line in lines]
        found: dict[SiteKey, list[list[float]]] = {}
        for site, probes in self._probes.items():
            found[site], picked = picked[: len(probes)], picked[len(probes) :]
        return found

    def _scores(self, site: SiteKey, view: StepView) -> Sequence[torch.Tensor]:
        """Scores (n,) of each probe of a site."""
        values = view.tensors.get(site)
        if values is None:
            have = ", ".join(f"layers.{layer}.{hook}" for hook, layer in view.tensors) or "none"
            raise SiteNotFound(
                f"layers.{site[1]}.{site[0]} is not captured, and {have} are; add it to the spec's capture, "
                "and leave capture_rows out, as controllers read every token"
            )
        probes = self._placed.get(site)
        if probes is None or probes.device != values.device:
            probes = self._placed[site] = self._probes[site].to(values.device)
        if probes.size(1) != values.size(1):
            raise VectorError(
                f"the probe of layers.{site[1]}.{site[0]} has {probes.size(1)} numbers but the site is "
                f"{values.size(1)} wide; give one number for each"
            )
        return (values.float() @ probes.T).T.unbind()
