"""Next-byte loss of a model whose stream is replaced at one site, by a forward hook in eager mode."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from steer_compile.errors import SpecError
from steer_compile.runtime.vectors import SiteKey

Edit: TypeAlias = Callable[[Tensor], Tensor]


@contextmanager
def replaced(model: Any, site: SiteKey, edit: Edit) -> Iterator[None]:
    """Inside the block the output of a decoder layer is what ``edit`` makes of it.

    Args:
        model: a Llama of transformers.
        site: ``("post_block", layer)``.
        edit: rows (..., width) to rows of the same shape.

    Raises:
        SpecError: another hook, or a layer that is none.
    """
    hook, layer = site
    layers = model.model.layers
    if hook != "post_block" or not 0 <= layer < len(layers):
        raise SpecError(f"{site} is not the output of a decoder layer; give ('post_block', 0 to {len(layers) - 1})")

    def put(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return edit(output)

    handle = layers[layer].register_forward_hook(put)
    try:
        yield
    finally:
        handle.remove()


def byte_losses(model: Any, ids: Tensor, targets: Tensor) -> Tensor:
    """Losses in nats of the counted targets.

    Args:
        ids: (n, tokens) int64.
        targets: (n, tokens) int64, the next ids; those below 0 or above 255 are not counted.

    Returns:
        (counted,) fp32.
    """
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits.float()
    each = functional.cross_entropy(logits.flatten(0, 1), targets.flatten().clamp_min(0), reduction="none")
    return each[(targets.flatten() >= 0) & (targets.flatten() < 256)]
