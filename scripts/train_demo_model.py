"""Train the demo language model: a byte-level Llama of 5.9 million parameters on scripture and Python source.

One file, needing torch, transformers and safetensors.  Reads the archive of ``demo_corpus.py``, trains for ``--steps``
steps under a learning rate that depends on the step alone, keeps the weight average that is best on the held-out split
after rounding to bfloat16, and writes a transformers checkpoint with its record and model card.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import tarfile
import time
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, PAD, VOCAB = 256, 257, 258
FILES = {"scripture": "bible.txt", "code": "python.txt"}
PROMPTS = {
    "scripture": ["And it came to pass", "The LORD is my ", "Blessed are they that ", "In those days the king "],
    "code": ["def read_", "import os\n", "class Queue:\n    def __init__(self", "    for name in "],
}
CARD = """# Demo model

A byte-level Llama of {parameters:,} parameters ({layers} layers, width {width}, {heads} query and {kv} key heads, tied
embeddings), trained from scratch for the demonstrations of this package.  It writes English in the style of the King
James Bible and Python code, and nothing else.  It has seen windows of {context} bytes only.

* Ids 0-255 are bytes, 256 begins and ends a document, 257 pads.
* Data (digests in `training.json`):
  `bible.txt`, {bible_bytes:,} bytes, {bible_licence};
  `python.txt`, {code_bytes:,} bytes, {code_licence}.
* Training: the stored weights are those of step {stored_step:,} of {steps:,}: {stored_bytes:,} bytes read,
  {stored_seconds:.0f} seconds (of {seconds:.0f}) on {device}, torch {torch}.
* Held-out bits per byte of the stored bfloat16 weights: scripture {bpb_scripture:.3f}, code {bpb_code:.3f}.  The stored
  weights are the best of the evaluations in `training.json`, so the held-out split also chose them.
* Reproduce: `python scripts/demo_corpus.py`, then
  `{command}`.
  The order of the data and the learning rate depend on the seed and the step alone; the rounding depends on the card.

## Samples (prompt in bold)

{samples}
"""


class Corpus:
    """One style's training text on the device, and its held-out text."""

    def __init__(self, data: bytes, entry: dict[str, Any], device: torch.device) -> None:
        """``entry``: the manifest's row for this file; a zero byte stands between documents."""
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise ValueError("corpus digest differs from its manifest")
        pieces: dict[str, list[bytes]] = {"train": [], "held": []}
        position = 0
        for _, length, split in entry["documents"]:
            pieces[split].append(data[position : position + length])
            position += length
        joined = {split: bytearray(b"\0".join(parts)) for split, parts in pieces.items()}
        self.train = torch.frombuffer(joined["train"], dtype=torch.uint8).to(device)
        self.held = torch.frombuffer(joined["held"], dtype=torch.uint8).to(device)
        self.lines = torch.nonzero(self.train == 10).flatten() + 1

    def draw(self, rows: int, context: int) -> Tensor:
        """Random training windows, uint8 [rows, context]; three quarters of them begin at a line."""
        device = self.train.device
        anywhere = torch.randint(self.train.numel(), (rows,), device=device)
        at_line = self.lines[torch.randint(self.lines.numel(), (rows,), device=device)]
        starts = torch.where(torch.rand(rows, device=device) < 0.75, at_line, anywhere)
        starts = starts.clamp(max=self.train.numel() - context)
        return self.train[starts[:, None] + torch.arange(context, device=device)]


def load_corpora(path: Path, device: torch.device) -> tuple[dict[str, Corpus], dict[str, Any]]:
    """Both corpora by style, and the archive's manifest without its document lists."""
    with tarfile.open(path) as archive:
        data = {one.name: cast(Any, archive.extractfile(one)).read() for one in archive.getmembers()}
    manifest = json.loads(data["manifest.json"])
    corpora = {style: Corpus(data[name], manifest["files"][name], device) for style, name in FILES.items()}
    for entry in manifest["files"].values():
        entry["documents"] = len(entry["documents"])
    return corpora, manifest


def inputs_targets(window: Tensor) -> tuple[Tensor, Tensor]:
    """Ids and next ids, both int64 [rows, context], of uint8 windows: BOS first, zero bytes become BOS."""
    targets = window.long()
    targets = torch.where(targets == 0, BOS, targets)
    return functional.pad(targets[:, :-1], (1, 0), value=BOS), targets


def build_model(tiny: bool, context: int) -> LlamaForCausalLM:
    """The demo model in float32, or a tiny one of the same kind."""
    width, layers, heads, inner = (64, 2, 4, 128) if tiny else (256, 8, 4, 688)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=max(1024, context),
        rms_norm_eps=1e-5, tie_word_embeddings=True, bos_token_id=BOS, eos_token_id=BOS, pad_token_id=PAD,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.mul_((2 * layers) ** -0.5)
    model.generation_config = GenerationConfig(
        bos_token_id=BOS, eos_token_id=BOS, pad_token_id=PAD, suppress_tokens=[PAD], max_new_tokens=256
    )
    return model


class Loss(nn.Module):
    """Next-byte loss through the model's layers with no mask tensor, so that attention takes its causal kernel."""

    def __init__(self, model: LlamaForCausalLM, dropout: float = 0.0) -> None:
        """``model`` keeps its parameters; this only calls its parts. ``dropout``: of what each layer adds."""
        super().__init__()
        self.model = model
        self.dropout = dropout

    def forward(self, ids: Tensor, targets: Tensor) -> Tensor:
        """Mean loss in nats a byte; ``ids``, ``targets``: int64 [rows, context], targets below 0 left out."""
        core = self.model.model
        hidden = core.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = core.rotary_emb(hidden, position_ids=positions)
        for layer in core.layers:
            after = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            hidden = hidden + functional.dropout(after - hidden, self.dropout) if self.dropout else after
        logits = self.model.lm_head(core.norm(hidden)).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


def rounded_copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    """A copy with bfloat16 parameters; buffers (the rotary frequencies) stay in float32, as after loading."""
    made = copy.deepcopy(model).eval()
    for parameter in made.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    made.config.dtype = torch.bfloat16
    return made


@torch.no_grad()
def bits_per_byte(model: LlamaForCausalLM, corpus: Corpus, context: int) -> float:
    """Held-out bits per byte over consecutive windows of ``context`` bytes, each after a BOS; edges left out."""
    text = corpus.held
    rows = math.ceil(text.numel() / context)
    ids, targets = inputs_targets(functional.pad(text, (0, rows * context - text.numel())).view(rows, context))
    targets = torch.where(targets == BOS, -100, targets)
    loss, total, count = Loss(model), 0.0, 0
    for part_ids, part in zip(ids.split(64), targets.split(64), strict=True):
        counted = int((part >= 0).sum())
        total += float(loss(part_ids, part)) * counted
        count += counted
    return total / count / math.log(2)


def evaluate(model: LlamaForCausalLM, corpora: dict[str, Corpus], context: int) -> dict[str, float]:
    """Held-out bits per byte of each style."""
    return {style: round(bits_per_byte(model, corpus, context), 4) for style, corpus in corpora.items()}


@torch.no_grad()
def sample(model: LlamaForCausalLM, length: int) -> list[dict[str, str]]:
    """Greedy and temperature-0.7 continuations of all prompts, ``length`` bytes each at most."""
    rows = [(style, prompt) for style, prompts in PROMPTS.items() for prompt in prompts]
    width = 1 + max(len(prompt) for _, prompt in rows)
    coded = [[PAD] * (width - 1 - len(prompt)) + [BOS, *prompt.encode()] for _, prompt in rows]
    ids = torch.tensor(coded, device=model.device)
    made: list[dict[str, str]] = []
    for name, options in {"greedy": {}, "temperature 0.7": {"temperature": 0.7, "top_k": 0}}.items():
        output = model.generate(
            ids, attention_mask=(ids != PAD).long(), max_new_tokens=length, do_sample=bool(options), **options
        )
        for (style, prompt), row in zip(rows, output[:, width:].tolist(), strict=True):
            text = bytes(value for value in row if value < BOS).decode("utf-8", errors="replace")
            made.append({"style": style, "decoding": name, "prompt": prompt, "text": text})
    return made


class Trainer:
    """Model, optimizer, weight average and record of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Everything on the GPU where there is one."""
        self.options = options
        self.began = time.perf_counter()
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(options.seed)
        torch.set_float32_matmul_precision("high")
        self.corpora, self.manifest = load_corpora(options.corpus, self.device)
        if options.tiny:
            for corpus in self.corpora.values():
                corpus.held = corpus.held[:32768]
        self.model = build_model(options.tiny, options.context).to(self.device)
        self.average = [one.detach().clone() for one in self.model.parameters()]
        self.rounded = rounded_copy(self.model)
        self.best = rounded_copy(self.model)
        self.best_bits = math.inf
        matrices = [one for one in self.model.parameters() if one.ndim == 2]
        vectors = [one for one in self.model.parameters() if one.ndim != 2]
        decay = options.weight_decay
        groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
        fused = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98), fused=fused)
        self.curve: list[dict[str, float]] = []
        self.steps = 0
        self.stored: dict[str, float] = {}

    def elapsed(self) -> float:
        """Seconds since the start, with the device idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - self.began

    def batch(self) -> tuple[Tensor, Tensor]:
        """One mixed batch: a fixed share of rows of each style."""
        options = self.options
        scripture = round(options.batch * options.scripture_share)
        rows = {"scripture": scripture, "code": options.batch - scripture}
        return inputs_targets(torch.cat([self.corpora[style].draw(rows[style], options.context) for style in rows]))

    def step(self, loss: nn.Module) -> Tensor:
        """One update, with a learning rate that rises, then falls to zero as a cosine; the loss in nats a byte."""
        options = self.options
        warm = min(1.0, (self.steps + 1) / options.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * self.steps / options.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = options.lr * warm * cosine
        ids, targets = self.batch()
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            value = loss(ids, targets)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        keep = min(options.ema, (1 + self.steps) / (10 + self.steps))
        for kept, new in zip(self.average, self.model.parameters(), strict=True):
            kept.lerp_(new.detach(), 1 - keep)
        self.steps += 1
        return cast(Tensor, value.detach())

    @torch.no_grad()
    def check(self, train_loss: float) -> None:
        """Round the average to bfloat16, measure it, and keep it where it is the best so far."""
        for target, source in zip(self.rounded.parameters(), self.average, strict=True):
            target.copy_(source)
        bits = evaluate(self.rounded, self.corpora, self.options.context)
        seen = {"step": self.steps, "seconds": round(self.elapsed(), 1)}
        if sum(bits.values()) < self.best_bits:
            self.best_bits = sum(bits.values())
            self.best.load_state_dict(self.rounded.state_dict())
            self.stored = {**seen, "bytes": self.steps * self.options.batch * self.options.context}
        row = {f"heldout_{style}": value for style, value in bits.items()}
        row["train_bits"] = round(train_loss / math.log(2), 4)
        self.curve.append({**seen, **row})
        print(json.dumps(self.curve[-1]), flush=True)

    def run(self) -> None:
        """Train for all steps, measuring every ``--eval-steps`` and at the end."""
        options = self.options
        loss: nn.Module = Loss(self.model, options.dropout)
        if options.compile and not options.tiny:
            loss = cast(nn.Module, torch.compile(loss, dynamic=False))
        while self.steps < options.steps:
            value = self.step(loss)
            if self.steps == 1:
                print(f"first step after {self.elapsed():.1f} s, {value.item():.3f} nats", flush=True)
            if self.steps % options.eval_steps == 0 or self.steps == options.steps:
                self.check(value.item())

    def report(self, stored: LlamaForCausalLM, seconds: float) -> dict[str, Any]:
        """The record of the run of ``seconds``; ``stored``: the checkpoint as read back, measured and sampled here."""
        options, tokens = self.options, self.steps * self.options.batch * self.options.context
        cuda = self.device.type == "cuda"
        return {
            "data": self.manifest,
            "device": torch.cuda.get_device_name() if cuda else "CPU",
            "versions": {
                "torch": str(torch.__version__), "transformers": str(transformers.__version__),
                "safetensors": str(safetensors.__version__),
            },
            "settings": {key: str(value) for key, value in vars(options).items() if key not in ("corpus", "out")},
            "parameters": sum(one.numel() for one in stored.parameters()),
            "stored": self.stored,
            "steps": self.steps,
            "tokens": tokens,
            "seconds": round(seconds, 1),
            "tokens_per_second": round(tokens / seconds),
            "peak_gpu_bytes": torch.cuda.max_memory_allocated() if cuda else 0,
            "heldout_bits_per_byte": evaluate(stored, self.corpora, options.context),
            "curve": self.curve,
            "samples": sample(stored, 64 if options.tiny else 256),
        }  # fmt: skip


def model_card(report: dict[str, Any], config: Any, context: int, command: str) -> str:
    """The model card as Markdown."""
    files, bits = report["data"]["files"], report["heldout_bits_per_byte"]
    samples = []
    for one in report["samples"]:
        text = "\n".join(f"    {line}".rstrip() for line in (one["prompt"] + one["text"]).splitlines())
        samples.append(f"{one['style'].capitalize()}, {one['decoding']}, after **{one['prompt']!r}**:\n\n{text}\n")
    return CARD.format(
        parameters=report["parameters"], layers=config.num_hidden_layers, width=config.hidden_size,
        heads=config.num_attention_heads, kv=config.num_key_value_heads, context=context,
        bible_bytes=files["bible.txt"]["bytes"], bible_licence=files["bible.txt"]["licence"],
        code_bytes=files["python.txt"]["bytes"], code_licence=files["python.txt"]["licence"],
        stored_step=report["stored"]["step"], stored_bytes=report["stored"]["bytes"], steps=report["steps"],
        stored_seconds=report["stored"]["seconds"], seconds=report["seconds"], device=report["device"],
        torch=report["versions"]["torch"], bpb_scripture=bits["scripture"], bpb_code=bits["code"],
        command=command, samples="\n".join(samples).rstrip(),
    )  # fmt: skip


def reproduce(options: argparse.Namespace) -> str:
    """The command that trains the same model."""
    names = "steps batch context scripture_share lr weight_decay dropout warmup ema eval_steps seed"
    settings = " ".join(f"--{name.replace('_', '-')} {getattr(options, name)}" for name in names.split())
    return f"python scripts/train_demo_model.py {settings}"


def style_notes(path: Path) -> dict[str, str]:
    """The style scorer's stored accuracy, or nothing where there is no such file."""
    if not path.exists():
        return {}
    with safetensors.safe_open(str(path), framework="pt") as stored:
        return dict(stored.metadata() or {})


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path(".gpu/demo_corpus.tar.xz"))
    parser.add_argument("--out", type=Path, default=Path("models/demo"))
    parser.add_argument("--steps", type=int, default=4000, help="updates; the learning rate ends at zero")
    parser.add_argument("--batch", type=int, default=256, help="windows a step")
    parser.add_argument("--context", type=int, default=512, help="bytes a window")
    parser.add_argument("--scripture-share", type=float, default=0.22)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1, help="share of what each layer adds that is left out")
    parser.add_argument("--warmup", type=int, default=200, help="steps")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--eval-steps", type=int, default=200, help="steps between two evaluations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a small model, batch and context for a quick check")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    if options.tiny:
        options.batch, options.context, options.warmup = 8, 64, 5
        options.steps, options.eval_steps = min(options.steps, 30), 10
    return options


def main() -> None:
    """Train and write the checkpoint folder."""
    options = parse()
    trainer = Trainer(options)
    trainer.run()
    seconds = trainer.elapsed()
    options.out.mkdir(parents=True, exist_ok=True)
    trainer.best.save_pretrained(options.out)
    weights = options.out / "model.safetensors"
    weights.chmod(0o644)
    stored = LlamaForCausalLM.from_pretrained(options.out, dtype=torch.bfloat16).to(trainer.device).eval()
    report = trainer.report(stored, seconds)
    report["command"] = reproduce(options)
    report["style_scorer"] = style_notes(Path("models/demo/style.safetensors"))
    report["model_bytes"] = weights.stat().st_size
    report["model_sha256"] = hashlib.sha256(weights.read_bytes()).hexdigest()
    (options.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    card = model_card(report, stored.config, options.context, report["command"])
    (options.out / "MODEL_CARD.md").write_text(card)
    for one in report["samples"]:
        print(f"--- {one['style']}, {one['decoding']}\n{one['prompt']}{one['text']}")
    shown = "stored steps tokens seconds tokens_per_second heldout_bits_per_byte model_bytes parameters"
    print(json.dumps({key: report[key] for key in shown.split()}))


if __name__ == "__main__":
    main()
