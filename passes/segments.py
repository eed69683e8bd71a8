"""Stream values between neighbouring writes, and which of them enters, leaves or splits a block.

::

    write k ---> cast ---> norm (post-norm models) ---> fork of write k+1 ---> skip of write k+1
    '-- leaves block L --'  '-- the value that everything of the next branch and skip reads --'
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from steer_compile.passes.blocks import Block
from steer_compile.passes.dataflow import Dataflow, dtype_of, module_path, op_name, same_dims, shape_of
from steer_compile.passes.residual import Write, passes_back

Path = tuple[str, ...]


@dataclass
class Segment:
    """Around one write: the value entering its block, the value leaving it, the fork of the next write."""

    write: Write
    entering: fx.Node
    leaving: fx.Node
    fork_after: fx.Node
    skip_chain: list[fx.Node]
    """From the previous write (or the stem) to the add, so that neighbours are a value and its reader."""


def segments_of(
    flow: Dataflow, writes: list[Write], blocks: list[Block], entry: fx.Node | None = None
) -> dict[int, Segment]:
    """Segment of each write, by ``id(write)``, in order. ``entry`` enters the first block, where it is known."""
    block_of = {id(b.write): block for block in blocks for b in block.branches}
    result: dict[int, Segment] = {}
    before: Segment | None = None
    for i, write in enumerate(writes):
        block = block_of.get(id(write))
        following = writes[i + 1] if i + 1 < len(writes) else None
        fork_after = following.fork if following is not None else _tail(flow, write, writes, block)
        again = before is not None and _looped(block_of.get(id(before.write)), block)
        entering = before.leaving if again and before is not None else _entering(flow, write, block)
        before = result[id(write)] = Segment(
            write=write,
            entering=entry if entry is not None and i == 0 else entering,
            leaving=_leaving(write, following, block, block_of, fork_after),
            fork_after=fork_after,
            skip_chain=[*write.path, *write.skip[1:], write.node],
        )
    return result


def arrival(flow: Dataflow, write: Write) -> list[fx.Node]:
    """Values from the stream that enters a graph cut between two blocks to the fork of its first write.

    The first of them is an input of the graph, or the sum of the two in which engines hand the stream on. Empty where
    inputs of the stream's shape are read in any other way.
    """
    shape = shape_of(write.fork) or ()
    inputs = {n for n in flow.nodes if n.op == "placeholder" and _is_stream(flow, n, shape)}
    todo, seen = [[write.fork]], {write.fork}
    while todo:
        path = todo.pop(0)
        if inputs and _summed(flow, path[0]) == inputs:
            return path
        for back in passes_back(flow, path[0]):
            if back.node not in seen:
                seen.add(back.node)
                todo.append([back.node, *path])
    return []


def _is_stream(flow: Dataflow, node: fx.Node, shape: tuple[object, ...]) -> bool:
    """Whether an input is read, has the stream's shape, and is none of the model's parameters."""
    dtype = dtype_of(node)
    alike = dtype is not None and dtype.is_floating_point and same_dims(shape_of(node) or (), shape)
    return alike and flow.is_activation(node) and bool(_readers(flow, node))


def _readers(flow: Dataflow, node: fx.Node) -> list[fx.Node]:
    """Who reads the numbers of a value, not its shape alone."""
    return [user for user in flow.users[node] if user.op == "output" or flow.depends(user, node)]


def _summed(flow: Dataflow, value: fx.Node) -> set[fx.Node]:
    """The inputs of the graph that a value is or is the plain sum of, where it alone reads them."""
    if value.op == "placeholder":
        return {value}
    found: set[fx.Node] = set()
    if op_name(value) != "add" or len(value.args) != 2 or value.kwargs:
        return found
    for operand in flow.inputs[value]:
        reader, source = value, operand
        while source.op != "placeholder" and op_name(source) in ("to", "float") and _readers(flow, source) == [reader]:
            reader, source = source, flow.inputs[source][0]
        if source.op != "placeholder" or _readers(flow, source) != [reader]:
            return set()
        found.add(source)
    return found


def _looped(earlier: Block | None, block: Block | None) -> bool:
    """Whether the same module runs twice in a row, so that its path does not tell where one run ends."""
    return earlier is not None and block is not None and earlier is not block and earlier.key == block.key != ()


def _inside(node: fx.Node, block: Block | None) -> bool:
    if block is None or not block.key:
        return False
    return module_path(node)[: len(block.key)] == block.key


def _entering(flow: Dataflow, write: Write, block: Block | None) -> fx.Node:
    """Last value on the way to the fork that the block's own module did not produce."""
    path = list(write.path)
    if block is None or not block.key:
        return write.fork
    if write.previous is None:
        path = [*_stem(flow, write.fork, block), *path[1:]] if path[0] is write.fork else path
    outside = path[0]
    for value in path[1:]:
        if _inside(value, block):
            break
        outside = value
    return outside


def _stem(flow: Dataflow, fork: fx.Node, block: Block) -> list[fx.Node]:
    """Values of the block's own module in front of its first fork, and the value that enters it."""
    path = [fork]
    while _inside(path[0], block) and len(path) < 16:
        back = next(iter(passes_back(flow, path[0])), None)
        if back is None:
            break
        path.insert(0, back.node)
    return path if not _inside(path[0], block) else [fork]


def _leaving(
    write: Write, following: Write | None, block: Block | None, block_of: dict[int, Block], fork_after: fx.Node
) -> fx.Node:
    """Last value after the write that the block's own module produced; the fork where modules do not tell."""
    if block is None or not block.key:
        return fork_after
    if following is None:
        return fork_after
    if following.previous is not write:
        return write.node
    path = [v for v in following.path if v is not write.node]
    value = write.node
    for step in path:
        if not _inside(step, block):
            break
        value = step
    same_block = block_of.get(id(following)) is block
    return following.fork if same_block else value


def _tail(flow: Dataflow, write: Write, writes: list[Write], block: Block | None) -> fx.Node:
    """The stream after the last write: as far as its own block carries it on, or as earlier blocks did."""
    value = write.node
    pattern = [op_name(n) for n in _last_boundary(writes)]
    while True:
        step = _next_step(flow, value)
        if step is None:
            return value
        if block is not None and block.key:
            if not _inside(step, block):
                return value
        elif not pattern or op_name(step) != pattern.pop(0):
            return value
        value = step


def _last_boundary(writes: list[Write]) -> list[fx.Node]:
    """Values between the last write of the previous block and the fork after it, where blocks have no modules."""
    kinds = [w for w in writes[1:] if w.previous is not None]
    return kinds[-1].path[1:] if kinds else []


def _next_step(flow: Dataflow, value: fx.Node) -> fx.Node | None:
    """The one reader that carries the value on, if there is just one way forward."""
    for user in flow.users[value]:
        if any(back.node is value for back in passes_back(flow, user)):
            return user
    return None
