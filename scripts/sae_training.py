"""Training of sparse autoencoders in plain PyTorch, for ``train_demo_saes.py``.

Rows are brought to a mean square norm of 1 for training, and the scale is folded into the biases and thresholds of the
result, so it takes and gives the model's own rows and its features count in units of the stream.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from steer_compile.capture.dataset import RowDataset
from steer_compile.runtime.vectors import SiteKey
from steer_compile.sae import SAE, JumpReLU, TopK

BANDWIDTH = 0.02
"""Width of the kernel around a threshold in which pre-activations tell its gradient."""
DEAD_AFTER = 250_000
"""Rows without a feature after which it counts as dead in training."""
SAMPLE = 65536
"""Rows that give the mean and the scale."""
STORED = torch.float16


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of a run.

    Attributes:
        features: of the autoencoder.
        k: of TopK, features of a row.
        l0_penalty: of JumpReLU, loss for each active feature.
        steps, batch: updates, and rows in each.
        lr: peak learning rate of Adam.
    """

    features: int
    k: int
    l0_penalty: float
    steps: int
    batch: int
    lr: float


class _Jump(torch.autograd.Function):
    """``pre where pre > threshold``; backward with the estimate of Rajamanoharan et al. 2024 (eq. 11)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return torch.where(pre > threshold, pre, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        near = (pre - threshold).abs() < BANDWIDTH / 2
        return torch.where(pre > threshold, grad, 0.0), -(threshold / BANDWIDTH) * torch.where(near, grad, 0.0).sum(0)


class _Step(torch.autograd.Function):
    """``1 where pre > threshold``; backward with the estimate of Rajamanoharan et al. 2024 (eq. 12)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return (pre > threshold).to(pre.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        pre, threshold = ctx.saved_tensors
        (grad,) = grads
        near = (pre - threshold).abs() < BANDWIDTH / 2
        return None, -(1 / BANDWIDTH) * torch.where(near, grad, 0.0).sum(0)


jump: Any = _Jump.apply
step: Any = _Step.apply


class Training(nn.Module, ABC):
    """Weights of an autoencoder and the loss of a batch. Decoder rows have norm 1 after each step."""

    silent: Tensor
    """Rows since each feature was last active (features,)."""

    def __init__(self, recipe: Recipe, mean: Tensor) -> None:
        """``mean``: of the scaled rows (width,), where the decoder's bias begins."""
        super().__init__()
        self.recipe = recipe
        width = mean.numel()
        self.W_dec = nn.Parameter(functional.normalize(torch.randn(recipe.features, width), dim=1))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(recipe.features))
        self.b_dec = nn.Parameter(mean.clone())
        self.register_buffer("silent", torch.zeros(recipe.features))

    @abstractmethod
    def loss(self, x: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        """Loss, square error of a row, and features of rows x (n, width); ``progress`` from 0 to 1."""

    @abstractmethod
    def result(self, scale: float) -> SAE:
        """The autoencoder of unscaled rows; ``scale``: what rows were multiplied by."""

    def after_step(self, features: Tensor) -> None:
        """Decoder rows back to norm 1, and the count of rows since each feature was last active."""
        with torch.no_grad():
            self.W_dec.copy_(functional.normalize(self.W_dec, dim=1))
            seen = (features > 0).any(0)
            self.silent.add_(len(features)).masked_fill_(seen, 0.0)

    def before_step(self) -> None:
        """The part of the decoder's gradient along its rows has no use, as they keep their norm (Gao et al. 2024)."""
        with torch.no_grad():
            assert self.W_dec.grad is not None
            self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    def dead(self) -> Tensor:
        """Features that count as dead (features,)."""
        return self.silent > DEAD_AFTER


class JumpReLUTraining(Training):
    """``||x - decode(f)||^2 + penalty L0`` with thresholds that learn; the penalty rises over the first fifth."""

    def __init__(self, recipe: Recipe, mean: Tensor) -> None:
        super().__init__(recipe, mean)
        self.log_threshold = nn.Parameter(torch.full((recipe.features,), math.log(0.03)))
        with torch.no_grad():
            self.b_enc.copy_(-mean @ self.W_enc)

    def loss(self, x: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        pre, threshold = (x @ self.W_enc + self.b_enc).relu(), self.log_threshold.exp()
        f = jump(pre, threshold)
        error = (x - f @ self.W_dec - self.b_dec).square().sum(1).mean()
        penalty = self.recipe.l0_penalty * min(1.0, 5 * progress)
        return error + penalty * step(pre, threshold).sum(1).mean(), error, f

    def result(self, scale: float) -> SAE:
        return stored(self, scale, False)


class TopKTraining(Training):
    """``||x - decode(f)||^2`` with the k largest features, and the error predicted by dead ones (Gao et al. 2024)."""

    AUX = 1 / 32

    def loss(self, x: Tensor, progress: float) -> tuple[Tensor, Tensor, Tensor]:
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        f = self._top(pre, self.recipe.k)
        rest = x - f @ self.W_dec - self.b_dec
        error = rest.square().sum(1).mean()
        dead = self.dead()
        count = min(int(dead.sum()), self.W_dec.size(1) // 2)
        loss = error
        if count:
            wanted = rest.detach()
            found = self._top(pre.masked_fill(~dead, -math.inf), count) @ self.W_dec
            share = (wanted - found).square().sum() / wanted.square().sum()
            loss = loss + self.AUX * share * error.detach()
        return loss, error, f

    @staticmethod
    def _top(pre: Tensor, k: int) -> Tensor:
        values, index = pre.topk(k, dim=1, sorted=False)
        return torch.zeros_like(pre).scatter(1, index, values.relu())

    def result(self, scale: float) -> SAE:
        return stored(self, scale, True)


def stored(made: Training, scale: float, subtract: bool) -> SAE:
    """The autoencoder of unscaled rows: weights in `STORED`, biases and thresholds in fp32."""
    activation: Any = TopK(made.recipe.k)
    if isinstance(made, JumpReLUTraining):
        activation = JumpReLU(made.log_threshold.detach().exp() / scale)
    return SAE(
        made.W_enc.detach().to(STORED), made.b_enc.detach() / scale, made.W_dec.detach().to(STORED),
        made.b_dec.detach() / scale, activation, subtract_b_dec=subtract,
    )  # fmt: skip


def rate(step: int, steps: int) -> float:
    """Factor on the learning rate: up over 2 %, and down to 0 over the last 30 % of the steps."""
    return min(1.0, (step + 1) / (0.02 * steps), (steps - step) / (0.3 * steps))


def batches(rows: RowDataset, size: int, steps: int) -> Any:
    """Random rows (size, width), each once before any comes again."""
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(rows))
        chosen, order = order[:size], order[size:]
        yield rows.batch(chosen.sort().values)


def fit(kind: type[Training], recipe: Recipe, rows: RowDataset, site: SiteKey, name: str) -> tuple[SAE, dict[str, Any]]:
    """Train one autoencoder; it as stored, and the record of the run."""
    began = time.perf_counter()
    sample = rows.batch(torch.randperm(len(rows))[:SAMPLE])
    scale = float(sample.square().sum(1).mean().rsqrt())
    made = kind(recipe, scale * sample.mean(0))
    optimizer = torch.optim.Adam(made.parameters(), lr=recipe.lr, betas=(0.9, 0.999))
    curve: list[dict[str, float]] = []
    for number, batch in enumerate(batches(rows, recipe.batch, recipe.steps)):
        optimizer.param_groups[0]["lr"] = recipe.lr * rate(number, recipe.steps)
        loss, error, f = made.loss(scale * batch, number / recipe.steps)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        made.before_step()
        torch.nn.utils.clip_grad_norm_(made.parameters(), 1.0)
        optimizer.step()
        made.after_step(f.detach())
        if (number + 1) % max(1, recipe.steps // 15) == 0:
            curve.append(
                {
                    "step": number + 1,
                    "square_error": round(float(error.detach()), 5),
                    "l0": round(float((f > 0).sum(1).float().mean()), 2),
                    "dead_share": round(float(made.dead().float().mean()), 4),
                }
            )
            print(name, curve[-1], f"{time.perf_counter() - began:.0f} s", flush=True)
    bare = made.result(scale)
    found = SAE(
        bare.W_enc, bare.b_enc, bare.W_dec, bare.b_dec, bare.activation,
        subtract_b_dec=bare.subtract_b_dec, site=site, name=name,
    )  # fmt: skip
    return found, {"seconds": round(time.perf_counter() - began, 1), "scale": scale, "curve": curve}
