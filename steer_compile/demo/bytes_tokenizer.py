"""Byte tokenizer of the demo language model: the ids 0-255 are bytes, 256 marks a document's edge, 257 pads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

BOS_ID = 256
PAD_ID = 257
VOCAB_SIZE = 258


class ByteTokenizer:
    """UTF-8 bytes as ids, with one id for both ends of a document and left padding of batches."""

    bos_token_id = BOS_ID
    eos_token_id = BOS_ID
    pad_token_id = PAD_ID
    vocab_size = VOCAB_SIZE

    def encode(self, text: str | bytes, bos: bool = True) -> list[int]:
        """Ids of ``text``, after the document mark where ``bos``; lone surrogates become question marks."""
        data = text.encode("utf-8", errors="replace") if isinstance(text, str) else text
        return [BOS_ID, *data] if bos else list(data)

    def decode_bytes(self, ids: Iterable[int] | Tensor) -> bytes:
        """Bytes of ``ids`` (any iterable or a 1-d tensor); the two special ids are left out."""
        values: list[int] = ids.tolist() if isinstance(ids, Tensor) else [int(value) for value in ids]
        for value in values:
            if not 0 <= value < VOCAB_SIZE:
                raise ValueError(f"id {value} is outside 0..{VOCAB_SIZE - 1}")
        return bytes(value for value in values if value < BOS_ID)

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        """Text of ``ids``; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def batch(
        self, texts: Sequence[str | bytes], bos: bool = True, device: torch.device | str | None = None
    ) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask``, both int64 [len(texts), longest], padded on the left."""
        if not texts:
            raise ValueError("an empty batch has no width")
        rows = [self.encode(text, bos) for text in texts]
        width = max(len(row) for row in rows)
        ids = torch.full((len(rows), width), PAD_ID, dtype=torch.int64)
        mask = torch.zeros((len(rows), width), dtype=torch.int64)
        for index, row in enumerate(rows):
            if row:
                ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
                mask[index, width - len(row) :] = 1
        return ids.to(device), mask.to(device)

    def __call__(self, texts: str | bytes | Sequence[str | bytes]) -> dict[str, Tensor]:
        """``batch`` as keyword arguments of a transformers model; one text is a batch of one."""
        listed = [texts] if isinstance(texts, (str, bytes)) else texts
        ids, mask = self.batch(listed)
        return {"input_ids": ids, "attention_mask": mask}
