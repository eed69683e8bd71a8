"""Tiny random models of Hugging Face, and the same edits as the package's made by forward hooks in eager mode."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM

from steer_compile.spec import HookSelection, SteerSpec

VOCAB, WIDTH, LAYERS, HEADS = 61, 32, 2, 4
Edit = Callable[[Tensor], Tensor]
Edits = Mapping[tuple[str, int], Edit]
Values = dict[tuple[str, int], list[Tensor]]


def _random(model: Any) -> Any:
    """Weights that make every part of the block count: the usual initialisation is close to the identity."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return model.eval()


def llama(dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(1)
    sizes = {"vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None, **options)
    return _random(LlamaForCausalLM(config)).to(dtype)


def gpt2() -> Any:
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=VOCAB, n_embd=WIDTH, n_layer=LAYERS, n_head=HEADS, n_positions=64)
    return _random(GPT2LMHeadModel(config))


def mamba() -> Any:
    torch.manual_seed(3)
    config = MambaConfig(vocab_size=VOCAB, hidden_size=WIDTH, num_hidden_layers=LAYERS, state_size=4, use_cache=False)
    return _random(MambaForCausalLM(config))


class Output(NamedTuple):
    logits: Tensor
    loss: Tensor | None


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor) -> Tensor:
        q, k, v = (
            t.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2) for t in self.qkv(hidden_states).chunk(3, -1)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return result


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.self_attn = _Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.SiLU(), nn.Linear(48, WIDTH))

    def forward(self, h: Tensor, broken: bool = False) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h))
        if broken:
            torch._dynamo.graph_break()
        result: Tensor = h + self.mlp(self.post_attention_layernorm(h))
        return result


class Toy(nn.Module):
    """A small Llama-like model that traces fast. ``cut``: a graph break in front of that block, or inside of it."""

    base_model_prefix = "model"

    def __init__(self, layers: int, cut: int | None, inside: bool) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"embed": nn.Embedding(VOCAB, WIDTH), "norm": nn.RMSNorm(WIDTH)})
        self.model["layers"] = nn.ModuleList(_Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.cut, self.inside = layers if cut is None else cut, inside

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Output:
        blocks = list(self.model["layers"])  # type: ignore[call-overload]
        h = self.model["embed"](input_ids)
        for block in blocks[: self.cut]:
            h = block(h)
        if self.cut < len(blocks) and not self.inside:
            torch._dynamo.graph_break()
        for block in blocks[self.cut :]:
            h = block(h, self.inside)
        logits = self.head(self.model["norm"](h))
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten()) if labels is not None else None
        return Output(logits, loss)


def toy(dtype: torch.dtype = torch.float32, layers: int = LAYERS, cut: int | None = None, inside: bool = False) -> Any:
    torch.manual_seed(4)
    return _random(Toy(layers, cut, inside)).to(dtype)


def tokens(batch: int = 2, length: int = 7, seed: int = 5) -> Tensor:
    return torch.randint(1, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def direction(seed: int, size: float = 1.0, width: int = WIDTH) -> Tensor:
    return size * torch.randn(width, generator=torch.Generator().manual_seed(seed))


def spec(*steer: str | HookSelection, **options: Any) -> SteerSpec:
    return SteerSpec(steer=steer, **{"rows": 8, "max_tokens": 64, **options})


def compiled(model: nn.Module, backend: Any, **options: Any) -> Any:
    return torch.compile(model, backend=backend, **options)


def logits(model: Any, *args: Any, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        result = model(*args, **kwargs).logits
    assert isinstance(result, Tensor)
    return result


def _place(model: Any, hook: str, layer: int) -> tuple[nn.Module, bool]:
    """Where an eager model shows the value of a hook: a module, and whether it is its input (else its output)."""
    base = model.get_submodule(model.base_model_prefix)
    block = next(m for m in base.children() if isinstance(m, nn.ModuleList))[layer]
    names = dict(block.named_children())
    mixer = next(names[name] for name in ("self_attn", "attn", "mixer") if name in names)
    places: dict[str, tuple[nn.Module | None, bool]] = {
        "pre_attn": (block, True),
        "post_attn": (names.get("post_attention_layernorm", names.get("ln_2", block)), "mlp" in names),
        "post_block": (block, False),
        "attn_in": (mixer, True),
        "attn_out": (mixer, False),
        "mlp_in": (names.get("mlp"), True),
        "mlp_out": (names.get("mlp"), False),
    }
    module, inward = places[hook]
    assert module is not None
    return module, inward


def _hook(model: Any, hook: str, layer: int, edit: Edit) -> Callable[[], None]:
    module, inward = _place(model, hook, layer)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (edit(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": edit(kwargs["hidden_states"])}

    def after(_: nn.Module, args: Any, output: Any) -> Any:
        return (edit(output[0]), *output[1:]) if isinstance(output, tuple) else edit(output)

    if inward:
        return module.register_forward_pre_hook(before, with_kwargs=True).remove
    return module.register_forward_hook(after).remove


_SAME_SUM = {"post_attn": "attn_out", ("pre_attn", "after_norm"): "attn_out", ("post_attn", "after_norm"): "mlp_out"}
"""Where a module's hook can put a term that the stream gets between two modules: into the branch added there."""


@contextmanager
def edited(model: Any, edits: Edits, placement: str = "before_norm") -> Iterator[None]:
    """Add to values of the eager model."""
    with ExitStack() as stack:
        for (hook, layer), edit in edits.items():
            place = _SAME_SUM.get((hook, placement)) or _SAME_SUM.get(hook, hook)
            stack.callback(_hook(model, place, layer, edit))
        yield


def adding(vectors: Mapping[tuple[str, int], Tensor]) -> Edits:
    """Edits that add a vector to every token, in fp32 and rounded once."""

    def edit(vector: Tensor) -> Edit:
        return lambda h: (h.float() + vector).to(h.dtype)

    return {site: edit(vector) for site, vector in vectors.items()}


@contextmanager
def replaced(model: Any, edits: Edits) -> Iterator[None]:
    """Edit values of the eager model in any way: a sum between two modules is what the branch in front is made to."""
    with ExitStack() as stack:
        for (hook, layer), edit in edits.items():
            if hook != "post_attn":
                stack.callback(_hook(model, hook, layer, edit))
                continue
            entered: list[Tensor] = []

            def enter(h: Tensor, entered: list[Tensor] = entered) -> Tensor:
                entered[:] = [h]
                return h

            def branch(out: Tensor, edit: Edit = edit, entered: list[Tensor] = entered) -> Tensor:
                return edit(entered[0] + out) - entered[0]

            stack.callback(_hook(model, "pre_attn", layer, enter))
            stack.callback(_hook(model, "attn_out", layer, branch))
        yield


@contextmanager
def watched(model: Any, *hooks: str, layers: int = LAYERS) -> Iterator[Values]:
    """Record the values at hooks of all layers, call by call."""
    seen: Values = {}

    def look(site: tuple[str, int]) -> Edit:
        def edit(h: Tensor) -> Tensor:
            seen.setdefault(site, []).append(h.detach().clone())
            return h

        return edit

    with ExitStack() as stack:
        for hook in hooks:
            for layer in range(layers):
                stack.callback(_hook(model, hook, layer, look((hook, layer))))
        yield seen
