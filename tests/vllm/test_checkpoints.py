"""Quantised weights and LoRA adapters. vLLM's own uncompiled model, with a forward hook, is the judge."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer_compile import SteerSpec
from steer_compile.errors import SteerError
from tests.vllm import engines
from tests.vllm.engines import PROMPT, at, generated, logprobs, texts, vector

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.filterwarnings("default"),
    pytest.mark.usefixtures("vllm_environment"),
]

ON_A_GPU = torch.cuda.is_available()
DTYPE = "bfloat16" if ON_A_GPU else "float32"  # kernels of 8-bit weights and of adapters take no fp32 on GPUs
SPEC = SteerSpec(steer=engines.HOOKS, rows=8)
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False},
            "input_activations": {
                "num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True,
            },
        }
    },
}  # fmt: skip


def quantised(model: Path, folder: Path) -> Path:
    """The model with 8-bit weights, one scale for each output, in the format of compressed-tensors."""
    folder.mkdir()
    found: dict[str, Tensor] = {}
    for name, weight in load_file(model / "model.safetensors").items():
        if "_proj.weight" in name:
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            found[name] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
            found[f"{name}_scale"] = scale
        else:
            found[name] = weight
    save_file(found, folder / "model.safetensors")
    config = json.loads((model / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": INT8}))
    return folder


def adapter(folder: Path, seed: int) -> Path:
    """A LoRA adapter of rank 8 on the query and down projections."""
    folder.mkdir()
    random = torch.Generator().manual_seed(seed)
    sizes = {"self_attn.q_proj": (64, 128), "mlp.down_proj": (128, 64)}
    weights = {}
    for layer in range(engines.LAYERS):
        for name, (inputs, outputs) in sizes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            weights[f"{prefix}.lora_A.weight"] = 0.3 * torch.randn(8, inputs, generator=random)
            weights[f"{prefix}.lora_B.weight"] = 0.3 * torch.randn(outputs, 8, generator=random)
    save_file(weights, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def judged(judge: Any, moved: Tensor, layer: int, ask: Callable[[Any], Any]) -> Any:
    """What ``ask`` gives with a vector added to a layer's output; its sum with the residual follows."""
    runner = judge.llm_engine.model_executor.driver_worker.worker.model_runner
    block = runner.get_model().model.layers[layer]
    handle = block.register_forward_hook(lambda module, args, out: (out[0] + moved.to(out[0]), *out[1:]))
    try:
        return ask(judge)
    finally:
        handle.remove()


def same(found: Any, expected: Any, exact: bool = True) -> None:
    """All tokens alike; the first where the model is not ``exact``, or is of bf16 on a GPU."""
    tokens, tolerance = (8, 2e-3) if exact and not ON_A_GPU else (1, 0.1)
    assert texts([found])[0][:tokens] == texts([expected])[0][:tokens]
    assert logprobs(found)[:tokens] == pytest.approx(logprobs(expected)[:tokens], abs=tolerance)


def test_eight_bit_weights(models: Path, tmp_path: Path) -> None:
    path = quantised(engines.saved("llama", models), tmp_path / "int8")
    judge = engines.engine(path, enforce_eager=True, dtype=DTYPE)
    moved = vector(1, 2.0)
    expected = [generated(judge, [None])[0], judged(judge, moved, 1, lambda llm: generated(llm, [None])[0])]
    found = generated(engines.engine(path, SPEC, dtype=DTYPE), [None, at(1, moved)])
    for each in zip(found, expected, strict=True):
        # Each token's numbers are rounded to 8 bits: where the last bit of a sum decides, two CPUs differ by a step.
        same(*each, exact=False)
    assert texts(expected[:1])[0][:1] != texts(expected[1:])[0][:1]


LORA = {"enable_lora": True, "max_lora_rank": 8, "max_loras": 2}


@pytest.mark.skipif(ON_A_GPU, reason="on a GPU the next test runs")
def test_adapters_on_a_cpu_are_refused_with_steering(models: Path) -> None:
    """vLLM compiles no model with adapters there."""
    with pytest.raises(SteerError, match="mode NONE"):
        engines.engine(engines.saved("llama", models), SPEC, **LORA)


@pytest.mark.skipif(not ON_A_GPU, reason="vLLM compiles no model with adapters on a CPU")
def test_adapters_in_one_batch_with_steering(models: Path, tmp_path: Path) -> None:
    """Each request has the adapter and the vector that it asks for, also both."""
    from vllm.lora.request import LoRARequest

    path = engines.saved("llama", models)
    chosen = LoRARequest("one", 1, str(adapter(tmp_path / "one", 1)))
    options: dict[str, Any] = {**LORA, "dtype": DTYPE}
    moved, loras = vector(1, 2.0), [None, chosen, None, chosen]

    def ask(llm: Any, steering: list[Any], adapters: list[Any]) -> list[Any]:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=8, temperature=0, detokenize=False, logprobs=1, ignore_eos=True,
                extra_args=None if each is None else {"steer": each},
            )
            for each in steering
        ]  # fmt: skip
        prompts = [{"prompt_token_ids": PROMPT}] * len(params)
        return [r.outputs[0] for r in llm.generate(prompts, params, lora_request=adapters, use_tqdm=False)]

    judge = engines.engine(path, enforce_eager=True, **options)
    plain = ask(judge, [None, None], loras[:2])
    expected = plain + judged(judge, moved, 1, lambda llm: ask(llm, [None, None], loras[:2]))
    found = ask(engines.engine(path, SPEC, **options), [None, None, at(1, moved), at(1, moved)], loras)
    for each in zip(found, expected, strict=True):
        same(*each)
    assert len({round(logprobs(output)[0], 3) for output in expected}) == 4  # each does something
