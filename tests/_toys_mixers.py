"""Toys: mixers that are no plain attention, odd streams, odd layouts, dtypes, odd inputs, no stream at all."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests._toys_base import BATCH, BLOCKS, TIME, VOCAB, WIDTH, Attention, Block, Toy, register_blocks, same, toy
from tests._toys_plain import PostNorm


class Ssm(nn.Module):
    """Causal convolution, gate, and a decayed running sum."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.conv, self.decay = nn.Conv1d(width, width, 3, groups=width), nn.Parameter(torch.full((width,), 0.1))

    def forward(self, x: Tensor) -> Tensor:
        u, gate = self.inp(x).chunk(2, -1)
        u = F.silu(self.conv(F.pad(u.transpose(1, 2), (2, 0))).transpose(1, 2))
        time = torch.arange(x.shape[1], device=x.device, dtype=x.dtype)[:, None]
        decay = torch.exp(-self.decay.abs() * time)
        state = decay * torch.cumsum(u / decay, 1)
        return self.out((state + u) * F.silu(gate))


class SsmBlock(Block):
    def build(self) -> None:
        self.mixer = Ssm()

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        h = self.tape.at("attn_in", layer, self.n1(x))
        x = x + self.tape.at("attn_out", layer, self.mixer(h))
        return self.tape.at("write_0 post_attn? post_block", layer, x)


class Hybrid(Block):
    """Mixer in even blocks, MLP in odd ones; one write each."""

    def build(self) -> None:
        self.mixer = Ssm()

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        if layer % 2:
            return self.tape.at("write_0 post_block", layer, x + self.feed(self.n1(x), layer))
        h = self.tape.at("attn_in", layer, self.n1(x))
        x = x + self.tape.at("attn_out", layer, self.mixer(h) if layer else self.attn(h))
        return self.tape.at("write_0 post_attn? post_block", layer, x)


@toy("hybrid_one_write")
class HybridToy(Toy):
    why = "attention, MLP, SSM, MLP: four blocks by their modules, not two by their order"
    block = Hybrid
    n_blocks = 4


class Moe(nn.Module):
    def __init__(self, width: int = WIDTH, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = self.router(flat).softmax(-1).topk(2, -1)
        rows, out = torch.arange(flat.shape[0], device=x.device), torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            share = (weight * (chosen == i)).sum(-1, keepdim=True)
            out.index_add_(0, rows, expert(flat).relu() * share)
        return out.view(x.shape)


class MoeBlock(Block):
    def build(self) -> None:
        self.mlp = Moe()


class Around(nn.Module):
    """`after(inner(before(x)))` as a module."""

    def __init__(self, inner: nn.Module, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner, self.before, self.after = inner, before, after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.inner(self.before(x)))


class ConvMix(Block):
    """The branch transposes to (B, H, T) for its convolution; the stream stays (B, T, H)."""

    def build(self) -> None:
        conv = nn.Conv1d(self.width, self.width, 3)
        self.attn = Around(conv, lambda h: F.pad(h.transpose(1, 2), (2, 0)), lambda y: y.transpose(1, 2))


class RotaryAttention(Attention):
    def rotate(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], device=x.device)[:, None] * torch.linspace(0.1, 1, 4, device=x.device)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        half = x.shape[-1] // 2
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().mix(self.rotate(q), self.rotate(k), v)


class RotaryBlock(Block):
    def build(self) -> None:
        self.attn = RotaryAttention(manual=True)


class TokenShift(Block):
    """RWKV: x + (shift(x) - x) mix in front of each projection, on the normed value."""

    normed = True

    def build(self) -> None:
        self.mix1, self.mix2 = nn.Parameter(torch.rand(self.width)), nn.Parameter(torch.rand(self.width))

    def shift(self, h: Tensor, mix: Tensor) -> Tensor:
        return h + (F.pad(h, (0, 0, 1, 0))[:, :-1] - h) * mix

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        h = self.n1(x) if self.normed else x
        self.tape.also("attn_in", layer, h)
        x = self.mid(x + self.attend(self.shift(h, self.mix1), layer), layer)
        h = self.n2(x) if self.normed else x
        self.tape.also("mlp_in", layer, h)
        return self.end(x + self.feed(self.shift(h, self.mix2), layer), layer)


class TokenShiftBare(TokenShift):
    """The same on the stream itself: the shifted value is a sum of the stream and a branch, but no write."""

    normed = False


class TimeFirst(Block):
    """The stream is (T, B, H)."""

    def build(self) -> None:
        self.attn = Around(Attention(), lambda h: h.transpose(0, 1), lambda y: y.transpose(0, 1))


class Flattened(Block):
    """The stream is (B * T, H)."""

    def build(self) -> None:
        self.attn = Around(Attention(), lambda h: h.view(BATCH, -1, WIDTH), lambda y: y.reshape(-1, WIDTH))


class ChannelsFirst(Block):
    """The stream is (B, H, T)."""

    def build(self) -> None:
        self.n1, self.n2 = nn.GroupNorm(1, 16), nn.GroupNorm(1, 16)
        self.attn = Around(nn.Conv1d(16, 16, 3), lambda h: F.pad(h, (2, 0)), same)
        self.mlp = Around(nn.Conv1d(16, 16, 1), F.gelu, same)


class HalfBranch(Block):
    """The stream is fp32, the branches bf16."""

    def build(self) -> None:
        self.attn, self.mlp = self.attn.bfloat16(), self.mlp.bfloat16()

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        h = self.n1(x)
        self.tape.also("attn_in", layer, h)
        out = self.attend(h.bfloat16(), layer)
        self.tape.also("attn_out", layer, lambda: out.float())
        x = self.mid(x + out, layer)
        h = self.n2(x)
        self.tape.also("mlp_in", layer, h)
        out = self.feed(h.bfloat16(), layer)
        self.tape.also("mlp_out", layer, lambda: out.float())
        return self.end(x + out.float(), layer)


class CastSum(Block):
    """The stream is bf16, the sum is made in fp32."""

    def cast(self, x: Tensor, out: Tensor, hooks: str, layer: int) -> Tensor:
        total = x.float() + out.float()
        self.tape.also(hooks, layer, total)
        return self.tape.at(hooks, layer, total.bfloat16())

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        h = self.n1(x.float())
        out = self.attend(h, layer, lambda b: b.bfloat16())
        self.tape.also("attn_out", layer, lambda: out.float())
        x = self.cast(x, out, "write_0 post_attn", layer)
        out = self.feed(self.n2(x.float()), layer, lambda b: b.bfloat16())
        self.tape.also("mlp_out", layer, lambda: out.float())
        return self.cast(x, out, "write_1 post_block", layer)


class ValueResidualAttention(Attention):
    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        v = self.split(self.v(x))
        self.value = v
        if first is not None:
            v = 0.5 * v + 0.5 * first
        return self.mix(self.split(self.q(x)), self.split(self.k(x)), v)


register_blocks(
    ("ssm_one_write", SsmBlock, "found", "Mamba: conv, gate, scan; post_attn may equal post_block or be missed"),
    ("moe", MoeBlock, "found", "softmax router, topk, index_add_: no attention"),
    ("conv_branch", ConvMix, "found", "convolution over a transposed branch"),
    ("rotary", RotaryBlock, "found", "q cos + rot(q) sin: adds inside the branch"),
    ("token_shift", TokenShift, "found", "adds on the branch's input"),
    ("token_shift_bare", TokenShiftBare, "found", "x + (shift(x) - x) mix is a branch input, not a write"),
)


@toy("time_first")
class TimeFirstToy(Toy):
    why = "stream (T, B, H)"
    block = TimeFirst
    layout = "time_first"

    def forward(self, ids: Tensor) -> Tensor:
        return self.finish(self.body(self.embed(ids).transpose(0, 1))).transpose(0, 1)


@toy("flattened")
class FlattenedToy(Toy):
    why = "stream (B * T, H)"
    block = Flattened
    layout = "flat"

    def forward(self, ids: Tensor) -> Tensor:
        return self.finish(self.body(self.embed(ids).view(-1, WIDTH))).view(BATCH, -1, VOCAB)


@toy("channels_first")
class ChannelsFirstToy(Toy):
    expect = "either"
    why = "stream (B, H, T): a site that says width H would be steered along time"
    block = ChannelsFirst
    layout = "channels_first"

    def build(self) -> None:
        self.tape.edit_dim = 1

    def forward(self, ids: Tensor) -> Tensor:
        return self.finish(self.body(self.embed(ids).transpose(1, 2)).transpose(1, 2))


@toy("fp32_stream_bf16_branch")
class HalfBranchToy(Toy):
    why = "embedding scale, fp32 stream, bf16 branches"
    block = HalfBranch

    def start(self, ids: Tensor) -> Tensor:
        return (self.embed(ids).bfloat16() * math.sqrt(WIDTH)).float()


@toy("bf16_stream_fp32_sum")
class CastSumToy(Toy):
    why = "bf16 stream, each sum in fp32 and rounded"
    block = CastSum

    def start(self, ids: Tensor) -> Tensor:
        return self.embed(ids).bfloat16()

    def finish(self, x: Tensor) -> Tensor:
        return super().finish(x.float())


@toy("value_residual")
class ValueResidual(Toy):
    why = "the first block's values are added to the later blocks' values"

    def build(self) -> None:
        for layer in self.layers:
            layer.attn = ValueResidualAttention()

    def body(self, x: Tensor) -> Tensor:
        first = None
        for i, layer in enumerate(self.layers):
            x = layer.enter(x, i)
            h = self.tape.at("attn_in", i, layer.n1(x))
            x = layer.mid(x + self.tape.at("attn_out", i, layer.attn(h, first)), i)
            first = layer.attn.value if first is None else first
            x = layer.end(x + layer.feed(layer.n2(x), i), i)
        return x


class InjectBlock(Block):
    def build(self) -> None:
        self.inject = nn.Linear(4, self.width)

    def forward(self, x: Tensor, extra: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = x + self.inject(extra)
        self.tape.also("pre_attn", layer, x)
        x = self.tape.at("write_0?", layer, x)
        x = x + self.attend(self.n1(x), layer)
        self.tape.also("write_0", layer, x)
        x = self.tape.at("write_1? post_attn", layer, x)
        x = x + self.feed(self.n2(x), layer)
        self.tape.also("write_1", layer, x)
        return self.tape.at("write_2? post_block", layer, x)


@toy("layer_input_injection")
class LayerInjection(Toy):
    why = "a second embedding, one slice a block, is added at the block's start"
    block = InjectBlock

    def build(self) -> None:
        self.embed2 = nn.Embedding(VOCAB, 4 * BLOCKS)

    def forward(self, ids: Tensor) -> Tensor:
        x, extra = self.embed(ids), self.embed2(ids).unflatten(-1, (BLOCKS, 4))
        for i, layer in enumerate(self.layers):
            x = layer(x, extra[:, :, i], i)
        return self.finish(x)


@toy("vit")
class Vit(Toy):
    why = "patches, CLS token, position embedding, no mask, pooled head"

    def build(self) -> None:
        del self.embed
        self.patch, self.cls = nn.Conv2d(3, WIDTH, 4, 4), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, TIME, WIDTH))
        for layer in self.layers:
            layer.attn.causal = False

    def inputs(self) -> tuple[Tensor, ...]:
        return (torch.randn(BATCH, 3, 8, 8, generator=torch.Generator().manual_seed(3)),)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1) + self.position
        return self.finish(self.body(x)[:, 0])


@toy("bert")
class Bert(Toy):
    why = "word + token type + position embeddings under a norm, post-norm blocks, padding mask, head with a norm"

    def build(self) -> None:
        self.layers = nn.ModuleList(PostNorm(self.tape) for _ in range(BLOCKS))
        self.kinds, self.positions = nn.Embedding(2, WIDTH), nn.Embedding(TIME, WIDTH)
        self.embed_norm, self.dense = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def inputs(self) -> tuple[Tensor, ...]:
        (ids,) = super().inputs()
        return ids, (torch.arange(TIME) > 2).long().expand(BATCH, -1).contiguous()

    def forward(self, ids: Tensor, kinds: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed_norm(self.embed(ids) + self.kinds(kinds) + self.positions(position))
        return self.head(self.norm(F.gelu(self.dense(self.body(x)))))
