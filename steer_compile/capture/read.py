"""Files that consumers wrote, back as `Rows`: one, or those of a folder, with the parts of several ranks beside."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from steer_compile.capture.codec import DTYPES, Mapped
from steer_compile.capture.names import in_order
from steer_compile.capture.packed import FORMAT, VERSION
from steer_compile.capture.rows import Rows, joined
from steer_compile.errors import CaptureError

Source: TypeAlias = "str | Path | Sequence[str | Path]"
_TRIES = 20


@dataclass(frozen=True)
class RequestInfo:
    """What files say of a request.

    Attributes:
        rows: how many rows the files hold.
        ended: it had ended when the last of them was sealed.
        dropped: rows that never reached the consumer.
        model, spec, prompt_length: as in `Meta`.
    """

    request: str
    tag: str = ""
    model: str = ""
    spec: str = ""
    prompt_length: int = 0
    rows: int = 0
    ended: bool = False
    dropped: int = 0

    @property
    def complete(self) -> bool:
        return self.ended and not self.dropped

    @classmethod
    def of_json(cls, data: Mapping[str, Any]) -> RequestInfo:
        """One of the ``requests`` of a sidecar; keys of later versions are left out."""
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        return cls(**known)


@dataclass(frozen=True)
class Captured:
    """Rows, and what is known of each request by name."""

    rows: Rows
    requests: Mapping[str, RequestInfo]


@dataclass(frozen=True)
class Sidecar:
    """A safetensors file and what its sidecar says of it.

    Attributes:
        path: the data.
        prefixes: what names of the tensors of each block begin with.
        counts: rows of each block.
        sites: dtype and row shape of each site.
    """

    path: Path
    prefixes: tuple[str, ...]
    counts: tuple[int, ...]
    sites: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    requests: tuple[RequestInfo, ...]

    @classmethod
    def read(cls, path: Path) -> Sidecar:
        """Raises `CaptureError` for a sidecar that is missing, damaged, or names data that are not there."""
        return cls.open(path)[0]

    @classmethod
    def open(cls, path: Path) -> tuple[Sidecar, Mapped]:
        """A sidecar and the data that it names, also while another process replaces both.

        Raises:
            CaptureError: one of them is missing or damaged.
        """
        found = cls._read(path)
        for _ in range(_TRIES):
            try:
                return found, Mapped(found.path)
            except CaptureError:
                now = cls._read(path)
                if now.path == found.path:  # it was not replaced meanwhile
                    if not found.path.exists():
                        break
                    raise
                found = now
        raise CaptureError(f"{path} names {found.path.name}, which is not there; capture again")

    @classmethod
    def _read(cls, path: Path) -> Sidecar:
        try:
            data = json.loads(path.read_text())
            if (data["format"], data["version"]) != (FORMAT, VERSION):
                raise CaptureError(f"{path} is {data['format']} {data['version']}, not {FORMAT} {VERSION}")
            name, packed = data["data"], data["layout"] != "per_file"
            counts = tuple(map(int, data["blocks"])) if packed else (int(data["rows"]),)
            sites = {k: (DTYPES[v["dtype"]], tuple(map(int, v["row_shape"]))) for k, v in data["sites"].items()}
            requests = tuple(RequestInfo.of_json(info) for info in data["requests"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, CaptureError):
                raise
            raise CaptureError(f"{path} is no readable sidecar ({error}); give the .json of captured rows") from error
        if os.path.basename(name) != name:
            raise CaptureError(f"{path} names data outside of its folder ({name!r}); it was not written by a consumer")
        prefixes = tuple(f"b{i}." for i in range(len(counts))) if packed else ("",)
        return cls(path.parent / name, prefixes, counts, sites, requests)

    def rows(self, keys: Iterable[str] | None = None, file: Mapped | None = None) -> Rows:
        """The rows, with all values or some, from the data that are mapped already where they are given."""
        file = file or Mapped(self.path)
        names = tuple(self.sites) if keys is None else tuple(keys)
        positions, ids, steps = (self._joint(file, name) for name in ("positions", "token_ids", "steps"))
        one = self.prefixes == ("",)
        request = torch.zeros(sum(self.counts), dtype=torch.int32) if one else self._joint(file, "request")
        values = {name: self._joint(file, name) for name in names}
        return Rows(tuple(info.request for info in self.requests), request, positions, ids, steps, values)

    def _joint(self, file: Mapped, name: str) -> Tensor:
        return torch.cat([file.tensor(f"{prefix}{name}") for prefix in self.prefixes])


def published(source: Source) -> list[Path]:
    """Sidecars and parquet files of a source, in the order of their names: files themselves, or all below a folder.

    A file of data stands for its sidecar, unless its name was changed by ``collisions="replace"``.

    Raises:
        CaptureError: there is nothing of the name, or nothing that was captured below it.
    """
    found: list[Path] = []
    for item in [source] if isinstance(source, str | Path) else source:
        path = Path(item)
        if path.is_dir():
            below = [p for ending in ("json", "parquet") for p in path.rglob(f"*.{ending}")]
            found += sorted((p for p in below if p.suffix == ".parquet" or _is_sidecar(p)), key=in_order)
        else:
            found.append(path.with_suffix(".json") if path.suffix == ".safetensors" else path)
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        raise CaptureError(f"no captured rows at {missing[0] if missing else source}; give a file or a folder of them")
    return found


def _is_sidecar(path: Path) -> bool:
    with path.open("rb") as file:
        return FORMAT.encode() in file.read(4096)


def read(
    source: Source, keys: Sequence[str] | None = None, request: str | None = None, tag: str | None = None
) -> Captured:
    """Rows of files, requests of one name as one request, in the order in which they were computed.

    Files that hold other sites of the same rows, as several ranks write them, are put together.

    Args:
        source: a sidecar, a file of data, a parquet file, a folder, or several of these.
        keys: the values to read, all where it is None.
        request, tag: the requests to read, all where they are None.

    Raises:
        CaptureError: nothing there, a damaged file, no such key or request, or ranks whose rows differ.
    """
    parts: list[Rows] = []
    infos: dict[tuple[str, tuple[str, ...]], RequestInfo] = {}
    have: set[str] = set()
    for path in published(source):
        rows, requests = _load(path, keys, have)
        wanted = [request in (None, info.request) and tag in (None, info.tag) for info in requests]
        if not any(wanted) or not rows.values:
            continue
        parts.append(rows if all(wanted) else _some(rows, wanted))
        for info, is_wanted in zip(requests, wanted, strict=True):
            if is_wanted:
                key = (info.request, tuple(sorted(rows.values)))
                infos[key] = _later(infos[key], info) if key in infos else info
    missing = sorted(set(keys or ()) - have)
    if missing:
        raise CaptureError(f"no file holds {missing[0]}; there are {', '.join(sorted(have))}")
    if not parts:
        raise CaptureError(f"no captured rows of request {request!r} and tag {tag!r} are there; give None for any")
    by_name: dict[str, RequestInfo] = {}
    for (name, _), info in infos.items():
        by_name.setdefault(name, info)
    return Captured(merged(parts), by_name)


def _load(path: Path, keys: Sequence[str] | None, have: set[str]) -> tuple[Rows, Sequence[RequestInfo]]:
    """Rows of one file, those of its values that are asked for; and in ``have`` all that it holds."""
    if path.suffix == ".parquet":
        try:
            from steer_compile.capture.arrow import parquet_sites, read_parquet
        except ImportError as error:
            raise CaptureError(f"{path} needs pyarrow ({error}); install steer-compile[capture]") from error
        sites = parquet_sites(path)
        have |= set(sites)
        rows, data = read_parquet(path, [site for site in sites if keys is None or site in keys])
        return rows, [RequestInfo.of_json(info) for info in data]
    side, file = Sidecar.open(path)
    have |= set(side.sites)
    return side.rows((site for site in side.sites if keys is None or site in keys), file), side.requests


def _some(rows: Rows, wanted: Sequence[bool]) -> Rows:
    """The rows of some requests; others are named no more."""
    kept = torch.tensor(wanted)
    part = rows.take(kept[rows.request.long()])
    number = (torch.cumsum(kept, 0) - 1).to(torch.int32)
    names = tuple(name for name, is_wanted in zip(rows.requests, wanted, strict=True) if is_wanted)
    request = number[part.request.long()]
    return Rows(names, request, part.positions, part.token_ids, part.steps, part.values)


def _later(former: RequestInfo, info: RequestInfo) -> RequestInfo:
    """What two shards say together of a request."""
    last = info if info.ended or not former.ended else former
    return replace(last, rows=former.rows + info.rows, dropped=max(former.dropped, info.dropped))


def merged(parts: Sequence[Rows]) -> Rows:
    """Parts with the same values one behind the other, and those with others side by side.

    Where a token id is -1 in a part, as no host there knew it, another part's stands.

    Raises:
        CaptureError: parts that share some values and not all, or whose requests, positions, steps or token ids differ.
    """
    kinds: dict[tuple[str, ...], list[Rows]] = {}
    for part in parts:
        kinds.setdefault(tuple(sorted(part.values)), []).append(part)
    groups = [joined(each) for each in kinds.values()]
    whole = groups[0]
    for other in groups[1:]:
        shared = sorted(set(whole.values) & set(other.values))
        if shared:
            raise CaptureError(
                f"files hold {shared[0]} together with other sites, and apart from them; read them with keys=[...]"
            )
        whole = _beside(whole, other)
    return whole


def _beside(one: Rows, other: Rows) -> Rows:
    """The same rows, with the values of both."""
    if set(one.requests) != set(other.requests):
        odd = sorted(set(one.requests) ^ set(other.requests))
        raise CaptureError(f"request {odd[0]!r} is in the files of some ranks alone; read it apart, with request=...")
    parts = []
    for name in one.requests:
        a, b = one.of(name), other.of(name)
        known = (a.token_ids >= 0) & (b.token_ids >= 0) if len(a) == len(b) else a.token_ids
        if not (
            len(a) == len(b)
            and torch.equal(a.positions, b.positions)
            and torch.equal(a.steps, b.steps)
            and torch.equal(a.token_ids[known], b.token_ids[known])
        ):
            raise CaptureError(
                f"request {name!r} has other rows in {min(b.values)} ({len(b)}) than in {min(a.values)} ({len(a)}); "
                "files of ranks belong together only where they captured the same tokens"
            )
        ids = torch.maximum(a.token_ids, b.token_ids)
        parts.append(Rows(a.requests, a.request, a.positions, ids, a.steps, {**a.values, **b.values}))
    return joined(parts)
