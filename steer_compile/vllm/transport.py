"""What the front end sends the engine for a request: checked contents of its rows, in pieces that cross processes.

`sent` makes plain data (lists, numbers, bytes) and `received` makes the contents again, without checking them twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steer_compile.runtime.contents import Contents
from steer_compile.runtime.features import Features
from steer_compile.runtime.gates import Clamp, Monitor
from steer_compile.runtime.vectors import TokenSelection, VectorSet


def sent(made: Mapping[str, Contents], tokens: TokenSelection | None) -> dict[str, Any]:
    """Contents by phase, equal ones once, and the tokens that they are for; a capture may be put beside them."""
    unique = {contents.digest(): contents for contents in made.values() if contents}
    places = list(unique)
    return {
        "phases": {phase: places.index(contents.digest()) for phase, contents in made.items() if contents},
        "contents": [_contents(contents) for contents in unique.values()],
        "tokens": None if tokens is None else [[list(s) for s in tokens.spans], tokens.last_prompt, tokens.generated],
    }


def received(data: Mapping[str, Any]) -> tuple[dict[str, Contents], TokenSelection | None]:
    """Contents by phase (empty for a phase in which nothing is added) and tokens, of `sent`."""
    contents = [_read_contents(item) for item in data["contents"]]
    phases = {phase: contents[place] for phase, place in data["phases"].items()}
    made = {phase: phases.get(phase, Contents()) for phase in ("prefill", "decode")}
    if data["tokens"] is None:
        return made, None
    spans, last_prompt, generated = data["tokens"]
    return made, TokenSelection(tuple(tuple(span) for span in spans), last_prompt, generated)


def sent_sets(sets: Mapping[str, VectorSet]) -> dict[str, Any]:
    """Vector sets by name."""
    return {name: _set(vectors) for name, vectors in sets.items()}


def received_sets(data: Mapping[str, Any]) -> dict[str, VectorSet]:
    """Those of `sent_sets`."""
    return {name: _read_set(vectors) for name, vectors in data.items()}


def _contents(contents: Contents) -> dict[str, Any]:
    sets = list(dict.fromkeys(vectors for vectors, _ in contents.parts))
    return {
        "sets": [_set(vectors) for vectors in sets],
        "parts": [[sets.index(vectors), scale] for vectors, scale in contents.parts],
        "monitors": [[*site, _bytes(m.probe), *m.numbers] for site, m in contents.monitors],
        "clamps": [
            [*site, [[_bytes(c.direction), c.lo, c.hi, c.strength, c.digest] for c in each]]
            for site, each in contents.clamps
        ],
        "features": contents.features.to_data(),
    }


def _read_contents(data: Mapping[str, Any]) -> Contents:
    sets = [_read_set(vectors) for vectors in data["sets"]]
    return Contents(
        tuple((sets[place], scale) for place, scale in data["parts"]),
        tuple(
            ((hook, layer), Monitor.checked(_floats(probe), *settings))
            for hook, layer, probe, *settings in data["monitors"]
        ),
        tuple(
            ((hook, layer), tuple(Clamp.checked(_floats(direction), *settings) for direction, *settings in each))
            for hook, layer, each in data["clamps"]
        ),
        Features.of_data(data["features"]),
    )


def _set(vectors: VectorSet) -> dict[str, Any]:
    blocks = [[[list(site) for site in sites], block.size(1), _bytes(block)] for sites, block in vectors.blocks]
    return {"digest": vectors.digest, "blocks": blocks}


def _read_set(data: Mapping[str, Any]) -> VectorSet:
    blocks = tuple(
        (tuple((hook, layer) for hook, layer in sites), _floats(numbers).view(-1, width))
        for sites, width, numbers in data["blocks"]
    )
    return VectorSet(blocks, data["digest"])


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


def _floats(data: bytes) -> torch.Tensor:
    """A vector of its own of fp32 numbers, whatever the process's default device is."""
    with torch.inference_mode(False):
        return torch.frombuffer(bytearray(data), dtype=torch.float32)
