"""Build the two corpora of the demo language model: scripture and Python source.

Scripture is the King James text of the Debian packages ``bible-kjv`` and ``bible-kjv-text`` (public domain), one
document a chapter.  Code is the standard library of the running Python (PSF licence), one document a file.  The
result is one ``.tar.xz`` with ``bible.txt``, ``python.txt`` and ``manifest.json`` (lengths, splits, digests), plus a
small JSON of held-out passages.  The same inputs and Python version always give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import sysconfig
import tarfile
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HELD_OUT_FRACTION = 0.02
BIBLE_LICENCE = "public domain (King James text of 1611), from the Debian package bible-kjv-text"
PYTHON_LICENCE = "Python Software Foundation License 2 (standard library of CPython)"
SKIPPED_PARTS = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "ensurepip", "data"}
BOOK_NAMES = (
    "Genesis Exodus Leviticus Numbers Deuteronomy Joshua Judges Ruth 1_Samuel 2_Samuel 1_Kings 2_Kings 1_Chronicles "
    "2_Chronicles Ezra Nehemiah Esther Job Psalms Proverbs Ecclesiastes Song_of_Solomon Isaiah Jeremiah Lamentations "
    "Ezekiel Daniel Hosea Joel Amos Obadiah Jonah Micah Nahum Habakkuk Zephaniah Haggai Zechariah Malachi Matthew "
    "Mark Luke John Acts Romans 1_Corinthians 2_Corinthians Galatians Ephesians Philippians Colossians "
    "1_Thessalonians 2_Thessalonians 1_Timothy 2_Timothy Titus Philemon Hebrews James 1_Peter 2_Peter 1_John 2_John "
    "3_John Jude Revelation"
)
BOOKS = BOOK_NAMES.split()


class Document(NamedTuple):
    """One chapter or source file."""

    name: str
    text: bytes


def digest(data: bytes) -> str:
    """Hex sha256 of ``data``."""
    return hashlib.sha256(data).hexdigest()


def print_bible(work: Path) -> str:
    """The whole King James text, one ``Ge1:1 In the beginning ...`` line a verse, printed by the tool ``bible``."""
    span = "gen1:1-rev22:21"
    tool = shutil.which("bible")
    if tool is not None:
        return subprocess.run([tool, "-f", span], check=True, capture_output=True, text=True).stdout
    subprocess.run(["apt-get", "download", "bible-kjv", "bible-kjv-text"], cwd=work, check=True, capture_output=True)
    for package in sorted(work.glob("*.deb")):
        subprocess.run(["dpkg", "-x", str(package), str(work / "root")], check=True)
    command = [str(work / "root/usr/bin/bible"), "-p", str(work / "root/usr/lib"), "-f", span]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def bible_documents(printed: str) -> list[Document]:
    """Chapters as ``Genesis 1``, a blank line, then one verse a line without its number."""
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in printed.splitlines():
        match = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.*)", line)
        if match is None:
            raise ValueError(f"not a verse: {line[:80]!r}")
        chapters.setdefault((match[1], match[2]), []).append(" ".join(match[3].split()))
    short = list(dict.fromkeys(book for book, _ in chapters))
    if len(short) != len(BOOKS):
        raise ValueError(f"{len(short)} books instead of {len(BOOKS)}")
    full = {key: name.replace("_", " ") for key, name in zip(short, BOOKS, strict=True)}
    return [
        Document(f"{full[book]} {chapter}", f"{full[book]} {chapter}\n\n{chr(10).join(verses)}\n".encode())
        for (book, chapter), verses in chapters.items()
    ]


def read_source(path: Path) -> bytes | None:
    """One source file with plain line ends, or None where it is tiny, huge, not UTF-8 or mostly not ASCII."""
    raw = path.read_bytes().replace(b"\r\n", b"\n")
    if not 200 <= len(raw) <= 400_000 or b"\0" in raw:
        return None
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    foreign = sum(byte >= 128 for byte in raw)
    return raw if foreign <= len(raw) // 200 else None


def python_documents(stdlib: Path, limit_bytes: int) -> list[Document]:
    """Standard-library files in path order: all but the tests, then tests in hash order up to ``limit_bytes``."""
    library: list[Document] = []
    tests: list[Document] = []
    for path in sorted(stdlib.rglob("*.py")):
        name = path.relative_to(stdlib)
        if SKIPPED_PARTS & set(name.parts):
            continue
        text = read_source(path)
        if text is not None:
            is_test = any(part in {"test", "tests", "idle_test"} for part in name.parts)
            (tests if is_test else library).append(Document(name.as_posix(), text))
    size = sum(len(document.text) for document in library)
    for document in sorted(tests, key=lambda one: digest(one.name.encode())):
        if size + len(document.text) <= limit_bytes:
            library.append(document)
            size += len(document.text)
    return sorted(library)


def held_out_names(documents: list[Document]) -> set[str]:
    """Names of the documents kept for evaluation: in hash order until 2 % of the bytes are reached."""
    goal = HELD_OUT_FRACTION * sum(len(document.text) for document in documents)
    chosen: set[str] = set()
    taken = 0
    for document in sorted(documents, key=lambda one: digest(b"held-out " + one.name.encode())):
        if taken >= goal:
            break
        if taken + len(document.text) <= 1.25 * goal:
            chosen.add(document.name)
            taken += len(document.text)
    return chosen


def corpus_entry(documents: list[Document], licence: str) -> tuple[bytes, dict[str, Any]]:
    """The joined text and its manifest entry (documents in order, each with its length in bytes and its split)."""
    held = held_out_names(documents)
    rows = [[one.name, len(one.text), "held" if one.name in held else "train"] for one in documents]
    text = b"".join(one.text for one in documents)
    sizes = {split: sum(int(row[1]) for row in rows if row[2] == split) for split in ("train", "held")}
    entry = {"licence": licence, "bytes": len(text), "sha256": digest(text), "split_bytes": sizes, "documents": rows}
    return text, entry


def passages(documents: list[Document], count: int, symbols: int) -> list[str]:
    """``count`` passages of whole lines, 100 to 200 bytes each, spread evenly over the documents.

    Each holds at least ``symbols`` characters of ``()[]{}=_``, which leaves docstrings and comments out of code.
    """
    found: list[str] = []
    for document in documents:
        lines = document.text.decode().splitlines()
        start = 2
        while start < len(lines):
            stop = start
            while stop < len(lines) and len("\n".join(lines[start : stop + 1]).encode()) <= 200:
                stop += 1
            text = "\n".join(lines[start:stop]).rstrip()
            marks = sum(text.count(one) for one in "()[]{}=_")
            if len(text.encode()) >= 100 and lines[start].strip() and marks >= symbols:
                found.append(text)
            start = max(stop, start + 1)
    distinct = list(dict.fromkeys(found))
    if len(distinct) < count:
        raise ValueError(f"only {len(distinct)} passages")
    return [distinct[index * len(distinct) // count] for index in range(count)]


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    """A reproducible ``.tar.xz``: fixed times and owners, members in the given order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mode = 0o644
            archive.addfile(info, io.BytesIO(data))


def write_prompts(path: Path, bible: list[Document], code: list[Document], count: int) -> None:
    """Held-out passages of both styles as JSON."""
    chosen = {
        "note": "Held-out passages, never seen in training, for deriving steering directions without the corpora.",
        "licences": {"scripture": BIBLE_LICENCE, "code": PYTHON_LICENCE},
    }
    texts = {}
    for style, documents, symbols in (("scripture", bible, 0), ("code", code, 8)):
        held = held_out_names(documents)
        texts[style] = passages([one for one in documents if one.name in held], count, symbols)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**chosen, **texts}, indent=1) + "\n")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path(".gpu/demo_corpus.tar.xz"))
    parser.add_argument("--prompts", type=Path, default=Path("models/demo/prompts.json"))
    parser.add_argument("--python-megabytes", type=float, default=24.0)
    parser.add_argument("--passages", type=int, default=64)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bible = bible_documents(print_bible(Path(work)))
    code = python_documents(Path(sysconfig.get_paths()["stdlib"]), int(options.python_megabytes * 1e6))
    bible_text, bible_entry = corpus_entry(bible, BIBLE_LICENCE)
    code_text, code_entry = corpus_entry(code, PYTHON_LICENCE)
    files = {"bible.txt": bible_entry, "python.txt": code_entry}
    manifest = {"python": platform.python_version(), "files": files}
    packed = json.dumps(manifest, separators=(",", ":")).encode()
    write_archive(options.out, {"bible.txt": bible_text, "python.txt": code_text, "manifest.json": packed})
    write_prompts(options.prompts, bible, code, options.passages)
    for name, entry in files.items():
        print(name, len(entry["documents"]), "documents", entry["split_bytes"], entry["sha256"])
    print(options.out, options.out.stat().st_size, "bytes", digest(options.out.read_bytes()))


if __name__ == "__main__":
    main()
