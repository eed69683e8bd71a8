"""The byte tokenizer of the demo."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer_compile.demo.bytes_tokenizer import BOS_ID, PAD_ID, VOCAB_SIZE, ByteTokenizer

TOKENIZER = ByteTokenizer()
SENTENCES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(SENTENCES)
def test_round_trip(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert ids[0] == BOS_ID
    assert len(ids) == 1 + len(text.encode())
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.encode(text, bos=False) == ids[1:]


@given(st.binary(max_size=40))
def test_any_bytes_round_trip(data: bytes) -> None:
    assert TOKENIZER.decode_bytes(torch.tensor(TOKENIZER.encode(data))) == data


@given(st.lists(SENTENCES, min_size=1, max_size=5))
def test_batch_pads_on_the_left(texts: list[str]) -> None:
    ids, mask = TOKENIZER.batch(texts)
    assert ids.shape == mask.shape == (len(texts), 1 + max(len(text.encode()) for text in texts))
    assert ids.dtype == mask.dtype == torch.int64
    for text, row, kept in zip(texts, ids, mask, strict=True):
        assert row[kept.bool()].tolist() == TOKENIZER.encode(text)
        assert bool((row[~kept.bool()] == PAD_ID).all())
        assert kept.tolist() == sorted(kept.tolist())
        assert TOKENIZER.decode(row) == text


def test_cut_character_becomes_a_replacement() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("é")[:-1]) == "\ufffd"


def test_lone_surrogate_becomes_a_question_mark() -> None:
    assert TOKENIZER.decode(TOKENIZER.encode("a\ud800b")) == "a?b"


def test_call_takes_one_text_or_many() -> None:
    one, many = TOKENIZER("abc"), TOKENIZER(["abc", "a"])
    assert torch.equal(one["input_ids"][0], many["input_ids"][0])
    assert many["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_empty_rows_without_mark() -> None:
    ids, mask = TOKENIZER.batch(["", "ab"], bos=False)
    assert ids[0].tolist() == [PAD_ID, PAD_ID]
    assert mask.sum(dim=1).tolist() == [0, 2]


def test_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="empty batch"):
        TOKENIZER.batch([])


@pytest.mark.parametrize("value", [-1, VOCAB_SIZE])
def test_foreign_id_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        TOKENIZER.decode([65, value])
