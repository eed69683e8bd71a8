"""Decision functions of monitors, hidden units and memory, without a model: what lies in the banks, and refusals."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from steer_compile import Monitor, Runtime, Steering, SteerSpec
from steer_compile.errors import SiteNotFound, SpecError, TooManyTokens, VectorError
from steer_compile.runtime.gates import Hidden
from steer_compile.spec import OP_FAMILIES
from tests.runtime.bank_shapes import SEQUENCES, SITE, WIDTH
from tests.runtime.test_families import axis, make, state

USES: dict[str, Callable[[Runtime], object]] = {
    "memory": lambda r: r.set_monitor(SITE, Monitor(axis(0), 1.0, kind="step", low=0.5)),
    "mlp": lambda r: r.set_monitor(SITE, Monitor(axis(0), hidden=Hidden(axis(0)[None], [0.5], [2.0]))),
}


@pytest.mark.parametrize("family", ["memory", "mlp"])
def test_what_a_monitor_needs_in_addition_is_asked_for_in_the_spec(family: str) -> None:
    runtime = make(tuple(op for op in OP_FAMILIES if op != family))
    before = state(runtime)
    with pytest.raises(SiteNotFound, match=f"no op family '{family}'"):
        USES[family](runtime)
    assert state(runtime) == before
    with pytest.raises(SpecError, match="cross_layer"):
        SteerSpec(steer="post_block", ops=("monitor", family))
    with pytest.raises(SpecError, match="needs a probe"):
        SteerSpec(steer="post_block", ops=("add", family), cross_layer=True)


def test_hidden_units_and_memory_lie_in_their_banks() -> None:
    runtime = make()
    units = Hidden(torch.stack([axis(0), axis(1)]), [0.5, -0.5], [2.0, 3.0])
    runtime.sites.set_monitor(SITE, Monitor(axis(2), 1.0, kind="step", low=0.25, hidden=units, clamps=True), True)
    tables = runtime.tables
    assert tables.view("probe_set", SITE).tolist() == [[1.0, 1.0, 2.0, 0.25, 1.0, 1.0, 1.0, 1.0]]
    assert torch.equal(tables.view("mlp", SITE), torch.stack([axis(0), axis(1), torch.zeros(WIDTH)]))
    assert tables.view("mlp_set", SITE).tolist() == [[0.5, 2.0], [-0.5, 3.0], [0.0, 0.0]]
    runtime.before_call(0, 3, 2)
    assert tables.slot[:6].tolist() == [0, 1, 0, 2, 0, 3]
    runtime.before_call(0, 3, 1)
    assert tables.slot[:3].tolist() == [1, 2, 3]
    with pytest.raises(TooManyTokens, match=f"sequences={SEQUENCES}"):
        runtime.before_call(0, SEQUENCES + 1, 1)
    with pytest.raises(VectorError, match="hidden units"):
        runtime.sites.set_monitor(SITE, Monitor(axis(0), hidden=Hidden([axis(0).tolist()] * 4, [0.0] * 4, [1.0] * 4)))
    with pytest.raises(VectorError, match="which a row's monitor cannot have"):
        runtime.register(Steering(monitors={SITE: Monitor(axis(0), hidden=units)}))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"kind": "cubic"}, "kind 'cubic' is unknown"),
        ({"kind": ["step"]}, "is unknown"),
        ({"low": 0.5}, "no bounds"),
        ({"kind": "step", "high": 2.0}, "no high"),
        ({"kind": "step", "low": 2.0}, "above its threshold"),
        ({"kind": "line", "low": 2.0, "high": 1.0}, "above high=1.0"),
        ({"kind": "line", "low": math.nan}, "not finite"),
        ({"kind": "line", "low": [1]}, "not finite"),
        ({"clamps": "yes"}, "give true or false"),
        ({"bias": 1.0}, "no 'bias'"),
    ],
)
def test_bad_decision_functions(given: dict[str, Any], text: str) -> None:
    with pytest.raises(VectorError, match=text):
        Monitor(axis(0), **given)
