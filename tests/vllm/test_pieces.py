"""vLLM's own back end: it cuts the graph at attention, compiles equal pieces once, stores and loads artifacts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging import version

from tests import _tree
from tests.vllm import engines

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]


def run(model: Path, cache: Path, *hooks: str, cut: str = "pieces") -> dict[str, Any]:
    """What a process of its own prints."""
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(_tree.ROOT), os.environ.get("PYTHONPATH", "")]),
        "VLLM_CACHE_ROOT": str(cache),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "VLLM_CPU_CI_ENV": "0",
    }  # fmt: skip
    command = [sys.executable, "-m", "tests.vllm.piecewise", str(model), cut, *hooks]
    done = subprocess.run(command, env=env, cwd=_tree.ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def hold_against_hooks(model: Path, found: dict[str, Any], tier: bool = False) -> None:
    """Of a vector at each layer in turn; a tier has another one for each, and is for decoded tokens."""
    from transformers import AutoModelForCausalLM

    judge = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for layer, tokens in enumerate(found["steered"]):
        output = type("Output", (), {"token_ids": tokens})
        vector = engines.vector(1 + layer * tier, 0.6)
        wanted, numbers = engines.judged(judge, output, vector, layer, tier)
        assert tokens == wanted
        assert found["numbers"][layer] == pytest.approx(numbers, abs=engines.TOLERANCE)
    at = int(tier)  # the first token that the vectors reach
    assert len({round(numbers[at], 2) for numbers in found["numbers"]}) == engines.LAYERS  # no layer is another one


def test_each_layer_gets_its_own_vector_from_shared_pieces_cold_and_warm(models: Path, tmp_path: Path) -> None:
    model = engines.saved("llama", models)
    plain = run(model, tmp_path)
    cold = run(model, tmp_path, *engines.HOOKS)
    warm = run(model, tmp_path, *engines.HOOKS)
    other = run(model, tmp_path, "post_block")
    assert plain["idle"] == cold["idle"] == warm["idle"] == other["idle"]
    assert cold["steered"] == warm["steered"] == other["steered"]

    hold_against_hooks(model, cold)
    assert cold["compiled"] == plain["compiled"]  # equal layers share a piece, as without a spec
    assert plain["compiled"] < engines.LAYERS + 1 or engines.before("0.28")  # which has a piece of its own for each
    assert (cold["loaded"], cold["splices"]) == (0, [2 * engines.LAYERS])
    again = run(model, tmp_path)
    assert warm["loaded"] == again["loaded"]  # as the engine without a spec, which has kept its own
    assert (warm["splices"], warm["compiled"]) == ([] if warm["loaded"] else cold["splices"], 0)
    assert warm["loaded"] or version.parse(torch.__version__) < version.parse("2.12")
    assert (other["loaded"], other["splices"]) == (0, [engines.LAYERS])  # another spec is another artifact


def test_a_gate_crosses_pieces_and_layers_behind_it_share_theirs(models: Path, tmp_path: Path) -> None:
    """The gate's value is handed on from piece to piece; a detector costs its own layer's piece and no other."""
    model = engines.saved("llama", models)
    plain = run(model, tmp_path)
    cold = run(model, tmp_path, "across")
    warm = run(model, tmp_path, "across")
    assert plain["idle"] == cold["idle"] == cold["shut"] == warm["shut"]
    hold_against_hooks(model, cold, tier=True)
    assert cold["steered"] == warm["steered"]
    assert cold["compiled"] == plain["compiled"] + 1  # of the three pieces between two layers, two are one still


def test_each_layer_gets_its_own_vector_where_inductor_cuts_the_graph(models: Path, tmp_path: Path) -> None:
    model = engines.saved("llama", models)
    found = run(model, tmp_path, *engines.HOOKS, cut="partition")
    assert found["splices"] == [2 * engines.LAYERS]
    hold_against_hooks(model, found)
