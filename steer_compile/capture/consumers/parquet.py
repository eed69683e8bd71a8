"""``parquet``: an Arrow dataset, one folder of part files."""

from __future__ import annotations

from pathlib import Path

from steer_compile.capture.atomic import made_folder, sweep
from steer_compile.capture.names import Numbers, checked_policy, slug
from steer_compile.capture.parts import Part, Parts, Signature
from steer_compile.errors import CaptureError


class ParquetConsumer(Parts):
    """Writes ``<tag>-00000.parquet`` and so on below a folder; a file appears when it is sealed.

    Args:
        root: the folder; made where it is missing. Temporary files that killed processes left there are removed.
        part_bytes: bytes of rows after which a file is sealed.
        group_bytes: bytes of rows of a row group, which is what is held in memory for each open file.
        collisions: where a name is taken: ``error``, ``suffix`` (the next number) or ``replace``.
        compression: a codec of parquet, such as ``zstd`` or ``none``.
        rank: of the process, where several write the same requests; it is part of the names unless it is 0.

    Raises:
        CaptureError: pyarrow is missing, an unknown policy, sizes below one, or a root that cannot be written.
    """

    def __init__(
        self,
        root: str | Path,
        part_bytes: int = 256 << 20,
        group_bytes: int = 16 << 20,
        collisions: str = "suffix",
        compression: str = "zstd",
        rank: int = 0,
    ) -> None:
        super().__init__(self._part)
        try:
            from steer_compile.capture.arrow import ParquetPart
        except ImportError as error:
            raise CaptureError(
                f"parquet needs pyarrow ({error}); install steer-compile[capture], or use the files consumer"
            ) from error
        if min(part_bytes, group_bytes) < 1:
            raise CaptureError(f"part_bytes={part_bytes} and group_bytes={group_bytes} are sizes; give numbers above 0")
        self._made = ParquetPart
        self._collisions = checked_policy(collisions)
        self._sizes, self._compression, self._rank = (part_bytes, group_bytes), compression, rank
        self._root = made_folder(Path(root))
        self._numbers = Numbers(collisions)
        sweep(self._root)

    def _part(self, tag: str, signature: Signature) -> Part:
        stem = slug(tag) if tag else "rows"
        stem = f"{stem}-r{self._rank}" if self._rank else stem
        names = self._numbers.of(stem, lambda: 0)
        return self._made(self._root, names, tag, signature, self._collisions, self._sizes, self._compression)
