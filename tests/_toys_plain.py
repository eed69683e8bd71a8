"""Toys: where norms stand, how many writes a block has, parallel blocks, scaled branches and residuals."""

import torch
from torch import Tensor, nn

from tests._toys_base import Attention, Block, Mlp, RMSNorm, Toy, register_blocks, toy


class RmsBlock(Block):
    def build(self) -> None:
        self.n1, self.n2 = RMSNorm(), RMSNorm()
        self.attn = Attention(manual=True)


class NormFree(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(x, layer), layer)
        return self.end(x + self.feed(x, layer), layer)


class PostNorm(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(self.n1(x + self.attend(x, layer)), layer)
        return self.end(self.n2(x + self.feed(x, layer)), layer)


class Sandwich(Block):
    def build(self) -> None:
        self.n1, self.n2, self.n3, self.n4 = (RMSNorm() for _ in range(4))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer, self.n2), layer)
        return self.end(x + self.feed(self.n3(x), layer, self.n4), layer)


class PostBranchNorm(Block):
    def build(self) -> None:
        self.n1, self.n2 = RMSNorm(), RMSNorm()

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(x, layer, self.n1), layer)
        return self.end(x + self.feed(x, layer, self.n2), layer)


class Parallel(Block):
    """x + attn + mlp. The half sum is read by nothing else, so it counts as a write or it does not."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        h = self.n1(x)
        half = x + self.attend(h, layer)
        self.tape.also("write_0", layer, half)
        return self.tape.at("write_0? write_1? post_block", layer, half + self.feed(h, layer))


class ParallelSum(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        h = self.n1(x)
        return self.tape.at("write_0? post_block", layer, (self.attend(h, layer) + self.feed(h, layer)) + x)


class ParallelTwoNorms(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        y = self.feed(self.n2(x), layer) + self.attend(self.n1(x), layer)
        return self.tape.at("write_0? post_block", layer, x + y)


class ThreeWrites(Block):
    """Self-attention, cross-attention to a fixed memory, MLP: either attention can end the mixing."""

    def build(self) -> None:
        self.cross, self.n3 = Attention(causal=False), nn.LayerNorm(self.width)
        self.memory = nn.Parameter(torch.randn(1, 4, self.width))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer), layer)
        memory = self.memory.expand(x.shape[0], -1, -1)
        h = self.n3(x)
        out = self.cross(h, memory)
        self.tape.also("attn_in", layer, h)
        self.tape.also("attn_out", layer, out)
        x = x + out
        self.tape.also("post_attn", layer, x)
        x = self.tape.at("write_1", layer, x)
        return self.tape.at("write_2 post_block", layer, x + self.feed(self.n2(x), layer))


class Macaron(Block):
    """Half MLP, attention, convolution, half MLP."""

    def build(self) -> None:
        self.ff, self.n3, self.n4 = Mlp(), nn.LayerNorm(self.width), nn.LayerNorm(self.width)
        self.conv = nn.Conv1d(self.width, self.width, 3, padding=1)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        h = self.n3(x)
        first = 0.5 * self.ff(h)
        self.tape.also("mlp_in", layer, h)
        self.tape.also("mlp_out", layer, first)
        x = self.tape.at("write_0", layer, x + first)
        x = self.tape.at("write_1 post_attn", layer, x + self.attend(self.n1(x), layer))
        h = self.n4(x)
        out = self.conv(h.transpose(1, 2)).transpose(1, 2)
        self.tape.also("attn_in", layer, h)
        self.tape.also("attn_out", layer, out)
        x = x + out
        self.tape.also("post_attn", layer, x)
        x = self.tape.at("write_2", layer, x)
        return self.tape.at("write_3 post_block", layer, x + self.feed(self.n2(x), layer, lambda b: b * 0.5))


class ScaledBranch(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer, lambda b: b * 0.22), layer)
        return self.end(x + self.feed(self.n2(x), layer, lambda b: b * 0.22), layer)


class LayerScale(Block):
    def build(self) -> None:
        self.g1, self.g2 = nn.Parameter(torch.full((self.width,), 0.3)), nn.Parameter(torch.full((self.width,), 0.3))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer, lambda b: self.g1 * b), layer)
        return self.end(x + self.feed(self.n2(x), layer, lambda b: self.g2 * b), layer)


class ScaledResidual(Block):
    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(0.8 * x + self.attend(self.n1(x), layer), layer)
        return self.end(0.8 * x + self.feed(self.n2(x), layer), layer)


class ScaledResidualPostNorm(Block):
    """DeepNorm."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(self.n1(1.7 * x + self.attend(x, layer)), layer)
        return self.end(self.n2(1.7 * x + self.feed(x, layer)), layer)


class GainedResidual(Block):
    def build(self) -> None:
        self.g1, self.g2 = nn.Parameter(torch.ones(self.width)), nn.Parameter(torch.ones(self.width))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(self.g1 * x + self.attend(self.n1(x), layer), layer)
        return self.end(x * self.g2 + self.feed(self.n2(x), layer), layer)


class NormedResidual(Block):
    """The skip leaves the norm (apply_residual_connection_post_layernorm): the normed value is in the sum."""

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        h = self.n1(x)
        x = self.mid(h + self.attend(h, layer), layer)
        h = self.n2(x)
        self.tape.also("write_0 post_attn", layer, h)
        return self.end(h + self.feed(h, layer), layer)


class ReZero(Block):
    def build(self) -> None:
        self.a1, self.a2 = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.4))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(x, layer, lambda b: self.a1 * b), layer)
        return self.end(x + self.feed(x, layer, lambda b: self.a2 * b), layer)


class DropoutBlock(Block):
    def build(self) -> None:
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer, self.drop), layer)
        return self.end(x + self.feed(self.n2(x), layer, self.drop), layer)


class LongBranch(Block):
    """Eight inner adds in each branch: the longest chain of adds is not the stream."""

    def build(self) -> None:
        self.inner = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(8))

    def forward(self, x: Tensor, layer: int) -> Tensor:
        x = self.enter(x, layer)
        x = self.mid(x + self.attend(self.n1(x), layer), layer)
        h = self.tape.at("mlp_in", layer, self.n2(x))
        for linear in self.inner:
            h = h + 0.5 * linear(h).relu()
        return self.end(x + self.tape.at("mlp_out", layer, h), layer)


register_blocks(
    ("prenorm_layernorm", Block, "found", "GPT-2"),
    ("prenorm_rmsnorm", RmsBlock, "found", "Llama, norm and softmax by hand"),
    ("norm_free", NormFree, "found", "the branch reads the stream itself"),
    ("postnorm", PostNorm, "found", "BERT: the stream is the norm's output"),
    ("sandwich", Sandwich, "found", "Gemma 2"),
    ("post_branch_norm", PostBranchNorm, "found", "OLMo 2"),
    ("parallel_left", Parallel, "found", "GPT-J: no post_attn"),
    ("parallel_sum_first", ParallelSum, "found", "Falcon: no post_attn"),
    ("parallel_two_norms", ParallelTwoNorms, "found", "NeoX, branches in the other order: no post_attn"),
    ("three_writes", ThreeWrites, "found", "decoder block"),
    ("macaron", Macaron, "found", "Conformer"),
    ("scaled_branch", ScaledBranch, "found", "Granite's residual multiplier"),
    ("layer_scale", LayerScale, "found", "parameter vector on the branch"),
    ("scaled_residual", ScaledResidual, "found", "0.8 x + b"),
    ("deepnorm", ScaledResidualPostNorm, "found", "1.7 x + b under a post-norm"),
    ("gained_residual", GainedResidual, "found", "parameter vector on the skip"),
    ("normed_residual", NormedResidual, "either", "a post-norm graph shifted by one norm: only the modules tell"),
    ("rezero", ReZero, "found", "learned scalar on the branch, no norm"),
    ("dropout", DropoutBlock, "found", "dropout modules in eval"),
)


@toy("long_branch")
class LongBranchToy(Toy):
    why = "the longest chain of adds lies inside the branches"
    block = LongBranch
    n_blocks = 2
