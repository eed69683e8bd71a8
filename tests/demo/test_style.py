"""The style scorer of the demo: fitting, its bounds, and the committed weights."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_compile.demo.style import BUCKETS, StyleScorer, fit_style, ngram_buckets, window_accuracy, windows

DEMO = Path(__file__).parents[2] / "models" / "demo"
CODE = b"def load(self, path):\n    with open(path) as handle:\n        return json.load(handle)\n\n" * 8
SCRIPTURE = b"And the king said unto them, Whither shall we go up? And they answered him, saying, To Hebron.\n" * 8


@pytest.fixture(scope="module")
def small() -> StyleScorer:
    return fit_style(CODE, SCRIPTURE, steps=20)


@pytest.fixture(scope="module")
def stored() -> StyleScorer:
    return StyleScorer.load(DEMO / "style.safetensors")


def test_fit_separates_its_texts(small: StyleScorer) -> None:
    assert small.score(CODE) > 0.2
    assert small.score(SCRIPTURE) < -0.2
    assert window_accuracy(small, CODE, SCRIPTURE) == 1.0
    assert window_accuracy(small, SCRIPTURE, CODE) == 0.0


def test_fit_is_repeatable(small: StyleScorer) -> None:
    assert np.array_equal(fit_style(CODE, SCRIPTURE, steps=20).weights, small.weights)


def test_file_keeps_every_score(small: StyleScorer, tmp_path: Path) -> None:
    small.notes["kind"] = "test"
    small.save(tmp_path / "style.safetensors")
    again = StyleScorer.load(tmp_path / "style.safetensors")
    assert again.notes == small.notes
    assert np.array_equal(again.weights, small.weights)


@given(st.binary(max_size=60))
def test_ngrams_and_bounds(data: bytes) -> None:
    buckets = ngram_buckets(data)
    assert len(buckets) == sum(max(0, len(data) - order + 1) for order in (1, 2, 3, 4))
    assert all(0 <= bucket < BUCKETS for bucket in buckets.tolist())
    weights = np.random.default_rng(0).uniform(-1, 1, BUCKETS).astype(np.float32)
    score = StyleScorer(weights).score(data)
    assert -1.0 <= score <= 1.0
    assert data or score == 0.0


def test_text_and_bytes_agree(stored: StyleScorer) -> None:
    assert stored.score("café = 1") == stored.score("café = 1".encode())
    assert stored.score("\ud800") == stored.score("?")


def test_windows_drop_the_rest() -> None:
    assert windows(b"abcdefg", 3) == [b"abc", b"def"]
    assert windows(b"ab", 3) == []


def test_short_texts_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        fit_style(CODE, b"short")
    with pytest.raises(ValueError, match="shorter"):
        window_accuracy(StyleScorer(np.zeros(BUCKETS, np.float32)), CODE, b"short")
    with pytest.raises(ValueError, match="shape"):
        StyleScorer(np.zeros(3, np.float32))


def test_committed_weights_are_small_and_accurate(stored: StyleScorer) -> None:
    assert (DEMO / "style.safetensors").stat().st_size < 100_000
    assert float(stored.notes["heldout_accuracy_100_bytes"]) >= 0.98
    assert np.abs(stored.weights).max() <= 1.0


def test_committed_weights_tell_the_passages_apart(stored: StyleScorer) -> None:
    texts = json.loads((DEMO / "prompts.json").read_text())
    code, scripture = ([stored.score(text) for text in texts[style]] for style in ("code", "scripture"))
    assert len(code) == len(scripture) == 64
    assert all(100 <= len(text.encode()) <= 200 for style in ("code", "scripture") for text in texts[style])
    assert np.mean(np.array(code) > 0) >= 0.98
    assert np.mean(np.array(scripture) < 0) >= 0.98


def test_mixture_lies_between(stored: StyleScorer) -> None:
    code, scripture = CODE[:200], SCRIPTURE[:200]
    mixed = stored.score(code + b"\n" + scripture)
    assert stored.score(scripture) + 0.2 < mixed < stored.score(code) - 0.2
