"""`FrontEnd`: checks a request's steering in the process that takes it, so that no bad one reaches the engine core."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from steer_compile.capture.selection import Top
from steer_compile.errors import SiteNotFound, SpecError, TableFull, UnknownName, VectorError
from steer_compile.runtime.contents import Contents
from steer_compile.runtime.registry import Registry
from steer_compile.runtime.steering import Steering
from steer_compile.runtime.vectors import PHASES, SiteKey, VectorSet
from steer_compile.vllm.capture_files import file_at, file_name
from steer_compile.vllm.capture_requests import CaptureAsked, CaptureRequest
from steer_compile.vllm.logged import Logs, captured_as, is_log, key_text
from steer_compile.vllm.model import Shape, expected_banks
from steer_compile.vllm.offered_saes import OfferedSAEs
from steer_compile.vllm.request_gates import gated
from steer_compile.vllm.requests import OVERRIDE, parse, parts
from steer_compile.vllm.settings import Settings, load_vectors
from steer_compile.vllm.site_data import Former, SiteMonitor, Tier
from steer_compile.vllm.transport import sent

MOST_SETS, MOST_NUMBERS = 256, 1 << 28
"""Most named vector sets, and numbers in all of them."""
_SHARE = 0.5
"""Of the tables' range, and of the room for clamps of a whole autoencoder, for what a request adds; the rest is for
what everyone gets, so that no sum overflows."""

Everyone = Mapping[str, Contents]


def digests_of(everyone: Everyone) -> dict[str, str]:
    """Digests of global steering, by phase."""
    return {phase: contents.digest() for phase, contents in everyone.items()}


@dataclass(frozen=True)
class Checked:
    """A request that the engine can do.

    Attributes:
        data: for the engine.
        digests: of what it adds in each phase, "" for nothing; and whether it may need a row for overrides.
        capture: the name of its captured rows, the consumer that they go to or "", the file that they are in
            without, and how many stages of a pipeline write it; None where it captures nothing.
        whole: it captures prompt tokens, all of which must therefore be computed.
        saes: numbers of the autoencoders that it uses (`offered_saes`).
    """

    data: dict[str, Any]
    digests: dict[str, str]
    capture: dict[str, Any] | None = None
    whole: bool = False
    saes: tuple[int, ...] = ()


def _short(text: str) -> str:
    """A digest of digests; the scheduler and the key of each cached block hold it."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class FrontEnd:
    """The engine's spec and named vectors beside tables of the right shapes that hold nothing.

    Names end here: a request goes on with the vectors that its names had when it came.

    Attributes:
        everyone: what every request gets, by phase.
        saes: autoencoders that requests may name.
        stages: of the engine's pipeline.
    """

    def __init__(self, settings: Settings, shape: Shape, stages: int = 1, drafts: bool = False) -> None:
        self.settings = settings
        self.stages = stages
        self._drafts = drafts
        self._shape = shape
        self._rows = settings.spec.rows
        self._lock = threading.Lock()
        self._sizes: dict[str, int] = {}
        self._registry = Registry(settings.spec)
        self._registry.reserve(expected_banks(settings.spec, shape), torch.device("meta"))
        banks = self._registry.tables.banks
        self._captured = {key: bank.width for bank in banks if (key := captured_as(bank)) is not None}
        self.everyone: Everyone = {"prefill": Contents(), "decode": Contents()}
        self.saes = OfferedSAEs(self._registry)
        self.saes.start(settings.saes)
        for name, path in settings.vectors:
            self.register(name, load_vectors(path))

    def checked(self, given: object) -> Checked:
        """A request's steering, checked.

        Raises:
            SpecError, VectorError, SiteNotFound, UnknownName: what the engine cannot do. TableFull: more rows than
                the spec has in all.
        """
        rest, gates, asked = parts(given)
        steering = parse(rest)
        saes = self.saes.numbers(steering.features)  # in front of their clamps, which one attached meanwhile would give
        made, more = self._made(steering, self.everyone), dict[str, Any]()
        if gates is not None:
            own, at_most, more = gated(self._registry, self.settings.spec, made["decode"], steering.tokens, gates)
            made = {**made, "decode": own}
            for contents in (own, at_most):
                self._registry.check(contents, _SHARE)
        tokens = "" if steering.tokens is None else repr(steering.tokens)
        digests = {phase: _short(contents.digest() + tokens) if contents else "" for phase, contents in made.items()}
        needed = sum(bool(digest) for digest in digests.values())
        if needed > self._rows:
            raise TableFull(f"the request needs {needed} rows, one for each phase, and the spec has rows={self._rows}")
        data = {**sent(made, steering.tokens), **more}
        if more.get("gates") or more.get("conversation"):
            digests[OVERRIDE] = "1"
        logs = Logs.of(made, steering.tokens)
        if asked is None:
            logs.check_kept(())
            return Checked(data, digests, saes=saes)
        capture = self._capture(CaptureAsked.of(asked), logs)
        data["capture"] = capture.to_data()
        file = "" if capture.to else str(file_at(self.settings.capture_dir, capture.name))
        reference = {"name": capture.name, "to": capture.to, "file": file, "stages": self.stages}
        return Checked(data, digests, reference, capture.tokens.in_prompt, saes)

    def _made(self, steering: Steering, others: Everyone) -> dict[str, Contents]:
        """Contents by phase that a row of the engine can hold beside what others have."""
        made = {phase: self._registry.contents(steering, phase) for phase in PHASES}
        for contents in {contents.digest(): contents for contents in made.values()}.values():
            self._registry.check(contents, _SHARE)
        for phase, contents in made.items():
            others.get(phase, Contents()).features.check_apart(contents.features)
            contents.features.check_room(int(_SHARE * self.settings.spec.features))
        return made

    def _capture(self, asked: CaptureAsked, logs: Logs) -> CaptureRequest:
        names = [spec.name for spec in self.settings.consumers]
        if asked.to and asked.to not in names:
            raise UnknownName(f"no consumer {asked.to!r:.80}; this engine has {', '.join(names) or 'none'}")
        if self._captured and not asked.to and not self.settings.capture_dir:
            raise SpecError(
                "the request captures, and this engine has no folder for captured rows; give capture_dir in "
                f"additional_config, or name a consumer in to ({', '.join(names) or 'there is none'})"
            )
        sites = logs.everything(self._captured) if asked.sites is None else asked.sites
        self._check_captured(sites)
        logs.check(sites, asked.tokens, asked.keep)
        widths = {site: self._captured[site] for site in sites}
        asked.keep.check(widths)
        if asked.tokens.top is not None:
            self._check_top(asked.tokens.top, widths)
        if self._drafts and (asked.tokens.top is not None or asked.keep.mean):
            what = "top" if asked.tokens.top is not None else "a mean"
            raise SpecError(
                f"{what} would count drafts that are not taken, and this engine decodes speculatively; capture rows, "
                "or leave speculative_config out"
            )
        return CaptureRequest(file_name(asked.name), sites, asked.tokens, asked.keep, asked.to, asked.tag)

    def _check_captured(self, sites: tuple[SiteKey, ...]) -> None:
        absent = [site for site in sites if site not in self._captured]
        if absent or not sites:
            have = ", ".join(key_text(site) for site in tuple(self._captured)[:6])
            more = f" and {len(self._captured) - 6} more" if len(self._captured) > 6 else ""
            log = bool(absent) and is_log(absent[0])
            cure = "give its site the op family sae_log" if log else "name its sites in the spec's capture"
            raise SiteNotFound(
                f"{key_text(absent[0]) if absent else 'nothing'} is not captured by this engine; it captures "
                f"{have or 'nothing'}{more}; {cure}"
            )

    def _check_top(self, top: Top, widths: Mapping[SiteKey, int]) -> None:
        if self.stages > 1:
            raise SpecError(
                "top needs all captured layers in one process, and this engine is a pipeline of stages; choose by "
                "position, or set pipeline_parallel_size=1"
            )
        top.check(widths)

    def check_sites(self, change: Tier | SiteMonitor) -> None:
        """Raise `SiteNotFound` or `VectorError` for a tier or a monitor that the engine's sites cannot take."""
        with self._lock:
            Former(Tier(VectorSet(), 1.0), {}).set(self._registry)
            change.set(self._registry)

    # -- what an operator changes ---------------------------------------------------------------------------------

    def register(self, name: str, vectors: object, replace: bool = False) -> str:
        """Name a vector set; returns the digest of its content.

        Raises:
            VectorError: bad vectors, a taken name without ``replace``, or too many or too large sets.
            SiteNotFound, SpecError: vectors of sites that the engine does not steer.
        """
        with self._lock:
            size = sum(torch.as_tensor(v).numel() for v in vectors.values()) if isinstance(vectors, dict) else 0
            others = {other: numbers for other, numbers in self._sizes.items() if other != name}
            if len(others) >= MOST_SETS or sum(others.values()) + size > MOST_NUMBERS:
                raise VectorError(
                    f"the server holds {len(others)} vector sets of {sum(others.values())} numbers, and {MOST_SETS} of "
                    f"{MOST_NUMBERS} are the most; delete one"
                )
            digest = self._registry.register_vectors(name, vectors, replace)
            self._sizes[name] = size
            return digest

    def forget(self, name: str) -> None:
        """Take a name away.

        Raises:
            UnknownName: there is none.
        """
        with self._lock:
            self._registry.named.pop(name)
            self._sizes.pop(name, None)

    def sets(self, names: Iterable[str]) -> dict[str, VectorSet]:
        """Named sets, of those names that there are."""
        with self._lock:
            known = self._registry.names
            return {name: self._registry.named.get(name) for name in names if name in known}

    def vectors(self) -> list[dict[str, Any]]:
        """Named sets: name, digest, how many numbers."""
        with self._lock:
            names = self._registry.names
            return [{"name": n, "digest": names[n], "numbers": self._sizes[n]} for n in sorted(names)]

    def checked_global(self, given: object) -> Everyone:
        """What every request is to get.

        Raises:
            SpecError: more than vectors and features, or a log. VectorError, SiteNotFound, UnknownName: what the engine
                cannot do.
        """
        steering = parse(given)
        if steering.tokens is not None or steering.monitors or steering.clamps:
            raise SpecError("global steering has vectors and features only; leave out tokens, monitors and clamps")
        self.saes.numbers(steering.features)
        made = self._made(steering, {})
        if Logs.of(made).phases:
            raise SpecError(
                "global steering logs features, which only a request can capture; leave mode 'log' and log out, and "
                "give them to requests"
            )
        return made

    def status(self) -> dict[str, Any]:
        """The spec, the model's stream, named vectors, autoencoders and global steering."""
        return {
            "spec": {k: v for k, v in self.settings.spec.to_dict().items() if k != "max_tokens"},
            "model": {"layers": self._shape.n_layers, "width": self._shape.width},
            "vectors": self.vectors(),
            "saes": self.saes.listed(),
            "global": digests_of(self.everyone),
        }
