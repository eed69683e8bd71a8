"""What both model runners share: the rows of the model that a runner built, and the requests that a step begins."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary

from steer_compile.errors import LoweringError, NotSteered
from steer_compile.vllm.model import SteeredModel
from steer_compile.vllm.rows import RequestRows
from steer_compile.vllm.settings import KEY

_ROWS: WeakKeyDictionary[Any, RequestRows] = WeakKeyDictionary()
_ANNOUNCED: dict[int, SteeredModel] = {}


def announce(module: str, config: Any, steered: SteeredModel) -> Any:
    """A runner of a module is building this model; from its first step on it writes rows. Returns the runner's class.

    The module is not imported, as that starts the device: a model is built by a runner that is there.

    Raises:
        LoweringError: the module is not loaded.
    """
    if module not in sys.modules:
        raise LoweringError(f"the model is built outside of {module}, and nothing would write the rows of its tokens")
    _ANNOUNCED[id(config)] = steered
    return vars(sys.modules[module])["GPUModelRunner"]


def rows_of(runner: Any) -> RequestRows | None:
    """A runner's rows, None where its engine has no spec.

    Raises:
        NotSteered: its engine has one, and the model was built without tables.
    """
    rows = _ROWS.get(runner)
    if rows is not None:
        return rows
    if id(runner.vllm_config) in _ANNOUNCED:
        return _ROWS.setdefault(runner, RequestRows(_ANNOUNCED.pop(id(runner.vllm_config)).registry))
    if KEY in (runner.vllm_config.additional_config or {}):
        raise NotSteered(
            "this engine has a spec, and its model was built without tables; no step runs unsteered: report the model "
            "and the version of vLLM"
        )
    return None


def dropped(rows: RequestRows, scheduled: Any) -> None:
    """Rows become free at every step, also at one without tokens, which tells an idle engine what has finished."""
    rows.drop(scheduled.finished_req_ids)
    rows.drop(scheduled.preempted_req_ids or ())


def admitted(rows: RequestRows, requests: Iterable[tuple[str, Any]]) -> None:
    """Rows for requests that begin, begin again or go on with more input, given with their sampling parameters."""
    for request, params in requests:
        rows.admit(request, params.extra_args if params is not None else None)
