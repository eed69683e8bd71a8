"""What the demo is fed: the bundled model, a tokenizer, passages of two styles, prompts, a style scorer."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import steer_compile
from steer_compile.demo.bytes_tokenizer import VOCAB_SIZE, ByteTokenizer
from steer_compile.demo.hf_tokenizer import HfTokenizer, has_tokenizer
from steer_compile.demo.run import Scorer, Styles
from steer_compile.demo.style import StyleScorer
from steer_compile.demo.subject import Tokenizer
from steer_compile.errors import CheckpointError, SpecError

PROMPTS = (
    "The ", "import ", "And it came to pass", "In the ", "It is ", "When ",
    "And ", "    for ", "# ", "He that ", "There are ", "And the king said",
)  # fmt: skip
"""Half of them open texts of both styles, the others one of them."""


def bundled_model() -> Path:
    """The demo model of the checkout: beside the package, or under the current directory.

    Raises:
        CheckpointError: neither has it.
    """
    for root in (Path(steer_compile.__file__).resolve().parents[1], Path.cwd()):
        folder = root / "models" / "demo"
        if (folder / "config.json").is_file():
            return folder
    raise CheckpointError(
        "models/demo was not found: run inside a checkout of the project, or give a model directory as MODEL"
    )


class _Bytes(ByteTokenizer):
    """Bytes for a model of more ids than bytes: the others are left out of its texts."""

    def decode(self, ids: Iterable[int] | Tensor) -> str:
        return super().decode([int(i) for i in ids if int(i) < VOCAB_SIZE])


def tokenizer_of(model: nn.Module, folder: Path) -> Tokenizer:
    """The model's own tokenizer where its files are there, else bytes.

    Raises:
        CheckpointError: no tokenizer, and a vocabulary too small for bytes.
    """
    if has_tokenizer(folder):
        return HfTokenizer(folder)
    config: Any = model.config
    if int(config.get_text_config().vocab_size) < VOCAB_SIZE:
        raise CheckpointError(f"{folder} has no tokenizer files and fewer than {VOCAB_SIZE} ids, so bytes do not fit")
    return _Bytes()


def style_scorer(folder: Path) -> Scorer | None:
    """The byte n-gram scorer stored beside the model, or None: then texts are scored by projection."""
    file = folder / "style.safetensors"
    if not file.is_file():
        return None
    scorer = StyleScorer.load(file)
    return lambda texts: [scorer.score(text) for text in texts]


def read_styles(folder: Path, positive: Path | None, negative: Path | None, most: int, rows: int) -> Styles:
    """The passages of both styles and the prompts.

    Raises:
        SpecError: one file without the other, or none where the model brings no passages.
    """
    if (positive is None) != (negative is None):
        raise SpecError("give both --positive FILE and --negative FILE, or neither")
    if positive is not None and negative is not None:
        passages = (read_passages(positive)[:most], read_passages(negative)[:most])
        opened = [" ".join(text.split()[:4]) + " " for pair in zip(*passages, strict=False) for text in pair]
        return Styles(positive.stem, negative.stem, passages, tuple((opened * rows)[:rows]))
    source = folder if (folder / "prompts.json").is_file() else bundled_model()
    try:
        stored = json.loads((source / "prompts.json").read_text(encoding="utf-8"))
        passages = (tuple(stored["code"][:most]), tuple(stored["scripture"][:most]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecError(f"{source / 'prompts.json'} holds no passages of code and scripture: {error}") from error
    return Styles("code", "scripture", passages, PROMPTS[:rows])


def read_passages(path: Path) -> tuple[str, ...]:
    """Passages of a text file, separated by blank lines; without blank lines each line is one.

    Raises:
        SpecError: fewer than two passages, or no such file.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"the passages {path} cannot be read: {error}") from error
    parts = [part.strip("\n") for part in text.split("\n\n")]
    parts = parts if len([p for p in parts if p.strip()]) > 1 else text.splitlines()
    found = tuple(part for part in parts if part.strip())
    if len(found) < 2:
        raise SpecError(f"{path} holds {len(found)} passages; give several, separated by blank lines")
    return found
