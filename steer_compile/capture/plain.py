"""`capture_to`: what a compiled model of plain PyTorch computes, on its way to a pipeline."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from steer_compile.capture.consumer import Meta
from steer_compile.capture.pipeline import Pipeline, StepRows
from steer_compile.errors import CaptureError, NotSteered, SiteNotFound, SpecError
from steer_compile.runtime.rows import PhaseTracker, Step, real_tokens
from steer_compile.runtime.runtime import Runtime
from steer_compile.runtime.vectors import SiteKey, site_key
from steer_compile.spec import SteerSpec


class Chooses(Protocol):
    """Which tokens are kept, such as `TokenSelection`."""

    def mask(self, first: int, length: int, prompt_length: int) -> npt.NDArray[np.bool_]:
        """Which of ``length`` tokens from position ``first`` on, behind a prompt of ``prompt_length``."""


def spec_digest(spec: SteerSpec) -> str:
    """What tells specs apart: 32 hexadecimal digits."""
    return hashlib.sha256(spec.to_json().encode()).hexdigest()[:32]


@contextmanager
def capture_to(
    runtime: Runtime,
    pipeline: Pipeline,
    requests: Sequence[str] | None = None,
    sites: Sequence[SiteKey | str] | None = None,
    tokens: Chooses | Sequence[Chooses | None] | None = None,
    tag: str = "",
    model: str = "",
    prompt_lengths: Sequence[int] | None = None,
) -> Iterator[None]:
    """Give the rows of the calls inside the block to a pipeline, each sequence as a request that ends with the block.

    A call that begins new prompts ends the requests before it, and begins others. Padding is never among the rows. If
    the block raises, its requests are given up.

    Args:
        requests: names of the sequences of the batch; those of `Runtime.steer`, or "0", "1", ... where none are given.
        sites: those of the compiled ones that are kept, ``("post_block", 3)`` or ``"layers.3.post_block"``; None is
            all of them.
        tokens: which tokens are kept, for all sequences or one for each; None is all of them.
        tag: of the requests.
        model: digest or name of the weights, for the files.
        prompt_lengths: tokens of each prompt where prompts are padded on the left; without it, phases and padding are
            those of a `Runtime.steer` around the block.

    Raises:
        SpecError: the spec captures nothing. CaptureError: names given twice, or as many as no call has sequences.
        NotSteered: on leaving, if no compiled graph ran inside. SiteNotFound: on leaving, if a site never ran.
    """
    if not runtime.spec.capture:
        raise SpecError("the spec captures nothing; give SteerSpec(capture=('post_block',), ...) and compile again")
    if requests is not None and len(set(requests)) < len(requests):
        raise CaptureError(f"requests={list(requests)!r} gives a name twice; give each sequence its own")
    chosen = frozenset(map(site_key, sites)) if sites is not None else None
    sink = _Sequences(pipeline, requests, chosen, tokens, (tag, Meta(model, spec_digest(runtime.spec))))
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
        sites: frozenset[SiteKey] | None,
        tokens: Chooses | Sequence[Chooses | None] | None,
        about: tuple[str, Meta],
    ) -> None:
        self._pipeline, self._given, self._sites, self._tokens = pipeline, requests, sites, tokens
        self._tag, self._meta = about
        self._open: list[str] = []
        self._seen: set[SiteKey] = set()
        self._step: Step | None = None
        self._number = 0
        self._names: tuple[str, ...] = ()
        self._values: dict[SiteKey, Tensor] = {}
        self._ids: Tensor | None = None

    def begin(self, step: Step, names: tuple[str, ...], number: int) -> None:
        self.flush()
        self._names = tuple(self._given) if self._given is not None else names
        for what, given in (("requests", self._given), ("tokens", self._tokens)):
            if isinstance(given, Sequence) and len(given) != step.batch:
                raise CaptureError(
                    f"{len(given)} {what} are given but the call has {step.batch} sequences; give one for each"
                )
        if step.phase == "prefill" and step.start == 0:
            self._end_all()
        for name, prompt in zip(self._names, step.prompts, strict=True):
            if name not in self._open:
                meta = Meta(self._meta.model, self._meta.spec, prompt)
                self._pipeline.begin(name, self._tag, meta)
                self._open.append(name)
        self._step, self._number = step, number

    def take(self, values: Mapping[SiteKey, Tensor], token_ids: Tensor | None, last: bool) -> None:
        own = {site: value for site, value in values.items() if self._sites is None or site in self._sites}
        self._values |= own
        self._ids = token_ids if token_ids is not None else self._ids
        if last:
            self.flush()

    def flush(self) -> None:
        """Submit what the graphs of the last call stored."""
        step, values, ids = self._step, self._values, self._ids
        self._step, self._values, self._ids = None, {}, None
        if step is None or not values:
            return
        self._seen |= set(values)
        rows, request, positions = self._chosen(step)
        keys = {f"layers.{layer}.{hook}": values[hook, layer] for hook, layer in values}
        of = StepRows(self._names, request, rows, self._number)
        if len(rows):
            self._pipeline.submit(of, positions, keys, ids.reshape(-1) if ids is not None else None)

    def _chosen(self, step: Step) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], Tensor]:
        """Numbers of the tokens that are kept, their requests, and the positions of all tokens."""
        kept = np.zeros((step.batch, step.length), np.bool_)
        positions = np.zeros((step.batch, step.length), np.int64)
        for b in range(step.batch):
            span, first = real_tokens(step, b)
            own = slice(span.start, span.stop)
            tokens = self._tokens[b] if isinstance(self._tokens, Sequence) else self._tokens
            kept[b, own] = True if tokens is None else tokens.mask(first, len(span), step.prompts[b])
            positions[b, own] = np.arange(first, first + len(span))
        request, _ = np.nonzero(kept)
        return np.flatnonzero(kept), request.astype(np.int32), torch.from_numpy(positions.reshape(-1))

    def check(self) -> None:
        """Raise `SiteNotFound` for a site that was asked for and never stored."""
        missing = sorted((self._sites or set()) - self._seen)
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

    def _end_all(self) -> None:
        for name in self._open:
            self._pipeline.end(name)
        self._open.clear()
