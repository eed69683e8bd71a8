"""`Settings`: what ``additional_config["steer_compile"]`` asks of an engine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from steer_compile.errors import SpecError
from steer_compile.spec import SteerSpec
from steer_compile.vllm.autoencoders import SAESpec, sae_specs
from steer_compile.vllm.capture_consumers import ConsumerSpec, consumer_specs
from steer_compile.vllm.operator_code import ControllerSpec, controller_specs, to_data

KEY = "steer_compile"
"""Key of the settings in vLLM's ``additional_config``."""

OWN_KEYS = ("vectors", "vector_root", "capture_dir", "capture_bytes", "consumers", "controllers", "autoencoders")
"""Keys beside the spec's, whose ``saes`` is a number."""
CAPTURE_BYTES = 1 << 30

SITE_OPS = ("tier", "monitor")
"""Op families whose data an operator sets for sites while requests run."""


@dataclass(frozen=True)
class Settings:
    """An engine's spec and the vector files that it loads when it starts.

    Attributes:
        spec: what may be steered; ``max_tokens`` is the engine's own.
        vectors: pairs of a name and the safetensors file of its vectors (tensors named ``layers.3.post_block``).
        vector_root: folder whose vector files and autoencoders an operator may name by path while the engine runs; ""
            for none.
        capture_dir: folder for captured rows, on the machine of the engine; needed where the spec captures, unless
            consumers take them, or controllers or gates of requests look at what it captures. Logged features need it
            or consumers.
        capture_bytes: most bytes of captured rows in memory; of what comes beyond them rows are dropped.
        consumers: where captured rows go beside files, by the names that requests give.
        controllers: controllers of dynamic steering, run on every rank.
        saes: autoencoders whose features requests may steer, loaded when the engine starts.
    """

    spec: SteerSpec
    vectors: tuple[tuple[str, str], ...] = ()
    vector_root: str = ""
    capture_dir: str = ""
    capture_bytes: int = CAPTURE_BYTES
    consumers: tuple[ConsumerSpec, ...] = ()
    controllers: tuple[ControllerSpec, ...] = ()
    saes: tuple[SAESpec, ...] = ()

    @property
    def dynamic(self) -> bool:
        """Whether anything may change the steering of decoded tokens while their requests run."""
        return bool(self.spec.overrides or self.controllers or self.families & set(SITE_OPS))

    @property
    def families(self) -> set[str]:
        """Op families of the spec."""
        return {op for selection in self.spec.steer for op in selection.ops}

    @classmethod
    def read(cls, additional_config: object, max_tokens: int, dtype: torch.dtype) -> Settings | None:
        """The settings of an engine, None where it has none.

        Args:
            max_tokens: most tokens of a step.
            dtype: the model's, which is the tables' where the spec names none. The stream may be wider in a graph that
                leaves sums unrounded.

        Raises:
            SpecError: the entry is no spec, or one of what vLLM does not offer.
        """
        given = additional_config.get(KEY) if isinstance(additional_config, Mapping) else None
        if given is None:
            return None
        if not isinstance(given, Mapping):
            raise SpecError(
                f"additional_config[{KEY!r}] is a {type(given).__name__}; give the spec as plain data, such as "
                "{'steer': ['post_block']} (steer_compile.vllm.engine_args makes it of a SteerSpec)"
            )
        plain = _plain(given)
        spec = SteerSpec.from_dict({"dtype": dtype, "sae_tokens": max_tokens, **plain, "max_tokens": max_tokens})
        controllers = controller_specs(given.get("controllers", {}))
        _check_reach(spec, bool(controllers))
        folders = {name: _folder(name, given.get(name, "")) for name in ("vector_root", "capture_dir")}
        consumers = consumer_specs(given.get("consumers", {}))
        _check_captures(spec, folders["capture_dir"], bool(consumers), bool(controllers))
        most = given.get("capture_bytes", CAPTURE_BYTES)
        if not isinstance(most, int) or isinstance(most, bool) or most < 1:
            raise SpecError(f"capture_bytes={most!r} is no number of bytes; give a whole number above 0")
        files = _files(given.get("vectors", {}))
        saes = _saes(given.get("autoencoders", {}), spec, folders["vector_root"])
        return cls(spec, files, **folders, capture_bytes=most, consumers=consumers, controllers=controllers, saes=saes)


def captures(spec: SteerSpec) -> bool:
    """Whether requests have anything to capture: values of hooks, or logged features."""
    return bool(spec.capture) or _logs(spec)


def _logs(spec: SteerSpec) -> bool:
    return any("sae_log" in selection.ops for selection in spec.steer)


def _check_captures(spec: SteerSpec, folder: str, consumers: bool, controllers: bool) -> None:
    """Raise `SpecError` where captures have no way out, or there is one for nothing. Values of hooks may be there for
    controllers and gates alone; logged features are for requests."""
    if not captures(spec):
        if folder or consumers:
            what = "a capture_dir" if folder else "consumers"
            raise SpecError(
                f"captures of vLLM's requests go to files or consumers, and the spec has {what} and captures nothing; "
                "name hooks in capture"
            )
        return
    looked_at = consumers or (bool(spec.overrides or controllers) and not _logs(spec))
    if not (folder or looked_at):
        raise SpecError(
            "captures of vLLM's requests go to files or consumers, and the spec has no capture_dir and no consumers; "
            "name a folder"
        )


def _plain(given: Mapping[str, Any]) -> dict[str, Any]:
    """The spec's part of an entry."""
    if isinstance(given.get("saes"), Mapping):
        raise SpecError(
            "saes is the number of whole autoencoders that a site has room for; name autoencoders in the key "
            "'autoencoders' of additional_config, as steer_compile.vllm.engine_args(spec, saes={...}) does"
        )
    return {key: value for key, value in given.items() if key not in OWN_KEYS}


def _check_reach(spec: SteerSpec, controllers: bool) -> None:
    """Refuse what nothing in an engine could reach, rather than compile it in for nothing, and packed captures."""
    if spec.capture_rows:
        raise SpecError(
            f"capture_rows={spec.capture_rows}: captures of vLLM's requests are dense in the graph, and each request's "
            "own rows are picked from them; leave capture_rows out"
        )
    patched = next((selection.hook for selection in spec.steer if "patch" in selection.ops), None)
    if patched is not None:
        raise SpecError(
            f"the spec has the op family 'patch' at {patched}, which vLLM's requests cannot use; leave it out, and "
            "patch a compiled model of plain PyTorch (steer_backend)"
        )
    scored = next((selection.hook for selection in spec.steer if "score" in selection.ops), None)
    if scored is not None and not controllers:
        raise SpecError(
            f"the spec has the op family 'score' at {scored}, and no controller reads scores; name one in controllers, "
            "or leave the family out"
        )


def _saes(given: object, spec: SteerSpec, root: str) -> tuple[SAESpec, ...]:
    """The engine's autoencoders, and that the spec can do what they need; with a root they may all come later."""
    families = {op for selection in spec.steer for op in selection.ops}
    if "sae_log" in families and spec.overrides:
        raise SpecError(
            f"the spec has the op family 'sae_log' and overrides={spec.overrides}, and tokens that read an override's "
            "row are not logged; leave one of them out, or capture rows and encode them (steer_compile.sae.features)"
        )
    if "sae_full" in families and spec.sae_tokens < spec.max_tokens:
        raise SpecError(
            f"sae_tokens={spec.sae_tokens}, and a step may have {spec.max_tokens} tokens, all of which requests may "
            "want decoded; leave sae_tokens out, or lower max_num_batched_tokens"
        )
    found = sae_specs(given)
    reads = bool(families & {"sae", "sae_full"})
    if found and not reads:
        raise SpecError(
            f"saes names {found[0].name!r}, and the spec has neither 'sae' nor 'sae_full' in its ops; add one"
        )
    if reads and not (found or root):
        raise SpecError(
            "the spec has the op families sae or sae_full and no autoencoders; name some (saes of engine_args, "
            "autoencoders in additional_config), or give vector_root, the folder from which an operator may attach "
            "them to the running engine"
        )
    return found


def _folder(name: str, given: object) -> str:
    if not isinstance(given, str) or (given and not Path(given).is_dir()):
        raise SpecError(f"{name}={given!r} is no folder; give the path of one")
    return given


def _files(vectors: object) -> tuple[tuple[str, str], ...]:
    if not isinstance(vectors, Mapping) or not all(isinstance(path, str) for path in vectors.values()):
        raise SpecError(f"vectors={vectors!r} names no files; give {{name: path of a safetensors file}}")
    missing = [path for path in vectors.values() if not Path(path).is_file()]
    if missing:
        raise SpecError(f"vectors: no file {missing[0]}; give the path of a safetensors file")
    return tuple(sorted((str(name), path) for name, path in vectors.items()))


def engine_args(
    spec: SteerSpec,
    vectors: Mapping[str, str | Path] | None = None,
    vector_root: str | Path = "",
    capture_dir: str | Path = "",
    controllers: Mapping[str, Mapping[str, Any]] | None = None,
    consumers: Mapping[str, Mapping[str, Any]] | None = None,
    saes: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Keyword arguments for ``vllm.LLM`` or ``AsyncEngineArgs`` that switch steering on.

    Args:
        spec: what may be steered. Its ``max_tokens`` has no part in it.
        vectors: named vector sets for requests: name to safetensors file.
        vector_root: folder whose vector files and autoencoders an operator may name by path while the engine runs.
            Needed where the spec has ``sae`` or ``sae_full`` and ``saes`` names none.
        capture_dir: folder for captured rows; needed where the spec captures, or logs features, and nothing but
            requests reads that.
        controllers: controllers of dynamic steering: name to ``{"class": "module:Class", "args": {...}}``, of which
            every process of the engine makes one. Code of the operator's; requests cannot name any.
        consumers: where captured rows of requests may go beside files: name to ``{"consumer": "parquet", "options":
            {...}}``, as `steer_compile.capture.consumer.make_consumer` takes them.
        saes: autoencoders whose features requests may steer: name to ``{"path": folder, "features": [...], "whole":
            ..., "sae": ..., "site": ..., "options": {...}}`` (`SAESpec`).

    Raises:
        SpecError: a vector file or a folder that is not there, or controllers or consumers of another form.
    """
    plain = {key: value for key, value in spec.to_dict().items() if key != "max_tokens"}
    files = dict(_files({name: str(path) for name, path in (vectors or {}).items()}))
    more: dict[str, Any] = {"vectors": files} if files else {}
    folders = {"vector_root": vector_root, "capture_dir": capture_dir}
    more |= {name: _folder(name, str(path)) for name, path in folders.items() if path}
    if controllers:
        more["controllers"] = to_data(controller_specs(controllers))
    if saes:
        more["autoencoders"] = {spec.name: spec.to_data() for spec in sae_specs(saes)}
    if consumers:
        more["consumers"] = {spec.name: spec.to_data() for spec in consumer_specs(consumers)}
    return {"additional_config": {KEY: {**plain, **more}}}


def cli_config(spec: SteerSpec, **more: Any) -> str:
    """The same for ``vllm serve --additional-config``; ``more`` as in `engine_args`."""
    return json.dumps(engine_args(spec, **more)["additional_config"])


def load_vectors(path: str) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file, named ``layers.3.post_block``."""
    return load_file(path)


@cache
def build() -> str:
    """Digest of this package's code, which is part of an engine's compile-cache key."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
