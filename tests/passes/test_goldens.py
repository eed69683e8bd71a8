# ruff: noqa: E501 (the lines of the plans)
"""Plans and graphs as text. `EXPECTTEST_ACCEPT=1 pytest tests/passes/test_goldens.py` writes the plans anew."""

from pathlib import Path
from typing import Any

import torch
from expecttest import TestCase
from torch import nn

from steer_compile import HookSelection, SteerSpec
from steer_compile.canon import canonical_plan, canonical_text
from steer_compile.passes.find_sites import find_sites
from steer_compile.passes.plan_edits import plan_edits
from steer_compile.passes.splice import splice
from tests._graphs import trace
from tests._models import gpt2, llama, spec, tokens, toy
from tests._toys import make

GOLDEN = Path(__file__).parents[1] / "golden"


def plan_text(asked: SteerSpec, model: nn.Module, *inputs: Any) -> str:
    gm, _ = trace(model, *(inputs or (tokens(),)))
    return canonical_plan(plan_edits(asked, find_sites(gm)), gm.graph)


class TestPlans(TestCase):
    def test_llama(self) -> None:
        asked = SteerSpec(steer=("post_block", "attn_out", "mlp_in"), capture=("pre_attn",), rows=5, max_tokens=32)
        self.assertExpectedInline(
            plan_text(asked, llama()),
            """\
tokens: 32
bank 0 capture: f32[1, 32, 32]
bank 1 capture: f32[1, 32, 32]
bank 2 table: f32[6, 8, 32]
add layers.0.post_block = add@model.layers.0 : f32[2, 7, 32] batch_first <- table 2[0]
capture layers.0.pre_attn = embedding@model.embed_tokens : f32[2, 7, 32] batch_first <- capture 0[0]
add layers.0.attn_out = linear@model.layers.0.self_attn.o_proj : f32[2, 7, 32] batch_first <- table 2[2]
add layers.0.mlp_in = mul@model.layers.0.post_attention_layernorm : f32[2, 7, 32] batch_first <- table 2[4] -> linear@model.layers.0.mlp.gate_proj, linear@model.layers.0.mlp.up_proj
add layers.1.post_block = add@model.layers.1 : f32[2, 7, 32] batch_first <- table 2[1]
capture layers.1.pre_attn = add@model.layers.0 : f32[2, 7, 32] batch_first <- capture 1[0]
add layers.1.attn_out = linear@model.layers.1.self_attn.o_proj : f32[2, 7, 32] batch_first <- table 2[3]
add layers.1.mlp_in = mul@model.layers.1.post_attention_layernorm : f32[2, 7, 32] batch_first <- table 2[5] -> linear@model.layers.1.mlp.gate_proj, linear@model.layers.1.mlp.up_proj""",
        )

    def test_gpt2(self) -> None:
        asked = spec("post_attn", HookSelection("post_block", [-1]), placement="after_norm", dtype="bfloat16")
        self.assertExpectedInline(
            plan_text(asked, gpt2()),
            """\
tokens: 64
bank 0 table: bf16[3, 11, 32]
add layers.0.post_attn = add@transformer.h.0 : f32[2, 7, 32] batch_first <- table 0[0] -> add@transformer.h.0
add layers.1.post_attn = add@transformer.h.1 : f32[2, 7, 32] batch_first <- table 0[1] -> add@transformer.h.1
add layers.1.post_block = add@transformer.h.1 : f32[2, 7, 32] batch_first <- table 0[2]""",
        )

    def test_parallel_block(self) -> None:
        model = make("parallel_left")
        asked = spec("attn_out", "mlp_out", capture="post_block", layers=[0, 2])
        self.assertExpectedInline(
            plan_text(asked, model, *model.inputs()),
            """\
tokens: 64
bank 0 capture: f32[1, 64, 16]
bank 1 capture: f32[1, 64, 16]
bank 2 table: f32[4, 11, 16]
capture layers.0.post_block = add@layers.0 : f32[2, 5, 16] batch_first <- capture 0[0]
add layers.0.attn_out = linear@layers.0.attn.o : f32[2, 5, 16] batch_first <- table 2[0]
add layers.0.mlp_out = linear@layers.0.mlp.down : f32[2, 5, 16] batch_first <- table 2[2]
capture layers.2.post_block = add@layers.2 : f32[2, 5, 16] batch_first <- capture 1[0]
add layers.2.attn_out = linear@layers.2.attn.o : f32[2, 5, 16] batch_first <- table 2[1]
add layers.2.mlp_out = linear@layers.2.mlp.down : f32[2, 5, 16] batch_first <- table 2[3]""",
        )


def test_the_text_of_a_spliced_graph() -> None:
    """One file for all versions of torch; what another version traces otherwise has a file of its own."""
    gm, _ = trace(toy(), tokens())
    asked = SteerSpec(steer="post_block", capture=HookSelection("attn_in", [1]), rows=4, max_tokens=32)
    splice(gm, plan_edits(asked, find_sites(gm)))
    text = canonical_text(gm.graph)
    version = ".".join(torch.__version__.split(".")[:2])
    own = GOLDEN / f"toy_spliced.torch{version}.txt"
    expected = own if own.exists() else GOLDEN / "toy_spliced.txt"
    assert text == expected.read_text(), f"{expected.name} differs:\n{text}"


def test_symbolic_sizes_are_named_in_order() -> None:
    for batch, length in ((2, 7), (5, 3)):
        gm, _ = trace(toy(layers=1), tokens(batch, length), dynamic=True)
        lines = canonical_text(gm.graph).splitlines()
        (add, *_) = (line for line in lines if " = add(" in line)
        assert " : f32[s0, s1, 32] @ model.layers.0" in add
