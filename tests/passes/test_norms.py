"""Norms of Hugging Face's models and of toys: found as often as the architecture has them, and equal to a reference."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from steer_compile.coverage import zoo
from steer_compile.ir import Norm
from steer_compile.passes.dataflow import module_path
from steer_compile.passes.norms import match_norms
from tests._graphs import node_values, trace

WIDTH, EPS, BF16, FP32 = 16, 1e-6, torch.bfloat16, torch.float32
Forward = Callable[[Any, Tensor], Any]

# Model type: norms of each layer, norms outside of the layers, their kind and offset.
MODELS: dict[str, tuple[int, int, str, float]] = {
    "llama": (2, 1, "rms", 0.0),
    "mixtral": (2, 1, "rms", 0.0),
    "granite": (2, 1, "rms", 0.0),
    "qwen3": (4, 1, "rms", 0.0),
    "gemma2": (4, 1, "rms_wide", 1.0),
    "gemma3_text": (6, 1, "rms_wide", 1.0),
    "olmo2": (4, 1, "rms_wide", 0.0),
    "olmo": (2, 1, "layer", 0.0),
    "gpt2": (2, 1, "layer", 0.0),
    "gpt_neox": (2, 1, "layer", 0.0),
    "phi": (1, 1, "layer", 0.0),
    "falcon": (1, 1, "layer", 0.0),
    "opt": (2, 1, "layer", 0.0),
    "cohere": (1, 1, "layer", 0.0),
}


def reference(norm: Norm, graph: fx.Graph, values: dict[str, Tensor]) -> Tensor:
    """What the record of a norm says that it computes."""
    value = values[norm.value]
    x, dtype = value.float(), value.dtype
    weight = values[norm.weight].float() + norm.offset if norm.weight else None
    bias = values[norm.bias].float() if norm.bias else None
    if any(n.target is F.layer_norm for n in graph.nodes if n.name in (norm.node, *norm.inner)):
        return F.layer_norm(x, x.shape[-1:], weight, bias, norm.eps).to(dtype)
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.eps)
    if weight is None:
        return x.to(dtype)
    if norm.kind == "rms":
        return x.to(dtype) * weight.to(dtype)
    assert bias is None
    return (x * weight).to(dtype)


def check(module: nn.Module, *inputs: Tensor) -> tuple[fx.Graph, list[Norm]]:
    """Trace a module, match its norms and compare each with the reference."""
    gm, args = trace(module, *inputs)
    found = match_norms(gm.graph)
    values = node_values(gm, args)
    readers = {n.name: {user.name for user in n.users} for n in gm.graph.nodes}
    for name, norms in found.items():
        for norm in norms:
            assert norm.value == name
            assert all(readers[n] <= {*norm.inner, norm.node} for n in norm.inner)
            result, want = values[norm.node], reference(norm, gm.graph, values)
            assert result.dtype == want.dtype == values[name].dtype
            narrow = result.dtype != FP32
            torch.testing.assert_close(result, want, rtol=2**-7 if narrow else 0, atol=1e-30 if narrow else 0)
    return gm.graph, [norm for norms in found.values() for norm in norms]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model_type", MODELS)
def test_models(model_type: str, dtype: torch.dtype) -> None:
    model: Any = zoo.tiny_model(model_type).to(dtype)
    model.config.use_cache = False
    graph, norms = check(model, zoo.tiny_inputs(model, model_type)["input_ids"])
    nodes = {n.name: n for n in graph.nodes}
    place = [next((p for p in module_path(nodes[norm.node]) if p.isdigit()), "") for norm in norms]
    each, outside, kind, offset = MODELS[model_type]
    assert Counter(place) == {"": outside, **{str(i): each for i in range(model.config.num_hidden_layers)}}
    assert {(norm.kind, norm.offset, norm.weight is None) for norm in norms} == {(kind, offset, model_type == "olmo")}
    assert all((norm.bias is None) == (model_type in ("olmo", "cohere")) for norm in norms if norm.kind == "layer")


class Toy(nn.Module):
    """A forward with parameters to choose from."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(WIDTH).to(BF16)), nn.Parameter(torch.randn(WIDTH).to(BF16))
        self.w32, self.w2 = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(5, WIDTH).to(BF16))
        self.one, self.pad = nn.Parameter(torch.randn(1).to(BF16)), nn.Parameter(torch.randn(1, WIDTH).to(BF16))
        self.run = forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def stat(f: Tensor, eps: float = EPS) -> Tensor:
    return torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + eps)


def norm32(x: Tensor) -> Tensor:
    return x.float() * stat(x.float())


def one_cast(x: Tensor) -> Tensor:
    f = x.float()
    return f * stat(f)


def centred(x: Tensor, axis: int = -1) -> Tensor:
    f = x.float()
    c = f - f.mean(axis, keepdim=True)
    return c * stat(c)


def leak(x: Tensor, pick: Callable[[Tensor, Tensor, Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    f = x.float()
    s = stat(f)
    n = f * s
    return n.to(x.dtype), pick(f, s, n) + 1


FOUND: dict[str, tuple[Forward, str, str | None, float]] = {
    "weight left": (lambda m, x: m.w * one_cast(x).to(x.dtype), "rms", "w", 0.0),
    "weight right": (lambda m, x: one_cast(x).to(x.dtype) * m.w, "rms", "w", 0.0),
    "two casts": (lambda m, x: m.w * norm32(x).to(x.dtype), "rms", "w", 0.0),
    "value times statistics": (lambda m, x: m.w * (x * stat(x.float())).to(x.dtype), "rms", "w", 0.0),
    "square": (
        lambda m, x: (x * torch.rsqrt(x.float().square().mean((-1,), True) + EPS)).to(x.dtype) * m.w,
        *("rms", "w", 0.0),
    ),
    "pow -0.5": (lambda m, x: (x * (x.float().pow(2).mean(2, True) + EPS) ** -0.5).to(x.dtype), "rms", None, 0.0),
    "1 / sqrt": (lambda m, x: (x * (1 / torch.sqrt(x.float().pow(2).mean(-1, True) + EPS))).bfloat16(), "rms", None, 0),
    "wide": (lambda m, x: (m.w * one_cast(x)).to(x.dtype), "rms_wide", "w", 0.0),
    "wide, weight in fp32": (lambda m, x: (one_cast(x) * m.w32).type_as(x), "rms_wide", "w32", 0.0),
    "gemma": (lambda m, x: (one_cast(x) * (1.0 + m.w.float())).type_as(x), "rms_wide", "w", 1.0),
    "no weight": (lambda m, x: one_cast(x).to(x.dtype), "rms", None, 0.0),
    "gated": (lambda m, x: one_cast(x).to(x.dtype) * torch.sigmoid(x), "rms", None, 0.0),
    "F.rms_norm": (lambda m, x: F.rms_norm(x, (WIDTH,), m.w, EPS), "rms_wide", "w", 0.0),
    "F.rms_norm then weight": (
        lambda m, x: F.rms_norm(x.float(), (WIDTH,), None, EPS).to(x.dtype) * m.w,
        "rms",
        "w",
        0,
    ),
    "F.layer_norm": (lambda m, x: F.layer_norm(x, (WIDTH,), m.w, m.b), "layer", "w", 0.0),
    "F.layer_norm in fp32": (
        lambda m, x: F.layer_norm(x.float(), (WIDTH,), m.w.float(), m.b.float(), eps=EPS).to(x.dtype),
        *("layer", "w", 0.0),
    ),
    "centred": (lambda m, x: (m.w.float() * centred(x)).to(x.dtype), "layer", "w", 0.0),
}


@pytest.mark.parametrize("name", FOUND)
def test_found(name: str) -> None:
    forward, kind, weight, offset = FOUND[name]
    graph, norms = check(Toy(forward), 3 * torch.randn(2, 5, WIDTH).to(BF16))
    (norm,) = norms
    assert (norm.kind, norm.offset) == (kind, offset)
    assert (norm.weight or "").endswith(f"_{weight}_") if weight else norm.weight is None
    calls = {n.name for n in graph.nodes if n.op.startswith("call")}
    if name != "gated":
        assert {*norm.inner, norm.node} == {name for name in calls if "log_api" not in name}


REFUSED: dict[str, Forward] = {
    "wrong axis": lambda m, x: (x * torch.rsqrt(x.float().pow(2).mean(1, keepdim=True) + EPS)).to(x.dtype),
    "wrong axis of the mean": lambda m, x: centred(x, axis=1).to(x.dtype),
    "two axes": lambda m, x: (x * torch.rsqrt(x.float().pow(2).mean((1, 2), keepdim=True) + EPS)).to(x.dtype),
    "cube": lambda m, x: (x * torch.rsqrt(x.float().pow(3).mean(-1, keepdim=True) + EPS)).to(x.dtype),
    "sum": lambda m, x: (x * torch.rsqrt(x.float().pow(2).sum(-1, keepdim=True) + EPS)).to(x.dtype),
    "no eps": lambda m, x: (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True))).to(x.dtype),
    "eps is a tensor": lambda m, x: (x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + m.one)).to(x.dtype),
    "statistics of another value": lambda m, x: (x * stat((x + 1).float())).to(x.dtype),
    "mean of another value": lambda m, x: ((x.float() - (x + 1).float().mean(-1, True)) * stat(x.float())).to(x.dtype),
    "statistics in bf16": lambda m, x: m.w * (x * stat(x)),
    "statistics in fp64": lambda m, x: (x.double() * stat(x.double())).to(x.dtype),
    "statistics rounded": lambda m, x: x * stat(x.float()).to(x.dtype),
    "mean in fp64": lambda m, x: (
        x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True, dtype=torch.float64) + EPS)
    ).to(x.dtype),
    "divided by the root": lambda m, x: (x / torch.sqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype),
    "cast leaks": lambda m, x: leak(x, lambda f, s, n: f),
    "statistics leak": lambda m, x: leak(x, lambda f, s, n: s),
    "fp32 result leaks": lambda m, x: leak(x, lambda f, s, n: n),
    "2-D weight": lambda m, x: m.w2 * one_cast(x).to(x.dtype),
    "(1, H) weight": lambda m, x: m.pad * one_cast(x).to(x.dtype),
    "weight of one number": lambda m, x: m.one * one_cast(x).to(x.dtype),
    "1 + weight in bf16": lambda m, x: (one_cast(x) * (1.0 + m.w)).to(x.dtype),
    "two additions": lambda m, x: (one_cast(x) * (1.0 + (1.0 + m.w.float()))).to(x.dtype),
    "weight rounded": lambda m, x: (one_cast(x) * m.w32.to(x.dtype)).to(x.dtype),
    "weight doubled": lambda m, x: (one_cast(x) * (m.w.float() * 2)).to(x.dtype),
    "weight promotes": lambda m, x: m.w32 * one_cast(x).to(x.dtype),
    "no rounding": lambda m, x: m.w * one_cast(x),
    "another dtype": lambda m, x: (m.w * one_cast(x)).to(torch.float16),
    "integers": lambda m, x: (m.w * one_cast(x) * 10).to(torch.int8),
    "in place": lambda m, x: x.float().mul_(stat(x.float())).to(x.dtype),
    "bias": lambda m, x: (centred(x) * m.w + m.b).to(x.dtype),
    "LayerNorm rounds early": lambda m, x: centred(x).to(x.dtype) * m.w,
    "F.rms_norm without eps": lambda m, x: F.rms_norm(x, (WIDTH,), m.w),
    "F.rms_norm of two axes": lambda m, x: F.rms_norm(x, (5, WIDTH), m.w2, EPS),
    "F.layer_norm of two axes": lambda m, x: F.layer_norm(x, (5, WIDTH), m.w2),
    "F.layer_norm, 1 + weight in bf16": lambda m, x: F.layer_norm(x, (WIDTH,), m.w + 1, m.b),
    "F.layer_norm, 1 + bias": lambda m, x: F.layer_norm(x.float(), (WIDTH,), m.w32, 1 + m.w32).to(x.dtype),
    "F.layer_norm stays in fp32": lambda m, x: F.layer_norm(x.float(), (WIDTH,)) + 1,
    "F.group_norm": lambda m, x: F.group_norm(x, 5),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    gm, _ = trace(Toy(REFUSED[name]), torch.randn(2, 5, WIDTH).to(BF16))
    assert match_norms(gm.graph) == {}


def test_a_value_with_two_norms_keeps_both() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.layer_norm(x, (WIDTH,), m.w), m.b * one_cast(x).to(x.dtype)

    _, norms = check(Toy(forward), torch.randn(2, 5, WIDTH).to(BF16))
    assert [norm.kind for norm in norms] == ["layer", "rms"]
    assert norms[0].value == norms[1].value


def test_a_shared_weight_cast_stays_outside() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        w = 1.0 + m.w.float()
        return (one_cast(x) * w).to(x.dtype), (one_cast(x + 1) * w).to(x.dtype)

    graph, norms = check(Toy(forward), torch.randn(2, 5, WIDTH).to(BF16))
    shared = {n.name for n in graph.nodes if n.op.startswith("call") and n.meta["example_value"].shape == (WIDTH,)}
    assert len(norms) == len(shared) == 2
    assert all(norm.offset == 1.0 and not shared & set(norm.inner) for norm in norms)
