"""Train the demo model's sparse autoencoders: a JumpReLU and a TopK one, on the stream that this package captures.

Reads the archive of ``demo_corpus.py``, captures rows of the middle layers with a compiled model into a folder, trains
on the CPU, measures on the held-out split, and writes ``models/demo/saes`` with its record ``training.json`` and a
paragraph of the model card.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from sae_training import JumpReLUTraining, Recipe, TopKTraining, Training, fit
from torch import Tensor
from train_demo_model import Corpus, inputs_targets, load_corpora
from transformers import AutoModelForCausalLM

from steer_compile import HookSelection, SteerSpec, sae, steer_backend
from steer_compile.backend import SteerBackend
from steer_compile.capture.consumer import make_consumer
from steer_compile.capture.dataset import RowDataset
from steer_compile.capture.pipeline import Pipeline
from steer_compile.capture.plain import About, capture_to
from steer_compile.capture.read import read
from steer_compile.capture.rows import Rows
from steer_compile.capture.selection import Selection
from steer_compile.demo.sae_loss import Edit, byte_losses, replaced
from steer_compile.runtime.vectors import SiteKey
from steer_compile.sae import SAE

HOOK = "post_block"
CONTEXT, BATCH = 512, 16
SHARD = 256
"""Windows whose rows are in one file."""
SCRIPTURE_SHARE = 0.4
CARD_BEGIN, CARD_END = "## Sparse autoencoders\n", "## Samples (prompt in bold)\n"
CARD = """## Sparse autoencoders

`saes/` holds {count} sparse autoencoders of the residual stream with {features:,} features each, read by
`steer_compile.sae.load_all("models/demo/saes")`: trained on {rows:,} rows of the training split, {share:.0%} of them
scripture, in fp32, and stored as fp16. The first token of each window is among the rows.

| name | site | features of a row | explained variance | dead | next-byte loss | loss recovered |
|---|---|---|---|---|---|---|
{table}

Measured as stored on {held:,} held-out rows, first tokens left out: *dead* is the share of features that no row has.
The loss is that of the rows' windows in nats with the site reconstructed; it is {plain:.3f} as it is. *Loss recovered*
is how much of the way from a zeroed site ({zeroed:.3f}), and from the site's mean, to the plain model that is.
JumpReLU is trained as in Rajamanoharan et al. 2024 (straight-through estimates for the thresholds, L0 penalty), TopK as
in Gao et al. 2024 (auxiliary loss of dead features), on {device}.
Reproduce: `python scripts/demo_corpus.py`, then `{command}`.

"""


def load_model(folder: Path) -> Any:
    """The demo model in fp32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def windows(corpora: dict[str, Corpus], count: int) -> Iterator[tuple[str, Tensor]]:
    """Batches of training windows uint8 [BATCH, CONTEXT] by style, in a fixed share."""
    owed = 0.0
    for _ in range(-(-count // BATCH)):
        owed += SCRIPTURE_SHARE
        style = "scripture" if owed >= 1 else "code"
        owed -= style == "scripture"
        yield style, corpora[style].draw(BATCH, CONTEXT)


def held_windows(corpora: dict[str, Corpus], count: int) -> dict[str, Tensor]:
    """Held-out windows uint8 [n, CONTEXT] by style, spread evenly over the split."""
    found = {}
    for style, share in (("scripture", SCRIPTURE_SHARE), ("code", 1 - SCRIPTURE_SHARE)):
        text = corpora[style].held
        wanted = max(1, round(count * share))
        whole = text[: len(text) // CONTEXT * CONTEXT].view(-1, CONTEXT)
        found[style] = whole[torch.linspace(0, len(whole) - 1, min(wanted, len(whole))).long()]
    return found


def check(pipeline: Pipeline, ended: list[str]) -> None:
    """Publish the rows of requests that have ended, and forget their names once all of them are there."""
    pipeline.flush()
    bad = {name: found for name in ended if (found := pipeline.wait(name)["disk"]).status != "ok"}
    if bad:
        raise RuntimeError(f"rows were lost: {bad}")
    ended.clear()


def capture(backend: SteerBackend, model: Any, parts: Iterable[tuple[str, Tensor]], root: Path, every: int) -> None:
    """Rows of every n-th token of each window into ``root/rows-<number>.safetensors``, one request a window.

    Args:
        parts: style and windows uint8 [BATCH, CONTEXT].
    """
    consumer = make_consumer("files", root=str(root), layout="sharded")
    with Pipeline({"disk": consumer}, policy="block") as pipeline, torch.no_grad():
        ended: list[str] = []
        for number, (style, window) in enumerate(parts):
            names = [f"{style}-{number}-{row}" for row in range(BATCH)]
            ids, _ = inputs_targets(window)
            with capture_to(backend.runtime, pipeline, names, tokens=Selection(every=every), about=About(model="demo")):
                model(ids, use_cache=False, logits_to_keep=1)
            ended += names
            if len(ended) >= SHARD:
                check(pipeline, ended)
        check(pipeline, ended)


def captured(options: argparse.Namespace, corpora: dict[str, Corpus], root: Path) -> dict[str, float]:
    """Capture training and held-out rows of a compiled copy of the model; seconds of both."""
    began = time.perf_counter()
    torch.manual_seed(options.seed)
    model, rows = load_model(options.model), BATCH * -(-CONTEXT // options.every)
    chosen = (HookSelection(HOOK, tuple(options.layers)),)
    backend = steer_backend(SteerSpec(capture=chosen, max_tokens=BATCH * CONTEXT, capture_rows=rows))
    model.compile(backend=backend, dynamic=False)
    capture(backend, model, windows(corpora, options.windows), root / "train", options.every)
    held = [
        (style, window)
        for style, some in held_windows(corpora, options.held_windows).items()
        for window in some[: len(some) // BATCH * BATCH].split(BATCH)
    ]
    capture(backend, model, held, root / "held", options.every)
    torch.compiler.reset()
    times = {"capture_seconds": round(time.perf_counter() - began, 1)}
    (root / "capture.json").write_text(json.dumps(times) + "\n")
    return times


@torch.no_grad()
def quality(made: SAE, rows: Tensor) -> dict[str, float]:
    """Explained variance, L0 and dead features over held-out rows [n, width]."""
    error, total, active = 0.0, 0.0, 0.0
    fired = torch.zeros(made.d_sae, dtype=torch.bool)
    mean = rows.mean(0)
    for part in rows.split(4096):
        f = made.encode(part)
        error += float((part - made.decode(f, part)).square().sum())
        total += float((part - mean).square().sum())
        active += float((f > 0).sum())
        fired |= (f > 0).any(0)
    return {
        "explained_variance": round(1 - error / total, 4),
        "l0": round(active / len(rows), 2),
        "dead_share": round(1 - float(fired.float().mean()), 4),
    }


@torch.no_grad()
def losses(model: Any, made: SAE, held: dict[str, Tensor], mean: Tensor) -> dict[str, float]:
    """Next-byte losses in nats of held-out windows under four treatments of the site, and the loss recovered."""
    site: SiteKey = made.site or (HOOK, 0)
    edits: dict[str, Edit] = {
        "plain": lambda h: h,
        "reconstructed": made.reconstruct,
        "zeroed": torch.zeros_like,
        "mean": lambda h: mean.expand_as(h),
    }
    found: dict[str, float] = {}
    for name, edit in edits.items():
        total = torch.zeros(0)
        for window in held.values():
            for part in window.split(BATCH):
                ids, targets = inputs_targets(part)
                with replaced(model, site, edit):
                    total = torch.cat([total, byte_losses(model, ids, targets)])
        found[f"loss_{name}"] = round(float(total.mean()), 4)
    gap = found["loss_zeroed"] - found["loss_plain"]
    found["loss_recovered"] = round((found["loss_zeroed"] - found["loss_reconstructed"]) / gap, 4)
    gap = found["loss_mean"] - found["loss_plain"]
    found["loss_recovered_over_mean"] = round((found["loss_mean"] - found["loss_reconstructed"]) / gap, 4)
    return found


def measured(model: Any, made: SAE, held: dict[str, Tensor], test: Rows) -> dict[str, float]:
    """Both, on held-out rows and windows. The first token is always the same and large, so `quality` goes without."""
    rows = test.values[made.key]
    return quality(made, rows[test.positions > 0]) | losses(model, made, held, rows.mean(0))


def plans(options: argparse.Namespace) -> list[tuple[str, int, type[Training]]]:
    """Name, layer and kind of each autoencoder: both kinds at the first layer, TopK at the others."""
    first, *others = options.layers
    found: list[tuple[str, int, type[Training]]] = [
        (f"jumprelu-{first}", first, JumpReLUTraining),
        (f"topk-{first}", first, TopKTraining),
    ]
    return found + [(f"topk-{layer}", layer, TopKTraining) for layer in others]


def card_text(report: dict[str, Any]) -> str:
    """The paragraph of the model card."""
    lines = [
        f"| `{one['name']}` | `{one['site']}` | {one['l0']:.1f} | {one['explained_variance']:.1%} | "
        f"{one['dead_share']:.1%} | {one['loss_reconstructed']:.3f} | {one['loss_recovered']:.1%}, "
        f"{one['loss_recovered_over_mean']:.1%} |"
        for one in report["saes"]
    ]
    return CARD.format(
        count=len(report["saes"]), features=report["saes"][0]["features"], rows=report["rows"],
        held=report["held_rows"], share=SCRIPTURE_SHARE, table="\n".join(lines),
        plain=report["saes"][0]["loss_plain"], zeroed=report["saes"][0]["loss_zeroed"],
        device=report["device"], command=report["command"],
    )  # fmt: skip


def put_in_card(path: Path, text: str) -> None:
    """Put the paragraph before the samples of a model card, in place of an older one."""
    card = path.read_text()
    head, found, samples = card.partition(CARD_END)
    if not found:
        raise ValueError(f"{path} has no line {CARD_END.strip()!r}")
    path.write_text(head.partition(CARD_BEGIN)[0] + text + found + samples)


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path(".gpu/demo_corpus.tar.xz"))
    parser.add_argument("--model", type=Path, default=Path("models/demo"))
    parser.add_argument("--out", type=Path, default=None, help="folder to write; saes/ beside the model by default")
    parser.add_argument("--rows", type=Path, default=None, help="folder of captured rows, kept and used again")
    parser.add_argument("--layers", type=int, nargs="+", default=[3, 5])
    parser.add_argument("--windows", type=int, default=4096, help="training windows of 512 bytes")
    parser.add_argument("--held-windows", type=int, default=160, help="of the held-out split")
    parser.add_argument("--every", type=int, default=2, help="every n-th token of a window is a row")
    parser.add_argument("--features", type=int, default=1024)
    parser.add_argument("--k", type=int, default=32, help="features of a row, of TopK")
    parser.add_argument("--l0-penalty", type=float, default=4e-3, help="of JumpReLU, of rows with mean square norm 1")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=None, help="names of those to train")
    return parser.parse_args()


def train_all(options: argparse.Namespace, root: Path) -> tuple[list[SAE], dict[str, Any]]:
    """Capture where no rows are there, train and measure; the autoencoders as stored, and the record."""
    corpora, manifest = load_corpora(options.corpus, torch.device("cpu"))
    model = load_model(options.model)
    done = root / "capture.json"
    times = json.loads(done.read_text()) if done.is_file() else captured(options, corpora, root)
    recipe = Recipe(options.features, options.k, options.l0_penalty, options.steps, options.batch, options.lr)
    saes, records = [], []
    held, test = held_windows(corpora, options.held_windows), read(root / "held").rows
    for name, layer, kind in plans(options):
        if options.only is not None and name not in options.only:
            continue
        key = f"layers.{layer}.{HOOK}"
        rows = RowDataset(root / "train", key)
        torch.manual_seed(options.seed)
        made, record = fit(kind, recipe, rows, (HOOK, layer), name)
        saes.append(made)
        record |= measured(model, made, held, test)
        records.append({"name": name, "site": key, "features": made.d_sae, **record, "digest": made.digest})
        print(json.dumps({key: value for key, value in records[-1].items() if key != "curve"}), flush=True)
    places = ("corpus", "out", "rows", "model", "only")
    settings = {key: str(value) for key, value in vars(options).items() if key not in places}
    shown = f"--layers {' '.join(map(str, options.layers))} --windows {options.windows} --steps {options.steps}"
    report = {
        "data": manifest, "device": f"{torch.get_num_threads()} CPU threads",
        "versions": {"torch": str(torch.__version__), "transformers": str(transformers.__version__)},
        "model_sha256": hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest(),
        "settings": settings, "rows": len(rows), "held_rows": len(test), **times, "saes": records,
        "command": f"python scripts/train_demo_saes.py {shown} --seed {options.seed}",
    }  # fmt: skip
    return saes, report


def main() -> None:
    """Train and write the folder."""
    options = parse()
    out = options.out or options.model / "saes"
    if out.exists():
        raise SystemExit(f"{out} is there already; remove it, or give --out of a folder that is not there")
    root = options.rows or Path(tempfile.mkdtemp())
    try:
        saes, report = train_all(options, root)
    finally:
        if options.rows is None:
            shutil.rmtree(root)
    sae.save(saes, out)
    (out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    if options.out is None:
        put_in_card(options.model / "MODEL_CARD.md", card_text(report))
    size = sum(file.stat().st_size for file in out.iterdir())
    print(f"{out}: {len(saes)} autoencoders, {size} bytes, {math.ceil(sum(r['seconds'] for r in report['saes']))} s")


if __name__ == "__main__":
    main()
