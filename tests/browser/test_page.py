"""The page of `steer-compile graph` in a headless Chromium, from a file and with the network off."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from steer_compile import SteerSpec
from steer_compile.debug.draw import draw
from steer_compile.debug.tracing import stage, trace
from steer_compile.debug.webpage import OPEN_LAYERS, page
from tests._toys import make

pytestmark = pytest.mark.browser

CHROMIUM = Path("/usr/bin/chromium")
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip
LAYERS = 5
NAME = "<img src=x onerror=document.title='broken'></script>"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a toy of five layers whose name is hostile."""
    toy = make("prenorm_rmsnorm")
    toy.layers.extend(type(toy)().layers[:2])
    spec = SteerSpec(steer=("post_block",), capture=("post_attn",), max_tokens=64)
    graphs = stage(trace(toy.eval(), {"ids": toy.inputs()[0]}), spec)
    kernels = {"h": ("triton_norm_0",), "linear": ("triton_norm_0", "extern_mm_1")}
    made = tmp_path_factory.mktemp("page") / "page.html"
    made.write_text(page(draw(NAME, graphs, "splice", kernels, ("triton_norm_0", "extern_mm_1"))), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.is_file():
        pytest.fail(f"{CHROMIUM} is not there: apt-get install chromium")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is not there: pip install 'steer-compile[browser]'")
    with sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=str(CHROMIUM), args=list(ARGUMENTS))
        yield started
        started.close()


@pytest.fixture
def view(browser: Any, file: Path) -> Iterator[Any]:
    """The open page. Afterwards it must have logged no error and asked for nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, offline=True)
    opened = context.new_page()
    errors: list[str] = []
    asked: list[str] = []
    opened.on("console", lambda message: errors.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: errors.append(str(error)))
    opened.on("request", lambda request: asked.append(request.url))
    opened.goto(file.as_uri())
    yield opened
    context.close()
    assert errors == []
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]


def open_layers(view: Any) -> list[int]:
    found = view.eval_on_selector_all("details[data-layer][open]", "all => all.map(e => Number(e.dataset.layer))")
    return [int(number) for number in found]


def test_the_header_names_the_model_and_counts(view: Any) -> None:
    assert view.title() == NAME
    assert view.inner_text("h1") == NAME
    assert view.locator("img").count() == 0
    facts = view.inner_text("#facts")
    for text in (f"{LAYERS} layers", f"{LAYERS} steered", f"{LAYERS} captured", "1 graph", "2 kernels", "after splice"):
        assert text in facts
    assert open_layers(view) == list(range(OPEN_LAYERS))


def test_enter_jumps_to_what_was_searched(view: Any) -> None:
    view.keyboard.press("/")
    view.keyboard.type("layers.4.post_b")
    assert view.inner_text("#hits li[aria-selected=true]").startswith("layers.4.post_block")
    view.keyboard.press("Enter")
    assert 4 in open_layers(view)
    assert view.locator("#hits li").count() == 0
    station = view.locator("details[data-layer='4'] .station.picked")
    assert station.count() == 1
    box = station.bounding_box()
    assert box is not None
    assert 0 < box["y"] < 800
    panel = view.inner_text("#panel")
    assert "layers.4.post_block" in panel
    assert "add: by the compiler" in panel


def test_a_node_a_module_and_a_kernel_are_found(view: Any) -> None:
    for word, text in (("gelu_1", "gelu("), ("layers.1.mlp", "layers.1.mlp"), ("extern_mm", "extern_mm_1")):
        view.fill("#search", word)
        view.press("#search", "Enter")
        assert text in view.inner_text("#panel")
        assert view.locator("#map .picked, #map .same").count() > 0
    view.fill("#search", "no such thing")
    assert view.locator("#hits li").count() == 0


def test_a_station_fills_the_panel(view: Any) -> None:
    view.locator("details[data-layer='0'] .station.captured").click()
    panel = view.inner_text("#panel")
    for text in ("layers.0.post_attn", "layers.0.write_0", "f32", "[2, 5, 16]", "capture: by the compiler", "= add("):
        assert text in panel
    assert "call_function[target=operator.add]" in panel
    assert "_toys_base.py" in panel
    view.locator("#panel .links button").first.click()
    assert view.inner_text("#panel") != panel


def test_an_op_and_the_title_of_a_box_fill_the_panel(view: Any) -> None:
    view.locator("details[data-layer='0'] .box.attention .op.hooked").first.click()
    assert "layers.0.attn_in" in view.inner_text("#panel")
    assert "triton_norm_0" in view.inner_text("#panel")
    view.locator("details[data-layer='0'] .box.steer .head").click()
    assert "steer: add" in view.inner_text("#panel h3")
    assert "$steer_bank" in view.inner_text("#panel")


def test_layers_open_and_close(view: Any) -> None:
    view.locator("details[data-layer='4'] > summary").click()
    assert 4 in open_layers(view)
    assert view.locator("details[data-layer='4'] .station").first.is_visible()
    view.click("#close")
    assert open_layers(view) == []
    view.click("#open")
    assert open_layers(view) == list(range(LAYERS))


def test_the_legend_shows_and_hides(view: Any) -> None:
    button = view.locator("#legend button[data-kind=attention]")
    box = "details[data-layer='0'] .box.attention"
    opacity = "element => Number(getComputedStyle(element).opacity)"
    assert view.eval_on_selector(box, opacity) == 1
    button.click()
    assert button.get_attribute("aria-pressed") == "false"
    assert view.eval_on_selector(box, opacity) < 0.5
    button.click()
    assert view.eval_on_selector(box, opacity) == 1


def test_the_keyboard_alone_is_enough(view: Any) -> None:
    view.locator("details[data-layer='0'] .station").first.focus()
    view.keyboard.press("Enter")
    first = view.inner_text("#panel h3")
    view.keyboard.press("ArrowRight")
    assert view.inner_text("#panel h3") != first
    view.keyboard.press("ArrowLeft")
    assert view.inner_text("#panel h3") == first
    view.keyboard.press("Escape")
    assert view.locator("#map .picked").count() == 0
    view.locator("details[data-layer='0'] > summary").focus()
    view.keyboard.press("Enter")
    assert 0 not in open_layers(view)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_both_colour_schemes_can_be_read(view: Any, scheme: str) -> None:
    view.emulate_media(color_scheme=scheme)
    ink, paper = (view.evaluate(f"getComputedStyle(document.body).{name}") for name in ("color", "backgroundColor"))
    light = [sum(int(part) for part in colour[4:-1].split(",")) for colour in (ink, paper)]
    assert abs(light[0] - light[1]) > 400
    assert (light[0] < light[1]) == (scheme == "light")
