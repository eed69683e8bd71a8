"""The demo model compiled, with an autoencoder attached: what `benchmarks.sae_subjects.Hooks` is the judge of."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from benchmarks.sae_subjects import Dose, load_model
from steer_compile import HookSelection, SAESteering, SteerSpec, steer_backend
from steer_compile.sae import SAE

NAME = "demo"


class Compiled:
    """The graph steers: clamped features in the site's kernel, and values decoded from all features.

    Args:
        features: those that ``delta`` may clamp.
        tokens: most tokens of a call.
    """

    name = "compiled"

    def __init__(self, folder: Path, made: SAE, features: Iterable[int], tokens: int) -> None:
        assert made.site is not None
        hook, layer = made.site
        chosen = (HookSelection(hook, (layer,), ops=("add", "sae", "sae_full")),)
        spec = SteerSpec(
            steer=chosen, max_tokens=tokens, features=8, saes=1, sae_features=made.d_sae, sae_tokens=tokens
        )
        self.model, self.backend = load_model(folder), steer_backend(spec)
        torch.compiler.reset()
        self.model.compile(backend=self.backend)
        self.backend.runtime.saes.attach(NAME, made, features=features, whole=True)

    def steering(self, dose: Dose, lengths: Sequence[int]) -> AbstractContextManager[object]:
        runtime = self.backend.runtime
        if not dose.mode:
            return runtime.steer(rows=[None] * len(lengths), prompt_lengths=list(lengths))
        return runtime.steer(features=SAESteering(NAME, dose.clamps, mode=dose.mode), prompt_lengths=list(lengths))
