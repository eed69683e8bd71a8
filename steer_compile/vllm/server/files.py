"""Files that a server takes: vectors (safetensors and GGUF, no pickle) by upload or by a path under an allowed root,
autoencoders by a path alone."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from steer_compile.errors import CheckpointError
from steer_compile.sae.files import detect

MAX_FILE = 64 << 20
"""Most bytes of a file."""

_CUT = (ArithmeticError, AttributeError, LookupError, MemoryError, OSError, TypeError, ValueError)
"""What reading a file that is cut or made up may raise."""
_DIRECTION = re.compile(r"direction\.(\d{1,6})")


def read_vectors(data: bytes) -> dict[str, torch.Tensor]:
    """Vectors of a file's bytes, by ``layers.3.post_block``.

    A GGUF file is a control vector of llama.cpp: its ``direction.3`` is added to what layer 3 hands on.

    Raises:
        CheckpointError: neither format, or a tensor of another name.
    """
    if data[:4] == b"GGUF":
        return _read_gguf(data)
    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        text = f"the file is neither safetensors ({error}) nor GGUF; give tensors named layers.3.post_block"
        raise CheckpointError(text) from error


def _read_gguf(data: bytes) -> dict[str, torch.Tensor]:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise CheckpointError("the file is GGUF, and the package gguf is not installed; install it") from error
    with tempfile.NamedTemporaryFile(suffix=".gguf") as file:
        file.write(data)
        file.flush()
        try:
            tensors = {t.name: torch.from_numpy(t.data.copy()) for t in GGUFReader(file.name).tensors}
        except _CUT as error:  # the reader has no error of its own
            raise CheckpointError(f"the GGUF file cannot be read ({error}); give a control vector") from error
    found = {}
    for name, tensor in tensors.items():
        match = _DIRECTION.fullmatch(name)
        if match is None or not tensor.is_floating_point():
            raise CheckpointError(
                f"the GGUF file has the tensor {name!r} of {tensor.dtype}; give direction.N of floats"
            )
        found[f"layers.{match[1]}.post_block"] = tensor
    return found


def _under(root: str, path: str) -> tuple[Path, bool]:
    """Where a path under a root leads, links followed, and whether something is there.

    Raises:
        CheckpointError: outside of the root.
    """
    base = Path(root).resolve()
    try:
        found = (base / path).resolve()
        inside = found.is_relative_to(base)
        there = inside and found.exists()
    except (OSError, ValueError, RuntimeError) as error:  # names with null bytes, too long, links in circles
        raise CheckpointError(f"the path is none of a file ({error}); give one under the server's root") from error
    if not inside:
        raise CheckpointError(f"the path {path!r} leads out of the server's root; give one under it")
    return found, there


def _absent(path: str) -> FileNotFoundError:
    return FileNotFoundError(f"no file {path!r} under the server's root; list what is there on the server")


def file_under(root: str, path: str) -> Path:
    """A vector file at a path under a root, links followed.

    Raises:
        CheckpointError: outside of the root, of another kind, too large. FileNotFoundError: not there.
    """
    found, there = _under(root, path)
    if found.suffix not in (".safetensors", ".gguf"):
        raise CheckpointError(f"the path {path!r} is of no vector file; give .safetensors or .gguf")
    if not (there and found.is_file()):
        raise _absent(path)
    if found.stat().st_size > MAX_FILE:
        raise CheckpointError(f"{path!r} has {found.stat().st_size} bytes, and {MAX_FILE} are the most")
    return found


def autoencoder_under(root: str, path: str) -> Path:
    """The folder or file of an autoencoder at a path under a root, with all that is read of it there too.

    Raises:
        CheckpointError: it, its folder, or a link in that leads out of the root. FileNotFoundError: not there.
            SAEError: no layout of autoencoders.
    """
    (found, there), base = _under(root, path), Path(root).resolve()
    if not there:
        raise _absent(path)
    _, file, folder = detect(found)
    read = (folder, file, *folder.glob("*"), *folder.glob("*/*"))  # layouts have their files no deeper
    out = next((item for item in read if not _is_under(item, base)), None)
    if out is not None:
        raise CheckpointError(
            f"beside the files at {path!r} is {out.name!r}, which leads out of the server's root; copy it under the "
            "root, or take it away"
        )
    return found


def _is_under(item: Path, base: Path) -> bool:
    try:
        return item.resolve().is_relative_to(base)
    except (OSError, RuntimeError):  # links in a circle
        return False
