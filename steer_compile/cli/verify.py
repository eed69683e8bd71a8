"""`steer-compile verify`: a self-test of steering on the user's own model."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import inf
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from steer_compile.backend import SteerBackend, steer_backend
from steer_compile.cli.load import Loaded, load
from steer_compile.cli.output import INNER_HELP, JSON_HELP, check_inner, console, notes, print_json, progress
from steer_compile.cli.sites import collect_sites
from steer_compile.errors import SiteNotFound, SpecError
from steer_compile.hooks import HOOKS, MULTI_STREAM_HOOKS, STREAM_HOOKS
from steer_compile.ir import SiteTable
from steer_compile.runtime.capture import CaptureLog
from steer_compile.runtime.vectors import SiteKey
from steer_compile.spec import HookSelection, SteerSpec

EPSILON = 0.1
"""Length of the test vector relative to the mean length of the values at the site."""
FLOOR = 1e-6
"""Smallest change of the logits, relative to the largest of them, that counts as moved."""
IDLE_TOLERANCE = 1e-4
"""Largest difference of the idle logits, relative to the largest of them; fusion may round otherwise."""

Step = Callable[[str, int], None]


@dataclass(frozen=True)
class Check:
    """One site: the largest change of a logit relative to the largest logit, or the length of what was captured."""

    layer: int
    hook: str
    operation: str
    change: float
    ok: bool


@dataclass(frozen=True)
class Outcome:
    """All checks of a model. ``idle``: the largest difference of a logit with nothing active, ``limit``: of these."""

    checks: tuple[Check, ...]
    idle: float
    limit: float
    graphs: int

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(c.ok for c in self.checks) and self.idle <= self.limit


def verify(
    model: Annotated[str, typer.Argument(help="Hugging Face directory, config.json, or module:function.")],
    spec: Annotated[
        Path | None, typer.Option(help="SteerSpec as .json or .toml; without it every stream hook is steered.")
    ] = None,
    inner: Annotated[str, typer.Option(help=INNER_HELP, callback=check_inner)] = "inductor",
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Compile a model with steering and test every site. Exit code 1: a site does not work.

    A small random vector at each site must move the logits, and with nothing active the logits must be those of the
    same model compiled without the backend.

    Example: steer-compile verify models/demo --inner eager
    """
    given = read_spec(spec) if spec is not None else None
    with progress(None) as step:
        step("reading the model", 0)
        loaded = load(model, torch.float32)
        step("tracing the model", 0)
        wanted = given or default_spec(collect_sites(loaded.model, loaded.inputs), loaded.inputs)
        outcome = check_model(loaded, wanted, inner, step)
    if as_json:
        print_json(_plain(loaded, outcome, inner, wanted))
    else:
        _print(loaded, outcome, inner)
    raise typer.Exit(0 if outcome.ok else 1)


def read_spec(path: Path) -> SteerSpec:
    """Raises `SpecError` for a file that is missing, of another kind, or no spec."""
    if path.suffix not in (".json", ".toml"):
        raise SpecError(f"{path} is neither .json nor .toml; write the spec with SteerSpec.to_json() or to_toml()")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"the spec {path} cannot be read: {error}") from error
    return SteerSpec.from_json(text) if path.suffix == ".json" else SteerSpec.from_toml(text)


def default_spec(table: SiteTable, inputs: dict[str, Any]) -> SteerSpec:
    """Steer every hook of the stream that the model has.

    Raises:
        SiteNotFound: the model has none.
    """
    hooks = tuple(h for h in (*STREAM_HOOKS, *MULTI_STREAM_HOOKS) if any(s.hook == h for s in table))
    if not hooks:
        reason = table.misses[0].reason if table.misses else "no residual stream"
        raise SiteNotFound(f"no site in this model: {reason}; `steer-compile sites MODEL --misses` says more")
    tokens = max((t.numel() for t in inputs.values() if isinstance(t, Tensor)), default=0)
    return SteerSpec(steer=hooks, rows=2, max_tokens=max(1024, tokens))


def logits_of(output: Any) -> Tensor:
    """The model's result: a tensor, the ``logits`` of an output object, or the first of several."""
    if not isinstance(output, Tensor):
        output = output.logits if hasattr(output, "logits") else output[0]
    result: Tensor = output
    return result.float()


def check_model(loaded: Loaded, spec: SteerSpec, inner: str, step: Step) -> Outcome:
    """Run every check.

    Raises:
        SteerError: the spec asks for what the model does not have.
    """
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        step("compiling without steering", 1)
        torch.compiler.reset()
        base = logits_of(torch.compile(loaded.model, backend=inner)(**loaded.inputs))
        step("measuring the stream", 1)
        lengths = _lengths(loaded.model, loaded.inputs, spec)
        step("compiling with steering", 1)
        torch.compiler.reset()
        backend = steer_backend(spec, inner=inner)
        compiled = torch.compile(loaded.model, backend=backend)

        def run() -> Tensor:
            return logits_of(compiled(**loaded.inputs)).clone()

        captured, idle = _captures(backend, spec, run)
        backend.runtime.check_complete()
        checks = [Check(layer, hook, "capture", size, 0 < size < inf) for (hook, layer), size in captured.items()]
        for hook, layer in sorted(backend.runtime.tables.steered(), key=_in_order):
            step(f"layers.{layer}.{hook}", 1)
            checks.append(_moved(backend, run, (hook, layer), lengths[hook, layer], idle))
    difference = float((idle - base).abs().max() / base.abs().max().clamp_min(1e-12))
    return Outcome(tuple(checks), difference, IDLE_TOLERANCE, len(backend.plans))


def _in_order(site: SiteKey) -> tuple[int, int, str]:
    hook, layer = site
    return layer, HOOKS.index(hook) if hook in HOOKS else len(HOOKS), hook


def _captures(backend: SteerBackend, spec: SteerSpec, run: Callable[[], Tensor]) -> tuple[dict[SiteKey, float], Tensor]:
    """One call with nothing active: the mean length of the captured values, and the logits."""
    if not spec.capture:
        return {}, run()
    with backend.runtime.capture() as log:
        idle = run()
        return _mean_lengths(log), idle


def _mean_lengths(log: CaptureLog) -> dict[SiteKey, float]:
    return {site: float(log[site].float().norm(dim=-1).mean()) for site in log}


def _lengths(model: nn.Module, inputs: dict[str, Any], spec: SteerSpec) -> dict[SiteKey, float]:
    """Mean length of the value of a token at every site of the spec, from captures."""
    torch.compiler.reset()
    hooks = dict.fromkeys(s.hook for s in (*spec.steer, *spec.capture))
    everywhere = tuple(HookSelection(hook) for hook in hooks)
    backend = steer_backend(SteerSpec(capture=everywhere, max_tokens=spec.max_tokens), inner="eager")
    compiled = torch.compile(model, backend=backend)
    with backend.runtime.capture() as log:
        compiled(**inputs)
        return _mean_lengths(log)


def _moved(backend: SteerBackend, run: Callable[[], Tensor], site: SiteKey, length: float, idle: Tensor) -> Check:
    """Steer one site by a random vector; ``idle`` are the logits without it."""
    hook, layer = site
    generator = torch.Generator().manual_seed(layer)
    vector = torch.randn(backend.runtime.tables.width(site) or 0, generator=generator)
    vector *= EPSILON * max(length, 1e-6) / vector.norm()
    with backend.runtime.steer({hook: {layer: vector}}):
        got = run()
    change = float((got - idle).abs().max() / idle.abs().max().clamp_min(1e-12))
    return Check(layer, hook, "steer", change, FLOOR < change < inf)


def _plain(loaded: Loaded, outcome: Outcome, inner: str, spec: SteerSpec) -> dict[str, Any]:
    return {
        "model": loaded.name,
        "note": loaded.note,
        "inner": inner,
        "spec": spec.to_dict(),
        "ok": outcome.ok,
        "graphs": outcome.graphs,
        "idle": {"difference": outcome.idle, "limit": outcome.limit, "ok": outcome.idle <= outcome.limit},
        "sites": [asdict(c) for c in outcome.checks],
    }


def _print(loaded: Loaded, outcome: Outcome, inner: str) -> None:
    if loaded.note:
        notes().print(loaded.note)
    out = console()
    table = Table(title=f"{loaded.name}, inner compiler {inner}", title_justify="left")
    for name in ("layer", "hook", "operation", "logit change", "ok"):
        table.add_column(name, justify="right" if name in ("layer", "logit change") else "left")
    for c in outcome.checks:
        change = f"{c.change:.2e}" if c.operation == "steer" else "-"
        table.add_row(str(c.layer), c.hook, c.operation, change, "yes" if c.ok else "[red]NO[/red]")
    out.print(table)
    same = (
        "bit-equal" if outcome.idle == 0.0 else f"largest difference {outcome.idle:.1e} (allowed {outcome.limit:.0e})"
    )
    out.print(f"idle: logits with and without the backend are {same}", highlight=False)
    passed, plural = sum(c.ok for c in outcome.checks), "" if outcome.graphs == 1 else "s"
    verdict = "[green]ok[/green]" if outcome.ok else "[red]failed[/red]"
    out.print(
        f"{verdict}: {passed} of {len(outcome.checks)} sites, {outcome.graphs} compiled graph{plural}", highlight=False
    )
    if not outcome.ok and not outcome.checks:
        out.print(escape("no site was instrumented"))
