"""`ActivationStore`: rows of whole prompts by what they were computed from, so that no prompt runs twice."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steer_compile.capture.rows import Rows
from steer_compile.errors import CaptureError


@dataclass(frozen=True)
class Source:
    """What a prompt's rows depend on beside its tokens.

    Attributes:
        model: digest of the weights.
        steering: digest of the spec and of all that steers prompts; "" for nothing.
    """

    model: str
    steering: str = ""


def prompt_key(token_ids: Sequence[int], source: Source) -> str:
    """SHA-256 of a prompt's tokens and of what its rows depend on."""
    digest = hashlib.sha256()
    for text in (source.model, source.steering):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    digest.update(np.asarray(token_ids, "<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Counters:
    """Numbers of a store: prompts found, not found and evicted, those that are there, and their bytes."""

    hits: int
    misses: int
    evicted: int
    prompts: int
    nbytes: int


class ActivationStore:
    """Rows of prompts within a budget; those used longest ago go first. Thread-safe.

    Rows are handed out as they are, not copied: write to none.

    Args:
        max_bytes: most bytes of rows, labels included.

    Raises:
        CaptureError: ``max_bytes`` below one.
    """

    def __init__(self, max_bytes: int) -> None:
        if max_bytes < 1:
            raise CaptureError(f"max_bytes={max_bytes} is no size; give a number above 0")
        self._most = max_bytes
        self._lock = threading.Lock()
        self._all: OrderedDict[str, tuple[Source, Rows]] = OrderedDict()
        self._used = self._hits = self._misses = self._evicted = 0

    @property
    def counters(self) -> Counters:
        with self._lock:
            return Counters(self._hits, self._misses, self._evicted, len(self._all), self._used)

    def get(self, token_ids: Sequence[int], source: Source, keys: Iterable[str]) -> Rows | None:
        """Rows of all tokens of a prompt with the values that are asked for, or None where one of them is missing."""
        wanted = tuple(keys)
        key = prompt_key(token_ids, source)
        with self._lock:
            _, rows = self._all.get(key, (source, None))
            if rows is None or not set(wanted) <= set(rows.values):
                self._misses += 1
                return None
            self._hits += 1
            self._all.move_to_end(key)
        values = {name: rows.values[name] for name in wanted}
        return Rows(rows.requests, rows.request, rows.positions, rows.token_ids, rows.steps, values)

    def put(self, token_ids: Sequence[int], source: Source, rows: Rows) -> bool:
        """Keep the rows of a prompt beside those of other sites that are there; False where they exceed the budget.

        Raises:
            CaptureError: they are not the rows of each token of the prompt, once each and in order.
        """
        ids = torch.tensor(list(token_ids), dtype=torch.int64)
        whole = torch.equal(rows.positions, torch.arange(len(ids)))
        if not whole or not bool(((rows.token_ids == ids) | (rows.token_ids == -1)).all()):
            raise CaptureError(
                f"{len(rows)} rows are not those of a prompt of {len(ids)} tokens; give each of its positions once, "
                "as Rows.latest_per_position does"
            )
        key = prompt_key(token_ids, source)
        with self._lock:
            former = self._drop(key)
            values = {**former.values, **rows.values} if former is not None else dict(rows.values)
            kept = Rows(rows.requests, rows.request, rows.positions, ids, rows.steps, values)
            if kept.nbytes > self._most:
                return False
            while self._used + kept.nbytes > self._most:
                self._drop(next(iter(self._all)))
                self._evicted += 1
            self._all[key] = (source, kept)
            self._used += kept.nbytes
            return True

    def _drop(self, key: str) -> Rows | None:
        _, rows = self._all.pop(key, (None, None))
        self._used -= rows.nbytes if rows is not None else 0
        return rows

    def invalidate(self, model: str | None = None, steering: str | None = None) -> int:
        """Forget what was computed with a model or steering, or all where neither is given; returns how many."""
        with self._lock:
            gone = [
                key
                for key, (source, _) in self._all.items()
                if model in (None, source.model) and steering in (None, source.steering)
            ]
            for key in gone:
                self._drop(key)
            return len(gone)


def captured_prompts(
    store: ActivationStore,
    source: Source,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    run: Callable[[list[Sequence[int]]], Sequence[Rows]],
) -> list[Rows]:
    """Rows of prompts, of which only those run that the store does not hold, each once.

    Args:
        keys: the values that are wanted.
        run: captures prompts, and returns the rows of each, with these values at least. It is not called for none.

    Raises:
        CaptureError: ``run`` returns rows of another number of prompts, or not all that was asked for.
    """
    found: dict[str, Rows] = {}
    missing: dict[str, Sequence[int]] = {}
    for prompt in prompts:
        key = prompt_key(prompt, source)
        if key in found or key in missing:
            continue
        rows = store.get(prompt, source, keys)
        if rows is None:
            missing[key] = prompt
        else:
            found[key] = rows
    made = list(run(list(missing.values()))) if missing else []
    if len(made) != len(missing):
        raise CaptureError(f"run returned rows of {len(made)} prompts for {len(missing)}; return them for each")
    for (key, prompt), rows in zip(missing.items(), made, strict=True):
        lacking = sorted(set(keys) - set(rows.values))
        if lacking:
            raise CaptureError(f"run captured {', '.join(rows.values)}, but not {lacking[0]}; capture it as well")
        store.put(prompt, source, rows)
        found[key] = Rows(
            rows.requests, rows.request, rows.positions, rows.token_ids, rows.steps, {k: rows.values[k] for k in keys}
        )
    return [found[prompt_key(prompt, source)] for prompt in prompts]
