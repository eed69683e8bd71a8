"""Which features of an autoencoder the harness clamps: by labels of captured rows, then by what they do to text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.sae_subjects import NOTHING, Dose, Subject, continuations, load_model, text_losses
from steer_compile import HookSelection, SteerSpec, TokenSelection, sae, steer_backend
from steer_compile.capture.rows import Rows
from steer_compile.demo.bytes_tokenizer import ByteTokenizer
from steer_compile.demo.inputs import PROMPTS, read_styles
from steer_compile.demo.style import StyleScorer
from steer_compile.sae import SAE, FeatureClamp

STYLES = ("code", "scripture")
LENGTH = 100
"""Ids of a passage whose rows choose features."""
CANDIDATES, TRIED_DOSE, TRIED_TOKENS, TRIED_PROMPTS, OPENING = 12, 2.0, 64, 6, 12
READABLE = 0.3
"""Most nats by which the plain model's loss of tried text may differ from that of unsteered text."""
Passages = Mapping[str, Sequence[str]]


def halves(folder: Path) -> tuple[Passages, Passages]:
    """The held-out passages: every second of those that are long enough chooses features, the others are measured."""
    styles = read_styles(folder, None, None, 64, len(PROMPTS))
    long = {
        name: [text for text in some if len(text.encode()) >= LENGTH]
        for name, some in zip(STYLES, styles.passages, strict=True)
    }
    return ({n: some[::2] for n, some in long.items()}, {n: some[1::2] for n, some in long.items()})


def captured(folder: Path, texts: Passages, saes: Sequence[SAE]) -> Rows:
    """Rows of the beginnings of texts at all sites, of a compiled model; requests are named ``style-number``."""
    tokenizer = ByteTokenizer()
    named = [(f"{style}-{i}", text) for style in STYLES for i, text in enumerate(texts[style])]
    ids = torch.tensor([tokenizer.encode(text)[:LENGTH] for _, text in named])
    layers = tuple(sorted({made.site[1] for made in saes if made.site}))
    spec = SteerSpec(capture=(HookSelection("post_block", layers),), max_tokens=ids.numel(), capture_rows=ids.numel())
    backend, model = steer_backend(spec), load_model(folder)
    model.compile(backend=backend)
    names = [name for name, _ in named]
    everything = TokenSelection(spans=((0, None),))
    steer, capture = backend.runtime.steer, backend.runtime.capture
    with torch.no_grad(), steer(rows=[None] * len(names), names=names), capture(tokens=everything) as log:
        model(ids, use_cache=False)
    torch.compiler.reset()
    return log.rows


def candidates(made: SAE, rows: Rows) -> dict[str, list[dict[str, Any]]]:
    """Of each style the features for which the share of its tokens that have it, less the other's, is largest."""
    found = sae.features(rows, made, top=min(256, made.d_sae))
    is_code = torch.tensor([name.startswith("code") for name in found.requests])[found.request.long()]
    shares = {}
    for style, own in (("code", is_code), ("scripture", ~is_code)):
        active = found.indices[own]
        shares[style] = torch.bincount(active[active >= 0], minlength=made.d_sae) / len(active)
    places, values = found.indices.clamp_min(0).flatten(), found.activations.float().flatten()
    largest = torch.zeros(made.d_sae).scatter_reduce_(0, places, values, "amax")
    picked = {}
    for style, other in (STYLES, STYLES[::-1]):
        best = (shares[style] - shares[other]).topk(CANDIDATES).indices.tolist()
        picked[style] = [
            {
                "feature": index,
                "largest": round(float(largest[index]), 4),
                **{f"share_of_{name}": round(float(shares[name][index]), 4) for name in STYLES},
            }
            for index in best
        ]
    return picked


def chosen(folder: Path, subject: Subject, made: SAE, rows: Rows, texts: Passages) -> dict[str, dict[str, Any]]:
    """Of each style the candidate that moves sampled text most toward it and leaves it text, at `TRIED_DOSE`.

    Prompts are the openings of passages that are not measured later. A candidate whose text is more or less likely
    under the plain model than unsteered text, by over `READABLE` nats a byte, is passed over; if all are, the nearest
    is taken.
    """
    scorer = StyleScorer.load(folder / "style.safetensors")
    prompts = [text[:OPENING] for style in STYLES for text in texts[style][:TRIED_PROMPTS]]

    def tried(dose: Dose) -> tuple[float, float]:
        written = [ByteTokenizer().decode(row) for row in continuations(subject, prompts, dose, TRIED_TOKENS)]
        score = sum(map(scorer.score, written)) / len(written)
        return score, float(text_losses(subject, written, NOTHING).mean())

    plain, likely = tried(NOTHING)
    picked = {}
    for style, found in candidates(made, rows).items():
        sign = 1 if style == "code" else -1
        for each in found:
            clamp = FeatureClamp(each["feature"], TRIED_DOSE * each["largest"])
            score, loss = tried(Dose("delta", (clamp,)))
            each["tried_shift"], each["tried_loss"] = round(score - plain, 4), round(loss - likely, 4)
        ranked = sorted(found, key=lambda each: (max(READABLE, abs(each["tried_loss"])), -sign * each["tried_shift"]))
        picked[style] = {**ranked[0], "candidates": found}
    return picked
