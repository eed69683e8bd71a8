"""Blocks of a spine: consecutive writes that belong to one layer of the model.

Module paths give the layer when they distinguish the layers; otherwise reused parameters (one module looped) and
the order of mixers and MLPs do. A write belongs to the module that computed its branch, not to the one that adds it:
some models add a block's output at the start of the next.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from steer_compile.passes.dataflow import Dataflow, is_state, module_path, op_name, shape_of
from steer_compile.passes.residual import Write
from steer_compile.passes.spine import is_learned, token_mixing

Path = tuple[str, ...]
_WEIGHTY = frozenset("linear matmul bmm addmm baddbmm einsum conv1d scaled_dot_product_attention layer_norm".split())


@dataclass
class Branch:
    """What one write adds: its nodes, its kind and the module that computed it."""

    write: Write
    region: list[fx.Node]
    mixing: str
    owner: Path
    parameters: frozenset[fx.Node]
    terms: list[Term] = field(default_factory=list)

    @property
    def parallel(self) -> bool:
        """Whether one write adds a mixer and an MLP that both read the same stream value."""
        kinds = {t.mixing for t in self.terms}
        return len(self.terms) > 1 and "" in kinds and len(kinds) > 1


@dataclass
class Term:
    """One addend of a parallel write."""

    node: fx.Node
    region: list[fx.Node]
    mixing: str


@dataclass
class Block:
    """One layer. ``key`` is its module path, or ``()`` where modules do not tell."""

    branches: list[Branch]
    key: Path = ()

    @property
    def first(self) -> Write:
        return self.branches[0].write

    @property
    def last(self) -> Write:
        return self.branches[-1].write


def describe_branch(flow: Dataflow, write: Write) -> Branch:
    """Region, kind and owner of the write's branch; a parallel write is split into its addends."""
    region = [n for n in flow.region(write.fork, write.node) if n is not write.node]
    on_skip = set(write.skip)
    region = [n for n in region if n not in on_skip]
    if write.kind == "skip":
        return Branch(write, [], "", (), frozenset())
    owner = _owner(region)
    parameters = frozenset(
        v for n in region for v in flow.inputs[n] if is_state(v) and op_name(n) not in ("to", "_to_copy")
    )
    branch = Branch(write, region, token_mixing(flow, region), owner, parameters)
    branch.terms = _terms(flow, write)
    if not _indexed(branch.owner):
        owners = {tuple(_indexed(o)[:1]): o for o in (_owner(t.region) for t in branch.terms) if _indexed(o)}
        branch.owner = next(iter(owners.values())) if len(owners) == 1 else ()
    return branch


def _owner(region: list[fx.Node]) -> Path:
    """Module that computed the region, told by its projections: masks and casts may come from elsewhere."""
    weighty = [n for n in region if op_name(n) in _WEIGHTY and module_path(n)] or region
    return _common([p for p in map(module_path, weighty) if p])


def _terms(flow: Dataflow, write: Write) -> list[Term]:
    """Addends of the branch that are computed from the fork, each by itself."""
    if len(write.branch) > 1:
        return []
    operands = list(write.branch)
    for inner in write.absorbed:
        operands += inner.branch
    leaves: list[fx.Node] = []
    todo = operands
    while todo:
        node = todo.pop(0)
        inputs = flow.inputs[node]
        plain_sum = op_name(node) == "add" and len(inputs) == 2 and all(flow.depends(i, write.fork) for i in inputs)
        chained = plain_sum and (flow.depends(inputs[0], inputs[1]) or flow.depends(inputs[1], inputs[0]))
        if plain_sum and not chained:
            todo += inputs
        else:
            leaves.append(node)
    terms = []
    for leaf in leaves:
        region = flow.region(write.fork, leaf)
        terms.append(Term(leaf, region, token_mixing(flow, region)))
    if any(t.mixing == "strong" for t in terms):
        for term in terms:
            term.mixing = term.mixing if term.mixing == "strong" else ""
    return terms


def _common(paths: list[Path]) -> Path:
    if not paths:
        return ()
    common = paths[0]
    for path in paths[1:]:
        size = 0
        while size < min(len(common), len(path)) and common[size] == path[size]:
            size += 1
        common = common[:size]
    return common


def group_blocks(flow: Dataflow, writes: list[Write]) -> tuple[list[Block], list[Branch]]:
    """Blocks in execution order, and the writes that belong to none (before the first or after the last block)."""
    branches = [describe_branch(flow, w) for w in writes]
    for index, branch in enumerate(branches):
        if branch.write.kind == "skip" and index + 1 < len(branches):
            branch.owner = branches[index + 1].owner
    strong = any(b.mixing == "strong" for b in branches)
    for branch in branches:
        if strong and branch.mixing == "weak":
            branch.mixing = ""
    keys = _keys(branches)
    if any(keys) and not _lists_of_halves(branches, keys):
        return _by_module(flow, branches, keys)
    return _by_kind(branches), []


def _lists_of_halves(branches: list[Branch], keys: list[Path | None]) -> bool:
    """Whether mixers and MLPs live in lists of their own, so that a block is one of each and no module."""
    kinds: dict[Path, set[bool]] = {}
    for branch, key in zip(branches, keys, strict=True):
        if key is not None and branch.write.kind != "skip":
            kinds.setdefault(key[:-1], set()).add(bool(branch.mixing))
    return len(kinds) > 1 and all(len(k) == 1 for k in kinds.values()) and len(set(map(tuple, kinds.values()))) == 2


def _indexed(owner: Path) -> list[Path]:
    return [owner[: i + 1] for i, part in enumerate(owner) if part.isdigit()]


def _keys(branches: list[Branch]) -> list[Path | None]:
    """Block path of each write: the outermost indexed module that does not hold several mixer-MLP rounds."""
    levels = [_indexed(b.owner) for b in branches]
    outer: list[Path | None] = [lv[0] if lv else None for lv in levels]
    inner: list[Path | None] = [lv[1] if len(lv) > 1 else None for lv in levels]
    deeper = False
    for start, stop in _runs(outer):
        if outer[start] is None:
            continue
        run = branches[start:stop]
        rounds = sum(
            1 for a, b in zip(run, run[1:], strict=False) if not a.mixing and b.mixing and a.write.kind != "skip"
        )
        parts = [branches[start + i : start + j] for i, j in _runs(inner[start:stop])]
        whole = all(any(b.mixing for b in part) for part in parts) and all(inner[start:stop])
        deeper |= rounds > 0 and len(parts) > 1 and whole
    if not deeper:
        return outer
    return [i or o for i, o in zip(inner, outer, strict=True)]


def _runs(keys: list[Path | None]) -> list[tuple[int, int]]:
    cuts = [0, *(i for i in range(1, len(keys)) if keys[i] != keys[i - 1]), len(keys)]
    return list(zip(cuts, cuts[1:], strict=False))


def _by_module(flow: Dataflow, branches: list[Branch], keys: list[Path | None]) -> tuple[list[Block], list[Branch]]:
    blocks: list[Block] = []
    loose: list[Branch] = []
    family, lone = _family(keys), _memory_readers(flow, branches, keys)
    waiting: list[Branch] = []
    for start, stop in _runs(keys):
        key = keys[start]
        run = branches[start:stop]
        if key is None or key[:-1] not in family:
            loose += run
            continue
        if key[:-1] in lone:
            waiting += run
            continue
        outside = [b for b in run if b.write.kind == "skip" and module_path(b.write.node)[: len(key)] != key]
        parts = _split_loops([b for b in run if b not in outside])
        if waiting:
            parts[0] = [*waiting, *outside, *parts[0]]
            waiting = []
        else:
            loose += outside
        blocks += [Block(part, key) for part in parts]
    return blocks, loose


def _family(keys: list[Path | None]) -> set[Path]:
    """Containers that hold blocks: a container of one write beside one with many is a stem or a head."""
    counts: dict[Path, int] = {}
    for key in keys:
        if key is not None:
            counts[key[:-1]] = counts.get(key[:-1], 0) + 1
    most = max(counts.values())
    return {c for c, n in counts.items() if n > 1 or most == 1}


def _memory_readers(flow: Dataflow, branches: list[Branch], keys: list[Path | None]) -> set[Path]:
    """Containers of lone cross-attention writes beside containers of whole blocks: each belongs to the next block."""
    by_container: dict[Path, list[list[Branch]]] = {}
    for start, stop in _runs(keys):
        key = keys[start]
        if key is not None:
            by_container.setdefault(key[:-1], []).append([b for b in branches[start:stop] if b.write.kind != "skip"])
    whole = {c for c, runs in by_container.items() if any(len({bool(b.mixing) for b in run}) > 1 for run in runs)}
    lone = {c for c, runs in by_container.items() if all(len(run) == 1 and _reads_memory(flow, run[0]) for run in runs)}
    return lone if whole else set()


def _reads_memory(flow: Dataflow, branch: Branch) -> bool:
    """Whether the branch mixes the stream with a sequence that is not computed from it: cross-attention."""
    inside = {*branch.region, branch.write.fork}
    values = {v for n in branch.region for v in flow.inputs[n] if v not in inside and len(shape_of(v) or ()) >= 3}
    return bool(branch.mixing) and any(is_learned(flow, v) for v in values)


def _split_loops(run: list[Branch]) -> list[list[Branch]]:
    """Split where a write uses the parameters of an earlier one again: the same module runs once more."""
    parts: list[list[Branch]] = [[]]
    seen: list[frozenset[fx.Node]] = []
    waiting: list[Branch] = []
    for branch in run:
        if branch.write.kind == "skip":
            waiting.append(branch)
            continue
        if branch.parameters and branch.parameters in seen:
            parts.append([])
            seen = []
        parts[-1] += [*waiting, branch]
        waiting = []
        seen.append(branch.parameters)
    parts[-1] += waiting
    return parts


def _by_kind(branches: list[Branch]) -> list[Block]:
    """Without modules a block ends after its MLP, or with each write when there is no MLP at all."""
    mixers = [bool(b.mixing) for b in branches]
    single = all(mixers) or not any(mixers) or any(b.parallel for b in branches)
    blocks: list[Block] = []
    current: list[Branch] = []
    for part in _split_loops(branches):
        for branch in part:
            after_mlp = any(not b.mixing and b.write.kind != "skip" for b in current)
            if current and (single or (branch.mixing and after_mlp)):
                blocks.append(Block(current))
                current = []
            current.append(branch)
        blocks.append(Block(current))
        current = []
    return [b for b in blocks if b.branches]
