"""Analysis: writes to parallel residual streams (hyper-connections), and the values that they are made of.

::

    streams (.., m, H) --.--> mix: a map (m, m) over the streams ------------------(+)--> streams'
                         |--> weights -> one stream (.., H) -> norm -> branch (.., H)  |
                         '--> place (.., m) ----------------------> outer product -----'

A write is told by the outer product of a branch and one number for each stream. How many streams there are is read off
its shape, also where the model holds them side by side in one dimension of m*H numbers.

Hyper-connections: Zhu et al. 2024 (arXiv 2409.19606). With a doubly stochastic map: mHC, Xie et al. 2025 (arXiv
2512.24880).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from steer_compile.passes.branch_ends import branch_input, dominators
from steer_compile.passes.dataflow import Dataflow, dtype_of, op_name, same_dims, shape_of
from steer_compile.passes.residual import MIX_OPS, Write

_CASTS = frozenset("to type_as float half bfloat16 double _to_copy convert_element_type clone contiguous".split())
_VIEWS = frozenset("view reshape flatten unflatten unsqueeze squeeze getitem contiguous clone".split())
_TURNS = frozenset("transpose swapaxes swapdims permute mT".split())
_PRODUCTS = frozenset("mul multiply".split())


@dataclass(frozen=True)
class StreamWrite:
    """What one write adds to its streams, and how it mixes them.

    Attributes:
        branch: the value (.., H) that is placed on the streams.
        place: its weight on each stream (.., m), before casts.
        mix: the map (.., m, m) of the streams as the model computes it, before casts and transposes; None where each
            stream is kept.
        streams, width: m and H.
    """

    branch: fx.Node
    place: fx.Node
    mix: fx.Node | None
    streams: int
    width: int


def stream_write(flow: Dataflow, write: Write) -> StreamWrite | None:
    """The parts of a write to parallel streams; None where the write is none."""
    for operand in write.branch:
        product = _behind(flow, operand, _VIEWS | _CASTS, _PRODUCTS)
        shape = shape_of(product) or ()
        if op_name(product) not in _PRODUCTS or len(shape) < 3:
            continue
        streams, width = shape[-2], shape[-1]
        if not isinstance(streams, int) or not isinstance(width, int) or streams < 2:
            continue
        branch, place = (_side(flow, product, ends) for ends in ((1, width), (streams, 1)))
        if branch is None or place is None or not _spans(write, streams, width):
            continue
        weights = _uncast(flow, _lowered(flow, place))
        return StreamWrite(_lowered(flow, branch), weights, _mix(flow, write, streams), streams, width)
    return None


def collapsed(flow: Dataflow, write: Write, parts: StreamWrite) -> fx.Node | None:
    """The one stream (.., H) that the branch reads, mixed from all of them; None where no single value is it."""
    region = flow.region(write.fork, parts.branch)
    chain = dominators(flow, write.fork, region)
    rank = len(shape_of(parts.branch) or ())
    found = None
    for node in chain[1:-1]:
        shape = shape_of(node) or ()
        if found is None:
            found = node if len(shape) == rank and same_dims(shape[-1:], (parts.width,)) else None
        elif op_name(node) in _CASTS:
            found = node
        else:
            break
    return found


def normed(flow: Dataflow, one: fx.Node, parts: StreamWrite) -> fx.Node | None:
    """The input of the branch behind its norm; the collapsed stream itself where there is no norm."""
    return branch_input(flow, one, flow.region(one, parts.branch))


def _side(flow: Dataflow, product: fx.Node, ends: tuple[int, int]) -> fx.Node | None:
    """The factor of an outer product whose last two dimensions are these."""
    found = [n for n in flow.inputs[product] if same_dims((shape_of(n) or ())[-2:], ends)]
    return found[0] if len(found) == 1 else None


def _spans(write: Write, streams: int, width: int) -> bool:
    """Whether the written value is the streams themselves, in two dimensions or side by side in one."""
    shape = shape_of(write.node) or ()
    if len(shape) == 4:
        return same_dims(shape[-2:], (streams, width))
    return len(shape) == 3 and same_dims(shape[-1:], (streams * width,))


def _behind(flow: Dataflow, node: fx.Node, steps: frozenset[str], stop: frozenset[str]) -> fx.Node:
    """The first value behind views and casts that is one of ``stop``, or the last one there is."""
    while op_name(node) not in stop and op_name(node) in steps and flow.inputs[node]:
        node = flow.inputs[node][0]
    return node


def _lowered(flow: Dataflow, node: fx.Node) -> fx.Node:
    """The value behind the view that added a dimension to it."""
    rank = len(shape_of(node) or ())
    while op_name(node) in _VIEWS and flow.inputs[node] and len(shape_of(node) or ()) == rank:
        node = flow.inputs[node][0]
    return node


def _uncast(flow: Dataflow, node: fx.Node, turns: bool = False) -> fx.Node:
    """The value behind casts, and behind transposes where ``turns``."""
    steps = _CASTS | _TURNS if turns else _CASTS
    while op_name(node) in steps and flow.inputs[node] and _is_floating(flow.inputs[node][0]):
        node = flow.inputs[node][0]
    return node


def _mix(flow: Dataflow, write: Write, streams: int) -> fx.Node | None:
    """The map of the streams on the skip path, in front of casts and transposes."""
    for node in write.skip:
        if op_name(node) not in MIX_OPS:
            continue
        for value in flow.inputs[node]:
            shape = shape_of(value) or ()
            per_token = len(shape) == len(shape_of(node) or ())
            if per_token and same_dims(shape[-2:], (streams, streams)) and value not in write.skip:
                return _uncast(flow, value, turns=True)
    return None


def _is_floating(node: fx.Node) -> bool:
    dtype = dtype_of(node)
    return dtype is not None and dtype.is_floating_point
