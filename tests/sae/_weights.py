"""Small autoencoders: on a grid of whole numbers, where fp32 is exact, and at random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steer_compile.sae import SAE, BatchTopK, Gated, JumpReLU, ReLU, TopK
from steer_compile.sae.activation import Activation

WIDTH, COUNT = 6, 10
SITE = ("post_block", 2)


def parts(seed: int = 0, width: int = WIDTH, count: int = COUNT) -> dict[str, Tensor]:
    """Random parameters of every kind, none of which is symmetric in its sizes."""
    generator = torch.Generator().manual_seed(seed)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return {
        "W_enc": made(width, count),
        "b_enc": made(count) * 0.3,
        "W_dec": made(count, width),
        "b_dec": made(width) * 0.5,
        "threshold": made(count).abs() * 0.5,
        "r_mag": made(count) * 0.3,
        "b_mag": made(count) * 0.3,
    }


def rows(n: int = 7, seed: int = 1, width: int = WIDTH) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * 2


def grid(seed: int, count: int = COUNT, width: int = WIDTH) -> dict[str, Tensor]:
    """Parameters that are small whole numbers: products are exact, and ties are frequent."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (width, count), "b_enc": (count,), "W_dec": (count, width), "b_dec": (width,)}
    return {name: torch.randint(-2, 3, shape, generator=generator).float() for name, shape in shapes.items()}


def whole(seed: int, *shape: int, low: int = -2, high: int = 3) -> Tensor:
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float()


ACTIVATIONS: dict[str, Callable[[int], Activation]] = {
    "relu": lambda seed: ReLU(),
    "jumprelu": lambda seed: JumpReLU(whole(seed, COUNT, low=-3, high=4)),
    "topk": lambda seed: TopK(seed % COUNT + 1),
    "batch_topk": lambda seed: BatchTopK(seed % 3 + 0.5),
    "batch_topk with a threshold": lambda seed: BatchTopK(3, float(seed % 4)),
    "gated": lambda seed: Gated(torch.zeros(COUNT), whole(seed, COUNT)),
}


def sae(activation: Activation | None = None, seed: int = 0, **options: object) -> SAE:
    """A random autoencoder of the site `SITE`."""
    own = parts(seed)
    tensors = {name: own[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return SAE(**tensors, **{"activation": activation or ReLU(), "site": SITE, "name": "tiny", **options})  # type: ignore[arg-type]
