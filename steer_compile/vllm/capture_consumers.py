"""Consumers of captured rows in an engine: which ones its operator named, and how rows of requests reach them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from steer_compile.capture.consumer import Meta, make_consumer
from steer_compile.capture.pipeline import Pipeline, StepRows
from steer_compile.dynamic.codec import fields_of, plain_text_of, text_of
from steer_compile.errors import SpecError, UnknownName
from steer_compile.vllm.captures import Kept, joined

MOST_CONSUMERS, MOST_REFUSED = 16, 1024
"""Most consumers of an engine, and most requests whose refusals are remembered."""
_LABELS = ("positions", "token_ids", "steps")


@dataclass(frozen=True)
class ConsumerSpec:
    """A consumer by the name under which requests ask for it: what makes it, and its options as JSON text."""

    name: str
    consumer: str
    options: str = "{}"

    def to_data(self) -> dict[str, Any]:
        return {"consumer": self.consumer, "options": json.loads(self.options)}


def consumer_specs(given: object) -> tuple[ConsumerSpec, ...]:
    """Consumers of ``{name: {"consumer": "parquet", "options": {...}}}``; nothing is loaded.

    Raises:
        SpecError: data of another form.
    """
    if not isinstance(given, Mapping) or len(given) > MOST_CONSUMERS:
        raise SpecError(
            f"consumers are {len(given) if isinstance(given, Mapping) else type(given).__name__}; give "
            f"{{name: {{'consumer': 'parquet', 'options': {{...}}}}}}, {MOST_CONSUMERS} at most"
        )
    found = []
    for name, item in sorted(given.items()):
        what = f"the consumer {text_of('the name of a consumer', name)!r}"
        data = fields_of(what, item, ("consumer", "options"), ("consumer",))
        options = plain_text_of(f"the options of {what}", data.get("options", {}))
        found.append(ConsumerSpec(name, text_of(f"what makes {what}", data["consumer"]), options))
    return tuple(found)


class Consumers:
    """The consumers of one process, each behind a pipeline of its own, so that a slow one holds no other up.

    Args:
        about: digests of model and spec, for the files.
        stage: of a pipeline of several, which consumers that merge files know as their ``rank``; None: of none.

    Raises:
        SpecError, UnknownName, CaptureError: a consumer that cannot be made.
    """

    def __init__(self, specs: Iterable[ConsumerSpec], about: Meta = Meta(), stage: int | None = None) -> None:  # noqa: B008
        rank = {} if stage is None else {"rank": stage}
        self._about = about
        self.stage = stage
        self._refused: dict[str, str] = {}
        self._pipelines = {
            spec.name: Pipeline({spec.name: make_consumer(spec.consumer, **{**json.loads(spec.options), **rank})})
            for spec in specs
        }

    def put(self, kept: Kept) -> None:
        """Hand the rows of a request over that has ended; waits while the consumer has more than its pipeline holds.

        What goes wrong on the way is the request's result.

        Raises:
            CaptureError: the pipeline is closed, or too many requests have no result yet.
        """
        pipeline, name = self._pipelines[kept.asked.to], kept.asked.name
        pipeline.begin(name, kept.asked.tag, Meta(self._about.model, self._about.spec, kept.prompt))
        try:
            self._submit(pipeline, kept)
        except (ValueError, RuntimeError, MemoryError) as error:
            pipeline.abort(name, f"{type(error).__name__}: {error}")
            return
        pipeline.end(name, kept.dropped)

    def _submit(self, pipeline: Pipeline, kept: Kept) -> None:
        found, name = dict(joined(kept)), kept.asked.name
        positions, ids, steps = (found.pop(label) for label in _LABELS)
        counted = found.pop("tokens", None)  # of a mean, which has one row
        if counted is not None:
            found |= {f"{key}.tokens": counted for key in list(found)}
        first = 0
        runs, counts = torch.unique_consecutive(steps, return_counts=True)
        for step, count in zip(runs.tolist(), counts.tolist(), strict=True):
            rows = np.arange(first, first + count, dtype=np.int64)
            pipeline.submit(StepRows((name,), np.zeros(count, np.int32), rows, step), positions, found, ids)
            first += count

    def refused(self, kept: Kept, error: Exception) -> None:
        """Remember why a request's rows were not taken; of the last ones only."""
        self._refused[kept.asked.name] = f"{type(error).__name__}: {error}"
        while len(self._refused) > MOST_REFUSED:
            del self._refused[next(iter(self._refused))]

    def results(self, consumer: str, name: str) -> dict[str, str]:
        """``status``, ``text`` and ``place`` of a request's rows in a consumer; a pending one is asked to publish.

        Raises:
            UnknownName: no such consumer.
        """
        pipeline = self._pipelines.get(consumer)
        if pipeline is None:
            raise UnknownName(f"no consumer {consumer!r}; this engine has {', '.join(self._pipelines) or 'none'}")
        if name in self._refused:
            return {"status": "error", "text": self._refused[name], "place": ""}
        try:
            result = pipeline.results(name)[consumer]
        except UnknownName:
            return {"status": "pending", "text": "the request has not ended, or its rows are on their way", "place": ""}
        if result.status == "pending":
            pipeline.flush()
        return {"status": result.status, "text": result.text, "place": result.place}

    def status(self) -> dict[str, Any]:
        """Counters of each pipeline."""
        return {name: pipeline.status() for name, pipeline in self._pipelines.items()}

    def close(self) -> None:
        """Deliver what is there, within a bounded time."""
        for pipeline in self._pipelines.values():
            pipeline.close()
