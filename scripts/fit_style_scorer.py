"""Fit the demo's style scorer on the training split of the corpora and measure it on the held-out split."""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path
from typing import Any

from steer_compile.demo.style import WINDOW, fit_style, window_accuracy


def read_splits(archive: Path) -> dict[str, dict[str, bytes]]:
    """Joined bytes of each split ("train", "held") of each corpus file."""
    splits: dict[str, dict[str, bytes]] = {}
    with tarfile.open(archive) as tar:
        members = {one.name: tar.extractfile(one) for one in tar.getmembers()}
        data = {name: handle.read() for name, handle in members.items() if handle is not None}
    manifest: dict[str, Any] = json.loads(data["manifest.json"])
    for name, entry in manifest["files"].items():
        pieces: dict[str, list[bytes]] = {"train": [], "held": []}
        position = 0
        for _, length, split in entry["documents"]:
            pieces[split].append(data[name][position : position + length])
            position += length
        splits[name] = {split: b"\n".join(texts) for split, texts in pieces.items()}
    return splits


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path(".gpu/demo_corpus.tar.xz"))
    parser.add_argument("--out", type=Path, default=Path("models/demo/style.safetensors"))
    parser.add_argument("--training", type=Path, default=Path("models/demo/training.json"))
    options = parser.parse_args()
    splits = read_splits(options.corpus)
    code, scripture = splits["python.txt"], splits["bible.txt"]
    scorer = fit_style(code["train"], scripture["train"])
    sizes = (WINDOW // 2, WINDOW, 2 * WINDOW)
    accuracy = {size: window_accuracy(scorer, code["held"], scripture["held"], size) for size in sizes}
    report = {
        "heldout_accuracy_100_bytes": f"{accuracy[WINDOW]:.5f}",
        "heldout_accuracy_50_bytes": f"{accuracy[WINDOW // 2]:.5f}",
        "heldout_accuracy_200_bytes": f"{accuracy[2 * WINDOW]:.5f}",
        "heldout_score_code": f"{scorer.score(code['held']):.4f}",
        "heldout_score_scripture": f"{scorer.score(scripture['held']):.4f}",
    }
    scorer.notes = report
    options.out.parent.mkdir(parents=True, exist_ok=True)
    scorer.save(options.out)
    if options.training.exists():
        training = json.loads(options.training.read_text())
        training["style_scorer"] = report
        options.training.write_text(json.dumps(training, indent=1) + "\n")
    print(options.out, options.out.stat().st_size, "bytes", json.dumps(report))


if __name__ == "__main__":
    main()
