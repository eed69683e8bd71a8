"""The coverage check on types that differ in every way that the finder must tell apart."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from steer_compile.coverage.check import Record, check_type
from steer_compile.coverage.table import COLUMNS, markdown, read_journal
from steer_compile.coverage.zoo import model_types

ROOT = Path(__file__).parents[2]

TYPES = {
    "llama": "pre-norm",
    "gpt2": "pre-norm, biases, learned positions",
    "bert": "post-norm: the stream is the norm's output",
    "olmo2": "norms behind the branches",
    "gemma2": "norms on both sides of the branches, scaled embedding",
    "gemma3_text": "local and global layers",
    "granite": "residual multiplier",
    "minimax": "skip taken from the norm's output, scaled on both sides",
    "gpt_neox": "parallel block",
    "cohere": "parallel block, layer norm by hand",
    "falcon": "parallel block written in place",
    "bloom": "residual added by a function",
    "opt": "decoder of the older kind",
    "mixtral": "mixture of experts",
    "deepseek_v3": "latent attention, shared experts",
    "gpt_oss": "attention sinks",
    "mamba": "one write a block",
    "mamba2": "one write a block, chunked scan",
    "rwkv": "token shift, stream halved between blocks",
    "jamba": "hybrid",
    "zamba2": "shared blocks",
    "nemotron_h": "hybrid of one-write blocks",
    "qwen3_next": "delta rule beside attention",
    "recurrent_gemma": "gated recurrence",
    "xlnet": "time first",
    "xlm": "mixers and MLPs in lists of their own",
    "xmod": "adapters written through masks",
    "blt": "cross-attention between the blocks",
    "deepseek_v4": "parallel streams, mixed",
    "hy_v4": "parallel streams, not mixed",
}


@pytest.mark.behaviour(83)
@pytest.mark.parametrize("model_type", TYPES)
def test_type_passes_every_column(model_type: str) -> None:
    record = check_type(model_type)
    assert record.passed, record.to_dict()
    assert record.layers >= 2


@pytest.mark.parametrize("model_type", ["gemma3n_text", "hrm_text", "dbrx"])
def test_what_is_not_supported_is_refused_with_a_reason(model_type: str) -> None:
    record = check_type(model_type)
    assert not record.passed
    assert record.steer is None
    assert "SiteNotFound" in record.reason


def test_published_table_holds_every_type_and_a_reason_for_each_failure() -> None:
    rows = json.loads((ROOT / "docs/coverage.json").read_text())
    assert [row["type"] for row in rows] == list(model_types())
    failed = [row for row in rows if not all(row[c] for c in COLUMNS)]
    assert all(row["reason"] for row in failed)
    assert len(failed) <= 0.05 * len(rows)


def test_table_shows_failures_first_and_a_damaged_journal_line_is_dropped(tmp_path: Path) -> None:
    good = Record("llama", "LlamaForCausalLM", True, True, True, True, True, 3, 1)
    bad = Record("odd", "OddForCausalLM", True, False, reason="a | b")
    text = markdown([good, bad], "eager")
    assert text.index("| odd |") < text.index("| llama |")
    assert "a \\| b" in text
    assert "1 of 2" in text
    journal = tmp_path / "journal.jsonl"
    journal.write_text(json.dumps(good.to_dict()) + "\n" + '{"type": "ha')
    assert [r.type for r in read_journal(journal)] == ["llama"]
