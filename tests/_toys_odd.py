"""Toys without one stream: nothing to find, two streams, several rows a token."""

import torch
from torch import Tensor, nn

from tests._toys_base import BLOCKS, WIDTH, Block, Key, Toy, toy


class NoTruth(Toy):
    """No value of the graph is the stream."""

    expect = "refused"

    def schemes(self) -> list[tuple[int, dict[Key, Tensor]]]:
        return [(0, {})]


@toy("reversible")
class Reversible(NoTruth):
    why = "two interleaved streams: neither alone is the stream"

    def body(self, x: Tensor) -> Tensor:
        y = x.flip(-1)
        for layer in self.layers:
            x = x + layer.attn(layer.n1(y))
            y = y + layer.mlp(layer.n2(x))
        return x + y


@toy("densenet")
class DenseNet(NoTruth):
    why = "concatenation: no sum carries a stream"

    def build(self) -> None:
        self.steps = nn.ModuleList(nn.Linear(WIDTH * (i + 1), WIDTH) for i in range(BLOCKS))
        self.join = nn.Linear(WIDTH * (BLOCKS + 1), WIDTH)

    def body(self, x: Tensor) -> Tensor:
        for step, layer in zip(self.steps, self.layers, strict=True):
            x = torch.cat((x, layer.mlp(layer.attn(layer.n1(step(x))))), -1)
        return self.join(x)


@toy("no_residual")
class NoResidual(NoTruth):
    why = "a plain stack of attention and MLP"

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer.n2(layer.mlp(layer.n1(layer.attn(x))))
        return x


@toy("inner_sums_only")
class InnerSums(NoTruth):
    why = "no skip around the blocks, but adds of equal shape inside each of them (GLU + linear)"

    def body(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer.n1(layer.attn(x))
            x = layer.mlp(h) + layer.attn.o(h).tanh()
        return x


class HyperBlock(Block):
    """m = 3 streams (B, T, m, H): read by a weighted sum, written by an outer product, mixed by m x m."""

    def build(self) -> None:
        self.mix = nn.Parameter(torch.eye(3).repeat(2, 1, 1))
        self.read, self.write = nn.Parameter(torch.full((2, 3), 0.4)), nn.Parameter(torch.full((2, 3), 0.8))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.tape.at("mhc_streams_pre_attn?", layer, x)
        for j, hook in enumerate(("mhc_streams_pre_mlp?", "mhc_streams_final?")):
            h = torch.einsum("btmh,m->bth", x, self.read[j])
            h = self.tape.at("mlp_in?" if j else "pre_attn?", layer, h)
            out = self.mlp(self.n2(h)) if j else self.attend(self.n1(h), layer)
            out = self.tape.at("mlp_out?" if j else "post_attn?", layer, out)
            x = torch.einsum("btmh,mn->btnh", x, self.mix[j]) + out.unsqueeze(2) * self.write[j][:, None]
            x = self.tape.at(hook, layer, x)
        return x


@toy("hyper_connections")
class HyperConnections(Toy):
    expect = "either"
    why = "a stream of three rows a token: the whole value, or a refusal"
    block = HyperBlock

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids).unsqueeze(2).expand(-1, -1, 3, -1)
        return self.finish(self.body(x).sum(2))
