"""Style scorer of the demo: is a text Python code or King James scripture?

A table of one weight in [-1, 1] for each of ``BUCKETS`` hashed byte n-grams (orders 1 to 4), started from naive Bayes,
``(p_code - p_scripture) / (p_code + p_scripture)``, and refined by logistic regression on 100-byte windows.  The score
of a text is the mean weight of its n-grams, so it lies in [-1, 1]: above 0 is code, below 0 scripture.  It is a mean:
a text that is half one style and half the other scores about midway.  ``SHARPNESS`` times the score is the log-odds
that a 100-byte text is code.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file
from torch.nn import functional

Floats = NDArray[np.float32]
BUCKETS = 32768
ORDERS = (1, 2, 3, 4)
SMOOTHING = 2.0
WINDOW = 100
SHARPNESS = 10.0
FIT_BATCH = 256


def ngram_buckets(text: bytes) -> NDArray[np.uint32]:
    """Buckets of all n-grams of ``text``: [sum over orders of max(0, len(text) - order + 1)]."""
    data = np.frombuffer(text, dtype=np.uint8).astype(np.uint64)
    parts: list[NDArray[np.uint32]] = []
    for order in ORDERS:
        count = len(data) - order + 1
        if count <= 0:
            break
        value = np.full(count, order, dtype=np.uint64)
        for shift in range(order):
            value = value * np.uint64(257) + data[shift : shift + count] + np.uint64(1)
        mixed = (value * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(49)
        parts.append((mixed % np.uint64(BUCKETS)).astype(np.uint32))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)


class StyleScorer:
    """Scores a text in [-1, 1]: positive for code, negative for scripture."""

    def __init__(self, weights: Floats, notes: dict[str, str] | None = None) -> None:
        """``weights``: float32 [BUCKETS] in [-1, 1]; ``notes``: strings stored beside them."""
        if weights.shape != (BUCKETS,):
            raise ValueError(f"weights have shape {weights.shape} instead of ({BUCKETS},)")
        self.weights = weights
        self.notes = dict(notes or {})

    def score(self, text: str | bytes) -> float:
        """Style of ``text`` in [-1, 1]: above 0 code, below 0 scripture, 0 for an empty text."""
        data = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        buckets = ngram_buckets(data)
        return float(self.weights[buckets].mean()) if len(buckets) else 0.0

    def is_code(self, text: str | bytes) -> bool:
        """True where the score is above 0."""
        return self.score(text) > 0.0

    def save(self, path: str | Path) -> None:
        """Write weights (float16) and notes as one safetensors file."""
        save_file({"weights": self.weights.astype(np.float16)}, str(path), metadata=self.notes)

    @classmethod
    def load(cls, path: str | Path) -> StyleScorer:
        """Read a file written by ``save``."""
        with safe_open(str(path), framework="numpy") as stored:
            notes = dict(stored.metadata() or {})
            weights = np.asarray(stored.get_tensor("weights"), dtype=np.float32)
        return cls(weights, notes)


def windows(text: bytes, size: int = WINDOW) -> list[bytes]:
    """Consecutive pieces of ``size`` bytes; the rest at the end is dropped."""
    return [text[start : start + size] for start in range(0, len(text) - size + 1, size)]


def naive_bayes_weights(code: bytes, scripture: bytes) -> Floats:
    """Weights float32 [BUCKETS] from smoothed n-gram frequencies of the two styles."""
    frequencies = []
    for text in (code, scripture):
        counts = np.zeros(BUCKETS, dtype=np.float64)
        for start in range(0, len(text), 1 << 20):
            counts += np.bincount(ngram_buckets(text[start : start + (1 << 20)]), minlength=BUCKETS)
        frequencies.append((counts + SMOOTHING) / (counts.sum() + SMOOTHING * BUCKETS))
    difference = (frequencies[0] - frequencies[1]) / (frequencies[0] + frequencies[1])
    return np.asarray(difference, dtype=np.float32)


def refine_weights(weights: Floats, code: bytes, scripture: bytes, steps: int) -> Floats:
    """Logistic regression on random 100-byte windows, from ``weights`` on; weights stay in (-1, 1) through tanh."""
    random = np.random.default_rng(0)
    free = torch.atanh(torch.from_numpy(weights).clamp(-0.95, 0.95)).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.01)
    labels = torch.cat([torch.ones(FIT_BATCH), torch.zeros(FIT_BATCH)])
    for step in range(steps):
        rows = []
        for text in (code, scripture):
            starts = random.integers(0, len(text) - WINDOW + 1, size=FIT_BATCH)
            rows += [ngram_buckets(text[start : start + WINDOW]) for start in starts]
        buckets = torch.from_numpy(np.stack(rows).astype(np.int64))
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / steps)
        loss = functional.binary_cross_entropy_with_logits(SHARPNESS * torch.tanh(free)[buckets].mean(dim=1), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.asarray(torch.tanh(free).detach().numpy(), dtype=np.float32)


def fit_style(code: bytes, scripture: bytes, steps: int = 1000) -> StyleScorer:
    """Fit on two training texts of at least 100 bytes; the same texts and ``steps`` give the same weights."""
    if min(len(code), len(scripture)) < WINDOW:
        raise ValueError(f"a text is shorter than {WINDOW} bytes")
    weights = refine_weights(naive_bayes_weights(code, scripture), code, scripture, steps)
    return StyleScorer(weights.astype(np.float16).astype(np.float32))


def window_accuracy(scorer: StyleScorer, code: bytes, scripture: bytes, size: int = WINDOW) -> float:
    """Mean over the two styles of the share of ``size``-byte windows on the right side of 0."""
    code_pieces, scripture_pieces = windows(code, size), windows(scripture, size)
    if not code_pieces or not scripture_pieces:
        raise ValueError(f"a text is shorter than {size} bytes")
    right_code = np.mean([scorer.score(piece) > 0 for piece in code_pieces])
    right_scripture = np.mean([scorer.score(piece) < 0 for piece in scripture_pieces])
    return float((right_code + right_scripture) / 2)
