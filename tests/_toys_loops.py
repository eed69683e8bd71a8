"""Toys: how the blocks are strung together (loops, shared weights, functions, scans, towers, skips)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan

from tests._toys_base import BLOCKS, VOCAB, WIDTH, Block, Key, Toy, toy
from tests._toys_plain import PostNorm, ThreeWrites


@toy("looped")
class Looped(Toy):
    why = "ALBERT: one module, three times"
    n_blocks = 3

    def build(self) -> None:
        self.layers = nn.ModuleList([Block(self.tape)])

    def body(self, x: Tensor) -> Tensor:
        for i in range(BLOCKS):
            x = self.layers[0](x, i)
        return x


@toy("looped_postnorm")
class LoopedPostNorm(Looped):
    why = "ALBERT with its post-norms"

    def build(self) -> None:
        self.layers = nn.ModuleList([PostNorm(self.tape)])


@toy("looped_injection")
class LoopedInjection(Looped):
    why = "Universal transformer: x = block(x + e)"

    def body(self, x: Tensor) -> Tensor:
        e = x
        for i in range(BLOCKS):
            self.tape.also("pre_attn", i, x)
            x = self.layers[0](x + e, i)
        return x


@toy("shared_layers")
class SharedLayers(Toy):
    why = "four blocks, two modules: 0 0 1 1"
    n_blocks = 4

    def build(self) -> None:
        a, b = Block(self.tape), Block(self.tape)
        self.layers = nn.ModuleList([a, a, b, b])


@toy("cycled_layers")
class CycledLayers(SharedLayers):
    why = "four blocks, two modules: 0 1 0 1"

    def build(self) -> None:
        a, b = Block(self.tape), Block(self.tape)
        self.layers = nn.ModuleList([a, b, a, b])


class Functional(Toy):
    """Blocks that are no modules: functions over stacked weights."""

    def build(self) -> None:
        del self.layers
        n, w = BLOCKS, WIDTH
        self.qkv, self.out = nn.Parameter(torch.randn(n, 3 * w, w) / 4), nn.Parameter(torch.randn(n, w, w) / 4)
        self.up, self.down = nn.Parameter(torch.randn(n, 2 * w, w) / 4), nn.Parameter(torch.randn(n, w, 2 * w) / 6)

    def step(self, x: Tensor, p: dict[str, Tensor], layer: int) -> Tensor:
        at = self.tape.at
        x = at("pre_attn", layer, x)
        q, k, v = F.linear(at("attn_in", layer, F.layer_norm(x, (WIDTH,))), p["qkv"]).chunk(3, -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = at("write_0 post_attn", layer, x + at("attn_out", layer, F.linear(y, p["out"])))
        h = F.gelu(F.linear(at("mlp_in", layer, F.layer_norm(x, (WIDTH,))), p["up"]))
        return at("write_1 post_block", layer, x + at("mlp_out", layer, F.linear(h, p["down"])))

    def stacked(self) -> dict[str, Tensor]:
        return {"qkv": self.qkv, "out": self.out, "up": self.up, "down": self.down}


@toy("functional")
class FunctionalLoop(Functional):
    why = "no module stack to number the layers by"

    def body(self, x: Tensor) -> Tensor:
        for i in range(BLOCKS):
            x = self.step(x, {name: w[i] for name, w in self.stacked().items()}, i)
        return x


@toy("scan")
class Scan(Functional):
    expect = "refused"
    why = "the blocks are iterations of one higher-order op: no node of the graph has a stream value"

    def schemes(self) -> list[tuple[int, dict[Key, Tensor]]]:
        return [(0, {}), (1, {})]

    def body(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            for i in range(BLOCKS):
                x = self.step(x, {name: w[i] for name, w in self.stacked().items()}, i)
            return x

        def combine(carry: Tensor, p: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
            return self.step(carry, p, 0), carry.sum()

        return scan(combine, x, self.stacked())[0]


@toy("torch_encoder_postnorm")
class TorchEncoder(Toy):
    expect = "either"
    why = "nn.TransformerEncoder: in eval and no_grad its layers can be one fused op each"
    norm_first = False

    def build(self) -> None:
        del self.layers
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 32, dropout=0.1, activation="gelu", batch_first=True, norm_first=self.norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False)

    def body(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.encoder(x)
        at = self.tape.at
        for i, m in enumerate(self.encoder.layers):
            x = at("pre_attn", i, x)
            if self.norm_first:
                x = at("write_0? post_attn?", i, x + m._sa_block(m.norm1(x), None, None))
                x = at("write_1? post_block", i, x + m._ff_block(m.norm2(x)))
            else:
                x = at("write_0? post_attn?", i, m.norm1(x + m._sa_block(x, None, None)))
                x = at("write_1? post_block", i, m.norm2(x + m._ff_block(x)))
            self.tape.also("write_0", i, x)
        return x


@toy("torch_encoder_prenorm")
class TorchEncoderPre(TorchEncoder):
    norm_first = True


class WideBlock(Block):
    width = 24


class TwoTowers(Toy):
    """Layers 0-2 are the first tower, 3-5 the second. One tower alone is a silent half."""

    expect = "either"
    n_blocks = 6

    def towers(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        for i in range(3):
            x = self.layers[i](x, i)
        for i in range(3, 6):
            y = self.layers[i](y, i)
        return x, y


@toy("two_towers")
class TwoTowersSum(TwoTowers):
    why = "two towers of equal depth, summed"

    def build(self) -> None:
        self.embed2 = nn.Embedding(VOCAB, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x, y = self.towers(self.embed(ids), self.embed2(ids))
        return self.finish(x + y)


@toy("two_towers_widths")
class TwoTowersWidths(TwoTowers):
    why = "two towers of different width"

    def build(self) -> None:
        self.embed2, self.join = nn.Embedding(VOCAB, 24), nn.Linear(24, WIDTH)
        self.layers = nn.ModuleList([Block(self.tape) for _ in range(3)] + [WideBlock(self.tape) for _ in range(3)])

    def forward(self, ids: Tensor) -> Tensor:
        x, y = self.towers(self.embed(ids), self.embed2(ids))
        return self.finish(x + self.join(y))


class CrossBlock(ThreeWrites):
    def forward(self, x: Tensor, memory: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer), layer)
        h = self.n3(x)
        out = self.cross(h, memory)
        self.tape.also("attn_in", layer, h)
        self.tape.also("attn_out", layer, out)
        x = x + out
        self.tape.also("post_attn", layer, x)
        x = self.tape.at("write_1", layer, x)
        return self.tape.at("write_2 post_block", layer, x + self.feed(self.n2(x), layer))


@toy("encoder_decoder")
class EncoderDecoder(Toy):
    expect = "either"
    why = "layers 0-2 encoder, 3-5 decoder; or the decoder's three alone"
    n_blocks = 6

    def build(self) -> None:
        self.layers = nn.ModuleList(Block(self.tape) for _ in range(3))
        self.decoder, self.embed2 = nn.ModuleList(CrossBlock(self.tape) for _ in range(3)), nn.Embedding(VOCAB, WIDTH)
        for block in self.layers:
            block.attn.causal = False
        self.mid_norm = nn.LayerNorm(WIDTH)

    def schemes(self) -> list[tuple[int, dict[Key, Tensor]]]:
        decoder = {(hook, layer - 3): value for (hook, layer), value in self.truth.items() if layer >= 3}
        return [(6, self.truth), (3, decoder)]

    def inputs(self) -> tuple[Tensor, ...]:
        (ids,) = super().inputs()
        return ids, (ids[:, :4] + 3) % VOCAB

    def forward(self, ids: Tensor, target: Tensor) -> Tensor:
        memory = self.mid_norm(self.body(self.embed(ids)))
        x = self.embed2(target)
        for i, layer in enumerate(self.decoder):
            x = layer(x, memory, i + 3)
        return self.finish(x)


@toy("unet_skips")
class UNetSkips(Toy):
    why = "x = x + w saved, between the blocks of the second half"
    n_blocks = 4

    def build(self) -> None:
        self.w = nn.Parameter(torch.full((2,), 0.5))

    def body(self, x: Tensor) -> Tensor:
        saved = []
        for i, layer in enumerate(self.layers):
            if i < 2:
                saved.append(x)
            else:
                self.tape.also("pre_attn", i, x)
                x = x + self.w[i - 2] * saved.pop()
                self.tape.also("write_0", i, x)
            x = layer(x, i)
            if i >= 2 and not torch.compiler.is_compiling():
                self.tape.also("write_1", i, self.truth["post_attn", i])
                self.tape.also("write_2", i, x)
        return x


class RecurrentSkipBlock(Block):
    def build(self) -> None:
        self.lambdas = nn.Parameter(torch.tensor([0.9, 0.3]))

    def forward(self, x: Tensor, x0: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.tape.at("write_0?", layer, self.lambdas[0] * x + self.lambdas[1] * x0)
        x = x + self.attend(self.n1(x), layer)
        self.tape.also("write_0", layer, x)
        x = self.tape.at("write_1? post_attn", layer, x)
        x = x + self.feed(self.n2(x), layer)
        self.tape.also("write_1", layer, x)
        return self.tape.at("write_2? post_block", layer, x)


@toy("skip_to_embedding")
class SkipToEmbedding(Toy):
    why = "a x + b x0 at the start of each block, with x0 the embedding"
    block = RecurrentSkipBlock

    def body(self, x: Tensor) -> Tensor:
        x0 = x
        for i, layer in enumerate(self.layers):
            x = layer(x, x0, i)
        return x


@toy("pyramid")
class Pyramid(Toy):
    expect = "either"
    why = "two stages of two blocks, 16 then 24 wide"
    n_blocks = 4

    def build(self) -> None:
        wide = [WideBlock(self.tape) for _ in range(2)]
        self.layers = nn.ModuleList([Block(self.tape), Block(self.tape), *wide])
        self.widen, self.norm, self.head = nn.Linear(WIDTH, 24), nn.LayerNorm(24), nn.Linear(24, VOCAB)

    def body(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = layer(self.widen(x) if i == 2 else x, i)
        return x


@toy("head_block")
class HeadBlock(Toy):
    why = "the logits head has a residual block of its own: no fourth layer"

    def build(self) -> None:
        self.extra = nn.Linear(WIDTH, WIDTH)

    def finish(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.head(h + self.extra(h).relu())
