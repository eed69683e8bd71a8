"""A Hugging Face tokenizer with the interface of the demo's byte tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from steer_compile.errors import CheckpointError

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


class HfTokenizer:
    """AutoTokenizer of a local directory, padding on the left."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, padding_side="left"
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise CheckpointError(f"the tokenizer in {folder} cannot be read: {str(error).splitlines()[0]}") from error
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token or self._tokenizer.unk_token

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of one text, with the special tokens that a prompt has where ``bos``."""
        ids: list[int] = self._tokenizer(text, add_special_tokens=bos)["input_ids"]
        return ids

    @property
    def unknown(self) -> int | None:
        """The id that stands for text that has no token."""
        found: int | None = self._tokenizer.unk_token_id
        return found

    def batch(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """``input_ids`` and ``attention_mask``, padded on the left."""
        made = self._tokenizer(list(texts), return_tensors="pt", padding=True)
        return made["input_ids"], made["attention_mask"]

    def decode(self, ids: Tensor) -> str:
        """Text of the ids without special tokens."""
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True)
        return text


def has_tokenizer(folder: Path) -> bool:
    """Whether the directory holds a tokenizer."""
    return any((folder / name).is_file() for name in FILES)
