"""Writes docs/transcripts.md: every debugging command on the demo model and on configs of 70B and 671B parameters.

    python scripts/write_transcripts.py

Run it from the repository root, in the environment of `make test`. Times and memory are of the machine that runs it.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from steer_compile import HookSelection, SteerSpec

TARGET = Path("docs/transcripts.md")
LINES = 34
"""Lines that are kept of an output; the rest is counted."""
DEMO, LLAMA, DEEPSEEK = "models/demo", "benchmarks/configs/llama_70b", "benchmarks/configs/deepseek_v3"
HEAD = """# Transcripts

What the debugging commands print, as `python scripts/write_transcripts.py` ran them, cut after some lines. `llama_70b`
and `deepseek_v3` are bare configs of 70 and 671 billion parameters; nothing of them is downloaded or allocated. The
guide is [debugging](debugging.md).

`plain.json` steers `post_block` and `attn_in` at every layer; `spec.json` is

```json
{spec}
```
"""


def main() -> None:
    spec = SteerSpec(
        steer=(HookSelection("post_block", "all", ("add", "clamp")),), capture=(HookSelection("post_attn", [0, 1]),),
        max_tokens=512,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "spec.json"
        file.write_text(spec.to_json())
        plain = Path(folder) / "plain.json"
        plain.write_text(SteerSpec(steer=("post_block", "attn_in")).to_json())
        commands = (
            ("sites", DEMO, "--layer", "3"),
            ("sites", LLAMA, "--hook", "post_block", "--layer", "-1"),
            ("sites", DEEPSEEK, "--layer", "60"),
            ("plan", file, DEMO, "--tokens", "256", "--bandwidth", "3.35"),
            ("plan", file, LLAMA),
            ("explain", "layers.3.post_block", DEMO),
            ("explain", "layers.79.mlp_in", LLAMA),
            ("explain", "layers.3.mhc_streams_final", DEMO),
            ("diff", DEMO, "--spec", file, "--context", "0"),
            ("diff", LLAMA, "--spec", plain, "--context", "0"),
            ("graph", DEMO, "--spec", file, "--layer", "0"),
            ("graph", LLAMA, "--spec", file, "--format", "html", "--out", Path(folder) / "page.html"),
            ("bisect", DEMO, plain, "--inner", "eager"),
            ("trace", DEMO, "--spec", file, "--out", Path(folder) / "trace", "--slots"),
            ("doctor",),
            ("sites", Path(folder)),
            ("plan", file, DEMO, "--device", "cpu", "--text"),
        )
        text = HEAD.format(spec=spec.to_json())
        for command in commands:
            words = [str(word) for word in command]
            print("steer-compile", *words, flush=True)
            text += _block(words, folder)
    TARGET.write_text(text, encoding="utf-8")


def _block(words: list[str], folder: str) -> str:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "steer_compile.cli.main", *words], capture_output=True, text=True, timeout=600
    )
    took = time.monotonic() - began
    most = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
    lines = [line.rstrip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 8], f"... {len(lines) - LINES} lines left out", *lines[-8:]]
    shown = " ".join(words).replace(f"{folder}/", "").replace(folder, "an/empty/folder")
    body = "\n".join(lines).replace(f"{folder}/", "").replace(folder, "an/empty/folder").replace(str(Path.cwd()), ".")
    body = re.sub(r"torchinductor_\w+", "torchinductor_you", body.replace(str(Path.home()), "~"))
    return (
        f"\n## steer-compile {shown}\n\n```text\n{body}\n```\n\nExit code {done.returncode}, {took:.1f} s; the largest "
        f"process so far took {most:.2f} GiB.\n"
    )


if __name__ == "__main__":
    main()
