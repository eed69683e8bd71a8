"""The graphs of a MODEL, of shapes alone wherever they are enough."""

from __future__ import annotations

from dataclasses import replace

from steer_compile import torch_compat
from steer_compile.cli.load import Loaded, load
from steer_compile.debug.tracing import Traced, trace
from steer_compile.errors import CheckpointError

SMALL = 4 * 2**30
"""Most bytes of parameters of a model that is made in full where its code reads numbers."""


def read_graphs(
    model: str, tokens: tuple[int, int] | None = None, dynamic: bool | None = None
) -> tuple[Loaded, list[Traced]]:
    """A model and its graphs.

    Args:
        tokens: rows of the example, and ids of each; None for a few.
        dynamic: whether sizes are left open.

    Raises:
        CheckpointError: a large model whose code reads numbers, so that shapes are not enough.
    """
    loaded = load(model, weights=False) if tokens is None else load(model, weights=False, tokens=tokens)
    try:
        return loaded, trace(loaded.model, loaded.inputs, loaded.shapes, dynamic)
    except torch_compat.NumbersNeeded as error:
        size = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
        if size > SMALL:
            raise CheckpointError(
                f"{model} cannot be traced by its shapes: its code reads numbers ({error}), and its weights of "
                f"{size / 2**30:.0f} GiB are not read for this; give a config of fewer layers"
            ) from error
    whole = load(model) if tokens is None else load(model, tokens=tokens)
    note = "its code reads numbers, so the model was made in full" + (f"; {whole.note}" if whole.note else "")
    return replace(whole, note=note), trace(whole.model, whole.inputs, dynamic=dynamic)
