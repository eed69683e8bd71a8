"""Toys: the many spellings of a write (in place, scaled, interpolated, gated, through views, made later)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests._toys_base import BLOCKS, Block, Toy, register_blocks, toy


class InPlaceOperator(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x += self.attend(self.n1(x), layer)
        x = self.mid(x, layer)
        x += self.feed(self.n2(x), layer)
        return self.end(x, layer)


class InPlaceMethod(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x.add_(self.attend(self.n1(x), layer))
        x = self.mid(x, layer)
        x.add_(self.feed(self.n2(x), layer))
        return self.end(x, layer)


class InPlaceIntoBranch(Block):
    """The branch's own memory takes the sum."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        b = self.attend(self.n1(x), layer)
        b += x
        x = self.mid(b, layer)
        b = self.feed(self.n2(x), layer)
        b.add_(x)
        return self.end(b, layer)


class InPlaceAlpha(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        b = self.attend(self.n1(x), layer)
        self.tape.also("attn_out", layer, lambda: 0.6 * b)
        x.add_(b, alpha=0.6)
        x = self.mid(x, layer)
        b = self.feed(self.n2(x), layer)
        self.tape.also("mlp_out", layer, lambda: 0.6 * b)
        x.add_(b, alpha=0.6)
        return self.end(x, layer)


class AddAlpha(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        b = self.attend(self.n1(x), layer)
        self.tape.also("attn_out", layer, lambda: 0.7 * b)
        x = self.mid(torch.add(x, b, alpha=0.7), layer)
        b = self.feed(self.n2(x), layer)
        self.tape.also("mlp_out", layer, lambda: 0.7 * b)
        return self.end(torch.add(x, b, alpha=0.7), layer)


class AddAlphaSwapped(Block):
    """The stream is the scaled operand: b + 0.7 x."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(torch.add(self.attend(self.n1(x), layer), x, alpha=0.7), layer)
        return self.end(torch.add(self.feed(self.n2(x), layer), x, alpha=0.7), layer)


class Subtract(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        b = self.attend(self.n1(x), layer)
        self.tape.also("attn_out", layer, lambda: -b)
        x = self.mid(x - b, layer)
        b = self.feed(self.n2(x), layer)
        self.tape.also("mlp_out", layer, lambda: -b)
        return self.end(x - b, layer)


class AddCMul(Block):
    def build(self) -> None:
        self.g1, self.g2 = nn.Parameter(torch.ones(self.width)), nn.Parameter(torch.ones(self.width))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        b = self.attend(self.n1(x), layer)
        self.tape.also("attn_out", layer, lambda: self.g1 * b)
        x = self.mid(torch.addcmul(x, self.g1, b), layer)
        b = self.feed(self.n2(x), layer)
        self.tape.also("mlp_out", layer, lambda: self.g2 * b)
        return self.end(torch.addcmul(x, b, self.g2), layer)


class Lerp(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        b = self.attend(self.n1(x), layer)
        self.tape.also("attn_out", layer, lambda: 0.3 * b)
        x = self.mid(torch.lerp(x, b, 0.3), layer)
        b = self.feed(self.n2(x), layer)
        self.tape.also("mlp_out", layer, lambda: 0.3 * b)
        return self.end(torch.lerp(x, b, 0.3), layer)


class Gated(Block):
    """Highway: g x + (1 - g) b with a gate that reads the data."""

    def build(self) -> None:
        self.gate1, self.gate2 = nn.Linear(self.width, self.width), nn.Linear(self.width, self.width)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        h = self.n1(x)
        b, g = self.attend(h, layer), self.gate1(h).sigmoid()
        self.tape.also("attn_out", layer, lambda: (1 - g) * b)
        x = self.mid(g * x + (1 - g) * b, layer)
        h = self.n2(x)
        b, g = self.feed(h, layer), self.gate2(h).sigmoid()
        self.tape.also("mlp_out", layer, lambda: (1 - g) * b)
        return self.end(g * x + (1 - g) * b, layer)


class ThroughView(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x.view(-1, self.width).add_(self.attend(self.n1(x), layer).reshape(-1, self.width))
        x = self.mid(x, layer)
        x.view(-1, self.width).add_(self.feed(self.n2(x), layer).reshape(-1, self.width))
        return self.end(x, layer)


class ThroughSlice(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x[:, :] += self.attend(self.n1(x), layer)
        x = self.mid(x, layer)
        x[:, :] += self.feed(self.n2(x), layer)
        return self.end(x, layer)


class PartOfStream(Block):
    """The attention writes all but the first token, in place; the value of the whole is in no later node."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        out = self.attn(self.tape.at("attn_in", layer, self.n1(x)))
        self.tape.also("attn_out", layer, out)
        x[:, 1:] += self.tape.at("attn_out", layer, out[:, 1:])
        x = self.tape.at("write_0? post_attn?", layer, x)
        return self.tape.at("write_1? write_0? post_block", layer, x + self.feed(self.n2(x), layer))


class StackSum(Block):
    """The sum is not an add at all."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(torch.stack((x, self.attend(self.n1(x), layer))).sum(0), layer)
        return self.end(torch.stack((x, self.feed(self.n2(x), layer))).sum(0), layer)


class FoldedLinear(Block):
    """The last projection takes the stream as its bias: addmm(x, h, W)."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer), layer)
        h = F.gelu(self.mlp.up(self.tape.at("mlp_in", layer, self.n2(x))))
        flat = torch.addmm(x.flatten(0, 1), h.flatten(0, 1), self.mlp.down.weight.t())
        return self.end(flat.view_as(x), layer)


class TwoPartMlp(Block):
    """x + routed + shared: two adds that are one write."""

    def build(self) -> None:
        self.shared = nn.Linear(self.width, self.width)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer), layer)
        h = self.tape.at("mlp_in", layer, self.n2(x))
        routed, shared = self.mlp(h), self.shared(h)
        self.tape.also("mlp_out", layer, routed)
        self.tape.also("mlp_out", layer, shared)
        self.tape.also("mlp_out", layer, lambda: routed + shared)
        self.tape.also("write_1", layer, lambda: x + routed)
        return self.tape.at("write_1? write_2? post_block", layer, x + routed + shared)


class Checkpointed(Block):
    """Everything inside is hidden in a higher-order op: only the block's ends are in the graph."""

    def inner(self, x: Tensor, layer: int) -> Tensor:
        x = self.tape.at("write_0? post_attn?", layer, x + self.attend(self.n1(x), layer))
        return x + self.feed(self.n2(x), layer)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = checkpoint(self.inner, x, layer, use_reentrant=False)
        self.tape.also("write_0", layer, x)
        return self.tape.at("write_1? post_block", layer, x)


register_blocks(
    ("inplace_operator", InPlaceOperator, "found", "x += b"),
    ("inplace_method", InPlaceMethod, "found", "x.add_(b) as a statement: later readers name the old node"),
    ("inplace_into_branch", InPlaceIntoBranch, "found", "b += x"),
    ("inplace_alpha", InPlaceAlpha, "found", "x.add_(b, alpha=0.6)"),
    ("add_alpha", AddAlpha, "found", "torch.add(x, b, alpha=0.7)"),
    ("add_alpha_swapped", AddAlphaSwapped, "found", "torch.add(b, x, alpha=0.7)"),
    ("subtract", Subtract, "found", "x - b"),
    ("addcmul", AddCMul, "found", "torch.addcmul(x, g, b) and (x, b, g)"),
    ("lerp", Lerp, "found", "torch.lerp(x, b, 0.3)"),
    ("gated_write", Gated, "either", "g x + (1 - g) b: both summands read the stream"),
    ("through_view", ThroughView, "either", "in place through a view of other shape"),
    ("through_slice", ThroughSlice, "either", "x[:, :] += b"),
    ("part_of_stream", PartOfStream, "either", "x[:, 1:] += b: the view is not the stream"),
    ("stack_sum", StackSum, "either", "a sum without an add"),
    ("folded_linear", FoldedLinear, "either", "the write is inside an addmm"),
    ("two_part_mlp", TwoPartMlp, "found", "x + routed + shared, DeepSeek-like"),
    ("checkpointed", Checkpointed, "either", "torch.utils.checkpoint: a higher-order op a block"),
)


class DeferredBlock(Block):
    def forward(self, h: Tensor, residual: Tensor | None, layer: int) -> tuple[Tensor, Tensor]:
        residual = h if residual is None else self.tape.at("write_1 post_block", layer - 1, residual + h)
        residual = self.enter(residual, layer)
        residual = self.mid(residual + self.attend(self.n1(residual), layer), layer)
        return self.feed(self.n2(residual), layer), residual


@toy("deferred")
class Deferred(Toy):
    why = "a block returns (hidden, residual); the next one makes the sum"
    block = DeferredBlock

    def body(self, x: Tensor) -> Tensor:
        residual = None
        for i, layer in enumerate(self.layers):
            x, residual = layer(x, residual, i)
        assert residual is not None
        return self.tape.at("write_1 post_block", BLOCKS - 1, residual + x)


@toy("many_readers")
class ExtraReaders(Toy):
    why = "every block's output is also an output of the model, and a side head reads the middle"

    def build(self) -> None:
        self.side = nn.Linear(16, 31)

    def forward(self, ids: Tensor) -> Tensor:
        x, kept = self.embed(ids), []
        for i, layer in enumerate(self.layers):
            x = layer(x, i)
            kept.append(x)
        return self.finish(x) + self.side(kept[1]) + torch.stack(kept).mean() * 0.1
