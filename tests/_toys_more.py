"""Toys: second chains beside the stream, and blocks cut across modules, as real models have them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests._toys_base import BLOCKS, WIDTH, Attention, Block, Mlp, Toy, register_blocks, toy


class ScaledSum(Block):
    """(x + b) / sqrt(2): the stream is the scaled sum."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid((x + self.attend(self.n1(x), layer)) / 2**0.5, layer)
        return self.end((x + self.feed(self.n2(x), layer)) * 0.7, layer)


class ClampedSum(Block):
    """T5 in half precision: the sum is clamped."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(torch.clamp(x + self.attend(self.n1(x), layer), -2, 2), layer)
        return self.end(torch.clamp(x + self.feed(self.n2(x), layer), -2, 2), layer)


class AdaNorm(Block):
    """DiT: n (1 + scale) + shift on the way in, a gate on the way out, both from a condition."""

    def build(self) -> None:
        self.condition, self.table = nn.Parameter(torch.randn(8)), nn.Linear(8, 6 * self.width)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        s1, b1, g1, s2, b2, g2 = self.table(self.condition).chunk(6)
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x) * (1 + s1) + b1, layer, lambda y: g1 * y), layer)
        return self.end(x + self.feed(self.n2(x) * (1 + s2) + b2, layer, lambda y: g2 * y), layer)


class BroadcastBranch(Block):
    """The MLP reads the mean over tokens: its branch has one row."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer), layer)
        h = self.n2(x)
        self.tape.also("mlp_in", layer, h)
        return self.end(x + self.feed(h.mean(1, keepdim=True), layer), layer)


class NormalisedLerp(Block):
    """nGPT: x = normalize(x + a (normalize(b) - x))."""

    def build(self) -> None:
        self.a1, self.a2 = nn.Parameter(torch.full((self.width,), 0.3)), nn.Parameter(torch.full((self.width,), 0.3))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        b = F.normalize(self.attn(x), dim=-1)
        x = self.tape.at("write_0 post_attn", layer, F.normalize(x + self.a1 * (b - x), dim=-1))
        b = F.normalize(self.mlp(x), dim=-1)
        return self.tape.at("write_1 post_block", layer, F.normalize(x + self.a2 * (b - x), dim=-1))


class LerpByHand(Block):
    """x + a (b - x)."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        b = self.attend(self.n1(x), layer)
        step = 0.3 * (b - x)
        self.tape.also("attn_out", layer, step)
        x = self.mid(x + step, layer)
        b = self.feed(self.n2(x), layer)
        step = 0.3 * (b - x)
        self.tape.also("mlp_out", layer, step)
        return self.end(x + step, layer)


class PythonSum(Block):
    """sum((x, attn, mlp)): 0 + x + attn + mlp."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        a, m = self.attend(self.n1(x), layer), self.feed(self.n2(x), layer)
        self.tape.also("write_0", layer, lambda: x + a)
        return self.tape.at("write_0? write_1? post_block", layer, sum((x, a, m)))


class ClonedStream(Block):
    """Clones, dropouts and no-op casts on the stream itself."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(F.dropout(x.clone(), 0.1, self.training), layer)
        x = self.mid((x + self.attend(self.n1(x), layer)).contiguous(), layer)
        return self.end((x + self.feed(self.n2(x), layer)).to(torch.float32), layer)


class Residual(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class WrappedWrites(Block):
    """Each write is in a module of its own inside the block."""

    def build(self) -> None:
        self.first, self.second = Residual(self.attn), Residual(self.mlp)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.mid(self.first(self.enter(x, layer)), layer)
        return self.end(self.second(x), layer)


register_blocks(
    ("scaled_sum", ScaledSum, "found", "(x + b) / sqrt(2): every later read is of the scaled value"),
    ("clamped_sum", ClampedSum, "found", "clamp(x + b): every later read is of the clamped value"),
    ("ada_norm", AdaNorm, "found", "adds of conditions on the branch input"),
    ("broadcast_branch", BroadcastBranch, "found", "a branch with one row for all tokens"),
    ("normalised_lerp", NormalisedLerp, "either", "an interpolation by hand under a normalisation"),
    ("lerp_by_hand", LerpByHand, "either", "x + a (b - x): two skips to one fork"),
    ("python_sum", PythonSum, "found", "a parallel block by the builtin sum: no post_attn"),
    ("cloned_stream", ClonedStream, "found", "clone, dropout, contiguous and cast on the stream"),
    ("wrapped_writes", WrappedWrites, "found", "residual wrapper modules inside the block"),
)


@toy("pairs_of_modules")
class PairsOfModules(Toy):
    why = "a list of (attention, MLP) pairs; the sums are made by the model, in no block module"

    def build(self) -> None:
        pair = ((nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), Mlp()) for _ in range(BLOCKS))
        self.layers = nn.ModuleList(nn.ModuleList(parts) for parts in pair)

    def body(self, x: Tensor) -> Tensor:
        for i, (n1, attn, n2, mlp) in enumerate(self.layers):
            x = self.tape.at("pre_attn", i, x)
            x = self.tape.at("write_0 post_attn", i, attn(n1(x)) + x)
            x = self.tape.at("write_1 post_block", i, mlp(n2(x)) + x)
        return x


@toy("separate_lists")
class SeparateLists(Toy):
    why = "one list of attentions, one of MLPs; the sums are made by the model"

    def build(self) -> None:
        self.layers = nn.ModuleList(Attention() for _ in range(BLOCKS))
        self.mlps = nn.ModuleList(Mlp() for _ in range(BLOCKS))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * BLOCKS))

    def body(self, x: Tensor) -> Tensor:
        for i in range(BLOCKS):
            x = self.tape.at("pre_attn", i, x)
            x = self.tape.at("write_0 post_attn", i, x + self.layers[i](self.norms[2 * i](x)))
            x = self.tape.at("write_1 post_block", i, x + self.mlps[i](self.norms[2 * i + 1](x)))
        return x


@toy("stages")
class Stages(Toy):
    why = "stages of blocks of one width: stages.0.0, stages.0.1, stages.1.0, ..."
    n_blocks = 4

    def build(self) -> None:
        self.layers = nn.ModuleList(nn.ModuleList(Block(self.tape) for _ in range(2)) for _ in range(2))

    def body(self, x: Tensor) -> Tensor:
        for i, stage in enumerate(self.layers):
            for j, layer in enumerate(stage):
                x = layer(x, 2 * i + j)
        return x


class ScoreAttention(Attention):
    def forward(self, x: Tensor, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
        q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
        new = q @ k.transpose(-1, -2) / 3
        scores = new if scores is None else scores + new
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2)), scores


@toy("score_residual")
class ScoreResidual(Toy):
    why = "RealFormer: the scores are a second chain of adds through all blocks, computed from the first"

    def build(self) -> None:
        for layer in self.layers:
            layer.attn = ScoreAttention()

    def body(self, x: Tensor) -> Tensor:
        scores = None
        for i, m in enumerate(self.layers):
            x = m.enter(x, i)
            out, scores = m.attn(self.tape.at("attn_in", i, m.n1(x)), scores)
            x = m.mid(x + self.tape.at("attn_out", i, out), i)
            x = m.end(x + m.feed(m.n2(x), i), i)
        return x


@toy("layer_sum_head")
class LayerSumHead(Toy):
    why = "ELMo: a running weighted sum of all blocks' outputs feeds the head; the stream does not"

    def build(self) -> None:
        self.weights = nn.Parameter(torch.full((BLOCKS,), 0.4))

    def body(self, x: Tensor) -> Tensor:
        total = 0.1 * x
        for i, layer in enumerate(self.layers):
            x = layer(x, i)
            total = total + self.weights[i] * x
        return total


@toy("memory_stream")
class MemoryStream(Toy):
    expect = "either"
    why = "a memory of two wide rows is read and written by each block: a second stream, as long as the first"

    def build(self) -> None:
        self.memory = nn.Parameter(torch.randn(1, 2, WIDTH))
        self.reads = nn.ModuleList(Attention(causal=False) for _ in range(BLOCKS))

    def body(self, x: Tensor) -> Tensor:
        memory = self.memory.expand(x.shape[0], -1, -1)
        for i, (m, read) in enumerate(zip(self.layers, self.reads, strict=True)):
            memory = memory + read(F.layer_norm(memory, (WIDTH,)), x)
            x = m.enter(x, i)
            x = m.mid(x + m.attend(m.n1(x), i) + memory.mean(1, keepdim=True) * 0.1, i)
            x = m.end(x + m.feed(m.n2(x), i), i)
            if not torch.compiler.is_compiling():
                self.tape.optional |= {("write_0", i), ("write_1", i), ("post_attn", i)}
        return x


@toy("last_token_only")
class LastTokenOnly(Toy):
    expect = "either"
    why = "the last block is computed for the last token alone: its stream is shorter"

    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(x[:, -1:] if i == BLOCKS - 1 else x, i)
        return x


@toy("deep_prompts")
class DeepPrompts(Toy):
    expect = "either"
    why = "each block's first token is replaced by a learned prompt: the stream is cut and joined"

    def build(self) -> None:
        self.prompts = nn.Parameter(torch.randn(BLOCKS, 1, 1, WIDTH))

    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(torch.cat((self.prompts[i].expand(x.shape[0], -1, -1), x[:, 1:]), 1), i)
        return x


@toy("depth_gate")
class DepthGate(Toy):
    expect = "either"
    why = "mixture of depths: where(mask, block(x), x) after each block is the stream that leaves it"

    def build(self) -> None:
        self.gate = nn.Linear(WIDTH, 1)

    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            chosen = torch.where(self.gate(x) > 0, layer(x, i), x)
            if not torch.compiler.is_compiling():
                self.tape.also("pre_attn", i + 1, chosen)
            x = chosen
        return x


@toy("dense_average")
class DenseAverage(Toy):
    expect = "either"
    why = "DenseFormer: after each block, a weighted sum of all values so far"

    def build(self) -> None:
        self.alpha = nn.Parameter(torch.full((BLOCKS, BLOCKS + 1), 0.3))

    def body(self, x: Tensor) -> Tensor:
        kept = [x]
        for i, layer in enumerate(self.layers):
            kept.append(layer(x, i))
            x = sum(self.alpha[i, j] * value for j, value in enumerate(kept))
        return x


@toy("first_block_differs")
class FirstBlockDiffers(Toy):
    why = "the first block has no attention (DeepSeek's first dense layers, gone further): one write"

    def body(self, x: Tensor) -> Tensor:
        first = self.layers[0]
        x = first.enter(x, 0)
        x = self.tape.at("write_0 post_block", 0, x + first.feed(first.n2(x), 0))
        for i in range(1, BLOCKS):
            x = self.layers[i](x, i)
        return x


@toy("unrolled_postnorm")
class Unrolled(Toy):
    why = "post-norm blocks without modules around them: only the shape of the graph tells the blocks apart"

    def build(self) -> None:
        del self.layers
        for i in range(BLOCKS):
            self.add_module(f"a{i}", Attention())
            self.add_module(f"f{i}", Mlp())

    def body(self, x: Tensor) -> Tensor:
        for i in range(BLOCKS):
            x = self.tape.at("pre_attn", i, x)
            y = self.tape.at("attn_out", i, getattr(self, f"a{i}")(x))
            x = self.tape.at("write_0 post_attn", i, F.layer_norm(x + y, (WIDTH,)))
            y = self.tape.at("mlp_out", i, getattr(self, f"f{i}")(x))
            x = self.tape.at("write_1 post_block", i, F.layer_norm(x + y, (WIDTH,)))
        return x


@toy("two_calls")
class TwoCalls(Toy):
    expect = "either"
    why = "one tower over two inputs in turn (siamese): layers 0-5 in order of execution, or a refusal"
    n_blocks = 6

    def build(self) -> None:
        self.layers = nn.ModuleList(Block(self.tape) for _ in range(BLOCKS))

    def forward(self, ids: Tensor) -> Tensor:
        x, y = self.embed(ids), self.embed(ids.flip(1))
        for i in range(BLOCKS):
            x = self.layers[i](x, i)
        for i in range(BLOCKS):
            y = self.layers[i](y, i + BLOCKS)
        return self.finish(x) * self.finish(y)
