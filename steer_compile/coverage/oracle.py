"""What eager mode says about the residual stream: decoder blocks, the states between them, and edits of them."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steer_compile.coverage import zoo

Edit = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Block:
    """One run of one decoder block: the modules where the stream enters and leaves (mostly the same module)."""

    entry: nn.Module
    exit: nn.Module
    name: str
    shape: torch.Size


@dataclasses.dataclass(frozen=True)
class Reference:
    """Copies of the states of one eager forward pass; the stream is [batch, length, width] in most models."""

    pre: list[Tensor]
    post: list[Tensor]
    hidden_states: list[Tensor] | None
    logits: Tensor
    agreement: list[str]
    changed_in_place: list[int]


@dataclasses.dataclass
class _Call:
    """One run of a module of a module list that maps a tensor to a tensor of the same shape."""

    module: nn.Module
    name: str
    container: str
    before: Tensor
    after: Tensor


def blocks(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[nn.Module]:
    """Decoder blocks in the order in which they run; a looped block occurs once per run."""
    return [block.exit for block in find_blocks(model, inputs)]


def find_blocks(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> list[Block]:
    """Find the decoder blocks by watching one forward pass (no knowledge of class names)."""
    inputs = _inputs_for(model, inputs)
    calls = _watch_lists(model, inputs)
    chained = _chained_lists(calls)
    turns = _lists_taking_turns([call for call in calls if call.container not in chained])
    found: list[tuple[str, Block]] = []
    for call in calls:
        entry = call.module
        if call.container in turns:
            entry = model.get_submodule(f"{turns[call.container]}.{call.name.rpartition('.')[2]}")
        if call.container in chained or call.container in turns:
            found.append((call.container, Block(entry, call.module, call.name, call.after.shape)))
    if not found:
        raise LookupError("no module list of the model carries a stream")
    stream = found[-1][1].shape
    lists = list(dict.fromkeys(container for container, block in found if block.shape == stream))
    if len(lists) > 1:
        lists = [name for name in lists if _reaches_logits(model, inputs, name, stream)]
    return [block for container, block in found if block.shape == stream and container in lists]


def _inputs_for(model: nn.Module, inputs: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return zoo.tiny_inputs(model, str(getattr(model.config, "model_type", ""))) if inputs is None else inputs


def _chained_lists(calls: list[_Call]) -> set[str]:
    """Module lists in which the stream passes from one module straight to the next."""
    return {
        a.container
        for a, b in zip(calls, calls[1:], strict=False)
        if a.container == b.container and a.module is not b.module and torch.equal(a.after, b.before)
    }


def _lists_taking_turns(calls: list[_Call]) -> dict[str, str]:
    """Sibling lists that take turns because none holds whole blocks: {list of the exits: list of the entries}."""
    siblings: dict[str, list[str]] = {}
    for call in calls:
        siblings.setdefault(call.container.rpartition(".")[0], []).append(call.container)
    turns = {}
    for order in siblings.values():
        names = list(dict.fromkeys(order))
        if len(names) > 1 and order == names * (len(order) // len(names)) and len(order) > len(names):
            turns[names[-1]] = names[0]
    return turns


def _reaches_logits(model: nn.Module, inputs: Mapping[str, Any], container: str, shape: torch.Size) -> bool:
    """Whether the logits are a differentiable function of the stream that the modules of a list return."""

    def require_grad(module: nn.Module, args: Any, output: Any) -> Any:
        stream = _stream_of(output, shape)
        return _replace_stream(output, stream, stream.detach().clone().requires_grad_())

    with contextlib.ExitStack() as stack, torch.enable_grad():
        for module in model.get_submodule(container).children():
            stack.callback(module.register_forward_hook(require_grad).remove)
        return logits_of(model(**inputs)).requires_grad


def _watch_lists(model: nn.Module, inputs: Mapping[str, Any]) -> list[_Call]:
    """Run the model once; the calls of modules in lists that are not inside another such call."""
    calls: list[_Call] = []
    open_calls: list[tuple[nn.Module, int, list[Tensor]]] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        open_calls.append((module, len(calls), [tensor.clone() for tensor in _stream_inputs(args, kwargs)]))

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            _, start, candidates = open_calls.pop()
            for before in candidates:
                after = _find_stream(output, before.shape)
                if after is not None:
                    del calls[start:]  # calls inside this one
                    calls.append(_Call(module, name, name.rpartition(".")[0], before, after.clone()))
                    return

        return hook

    with contextlib.ExitStack() as stack, torch.no_grad():
        for container_name, container in model.named_modules():
            if not isinstance(container, nn.ModuleList):
                continue
            for key, module in container.named_children():
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hook = leave(f"{container_name}.{key}")
                stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        model(**inputs)
    return calls


def _stream_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Tensors that may be the stream, the likeliest first."""
    values = [kwargs.get("hidden_states"), *args, *kwargs.values()]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2]


def _find_stream(output: Any, shape: torch.Size) -> Tensor | None:
    """The stream in what a block returned: a tensor, or the first tensor of the stream's shape in a collection."""
    if isinstance(output, Tensor):
        return output if output.shape == shape else None
    named = getattr(output, "hidden_states", None)
    values = [named, *output] if isinstance(output, tuple | list) else [named]
    return next((value for value in values if isinstance(value, Tensor) and value.shape == shape), None)


def _stream_of(output: Any, shape: torch.Size) -> Tensor:
    stream = _find_stream(output, shape)
    if stream is None:
        raise LookupError(f"a block returned no tensor of the stream's shape {tuple(shape)}")
    return stream


def _replace_stream(output: Any, old: Tensor, new: Tensor) -> Any:
    """What a block returned, with the stream exchanged and everything else kept."""
    if isinstance(output, Tensor):
        return new
    values = [new if value is old else value for value in output]
    if hasattr(output, "_fields"):
        return type(output)(*values)
    return type(output)(values)


def logits_of(output: Any) -> Tensor:
    """Logits of a model output, [batch, length, vocabulary] in most models."""
    logits = output.logits if hasattr(output, "logits") else output[0]
    assert isinstance(logits, Tensor)
    return logits


def reference_states(model: nn.Module, inputs: Mapping[str, Any]) -> Reference:
    """States between the blocks, by hooks in one eager run, and what output_hidden_states says in another."""
    found = find_blocks(model, inputs)
    pre: list[Tensor] = []
    post: list[Tensor] = []
    live: list[Tensor] = []
    shape = found[-1].shape

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        pre.append(next(tensor for tensor in _stream_inputs(args, kwargs) if tensor.shape == shape).clone())

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        stream = _stream_of(output, shape)
        live.append(stream)
        post.append(stream.clone())

    with contextlib.ExitStack() as stack, torch.no_grad():
        for module in {id(block.entry): block.entry for block in found}.values():
            stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
        for module in {id(block.exit): block.exit for block in found}.values():
            stack.callback(module.register_forward_hook(leave).remove)
        logits = logits_of(model(**inputs)).clone()
    changed = [layer for layer, (a, b) in enumerate(zip(live, post, strict=True)) if not torch.equal(a, b)]
    hidden, made = _hidden_states(model, inputs, post[-1])
    agreement = [_agree(layer, post, hidden, made) for layer in range(len(post))]
    return Reference(pre, post, hidden, logits, agreement, changed)


def _hidden_states(
    model: nn.Module, inputs: Mapping[str, Any], last: Tensor
) -> tuple[list[Tensor] | None, list[tuple[str, Tensor]]]:
    """What output_hidden_states gives, and what the modules behind the last block make of its stream."""
    made = [("", last)]

    def leave(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
                return
            source = next((path for path, state in made if _same(args[0], state)), None)
            if source is not None and output.is_floating_point():
                made.append((f"{source} {name}".strip(), output.clone()))

        return hook

    parameters = inspect.signature(model.forward).parameters
    if "output_hidden_states" not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None, made
    with contextlib.ExitStack() as stack, torch.no_grad():
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(leave(name.rpartition(".")[2])).remove)
        output = model(**inputs, output_hidden_states=True)
    hidden = getattr(output, "hidden_states", None)
    return (None if hidden is None else [state.clone() for state in hidden]), made


def _agree(layer: int, post: list[Tensor], hidden: list[Tensor] | None, made: list[tuple[str, Tensor]]) -> str:
    """Which entry of hidden_states is the stream that leaves a block."""
    if hidden is None:
        return "no hidden_states"
    order = sorted(range(len(hidden)), key=lambda index: (index != layer + 1, index))
    for index in order:
        if _same(post[layer], hidden[index]):
            return f"hidden_states[{index}]"
    for index in order:
        for label, view in _views(post[layer], hidden[index]):
            if _same(view, hidden[index]):
                return f"hidden_states[{index}] {label}"
    path = next((path for path, state in made if path and _same(state[:, -hidden[-1].shape[1] :], hidden[-1])), None)
    if layer < len(post) - 1 or path is None:
        return "missing"
    return "final norm applied" if " " not in path and _is_norm_name(path) else f"final modules applied: {path}"


def _is_norm_name(name: str) -> bool:
    return "norm" in name.lower() or name.startswith("ln")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _views(stream: Tensor, published: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Forms in which models publish a stream."""
    yield "transposed", stream.transpose(0, 1)
    if published.dim() == stream.dim() and published.shape[1] < stream.shape[1]:
        length = published.shape[1]
        yield "cropped to the front", stream[:, :length]
        yield "cropped to the back", stream[:, -length:]
    if published.shape == stream.shape:
        factor = float((stream * published).sum() / (stream * stream).sum())
        yield f"scaled by {factor:g}", stream * round(factor, 6)


@contextlib.contextmanager
def edit_block_output(
    model: nn.Module, layer: int, edit: Edit, inputs: Mapping[str, Any] | None = None
) -> Iterator[None]:
    """Replace the stream that leaves the layer-th block run by edit(stream), in every forward pass."""
    inputs = _inputs_for(model, inputs)
    found = find_blocks(model, inputs)
    layer = range(len(found))[layer]
    runs = 0

    def restart(module: nn.Module, args: Any) -> None:
        nonlocal runs
        runs = 0

    def leave(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal runs
        runs += 1
        if runs != layer + 1:
            return None
        stream = _stream_of(output, found[layer].shape)
        return _replace_stream(output, stream, edit(stream.clone()))

    with contextlib.ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(restart).remove)
        for module in {id(block.exit): block.exit for block in found}.values():
            stack.callback(module.register_forward_hook(leave).remove)
        yield


def check(model_type: str) -> dict[str, Any]:
    """One row of facts about a model type: class, number of blocks, finite logits, agreement with hidden_states."""
    model = zoo.tiny_model(model_type)
    inputs = zoo.tiny_inputs(model, model_type)
    reference = reference_states(model, inputs)
    found = find_blocks(model, inputs)
    direction = torch.randn(reference.post[0].shape[-1], generator=torch.Generator().manual_seed(7))
    with edit_block_output(model, len(found) // 2, lambda stream: stream + direction, inputs), torch.no_grad():
        edited = logits_of(model(**inputs))
    return {
        "model_type": model_type,
        "class": zoo.class_name(model_type),
        "blocks": len(found),
        "modules": len({id(block.exit) for block in found}),
        "stream": tuple(reference.post[0].shape),
        "finite": bool(torch.isfinite(reference.logits).all()),
        "edit_shows": not torch.allclose(edited, reference.logits, atol=1e-3),
        "linked": all(torch.equal(a, b) for a, b in zip(reference.post, reference.pre[1:], strict=False)),
        "least_change": min(
            float((b - a).norm() / a.norm()) for a, b in zip(reference.pre, reference.post, strict=True)
        ),
        "agreement": reference.agreement,
        "changed_in_place": reference.changed_in_place,
    }
