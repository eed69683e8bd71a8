"""Parquet through pyarrow: a part file that grows by row groups, and rows out of one."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from steer_compile.capture.atomic import Temporary, publish
from steer_compile.capture.block import Block, row_bytes
from steer_compile.capture.codec import DTYPES, dtype_name
from steer_compile.capture.copies import widened
from steer_compile.capture.parts import Part, Signature
from steer_compile.capture.rows import Rows
from steer_compile.errors import CaptureError

FORMAT, VERSION = "steer_compile.parquet", 1
LABEL_COLUMNS = ("request", "number", "tag", "position", "token_id", "step")
_STORED = {torch.bfloat16: torch.float32}
"""Dtypes that Arrow lacks and what holds them: every bfloat16 is a float32, so nothing is lost."""
_KEY = b"steer_compile"
_BUFFER = 1 << 20
_REQUESTS = b"steer_compile.requests"


class _Bytes(io.RawIOBase):
    """What pyarrow writes to. Where it is ``dead`` nothing is: a writer ends its file even when that is discarded."""

    def __init__(self, file: Temporary) -> None:
        self._file = file
        self.dead = False

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if not self.dead:
            self._file.write(data)
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self._file.size


def _field(key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> pa.Field:
    stored = _STORED.get(dtype, dtype)
    try:
        kind = pa.from_numpy_dtype(torch.empty(0, dtype=stored).numpy().dtype)
    except TypeError as error:
        raise CaptureError(f"{key} has dtype {dtype}, which parquet does not hold; use the files consumer") from error
    return pa.field(key, pa.list_(pa.field("element", kind, nullable=False), int(np.prod(shape, dtype=int))), False)


class ParquetPart(Part):
    """One file: label columns, and for each site a column of lists of a fixed size, a row group for each block.

    Args:
        names: stems for the file, to try one after the other.
        most: bytes of rows after which the part is full.
        group: bytes of rows of a row group.
    """

    def __init__(
        self, folder: Path, names: Iterable[str], tag: str, signature: Signature, policy: str, sizes: tuple[int, int],
        compression: str,
    ) -> None:  # fmt: skip
        self._folder, self._names, self._tag, self._policy = folder, names, tag, policy
        row, (most, group) = row_bytes(signature), sizes
        self._most, self._rows = max(1, most // row), 0
        self._block = Block(signature, max(1, min(group // row, self._most)))
        text = pa.dictionary(pa.int32(), pa.string())
        labels = {"request": text, "number": pa.int32(), "tag": text}
        labels |= {name: pa.int64() for name in ("position", "token_id", "step")}
        sites = {key: {"dtype": dtype_name(dtype, key), "row_shape": list(shape)} for key, dtype, shape in signature}
        about = json.dumps({"format": FORMAT, "version": VERSION, "sites": sites})
        fields = [pa.field(name, kind, False) for name, kind in labels.items()] + [_field(*s) for s in signature]
        self._schema = pa.schema(fields, metadata={_KEY: about.encode()})
        self._requests: dict[int, str] = {}
        self._file = Temporary(folder)
        self._bytes = _Bytes(self._file)
        self._buffer = io.BufferedWriter(self._bytes, _BUFFER)
        try:
            self._writer = pq.ParquetWriter(
                pa.PythonFile(self._buffer, mode="w"), self._schema, compression=compression,
                use_dictionary=["request", "tag"], write_statistics=list(LABEL_COLUMNS), store_schema=True,
            )  # fmt: skip
        except (OSError, ValueError, pa.ArrowException):
            self._bytes.dead = True
            self._file.discard()
            raise

    def append(self, rows: Rows, request: Tensor, first: int) -> int:
        stop = min(len(rows), first + self._most - self._rows)
        self._rows += stop - first
        for number, index in set(zip(request[first:stop].tolist(), rows.request[first:stop].tolist(), strict=True)):
            self._requests[number] = rows.requests[index]
        while first < stop:
            if self._block.full:
                self._write()
            first = self._block.take(rows, request, first, stop)
        return stop

    def _write(self) -> None:
        tensors = dict(self._block.tensors())
        number = tensors.pop("request").numpy()
        names = [self._requests.get(i, "") for i in range(max(self._requests) + 1)]
        count = len(number)
        columns: list[Any] = [
            pa.DictionaryArray.from_arrays(number, pa.array(names, pa.string())),
            pa.array(number),
            pa.DictionaryArray.from_arrays(np.zeros(count, np.int32), pa.array([self._tag], pa.string())),
        ]
        columns += [pa.array(tensors.pop(name).numpy()) for name in ("positions", "token_ids", "steps")]
        for field in list(self._schema)[len(columns) :]:
            flat = widened(tensors[field.name]).reshape(-1)
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(flat), type=field.type))
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema), row_group_size=count)
        self._block.clear()

    def seal(self, requests: Sequence[Mapping[str, Any]]) -> str:
        if self._block.filled:
            self._write()
        self._writer.add_key_value_metadata({_REQUESTS: json.dumps(list(requests)).encode()})
        try:
            self._writer.close()
            self._buffer.flush()
            return str(publish(self._file, self._folder, self._names, self._policy, ".parquet"))
        finally:
            self.discard()

    def discard(self) -> None:
        self._bytes.dead = True
        self._writer.close()
        self._file.discard()


def parquet_sites(path: Path) -> list[str]:
    """Sites of one part file.

    Raises:
        CaptureError: the file is missing, damaged, or none that the consumer wrote.
    """
    try:
        return list(json.loads(pq.read_schema(path).metadata[_KEY])["sites"])
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> CaptureError:
    return CaptureError(f"{path} cannot be read as captured rows ({error}); give a file of the parquet consumer")


def read_parquet(path: Path, keys: Sequence[str] | None = None) -> tuple[Rows, list[dict[str, Any]]]:
    """Rows of one part file, and what it says of its requests.

    Raises:
        CaptureError: the file is missing, damaged, or none that the consumer wrote.
    """
    try:
        file = pq.ParquetFile(path)
        about = json.loads(file.schema_arrow.metadata[_KEY])
        infos = json.loads(file.metadata.metadata[_REQUESTS])
        sites = {key: about["sites"][key] for key in (about["sites"] if keys is None else keys)}
        table = file.read(columns=["number", "position", "token_id", "step", *sites])
    except (OSError, KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    number, positions, ids, steps = (_numbers(table[name]) for name in ("number", "position", "token_id", "step"))
    values = {}
    for key, site in sites.items():
        flat = _numbers(table[key].combine_chunks().flatten()).to(DTYPES[site["dtype"]])
        values[key] = flat.view(len(table), *site["row_shape"])
    return Rows(tuple(info["request"] for info in infos), number, positions, ids, steps, values), infos


def _numbers(column: Any) -> Tensor:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return torch.from_numpy(np.array(array.to_numpy(zero_copy_only=False)))
