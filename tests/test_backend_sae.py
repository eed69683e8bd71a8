"""Features steered in compiled models equal the reference of `steer_compile.sae` in forward hooks in eager mode."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from steer_compile import HookSelection, SAESteering, Steering, SteerSpec, sae, steer_backend
from steer_compile.backend import SteerBackend
from steer_compile.errors import SAEError, SiteNotFound, TableFull, TooManyTokens, UnknownName, VectorError
from steer_compile.sae import SAE, FactorNorm, FeatureClamp, Gated, JumpReLU, LayerNorm, NoNorm, ReLU, TopK
from steer_compile.sae.activation import Activation
from steer_compile.sae.normalise import Normalisation
from steer_compile.torch_compat import compile_count
from tests._models import WIDTH, compiled, edited, gpt2, llama, logits, tokens
from tests.sae._weights import parts

SITE = ("post_block", 0)
COUNT = 40
P = parts(3, WIDTH, COUNT)
CLAMPS = (FeatureClamp(3, 4.0), FeatureClamp(8, -1.5, "add"), FeatureClamp(20, 2.0, only_if_active=True))


def tiny(activation: Activation | None = None, norm: Normalisation | None = None, seed: int = 3, **options: Any) -> SAE:
    own = parts(seed, WIDTH, COUNT)
    given: dict[str, Any] = {"activation": activation or ReLU(), "normalisation": norm or NoNorm(), "site": SITE}
    given |= options
    return SAE(own["W_enc"], own["b_enc"], own["W_dec"], own["b_dec"], **given)


def steering(*ops: str, **options: Any) -> SteerSpec:
    given: dict[str, Any] = {
        "steer": (HookSelection("post_block", "all", ops or ("add", "sae")),),
        "max_tokens": 64,
        "features": 8,
    }
    return SteerSpec(**{**given, **options})


def built(model: Any, inner: str = "eager", *ops: str, **options: Any) -> tuple[Any, SteerBackend]:
    torch.compiler.reset()
    backend = steer_backend(steering(*ops, **options), inner=inner)
    return compiled(model, backend), backend


def delta(made: SAE, clamps: Any = CLAMPS) -> Callable[[Tensor], Tensor]:
    return lambda h: sae.steered_delta(h, made, clamps)


def close(got: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("activation", "norm"),
    [
        (ReLU(), NoNorm()),
        (JumpReLU(P["threshold"]), FactorNorm(0.4)),
        (Gated(P["r_mag"], P["b_mag"]), LayerNorm(1e-5)),
    ],
    ids=["relu", "jumprelu with a factor", "gated with layer norm"],
)
@pytest.mark.parametrize(("make", "inner"), [(llama, "eager"), (gpt2, "inductor")])
def test_delta_equals_forward_hooks(
    make: Callable[[], Any], inner: str, activation: Activation, norm: Normalisation
) -> None:
    model, ids, made = make(), tokens(2, 7), tiny(activation, norm, subtract_b_dec=True)
    plain = logits(model, ids)
    with edited(model, {SITE: delta(made)}):
        expected = logits(model, ids)
    run, backend = built(model, inner)
    backend.runtime.saes.attach("bridge", made, features=(8, 3, 20))
    idle = logits(run, ids)
    close(idle, plain)
    with backend.runtime.steer(features=SAESteering("bridge", CLAMPS)):
        close(logits(run, ids), expected)
    assert torch.equal(logits(run, ids), idle)
    assert (expected - plain).abs().max() > 0.05


def test_rows_and_phases() -> None:
    """Each sequence has its own features, in the phases that it names, behind the global ones."""
    model, ids, made = llama(), tokens(3, 6), tiny()
    run, backend = built(model)
    runtime = backend.runtime
    runtime.saes.attach("bridge", made, features=range(8))
    runtime.set_global(features=[SAESteering("bridge", [FeatureClamp(0, 3.0)], phase="prefill")])
    own = Steering(features=SAESteering("bridge", [FeatureClamp(5, 1.0, "add")]))
    late = Steering(features=SAESteering("bridge", [FeatureClamp(6, 2.0)], phase="decode"))
    shared, both = [FeatureClamp(0, 3.0)], [FeatureClamp(0, 3.0), FeatureClamp(5, 1.0, "add")]
    with runtime.steer(rows=[own, None, late]):
        got = logits(run, ids)
        after = logits(run, ids[:, -1:])

    def expected(given: Tensor, by_row: list[Any]) -> Tensor:
        def edit(h: Tensor) -> Tensor:
            return torch.stack([sae.steered_delta(row, made, clamps) for row, clamps in zip(h, by_row, strict=True)])

        with edited(model, {SITE: edit}):
            return logits(model, given)

    close(got, expected(ids, [both, shared, shared]))
    close(after, expected(ids[:, -1:], [[FeatureClamp(5, 1.0, "add")], [], [FeatureClamp(6, 2.0)]]))


def test_vectors_and_features_compose_in_order() -> None:
    """A vector is added before features are read."""
    model, ids, made, vector = llama(), tokens(2, 5), tiny(), torch.randn(WIDTH)
    run, backend = built(model)
    backend.runtime.saes.attach("bridge", made, features=(3, 8, 20))
    with edited(model, {SITE: lambda h: sae.steered_delta(h + vector, made, CLAMPS)}):
        expected = logits(model, ids)
    with backend.runtime.steer({SITE: vector}, features=SAESteering("bridge", CLAMPS)):
        close(logits(run, ids), expected)


def test_attach_and_detach_compile_nothing() -> None:
    model, ids = llama(), tokens(2, 5)
    run, backend = built(model)
    logits(run, ids)
    compiled_before, runtime = compile_count(), backend.runtime
    places = [tensor.data_ptr() for tensor in runtime.tables.tensors]
    for seed, activation in enumerate((ReLU(), JumpReLU(P["threshold"]), Gated(P["r_mag"], P["b_mag"]))):
        made = tiny(activation, LayerNorm() if seed else None, seed=seed)
        runtime.saes.attach("bridge", made, features=(20, 3, 8))
        with edited(model, {SITE: delta(made)}):
            expected = logits(model, ids)
        with runtime.steer(features=SAESteering("bridge", CLAMPS)):
            close(logits(run, ids), expected)
            with pytest.raises(SAEError, match="in use by 2 rows"):
                runtime.saes.detach("bridge")
        runtime.saes.detach("bridge")
    assert compile_count() == compiled_before
    assert [tensor.data_ptr() for tensor in runtime.tables.tensors] == places
    close(logits(run, ids), logits(model, ids))


def test_several_autoencoders_share_a_site() -> None:
    model, ids, one, two = llama(), tokens(2, 5), tiny(), tiny(JumpReLU(P["threshold"]), FactorNorm(2.0), seed=9)
    run, backend = built(model)
    backend.runtime.saes.attach("one", one, features=(3, 8, 20))
    backend.runtime.saes.attach("two", two, features=(3, 1))
    other = [FeatureClamp(1, 1.0, "add"), FeatureClamp(3, 0.5)]

    def edit(h: Tensor) -> Tensor:  # both read the same value, and their steps add up
        return h + (sae.steered_delta(h, one, CLAMPS) - h) + (sae.steered_delta(h, two, other) - h)

    with edited(model, {SITE: edit}):
        expected = logits(model, ids)
    with backend.runtime.steer(features=[SAESteering("one", CLAMPS), SAESteering("two", other)]):
        close(logits(run, ids), expected)


REFUSED: dict[str, tuple[Callable[[Any], object], type[Exception], str]] = {
    "no features": (lambda s: s.attach("x", tiny()), SAEError, "nothing of 'x' would be loaded"),
    "no list": (lambda s: s.attach("x", tiny(), 5), SAEError, "features=5 of 'x' is no list"),
    "a text": (lambda s: s.attach("x", tiny(), "12"), SAEError, "features='12' of 'x' is no list"),
    "a taken name": (lambda s: s.attach("bridge", tiny(), [1]), SAEError, "'bridge' of an autoencoder is taken"),
    "out of range": (lambda s: s.attach("x", tiny(), [40]), SAEError, "no feature 40; its features are 0 to 39"),
    "twice": (lambda s: s.attach("x", tiny(), [1, 1]), SAEError, "given twice"),
    "full": (lambda s: s.attach("x", tiny(), range(6)), TableFull, "3 of features=8 .* taken by bridge"),
    "top k": (lambda s: s.attach("x", tiny(TopK(3)), [1]), SAEError, "whole=True at a site with .*sae_full"),
    "batch": (lambda s: s.attach("x", tiny(sae.BatchTopK(3)), [1]), SAEError, "depend on the batch"),
    "no family": (lambda s: s.attach("x", tiny(), whole=True), SiteNotFound, "no op family 'sae_full'"),
    "another site": (lambda s: s.attach("x", tiny(), [1], site=("pre_attn", 0)), SAEError, "belongs to layers.0.post"),
    "no site": (lambda s: s.attach("x", tiny(site=None), [1]), SAEError, "does not say which site"),
    "absent layer": (lambda s: s.attach("x", tiny(site=("post_block", 9)), [1]), SiteNotFound, "layers.9.post_block"),
    "no SAE": (lambda s: s.attach("x", object(), [1]), SAEError, "is a object"),
    "absent name": (lambda s: s.detach("x"), UnknownName, "attached are bridge"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_leave_everything_as_it_was(case: str) -> None:
    call, kind, text = REFUSED[case]
    run, backend = built(llama())
    logits(run, tokens())
    backend.runtime.saes.attach("bridge", tiny(), features=(8, 3, 20))
    before, tensors = backend.runtime.saes.attached, [t.clone() for t in backend.runtime.tables.tensors]
    with pytest.raises(kind, match=text):
        call(backend.runtime.saes)
    assert backend.runtime.saes.attached == before
    assert all(torch.equal(a, b) for a, b in zip(tensors, backend.runtime.tables.tensors, strict=True))


def test_another_width_is_refused() -> None:
    run, backend = built(llama())
    logits(run, tokens())
    own = parts(0, WIDTH + 2, COUNT)
    wide = SAE(own["W_enc"], own["b_enc"], own["W_dec"], own["b_dec"], ReLU(), site=SITE)
    with pytest.raises(VectorError, match=r"layers.0.post_block has 34 numbers but the site is 32 wide"):
        backend.runtime.saes.attach("wide", wide, features=[1])
    assert not backend.runtime.saes.attached


def test_what_is_no_clamp_is_refused_where_it_is_made() -> None:
    for wrong in (5, "3", [3], [None]):
        with pytest.raises(SAEError, match=r"holds a \w+; give FeatureClamp"):
            SAESteering("bridge", wrong)  # type: ignore[arg-type]
    with pytest.raises(SAEError, match="only_if_active='no'; give true or false"):
        FeatureClamp(3, 1.0, only_if_active="no")  # type: ignore[arg-type]
    with pytest.raises(SAEError, match="log='yes'; give true or false"):
        SAESteering("bridge", CLAMPS, log="yes")  # type: ignore[arg-type]
    assert SAESteering("bridge", CLAMPS[0]).clamps == CLAMPS[:1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "kind", "text"),
    [
        ([SAESteering("bridge", [FeatureClamp(5, 1.0)])], SAEError, "feature 5 of 'bridge' is not loaded .* 8, 3, 20"),
        ([SAESteering("bridge", [FeatureClamp(77, 1.0)])], SAEError, "no feature 77; its features are 0 to 39"),
        ([SAESteering("tower", [FeatureClamp(5, 1.0)])], UnknownName, "'tower' is attached; attached are bridge"),
        ([SAESteering("bridge", mode="reconstruct")], SAEError, "not attached as a whole"),
        ([SAESteering("bridge", CLAMPS[:1]), SAESteering("bridge", CLAMPS)], SAEError, "feature 3 of 'bridge' .*twice"),
        (["bridge"], SAEError, "features hold a str"),
    ],
)
def test_bad_steering_is_refused_and_takes_no_row(given: Any, kind: type[Exception], text: str) -> None:
    run, backend = built(llama())
    logits(run, tokens())
    backend.runtime.saes.attach("bridge", tiny(), features=(8, 3, 20))
    with pytest.raises(kind, match=text):
        backend.runtime.register(Steering(features=given))
    assert backend.runtime.rows_in_use == 0


def test_a_request_may_not_clamp_what_everyone_has_clamped() -> None:
    run, backend = built(llama())
    runtime = backend.runtime
    runtime.saes.attach("bridge", tiny(), features=(8, 3, 20))
    handle = runtime.register(Steering(features=SAESteering("bridge", [FeatureClamp(3, 1.0)], phase="decode")))
    shared = SAESteering("bridge", [FeatureClamp(3, 9.0)])
    with pytest.raises(SAEError, match="feature 3 of 'bridge' at layers.0.post_block is clamped twice"):
        runtime.set_global(features=[shared])
    runtime.set_global(features=[SAESteering("bridge", [FeatureClamp(3, 9.0)], phase="prefill")])
    with pytest.raises(SAEError, match="to 9 .* to 2;"):
        runtime.register(Steering(features=SAESteering("bridge", [FeatureClamp(3, 2.0)])))
    runtime.release(handle)
    runtime.set_global(features=[shared])
    with pytest.raises(SAEError, match="in use by 2 rows"):
        runtime.saes.detach("bridge")
    runtime.clear_global()
    runtime.saes.detach("bridge")
    assert torch.isfinite(logits(run, tokens())).all()


FULL = ("add", "sae", "sae_full", "sae_log")
ROOM = {"sae_features": 48, "saes": 2, "sae_tokens": 40, "top_features": 4}


@pytest.mark.parametrize(
    ("activation", "norm"), [(TopK(6), NoNorm()), (JumpReLU(P["threshold"]), LayerNorm())], ids=["topk", "jumprelu"]
)
@pytest.mark.parametrize("mode", ["reconstruct", "keep_error", "delta"])
@pytest.mark.parametrize(("make", "inner"), [(llama, "eager"), (gpt2, "inductor")])
def test_full_equals_forward_hooks(
    make: Callable[[], Any], inner: str, mode: str, activation: Activation, norm: Normalisation
) -> None:
    model, ids, made = make(), tokens(3, 6), tiny(activation, norm)
    run, backend = built(model, inner, *FULL, **ROOM)
    backend.runtime.saes.attach("bridge", made, whole=True)
    idle, before = logits(run, ids), compile_count()
    close(idle, logits(model, ids))

    def edit(h: Tensor) -> Tensor:
        new = sae.steered_reconstruction(h, made, CLAMPS, keep_error=mode != "reconstruct")
        return torch.stack([h[0], new[1], h[2]])

    with edited(model, {SITE: edit}):
        expected = logits(model, ids)
    own = Steering(features=SAESteering("bridge", CLAMPS, mode=mode))
    with backend.runtime.steer(rows=[None, own, None]):
        got = logits(run, ids)
    close(got, expected)
    assert torch.equal(got[[0, 2]], idle[[0, 2]])
    assert (expected[1] - idle[1]).abs().max() > 0.05
    assert compile_count() == before


def test_vectors_delta_and_full_compose_in_order() -> None:
    model, ids, made, other, vector = llama(), tokens(2, 5), tiny(), tiny(TopK(8), seed=7), torch.randn(WIDTH)
    run, backend = built(model, "eager", *FULL, **ROOM)
    backend.runtime.saes.attach("parts", made, features=(3, 8, 20))
    backend.runtime.saes.attach("whole", other, whole=True)

    def edit(h: Tensor) -> Tensor:
        return sae.steered_reconstruction(sae.steered_delta(h + vector, made, CLAMPS), other)

    with edited(model, {SITE: edit}):
        expected = logits(model, ids)
    features = [SAESteering("whole", mode="reconstruct"), SAESteering("parts", CLAMPS)]
    with backend.runtime.steer({SITE: vector}, features=features):
        close(logits(run, ids), expected)


def test_a_call_with_too_many_decoded_tokens_is_refused_and_changes_nothing() -> None:
    run, backend = built(llama(), "eager", *FULL, **{**ROOM, "sae_tokens": 8})
    runtime, ids = backend.runtime, tokens(2, 6)
    runtime.saes.attach("whole", tiny(TopK(4)), whole=True)
    plain = logits(run, ids)
    with pytest.raises(TooManyTokens, match=r"12 tokens .* layers.0.post_block but the spec has sae_tokens=8"):  # noqa: SIM117
        with runtime.steer(features=SAESteering("whole", mode="reconstruct")):
            logits(run, ids)
    assert torch.equal(logits(run, ids), plain)
    own = Steering(features=SAESteering("whole", mode="reconstruct"))
    with runtime.steer(rows=[None, own]):
        assert torch.equal(logits(run, ids)[0], plain[0])
    runtime.set_global(features=[SAESteering("whole", mode="log", phase="prefill")])
    with pytest.raises(TooManyTokens, match="12 tokens"):
        logits(run, ids)


def test_everyones_clamps_of_a_whole_autoencoder_stay_beside_a_requests() -> None:
    model, ids, made = llama(), tokens(2, 5), tiny(TopK(8))
    run, backend = built(model, "eager", *FULL, **ROOM)
    backend.runtime.saes.attach("whole", made, whole=True)
    shared, own = FeatureClamp(3, 5.0), FeatureClamp(8, -4.0, "add")

    def edit(h: Tensor) -> Tensor:
        both = sae.steered_reconstruction(h, made, [shared, own], keep_error=True)
        return torch.stack([both[0], sae.steered_reconstruction(h, made, [shared], keep_error=True)[1]])

    with edited(model, {SITE: edit}):
        expected = logits(model, ids)
    backend.runtime.set_global(features=[SAESteering("whole", [shared])])
    with backend.runtime.steer(rows=[Steering(features=SAESteering("whole", [own])), None]):
        close(logits(run, ids), expected)
    with pytest.raises(SAEError, match="decoded by 'whole' and by 'whole' in one phase, or with and without"):
        backend.runtime.register(Steering(features=SAESteering("whole", [own], mode="reconstruct")))


def test_a_refused_call_begins_no_sink() -> None:
    run, backend = built(llama(), "eager", *FULL, capture=("post_block",), **{**ROOM, "sae_tokens": 8})
    runtime, ids, begun = backend.runtime, tokens(2, 6), list[Any]()
    runtime.saes.attach("whole", tiny(TopK(4)), whole=True)
    logits(run, ids)

    class Watch:
        demand = None

        def begin(self, *given: Any) -> None:
            begun.append(given)

        def take(self, *given: Any) -> None:
            pass

    runtime.sinks.append(Watch())  # type: ignore[arg-type]
    runtime.set_global(features=[SAESteering("whole", mode="reconstruct")])
    with pytest.raises(TooManyTokens):
        logits(run, ids)
    assert not begun
    runtime.clear_global()
    logits(run, ids)
    assert len(begun) == 1


def test_largest_features_of_each_token_are_logged() -> None:
    model, ids, made = llama(), tokens(2, 5), tiny(JumpReLU(P["threshold"]))
    run, backend = built(model, "eager", *FULL, capture=("post_block",), **ROOM)
    backend.runtime.saes.attach("whole", made, whole=True)
    own = Steering(features=SAESteering("whole", mode="log"))
    with backend.runtime.steer(rows=[own, None]), backend.runtime.capture() as log:
        logits(run, ids)
    found = backend.runtime.saes.top_features(SITE)
    exact = made.encode(log[SITE][0]).topk(4)
    torch.testing.assert_close(found.activations[0], exact.values, rtol=1e-4, atol=1e-4)
    assert found.indices.dtype == torch.int64
    active = exact.values > 0
    assert torch.equal(found.indices[0][active], exact.indices[active])
    assert bool((found.indices[0][~active] == -1).all())


@pytest.mark.parametrize("kind", ["sigmoid", "step"])
def test_a_feature_is_a_probe(kind: str) -> None:
    """A monitor made of a feature opens where the feature is active, in the same forward."""
    made = tiny(JumpReLU(P["threshold"]), FactorNorm(0.5), subtract_b_dec=True)
    monitor = sae.feature_monitor(made, 5, kind=kind)
    h = torch.randn(400, WIDTH, generator=torch.Generator().manual_seed(0))
    active = made.encode(h)[:, 5] > 0
    score = h @ monitor.probe
    assert torch.equal(score > monitor.threshold, active)
    assert 20 < int(active.sum()) < 380


def test_features_that_are_no_probes_are_refused() -> None:
    for made, text in ((tiny(TopK(3)), "largest"), (tiny(ReLU(), LayerNorm()), "layer norm")):
        with pytest.raises(SAEError, match=text):
            sae.feature_monitor(made, 1)
    with pytest.raises(SAEError, match="no feature 40"):
        sae.feature_monitor(tiny(), 40)
