"""The variants that `benchmarks.sites` compares: which op families, by which lowering, and their run-time data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer_compile import Clamp, HookSelection, Monitor, SAESteering, Steering, SteerSpec
from steer_compile.runtime.gates import Hidden
from steer_compile.runtime.rows import PhaseTracker
from steer_compile.sae import SAE, FeatureClamp, ReLU

HOOKS = ("post_attn", "post_block")
DETECTOR = 2
FEATURED = 3
"""Layer of the site whose features are clamped."""


@dataclass(frozen=True)
class Kind:
    """One graph: op families at both stream hooks of every layer, hooks that are captured, and the lowering."""

    ops: tuple[str, ...]
    capture: bool
    lowering: str
    goal: str = "none, for comparison"
    idle: bool = False
    opaque: bool = False
    features: int = 0
    """Features that are clamped at one site, which then has the family ``sae``."""
    detect: tuple[str, ...] = ()
    """What opens gates behind the third block, for all sites behind it."""

    def spec(self, max_tokens: int) -> SteerSpec:
        steer: list[Any] = [HookSelection(hook, "all", self.ops) for hook in HOOKS if self.ops]
        steer += [HookSelection("post_block", [FEATURED], ("add", "sae"))] if self.features else []
        steer += [HookSelection("post_block", [DETECTOR], self.detect)] if self.detect else []
        capture = HOOKS if self.capture else ()
        return SteerSpec(
            steer=steer, cross_layer=bool(self.detect), capture=capture, ops=self.ops or ("add",), rows=8,
            max_tokens=max_tokens, clamps=4, lowering=self.lowering,
        )  # fmt: skip


_FAMILIES: dict[str, tuple[tuple[str, ...], bool, str]] = {
    "add": (("add",), False, "<= 0.5 %"),
    "monitor": (("add", "tier", "monitor"), False, "<= 0.7 %"),
    "row_monitor": (("add", "row_monitor"), False, "<= 1 %"),
    "clamp": (("add", "clamp"), False, "<= 2 %"),
    "capture": (("add",), True, "<= 3 %"),
    "score": (("monitor", "row_monitor", "score"), False, "<= 1 %"),
    "row_monitor_score": (("add", "row_monitor", "score"), False, "<= 1 %"),
    "all": (("add", "tier", "monitor", "row_monitor", "clamp"), True, "none, for comparison"),
}
KINDS = {
    "idle": Kind(("add",), False, "template", "<= 0.3 %", idle=True),
    **{name: Kind(ops, capture, "template", goal) for name, (ops, capture, goal) in _FAMILIES.items()},
    **{f"{name}_compiler": Kind(ops, capture, "compiler") for name, (ops, capture, _) in _FAMILIES.items()},
    "sae_idle": Kind(("add",), False, "template", "<= 0.3 %", idle=True, features=64),
    "sae": Kind(("add",), False, "template", "<= 1 %", features=64),
    "add_opaque": Kind(("add",), False, "compiler", opaque=True),
    "cross_layer": Kind(("add",), False, "auto", "<= 1 %", detect=("row_monitor", "score")),
    "memory": Kind(("add",), False, "auto", "<= 1 %", detect=("monitor", "score", "memory", "mlp")),
}


def activate(runtime: Any, kind: Kind, layers: int, width: int) -> None:
    """Fill every table that the kind has, with gates that are half open, and steer every token as a decoded one."""
    runtime.phases = PhaseTracker(told="decode")
    if kind.idle or not kind.ops:
        return
    generator = torch.Generator().manual_seed(7)
    sites = [(hook, n) for hook in HOOKS for n in range(layers)]

    def drawn(size: float) -> dict[tuple[str, int], Tensor]:
        return {site: size * torch.randn(width, generator=generator) for site in sites}

    config: dict[str, Any] = {"base": drawn(0.02)} if "add" in kind.ops else {}
    detector = ("post_block", DETECTOR)
    if "row_monitor" in kind.ops:
        config["monitors"] = {site: Monitor(v, 0.1, 0.5) for site, v in drawn(0.05).items()}
    elif "row_monitor" in kind.detect:
        config["monitors"] = {detector: Monitor(drawn(0.05)[detector], 0.1, 0.5)}
    if "clamp" in kind.ops:
        config["clamps"] = {
            site: [Clamp(torch.randn(width, generator=generator), lo=-0.05, hi=0.05) for _ in range(4)]
            for site in sites
        }
    if "tier" in kind.ops:
        runtime.sites.set_tier(drawn(0.02))
    if "monitor" in kind.ops:
        for site, probe in drawn(0.05).items():
            runtime.sites.set_monitor(site, Monitor(probe, 0.1, 0.5), gate_rows=True)
    if "monitor" in kind.detect:
        units = Hidden(torch.randn(16, width, generator=generator) * 0.05, torch.zeros(16), torch.ones(16) * 0.1)
        step = Monitor(drawn(0.05)[detector], -1e6, kind="step", low=-2e6, hidden=units)  # the same in all dtypes
        runtime.sites.set_monitor(detector, step, gate_rows=True)
    config["features"] = _features(runtime, kind.features, width) if kind.features else ()
    runtime.assign(runtime.register(Steering(**config)))


def _features(runtime: Any, count: int, width: int) -> SAESteering:
    """Attach a random autoencoder, and clamp all of its features."""
    generator = torch.Generator().manual_seed(3)
    encoder, decoder = (torch.randn(width, count, generator=generator) / width**0.5 for _ in range(2))
    made = SAE(encoder, torch.zeros(count), decoder.T, torch.zeros(width), ReLU(), site=("post_block", FEATURED))
    runtime.saes.attach("random", made, features=range(count))
    return SAESteering("random", [FeatureClamp(i, 0.05) for i in range(count)])
