"""Parts of the toy models: the tape that records true stream values, blocks, attention, norms."""

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Expect = Literal["found", "refused", "either"]
Key = tuple[str, int]

VOCAB, WIDTH, BLOCKS, BATCH, TIME = 31, 16, 3, 2, 5


class Tape:
    """What the toy's forward says about itself, outside of compile only: true values out, edits in.

    `truth` is the value of a hook; `alternatives` are other values that are just as right; `optional` are
    hooks that may be missed (the text leaves them open), but must be right when they are reported.
    """

    def __init__(self) -> None:
        self.truth: dict[Key, Tensor] = {}
        self.alternatives: dict[Key, list[Tensor]] = {}
        self.optional: set[Key] = set()
        self.edit: dict[Key, Tensor] = {}
        self.edit_dim = -1
        """Dimension of the width: -1, or 1 for a stream (B, H, T)."""

    def clear(self) -> None:
        self.truth.clear()
        self.alternatives.clear()
        self.optional.clear()

    def at(self, hooks: str, layer: int, value: Tensor) -> Tensor:
        """Record `value` at each of the space-separated hooks (`?` marks an optional one) and edit it."""
        if torch.compiler.is_compiling():
            return value
        for word in hooks.split():
            key = (word.rstrip("?"), layer)
            self.truth[key] = value.detach().clone()
            if word.endswith("?"):
                self.optional.add(key)
            if key in self.edit:
                edit = self.edit[key].to(value.dtype)
                value = value + (edit if self.edit_dim == -1 else edit[:, None])
        return value

    def also(self, hooks: str, layer: int, value: Tensor | Callable[[], Tensor]) -> None:
        """Accept `value` at the hooks too. A callable is not traced: the graph gets no dead nodes from the tape."""
        if torch.compiler.is_compiling():
            return
        for hook in hooks.split():
            other = value if isinstance(value, Tensor) else value()
            self.alternatives.setdefault((hook, layer), []).append(other.detach().clone())


class RMSNorm(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class Attention(nn.Module):
    """Two heads over (B, T, H). `manual` spells out the softmax; `memory` makes it cross-attention."""

    def __init__(self, width: int = WIDTH, causal: bool = True, manual: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.causal, self.manual, self.heads = causal, manual, 2

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.manual:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            if self.causal:
                mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
                scores = scores.masked_fill(~mask, float("-inf"))
            y = scores.softmax(-1) @ v
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.o(y.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        return self.mix(self.split(self.q(x)), self.split(self.k(source)), self.split(self.v(source)))


class Mlp(nn.Module):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


def same(x: Tensor) -> Tensor:
    return x


class Block(nn.Module):
    """Base of the blocks: `forward(x, layer)`; the layer number is only for the tape."""

    width = WIDTH

    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape
        self.attn, self.mlp = Attention(self.width), Mlp(self.width)
        self.n1, self.n2 = nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        self.build()

    def build(self) -> None:
        """Add what this kind of block has besides."""

    def enter(self, x: Tensor, layer: int) -> Tensor:
        return self.tape.at("pre_attn", layer, x)

    def mid(self, x: Tensor, layer: int) -> Tensor:
        return self.tape.at("write_0 post_attn", layer, x)

    def end(self, x: Tensor, layer: int) -> Tensor:
        return self.tape.at("write_1 post_block", layer, x)

    def attend(self, h: Tensor, layer: int, after: Callable[[Tensor], Tensor] = same) -> Tensor:
        h = self.tape.at("attn_in", layer, h)
        return self.tape.at("attn_out", layer, after(self.attn(h)))

    def feed(self, h: Tensor, layer: int, after: Callable[[Tensor], Tensor] = same) -> Tensor:
        h = self.tape.at("mlp_in", layer, h)
        return self.tape.at("mlp_out", layer, after(self.mlp(h)))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer), layer)
        return self.end(x + self.feed(self.n2(x), layer), layer)


class Toy(nn.Module):
    """A model with known truth. Subclasses change `block`, `start`, `body` or `finish`."""

    expect: ClassVar[Expect] = "found"
    why: ClassVar[str] = ""
    block: ClassVar[type[Block]] = Block
    n_blocks: ClassVar[int] = BLOCKS
    layout: ClassVar[str] = "batch_first"
    """Of the stream: ``batch_first`` (B, T, H), ``time_first`` (T, B, H), ``flat`` (B * T, H), ``channels_first``."""

    def __init__(self) -> None:
        super().__init__()
        self.tape = Tape()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(self.block(self.tape) for _ in range(self.n_blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        self.build()

    def build(self) -> None:
        """Add what this toy has besides."""

    @property
    def truth(self) -> dict[Key, Tensor]:
        return self.tape.truth

    @property
    def edit(self) -> dict[Key, Tensor]:
        return self.tape.edit

    def schemes(self) -> list[tuple[int, dict[Key, Tensor]]]:
        """Every right answer as (number of layers, truth). More than one where the numbering is open."""
        return [(self.n_blocks, self.truth)]

    def inputs(self) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(7)
        return (torch.randint(0, VOCAB, (BATCH, TIME), generator=generator),)

    def start(self, ids: Tensor) -> Tensor:
        return self.embed(ids)

    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x, i)
        return x

    def finish(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))

    def forward(self, ids: Tensor) -> Tensor:
        return self.finish(self.body(self.start(ids)))


TOYS: dict[str, type[Toy]] = {}


def toy(name: str) -> Callable[[type[Toy]], type[Toy]]:
    """Register a toy class."""

    def register(cls: type[Toy]) -> type[Toy]:
        assert name not in TOYS, name
        TOYS[name] = cls
        return cls

    return register


def register_blocks(*rows: tuple[str, type[Block], Expect, str]) -> None:
    """Register toys that differ from the base toy in their block only: (name, block, expect, why)."""
    for name, block, expect, why in rows:
        toy(name)(type(name, (Toy,), {"block": block, "expect": expect, "why": why}))


def make(name: str) -> Toy:
    """A toy in eval mode, all of its weights random (neutral gains and gates would hide mistakes)."""
    torch.manual_seed(sum(map(ord, name)))
    model = TOYS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.requires_grad_(False)
