"""`capture_to`: what a compiled model of plain PyTorch computes, on its way to a pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from steer_compile.capture.consumer import Meta
from steer_compile.capture.keeping import Keeping, Taken
from steer_compile.capture.pipeline import Pipeline, StepRows
from steer_compile.capture.reduce import Reduction
from steer_compile.capture.selection import Selection
from steer_compile.errors import CaptureError, NotSteered, SiteNotFound, SpecError
from steer_compile.runtime.demand import Choice, Demand, Sites, demand
from steer_compile.runtime.packed import PackedCall
from steer_compile.runtime.rows import PhaseTracker, Step, real_tokens
from steer_compile.runtime.runtime import Runtime
from steer_compile.runtime.vectors import SiteKey, site_key
from steer_compile.spec import SteerSpec

ROWS = Reduction()


@dataclass(frozen=True)
class About:
    """What files say of all requests of a block: a tag, and a digest or name of the weights."""

    tag: str = ""
    model: str = ""


NOTHING = About()


def spec_digest(spec: SteerSpec) -> str:
    """What tells specs apart: 32 hexadecimal digits."""
    return hashlib.sha256(spec.to_json().encode()).hexdigest()[:32]


@contextmanager
def capture_to(
    runtime: Runtime,
    pipeline: Pipeline,
    requests: Sequence[str] | None = None,
    sites: Sequence[SiteKey | str] | None = None,
    tokens: Choice | Sequence[Choice | None] | None = None,
    about: About = NOTHING,
    prompt_lengths: Sequence[int] | None = None,
    keep: Reduction = ROWS,
) -> Iterator[None]:
    """Give the rows of the calls inside the block to a pipeline, each sequence as a request that ends with the block.

    A call that begins new prompts ends the requests before it, and begins others. Padding is never among the rows. If
    the block raises, its requests are given up.

    Args:
        requests: names of the sequences of the batch; those of `Runtime.steer`, or "0", "1", ... where none are given.
        sites: those of the compiled ones that are kept, ``("post_block", 3)`` or ``"layers.3.post_block"``; None is
            all of them.
        tokens: which tokens are kept, such as a `TokenSelection` or a `Selection`; None is all of them. Or a list with
            one for each sequence, in which None is no token.
        about: tag of the requests, and the model's name, for the files.
        prompt_lengths: tokens of each prompt where prompts are padded on the left; without it, phases and padding are
            those of a `Runtime.steer` around the block.
        keep: what is kept of the values; a mean or a `Selection.top` is given on when its request ends.

    Raises:
        SpecError: the spec captures nothing, or ``keep`` does not fit. CaptureError: names given twice, or as many as
            no call has sequences.
        NotSteered: on leaving, if no compiled graph ran inside. SiteNotFound: on leaving, if a site never ran.
    """
    if not runtime.spec.capture:
        raise SpecError("the spec captures nothing; give SteerSpec(capture=('post_block',), ...) and compile again")
    if requests is not None and len(set(requests)) < len(requests):
        raise CaptureError(f"requests={list(requests)!r} gives a name twice; give each sequence its own")
    positions = [_by_position(one) for one in tokens] if isinstance(tokens, Sequence) else _by_position(tokens)
    wanted = demand(positions, None if sites is None else [site_key(site) for site in sites])
    sink = _Sequences(
        pipeline, requests, wanted, Keeping(keep, tokens), (about.tag, Meta(about.model, spec_digest(runtime.spec)))
    )
    outside, calls, whole = runtime.phases, runtime.calls, False
    if prompt_lengths is not None:
        runtime.phases = PhaseTracker(prompts=tuple(map(int, prompt_lengths)))
    runtime.sinks.append(sink)
    try:
        yield
        if runtime.calls == calls:
            raise NotSteered(
                "nothing was captured: no compiled graph ran inside the block; compile the module in place with "
                "model.compile(backend=...), since torch.compile(model).generate(...) runs the original model"
            )
        sink.flush()
        sink.check()
        whole = True
    finally:
        runtime.sinks[:] = [other for other in runtime.sinks if other is not sink]
        runtime.phases = outside
        sink.close(whole)


class _Sequences:
    """A `Sink` whose requests are the sequences of a batch."""

    def __init__(
        self,
        pipeline: Pipeline,
        requests: Sequence[str] | None,
        wanted: Demand,
        keeping: Keeping,
        about: tuple[str, Meta],
    ) -> None:
        self.demand = wanted
        self._pipeline, self._given, self._keeping = pipeline, requests, keeping
        self._tag, self._meta = about
        self._open: list[str] = []
        self._seen: set[SiteKey] = set()
        self._step: Step | None = None
        self._number = 0
        self._names: tuple[str, ...] = ()
        self._values: dict[SiteKey, Tensor] = {}
        self._ids: Tensor | None = None
        self._packed: PackedCall | None = None

    def begin(self, step: Step, names: tuple[str, ...], number: int) -> None:
        self.flush()
        self._names = tuple(self._given) if self._given is not None else names
        if self._given is not None and len(self._given) != step.batch:
            raise CaptureError(
                f"{len(self._given)} requests are given but the call has {step.batch} sequences; give one for each"
            )
        self.demand.of(step.batch)
        if step.phase == "prefill" and step.start == 0:
            self._end_all()
        for name, prompt in zip(self._names, step.prompts, strict=True):
            if name not in self._open:
                meta = Meta(self._meta.model, self._meta.spec, prompt)
                self._pipeline.begin(name, self._tag, meta)
                self._open.append(name)
        self._step, self._number = step, number

    def take(self, values: Mapping[SiteKey, Tensor], token_ids: Tensor | None, last: bool) -> None:
        wanted = self.demand.sites
        assert isinstance(wanted, Sites)
        self._values |= {site: value for site, value in values.items() if site in wanted}
        self._ids = token_ids if token_ids is not None else self._ids
        if last:
            self.flush()

    def take_packed(self, call: PackedCall, continued: bool) -> PackedCall:
        if self._packed is None or not continued:
            self._packed = call
        return self._packed

    def flush(self) -> None:
        """Submit what the graphs of the last call stored."""
        step, values, ids, packed = self._step, self._values, self._ids, self._packed
        self._step, self._values, self._ids, self._packed = None, {}, None, None
        if packed is not None:
            self._give(_of_packed(packed))
        elif step is not None and values:
            self._give(self._chosen(step, values, ids))

    def _give(self, taken: Taken) -> None:
        self._seen |= set(taken.values)
        found = self._keeping.take(self._names, taken)
        if found is not None:
            rest, values = found
            self._submit(self._names, rest, values)

    def _submit(self, names: Sequence[str], of: Taken, values: Mapping[str, Tensor]) -> None:
        rows = StepRows(names, of.request.astype(np.int32), of.rows, self._number)
        self._pipeline.submit(rows, of.positions, values, of.token_ids)

    def _chosen(self, step: Step, values: Mapping[SiteKey, Tensor], ids: Tensor | None) -> Taken:
        """The tokens that are kept, of all that the last call stored."""
        kept = np.zeros((step.batch, step.length), np.bool_)
        positions = np.zeros((step.batch, step.length), np.int64)
        for b, (tokens, _) in enumerate(self.demand.of(step.batch)):
            span, first = real_tokens(step, b)
            own = slice(span.start, span.stop)
            kept[b, own] = tokens.mask(first, len(span), step.prompts[b])
            positions[b, own] = np.arange(first, first + len(span))
        request, _ = np.nonzero(kept)
        labels = torch.from_numpy(positions.reshape(-1))
        return Taken(request, np.flatnonzero(kept), labels, ids.reshape(-1) if ids is not None else None, values)

    def check(self) -> None:
        """Raise `SiteNotFound` for a site that was asked for and never stored."""
        missing = [site for site in self.demand.named() if site not in self._seen]
        if missing:
            have = ", ".join(f"layers.{layer}.{hook}" for hook, layer in sorted(self._seen)) or "none"
            hook, layer = missing[0]
            raise SiteNotFound(
                f"layers.{layer}.{hook} is not captured; captured are {have}; add it to SteerSpec(capture=...)"
            )

    def close(self, whole: bool) -> None:
        """No more calls come; ``whole`` says whether all went well."""
        if whole:
            self._end_all()
        else:
            for name in self._open:
                self._pipeline.abort(name, "the block around its calls raised an error")
            self._open.clear()
            self._keeping.forget()

    def _end_all(self) -> None:
        for name in self._open:
            found = self._keeping.ended(name)
            if found is not None:
                self._submit((name,), *found)
            self._pipeline.end(name)
        self._open.clear()


def _by_position(tokens: Choice | None) -> Choice | None:
    """The choice without what needs values, for which `Keeping` is there."""
    return replace(tokens, top=None) if isinstance(tokens, Selection) else tokens


def _of_packed(call: PackedCall) -> Taken:
    """Rows of a call whose graph stored the chosen tokens alone."""
    used = max((value.size(0) for value in call.values.values()), default=0)
    places, tokens = (torch.from_numpy(np.array(numbers, np.int64)) for numbers in (call.rows, call.tokens))
    positions = torch.zeros(used, dtype=torch.int64).index_copy_(0, places, torch.from_numpy(call.positions))
    ids = None
    if call.token_ids is not None:
        device = call.token_ids.device
        chosen = call.token_ids.index_select(0, tokens.to(device)).to(torch.int64)
        ids = torch.zeros(used, dtype=torch.int64, device=device).index_copy_(0, places.to(device), chosen)
    return Taken(call.request, call.rows, positions, ids, call.values)
