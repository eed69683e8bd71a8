"""What the tests of commands share: running one, and a tiny Llama."""

import functools
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from steer_compile.cli import graphs
from steer_compile.cli.main import app


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(a) for a in arguments])


def told(*arguments: object, code: int = 0) -> Any:
    """What a command prints as JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def refused(result: Result, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr


@contextmanager
def graphs_read_once() -> Iterator[None]:
    """Graphs are never changed, so that commands may share them."""
    once = functools.cache(graphs.read_graphs)
    with pytest.MonkeyPatch.context() as patch:
        for verb in ("plan", "explain", "diff", "trace", "sites"):
            patch.setattr(importlib.import_module(f"steer_compile.cli.{verb}"), "read_graphs", once)
        yield


def tiny_llama(folder: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder
