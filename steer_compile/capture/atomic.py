"""Files that appear whole or not at all, under names that nobody else has."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from steer_compile.errors import CaptureError

_PREFIX, _ENDING = ".steer-compile-", ".part"
_OWN = re.compile(re.escape(_PREFIX) + r"[0-9a-f]{32}" + re.escape(_ENDING))
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_TRIES = 16


class Temporary:
    """A file under a temporary name in the folder where it is to appear, locked as long as its process lives.

    Attributes:
        fd: the open file.
        size: bytes written so far.
    """

    def __init__(self, folder: Path) -> None:
        self.size = 0
        for _ in range(_TRIES):
            self._path = folder / f"{_PREFIX}{uuid.uuid4().hex}{_ENDING}"
            self.fd = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o644)
            if _locked(self.fd) is not False and os.fstat(self.fd).st_nlink:
                return
            os.close(self.fd)  # a sweep of another process was faster
        raise CaptureError(f"no temporary file could be locked in {folder}; see whether its file system works")

    def write(self, *parts: Any) -> None:
        """Append bytes, all of them."""
        for part in parts:
            view = memoryview(part).cast("B")
            while view.nbytes:
                done = os.write(self.fd, view)
                self.size += done
                view = view[done:]

    def write_at(self, offset: int, data: bytes) -> None:
        """Write bytes at a place that was left free."""
        view = memoryview(data)
        while view.nbytes:
            done = os.pwrite(self.fd, view, offset)
            offset, view = offset + done, view[done:]

    def skip(self, size: int) -> None:
        """Leave bytes free, for `write_at`."""
        os.lseek(self.fd, size, os.SEEK_CUR)
        self.size += size

    def sync(self) -> None:
        """Make what was written durable."""
        os.fsync(self.fd)

    def publish(self, final: Path, replace: bool) -> None:
        """Make the file durable and give it its name, with all of its content or not at all; then close it.

        Raises:
            FileExistsError: the name is taken, and ``replace`` is not set; the file stays open for another name.
        """
        self.sync()
        if replace:
            os.replace(self._path, final)
        else:
            _rename_fresh(self._path, final)
        os.close(self.fd)
        self.fd = -1
        try:
            sync_folder(final.parent)
        except OSError:
            final.unlink(missing_ok=True)
            raise

    def discard(self) -> None:
        """Remove the file, unless it was published."""
        if self.fd >= 0:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            os.close(self.fd)
            self.fd = -1


def _locked(fd: int) -> bool | None:
    """Lock a file; False where another holds the lock, None where the file system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOTSUP, errno.ENOSYS, errno.EINVAL, errno.ENOLCK):
            return None
        raise
    return True


def _rename_fresh(path: Path, final: Path) -> None:
    """Rename, but never onto another file."""
    try:
        os.link(path, final)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if final.exists():  # a file system without links: two processes must not share names there
            raise FileExistsError(errno.EEXIST, "the name is taken", str(final)) from error
        os.replace(path, final)
        return
    os.unlink(path)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def made_folder(folder: Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        CaptureError: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except OSError as error:
        raise CaptureError(f"no folder {folder} can be made ({error}); give a root that can be written") from error
    if not writable:
        raise CaptureError(f"nothing can be written in {folder}; give a root that can be written")
    return folder


def sweep(root: Path) -> int:
    """Remove what processes that were killed left under a root: temporary files that nobody holds.

    Files of running processes are locked, and files of other names are left alone.

    Returns:
        Number of removed files.
    """
    removed = 0
    for folder, _, names in os.walk(root):
        for name in filter(_OWN.fullmatch, names):
            path = os.path.join(folder, name)
            try:
                fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError:
                continue  # it was published or removed meanwhile
            try:
                if _locked(fd):
                    os.unlink(path)
                    removed += 1
            except FileNotFoundError:
                pass
            finally:
                os.close(fd)
    return removed


def publish(data: Temporary, folder: Path, names: Iterable[str], policy: str, ending: str) -> Path:
    """Publish a file that stands alone under the first of the stems that is free, or in place of the former file.

    Raises:
        CaptureError: every name is taken. OSError: the disk is full or fails; nothing is published then.
    """
    tried = ""
    for tried in names:
        final = folder / f"{tried}{ending}"
        try:
            data.publish(final, replace=policy == "replace")
        except FileExistsError:
            continue
        return final
    raise _taken(folder / f"{tried}{ending}")


def _taken(path: Path) -> CaptureError:
    return CaptureError(
        f"{path} is there already; take another name, remove it, or give collisions='suffix' or 'replace'"
    )


def publish_pair(
    data: Temporary, folder: Path, names: Iterable[str], info: Mapping[str, Any], policy: str, ending: str
) -> Path:
    """Publish a file of data, then the JSON sidecar that names it; returns the path of the sidecar.

    The sidecar is what makes the pair: a reader begins with it, and data without one are not there. It is published
    last, and replaced in one go, while data that are in place are never written to.

    Args:
        names: stems to try.
        info: what the sidecar holds beside the name and size of the data.
        policy: one of `POLICIES`.

    Raises:
        CaptureError: every name is taken. OSError: the disk is full or fails; nothing is published then.
    """
    tried = ""
    for tried in names:
        side = folder / f"{tried}.json"
        former = _data_of(side) if policy == "replace" else None
        final = folder / (f"{tried}{ending}" if former is None else f"{tried}.{uuid.uuid4().hex[:8]}{ending}")
        if policy != "replace" and (side.exists() or final.exists()):
            continue
        text = Temporary(folder)
        try:
            text.write(json.dumps({"data": final.name, "bytes": data.size, **info}, separators=(",", ":")).encode())
            text.sync()  # before the data appear, so that a process is hardly ever killed between the two
            data.publish(final, replace=policy == "replace")
            _publish_or_undo(text, side, policy == "replace", final)
        except FileExistsError:
            if data.fd < 0:
                raise
            continue
        finally:
            text.discard()
        if former is not None and former != final:
            former.unlink(missing_ok=True)
        return side
    raise _taken(folder / f"{tried}{ending}")


def _publish_or_undo(text: Temporary, side: Path, replace: bool, final: Path) -> None:
    """Publish a sidecar; where that fails the data go as well."""
    try:
        text.publish(side, replace)
    except OSError:
        final.unlink(missing_ok=True)
        raise


def _data_of(side: Path) -> Path | None:
    """The data that a sidecar names, None where there is no readable one."""
    try:
        name = json.loads(side.read_text()).get("data", "")
    except (OSError, ValueError, AttributeError):
        return None
    own = isinstance(name, str) and os.path.basename(name) == name and name.startswith(f"{side.stem}.")
    return side.parent / name if own else None
