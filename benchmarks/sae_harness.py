"""What the demo model's autoencoders keep, and what clamping their features does: on the CPU, in a few minutes.

    python -m benchmarks.sae_harness

(a) Next-byte loss with a layer's stream as it is, reconstructed, zeroed, and replaced by its mean. (b) Style of sampled
text against the value of a clamped feature, in multiples of its largest activation. (c) The same doses by ``delta``,
which keeps the error term, and by ``reconstruct``, which drops it. All of it by forward hooks of the eager model, and
each dose by the compiled model as well, whose losses and tokens have to be the same.

Features are chosen on one half of the held-out passages (`benchmarks.sae_choice`), and losses are taken on the other.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.patch_sweep import processor
from benchmarks.sae_choice import STYLES, Passages, captured, chosen, halves
from benchmarks.sae_compiled import Compiled
from benchmarks.sae_subjects import NOTHING, WINDOW, Dose, Hooks, Subject, certain, continuations, text_losses
from steer_compile import sae
from steer_compile.capture.rows import Rows
from steer_compile.demo.bytes_tokenizer import ByteTokenizer
from steer_compile.demo.inputs import PROMPTS, bundled_model
from steer_compile.demo.sae_loss import replaced
from steer_compile.demo.style import StyleScorer
from steer_compile.sae import SAE, FeatureClamp

STEERED = "jumprelu-3"
DOSES = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0)
TOKENS, PASSAGES = 96, 16
LOSS_APART = 1e-3
"""Most nats by which the loss of a byte may differ between two ways to do the same."""


def recovered(losses: Mapping[str, float], base: str) -> float:
    """The part of the loss between a base and the plain model that the reconstruction keeps."""
    return round((losses[base] - losses["reconstructed"]) / (losses[base] - losses["plain"]), 4)


def reconstruction(folder: Path, saes: Sequence[SAE], rows: Rows, texts: Passages) -> list[dict[str, Any]]:
    """Mean loss of each style's passages under each treatment of each autoencoder's site."""
    made_rows = []
    for made in saes:
        subject = Hooks(folder, made)
        assert made.site is not None
        mean = rows.values[made.key].mean(0)
        edits = {
            "plain": lambda h: h,
            "reconstructed": made.reconstruct,
            "zeroed": torch.zeros_like,
            "mean": lambda h, mean=mean: mean.expand_as(h),
        }
        losses: dict[str, dict[str, float]] = {}
        for name, edit in edits.items():
            with replaced(subject.model, made.site, edit):
                losses[name] = {style: float(text_losses(subject, texts[style], NOTHING).mean()) for style in STYLES}
        for style in (*STYLES, "both"):
            of = {name: loss[style] if style in STYLES else sum(loss.values()) / 2 for name, loss in losses.items()}
            made_rows.append(
                {
                    "sae": made.name, "site": made.key, "style": style,
                    **{name: round(value, 4) for name, value in of.items()},
                    "recovered_over_zero": recovered(of, "zeroed"), "recovered_over_mean": recovered(of, "mean"),
                }
            )  # fmt: skip
    return made_rows


@dataclass(frozen=True)
class Run:
    """What a dose did: losses (bytes,) of the passages of each style, and sampled ids (prompts, TOKENS)."""

    losses: dict[str, Tensor]
    tokens: Tensor | None


class Doses:
    """Runs doses on a subject and scores what comes out."""

    def __init__(self, folder: Path, texts: Passages, judge: Hooks) -> None:
        """``judge``: whose plain loss says how likely a continuation is."""
        self.scorer = StyleScorer.load(folder / "style.safetensors")
        self.texts, self.judge = {style: some[:PASSAGES] for style, some in texts.items()}, judge
        self.certain = {style: certain(judge, some) for style, some in self.texts.items()}

    def run(self, subject: Subject, dose: Dose, write: bool = True) -> Run:
        """Losses, and where ``write`` is set continuations."""
        losses = {style: text_losses(subject, self.texts[style], dose) for style in STYLES}
        return Run(losses, continuations(subject, PROMPTS, dose, TOKENS) if write else None)

    def row(self, run: Run) -> dict[str, float]:
        """Columns of the table."""
        assert run.tokens is not None
        written = [ByteTokenizer().decode(row) for row in run.tokens]
        scores = torch.tensor([self.scorer.score(text) for text in written])
        return {
            "style": round(float(scores.mean()), 4),
            "style_spread": round(float(scores.std()), 4),
            "loss_of_text": round(float(text_losses(self.judge, written, NOTHING).mean()), 4),
            **{f"loss_{style}": round(float(loss.mean()), 4) for style, loss in run.losses.items()},
        }


class Agreement:
    """How far two ways to do the same are apart, over all doses.

    A feature of which the pre-activation is at its threshold is there or not by rounding, and `reconstruct` jumps with
    it. So losses are compared before the first such token of a text; those behind it are kept account of beside.
    """

    def __init__(self, certain: Mapping[str, Tensor]) -> None:
        """``certain``: by style, the bytes (bytes,) bool before such a token."""
        self.certain = certain
        self.loss, self.loss_behind, self.continuations, self.differ = 0.0, 0.0, 0, 0

    def add(self, one: Run, other: Run) -> None:
        """Compare two runs of a dose."""
        for style, before in self.certain.items():
            apart = (one.losses[style] - other.losses[style]).abs()
            self.loss = max(self.loss, float(apart[before].max()))
            self.loss_behind = max(self.loss_behind, float(apart.where(~before, 0.0).max()))
        if one.tokens is not None and other.tokens is not None:
            self.continuations += len(one.tokens)
            self.differ += int((one.tokens != other.tokens).any(1).sum())

    def record(self) -> dict[str, Any]:
        """What was compared, the largest differences of a byte's loss, and how many continuations differ."""
        return {
            "bytes": sum(int(each.sum()) for each in self.certain.values()),
            "largest_loss_difference": self.loss,
            "bytes_behind_a_tie": sum(int((~each).sum()) for each in self.certain.values()),
            "largest_loss_difference_behind_a_tie": self.loss_behind,
            "continuations": self.continuations,
            "differ": self.differ,
        }

    def holds(self) -> bool:
        """Whether losses are equal within `LOSS_APART` and continuations are the same."""
        return self.loss <= LOSS_APART and not self.differ


def responses(
    runner: Doses, subject: Subject, others: Sequence[Subject], picked: Mapping[str, Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[str, Agreement], dict[str, list[str]]]:
    """The dose-response table of both features in each mode, agreements, and texts.

    ``delta`` is compared with ``keep_error``, and each mode of the subject with those of the others: continuations of
    ``keep_error`` at one dose, all else at all of them.
    """
    same = Agreement({style: torch.ones_like(each) for style, each in runner.certain.items()})
    agree = {"delta against keep_error": same}

    def run(dose: Dose, write: bool = True) -> Run:
        found = runner.run(subject, dose, write)
        for other in others:
            named = f"{other.name} against {subject.name}, {dose.mode or 'not steered'}"
            agree.setdefault(named, Agreement(runner.certain if dose.mode == "reconstruct" else same.certain))
            agree[named].add(found, runner.run(other, dose, write))
        return found

    texts: dict[str, list[str]] = {}
    plain = run(NOTHING)
    table: list[dict[str, Any]] = [
        {"feature_of": "none", "feature": "", "mode": "none", "dose": "", "value": "", **runner.row(plain)}
    ]
    for style, feature in picked.items():
        for dose in DOSES:
            value = dose * feature["largest"]
            clamps = (FeatureClamp(feature["feature"], value),)
            kept = run(Dose("delta", clamps))
            same.add(kept, run(Dose("keep_error", clamps), write=dose == 1.0))
            for mode, made in (("delta", kept), ("reconstruct", run(Dose("reconstruct", clamps)))):
                named = {"feature_of": style, "feature": feature["feature"], "mode": mode, "dose": dose}
                table.append({**named, "value": round(value, 4), **runner.row(made)})
                print(json.dumps(table[-1]), flush=True)
            assert kept.tokens is not None
            texts[f"{style} {dose}"] = [ByteTokenizer().decode(row) for row in kept.tokens[:2]]
    return table, agree, texts


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=records.RESULTS)
    parser.add_argument("--saes", type=Path, default=None, help="folder of the manifest; saes/ beside the demo model")
    parser.add_argument("--hooks", action="store_true", help="leave the compiled model out")
    parser.add_argument("--commit", default=None)
    options = parser.parse_args()
    began = time.perf_counter()
    folder = bundled_model()
    where = {**records.environment(options.commit), "card": processor("cpu")}
    print(json.dumps(where), flush=True)
    saes = sae.load_all(options.saes or folder / "saes", width=256)
    choosing, measured = halves(folder)
    rows = captured(folder, choosing, list(saes.values()))
    kept = reconstruction(folder, list(saes.values()), rows, measured)
    for row in kept:
        print(json.dumps(row), flush=True)
    hooks = Hooks(folder, saes[STEERED])
    picked = chosen(folder, hooks, hooks.made, rows, choosing)
    print(json.dumps(picked), flush=True)
    features = [feature["feature"] for feature in picked.values()]
    others = [] if options.hooks else [Compiled(folder, saes[STEERED], features, PASSAGES * WINDOW)]
    table, agreement, texts = responses(Doses(folder, measured, hooks), hooks, others, picked)
    options.out.mkdir(parents=True, exist_ok=True)
    records.write_csv(kept, options.out / "sae_reconstruction.csv")
    records.write_csv(table, options.out / "sae_doses.csv")
    seconds = round(time.perf_counter() - began, 1)
    record = {
        **where, "seconds": seconds, "sae": STEERED, "features": picked,
        "agreement": {name: each.record() for name, each in agreement.items()}, "texts": texts,
    }  # fmt: skip
    (options.out / "sae_harness.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({"seconds": seconds, **record["agreement"]}))
    if not all(each.holds() for each in agreement.values()):
        sys.exit("two ways to do the same are apart")


if __name__ == "__main__":
    main()
