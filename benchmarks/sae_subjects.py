"""The demo model steered by features of an autoencoder, in several ways: losses of texts, and continuations.

`Hooks` is the oracle: the reference functions of `steer_compile.sae` in a forward hook of the eager model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from steer_compile import sae
from steer_compile.demo.bytes_tokenizer import PAD_ID, ByteTokenizer
from steer_compile.demo.sae_loss import byte_losses, replaced
from steer_compile.sae import SAE, FeatureClamp, JumpReLU

MODES = ("delta", "keep_error", "reconstruct")
SEED, TEMPERATURE = 0, 0.7
TIE = 5e-5
"""Twice what fp32 is off by in a pre-activation of the demo model's autoencoders."""
WINDOW = 192
"""Most bytes of a text whose loss is taken."""


@dataclass(frozen=True)
class Dose:
    """What one autoencoder does to every token; the default leaves it alone.

    Attributes:
        mode: ``delta`` moves the clamped features; ``keep_error`` is the same through the whole autoencoder, with the
            error term kept; ``reconstruct`` drops it; empty: nothing.
    """

    mode: str = ""
    clamps: tuple[FeatureClamp, ...] = ()

    def rows(self, made: SAE) -> Callable[[Tensor], Tensor]:
        """The reference of what becomes of rows."""
        if self.mode == "delta":
            return lambda h: sae.steered_delta(h, made, self.clamps)
        return lambda h: sae.steered_reconstruction(h, made, self.clamps, keep_error=self.mode == "keep_error")


NOTHING = Dose()


class Subject(Protocol):
    """A way to steer."""

    name: str
    model: Any

    def steering(self, dose: Dose, lengths: Sequence[int]) -> AbstractContextManager[object]:
        """Calls inside are steered. ``lengths``: tokens of each prompt, padding left out."""


class Hooks:
    """A forward hook of the eager model."""

    name = "hooks"

    def __init__(self, folder: Path, made: SAE) -> None:
        self.model, self.made = load_model(folder), made

    def steering(self, dose: Dose, lengths: Sequence[int]) -> AbstractContextManager[object]:
        if not dose.mode:
            return nullcontext()
        assert self.made.site is not None
        return replaced(self.model, self.made.site, dose.rows(self.made))


def load_model(folder: Path) -> Any:
    """The demo model in fp32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def text_batch(texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids and next ids (n, length) of the beginnings of texts, padded on the right, where nothing is counted."""
    tokenizer, rows = ByteTokenizer(), []
    for text in texts:
        ids = tokenizer.encode(text)[: length + 1]
        rows.append(ids + [PAD_ID] * (length + 1 - len(ids)))
    batch = torch.tensor(rows)
    targets = batch[:, 1:].masked_fill(batch[:, 1:] == PAD_ID, -1)
    return batch[:, :-1].contiguous(), targets


def text_losses(subject: Subject, texts: Sequence[str], dose: Dose, length: int = WINDOW) -> Tensor:
    """Losses in nats (counted bytes,) of the next bytes of texts, one after the other."""
    ids, targets = text_batch(texts, length)
    with subject.steering(dose, [length] * len(texts)):
        return byte_losses(subject.model, ids, targets)


def certain(subject: Hooks, texts: Sequence[str], length: int = WINDOW) -> Tensor:
    """Which of the counted bytes (bytes,) bool come before a token with a pre-activation within `TIE` of its threshold.

    Raises:
        TypeError: the autoencoder has no thresholds.
    """
    made = subject.made
    if not isinstance(made.activation, JumpReLU):
        raise TypeError(f"{made.name} has no thresholds; give one with JumpReLU")
    assert made.site is not None
    stream: list[Tensor] = []

    def look(h: Tensor) -> Tensor:
        stream.append(h)
        return h

    ids, targets = text_batch(texts, length)
    with replaced(subject.model, made.site, look):
        byte_losses(subject.model, ids, targets)
    shift = made.b_dec.float() if made.subtract_b_dec else 0.0
    product = (made.normalisation.normalised(stream[0]) - shift) @ made.W_enc.float()
    near = ((product + made.b_enc - made.activation.threshold).abs() < TIE).any(-1)
    return (near.cumsum(1) == 0)[targets >= 0]


def continuations(subject: Subject, prompts: Sequence[str], dose: Dose, tokens: int) -> Tensor:
    """Sampled ids (prompts, tokens), the same noise in every call."""
    from transformers import StaticCache

    ids, mask = ByteTokenizer().batch(prompts)
    with torch.no_grad(), torch.random.fork_rng(devices=[]), subject.steering(dose, mask.sum(1).tolist()):
        torch.manual_seed(SEED)
        made: Tensor = subject.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
            max_new_tokens=tokens, min_new_tokens=tokens, disable_compile=True,
            past_key_values=StaticCache(config=subject.model.config, max_cache_len=ids.size(1) + tokens),
        )  # fmt: skip
    return made[:, ids.size(1) :]
