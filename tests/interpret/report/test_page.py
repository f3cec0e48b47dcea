"""The page in a browser: nothing is fetched, nothing goes wrong, all can be reached by pointer and by keyboard."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from tests.interpret.report.synthetic import findings
from vlmoe.interpret.report import build

DRIFT = {"1/vision": {"changed": 0.8, "matched": 0.4, "tokens": 128}}
# What the pages show: every shape that findings come in.
PAGES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "demo": lambda: [findings()],
    "two runs": lambda: [findings(), findings(seed=3, title="other") | {"drift": DRIFT}],
    "other models": lambda: [findings(), findings(1, 4, modalities=("",), title="other", history=False)],
    "60 layers of 64": lambda: [findings(60, 64, 8, modalities=("",), kinds=("pair", "text"), history=False)],
    "one expert": lambda: [findings(1, 1, 1)],
    "no samples": lambda: [findings(shown=0)],
    "text only": lambda: [findings(modalities=("text",), kinds=("text",))],
    "bare": lambda: [{k: findings(1)[k] for k in ("title", "sites", "use", "experts", "samples")}],
    "no ablation": lambda: [findings(ablation=False, history=False)],
}


class Reader:
    """A tab that notes what goes wrong in it, and everything that it asks for."""

    def __init__(self, browser: Any, file: Path, width: int = 1280, height: int = 800, **options: Any) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height}, offline=True, **options)
        self.context.set_default_timeout(300_000)  # a busy machine is no failure
        self.tab, self.file = self.context.new_page(), file
        self.wrong: list[str] = []
        self.asked: list[str] = []
        self.tab.on("console", lambda message: self.wrong.append(message.text))
        self.tab.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.tab.on("dialog", self.dismiss)
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.open("overview")

    def dismiss(self, dialog: Any) -> None:
        self.wrong.append(dialog.message)
        dialog.dismiss()

    def open(self, where: str) -> None:
        """From the address bar: a page of its own."""
        self.tab.goto("about:blank")
        self.tab.goto(f"file://{self.file}#{where}")
        self.tab.wait_for_selector("main h2")

    def go(self, where: str) -> None:
        """Within the page, as by a link."""
        self.tab.evaluate("where => { location.hash = where }", where)
        self.tab.wait_for_selector(f'#tabs a[aria-current=page][href="#{where.split("/")[0]}"]')

    def heading(self) -> str:
        return str(self.tab.inner_text("main h2"))

    def overflow(self) -> int:
        return int(self.tab.evaluate("document.documentElement.scrollWidth - window.innerWidth"))

    def address(self) -> str:
        return str(self.tab.evaluate("location.hash"))

    def focused(self) -> str:
        return str(
            self.tab.evaluate("document.activeElement.getAttribute('aria-label') || document.activeElement.innerText")
        )

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Name -> the page, built when it is first asked for."""
    folder = tmp_path_factory.mktemp("pages")

    def built(name: str) -> Path:
        file = folder / f"{name.replace(' ', '-')}.html"
        if not file.exists():
            runs = PAGES[name]()
            build(runs[0], file, runs[1] if len(runs) > 1 else None)
        return file

    return built


@pytest.fixture
def read(browser: Any, files: Callable[[str], Path]) -> Iterator[Callable[..., Reader]]:
    opened: list[Reader] = []

    def reader(name: str = "demo", **options: Any) -> Reader:
        opened.append(Reader(browser, files(name), **options))
        return opened[-1]

    yield reader
    for one in opened:
        one.context.close()
        assert not one.wrong
        assert all(url.startswith((f"file://{one.file}", "data:", "about:blank")) for url in one.asked), one.asked


# ------------------------------------------------------------------------------------------------------ all, everywhere
@pytest.mark.parametrize("name", PAGES)
def test_every_view_opens_without_an_error_or_a_request(read: Callable[..., Reader], name: str) -> None:
    page = read(name)
    tabs = page.tab.eval_on_selector_all("#tabs a", "links => links.map(a => a.getAttribute('href'))")
    assert len(tabs) >= 6
    for tab in tabs:
        page.tab.click(f'#tabs a[href="{tab}"]')
        page.tab.wait_for_selector(f'#tabs a[aria-current=page][href="{tab}"]')
        text = page.tab.inner_text("main")
        assert not re.search(r"\b(undefined|NaN|Infinity|null)\b|\[object", text), text


@pytest.mark.parametrize("name", ["demo", "two runs", "60 layers of 64", "one expert"])
def test_no_view_is_wider_than_a_small_phone(read: Callable[..., Reader], name: str) -> None:
    page = read(name, width=360, height=740)
    for view in page.tab.eval_on_selector_all("#tabs a", "links => links.map(a => a.hash.slice(1))"):
        page.go(view)
        assert page.overflow() <= 0, view


def test_the_dark_scheme_has_a_dark_page(read: Callable[..., Reader]) -> None:
    light, dark = (read("demo", color_scheme=scheme) for scheme in ("light", "dark"))
    shade = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b)"
    )
    assert dark.tab.evaluate(shade) < 150 < 600 < light.tab.evaluate(shade)


def test_hostile_words_are_shown_as_words(read: Callable[..., Reader], tmp_path: Path, browser: Any) -> None:
    run = findings(title="<img src=x onerror=alert(1)>")
    run["samples"][0]["tokens"][0] = "</script><script>alert(2)</script>"
    run["experts"]["1/text"][0]["values"][0]["value"] = "<b>bold</b>"
    page = Reader(browser, build(run, tmp_path / "hostile.html"))
    assert page.heading() == "<img src=x onerror=alert(1)>"
    page.open("samples/0")
    assert "</script><script>alert(2)</script>" in page.tab.inner_text(".tokens")
    page.open("expert/1%2Ftext/0")
    assert "<b>bold</b>" in page.tab.inner_text("main")
    assert not page.wrong
    page.context.close()


# -------------------------------------------------------------------------------------------------------------- experts
def test_clicking_an_expert_in_the_heat_map_shows_its_page(read: Callable[..., Reader]) -> None:
    page = read()
    page.go("use")
    page.tab.click('a[aria-label^="Layer 3 · vision, expert 5"]')
    page.tab.wait_for_selector("text=What it takes")
    assert page.heading() == "Layer 3 · vision · expert 5"
    assert page.address() == "#expert/3%2Fvision/5"
    page.tab.go_back()
    page.tab.wait_for_selector("text=Balance in numbers")


def test_an_experts_address_opens_its_page(read: Callable[..., Reader]) -> None:
    page = read()
    page.open("expert/1%2Ftext/2")
    assert page.heading() == "Layer 1 · text · expert 2"
    shown = findings()["experts"]["1/text"][2]
    text = page.tab.inner_text("main")
    assert f"{100 * shown['share']:.0f}% of the tokens" in text
    assert shown["values"][0]["value"] in text and "95% interval" in text
    assert len(page.tab.query_selector_all(".whiskers tbody tr")) == 1 + len(shown["ablation"]["by_factor"])
    page.open("expert/9%2Fnone/999")  # an address of another report
    assert page.heading() == "Layer 1 · vision · expert 7"


def test_arrow_keys_go_from_expert_to_expert(read: Callable[..., Reader]) -> None:
    page = read()
    page.open("expert/1%2Fvision/0")
    page.press("ArrowRight")
    expect(page.tab.locator("h2").first).to_have_text(re.compile(r"expert 1$"))
    page.press("ArrowLeft")
    expect(page.tab.locator("h2").first).to_have_text(re.compile(r"expert 0$"))
    page.tab.click("text=Next ▶")
    expect(page.tab.locator("h2").first).to_have_text(re.compile(r"expert 1$"))
    assert page.focused() == "Next ▶"  # a second click needs no new aim
    page.tab.select_option("#site-picker", "3/text")
    expect(page.tab.locator("h2").first).to_have_text(re.compile(r"^Layer 3"))


def test_a_patch_of_an_expert_leads_to_its_sample(read: Callable[..., Reader]) -> None:
    page = read()
    page.open("expert/1%2Fvision/3")
    page.tab.click(".crops a")
    page.tab.wait_for_selector(".map .patch")
    assert page.address().startswith("#samples/")


# -------------------------------------------------------------------------------------------------------------- samples
def layer_now(page: Reader) -> str:
    return str(page.tab.inner_text("#layer-now").split(" (")[0])


def experts_on_patches(page: Reader) -> list[int]:
    return [int(x) for x in page.tab.eval_on_selector_all(".map .patch b", "all => all.map(b => b.textContent)")]


def test_layers_are_stepped_through_with_buttons_and_keys(read: Callable[..., Reader]) -> None:
    page, sample = read(), findings()["samples"][0]
    first = {layer: [r[0] for r in sample["routes"][f"{layer}/vision"]["vision"]] for layer in (1, 3)}
    page.open("samples")
    assert layer_now(page) == "Layer 1" and experts_on_patches(page) == first[1]
    page.tab.click("text=Next layer ▶")
    assert layer_now(page) == "Layer 3" and experts_on_patches(page) == first[3]
    assert page.tab.is_disabled("text=Next layer ▶")
    page.press("ArrowLeft")
    assert layer_now(page) == "Layer 1" and experts_on_patches(page) == first[1]
    page.press("ArrowRight", "ArrowRight")
    assert layer_now(page) == "Layer 3"
    assert page.address() == "#samples/0/3"
    page.tab.click("#tabs >> text=Use")
    page.tab.go_back()  # steps leave no entries behind: one step back is the view before
    page.tab.wait_for_selector("#layer-now")
    assert layer_now(page) == "Layer 3"


def test_a_patch_tells_expert_and_gate_to_pointer_and_focus(read: Callable[..., Reader]) -> None:
    page, sample = read(), findings()["samples"][0]
    page.open("samples/0/1")
    route, gate = sample["routes"]["1/vision"]["vision"][6], sample["gates"]["1/vision"]["vision"][6]
    patch = page.tab.locator(".map .patch").nth(6)
    patch.hover()
    tip = page.tab.inner_text("#tip")
    assert (
        f"row 2, column 3 (hidden from the model): expert {route[0]} with gate {gate:.3g}, then expert {route[1]}"
        in tip
    )
    page.tab.locator(".map .patch").nth(0).focus()
    page.press("ArrowDown", "ArrowRight", "ArrowRight")
    assert page.focused() in tip
    page.press("Enter")
    assert f"Open expert {route[0]}" in page.tab.inner_text(".readout")
    page.tab.click(f".readout >> text=Open expert {route[0]}")
    page.tab.wait_for_selector("text=What it takes")
    assert page.heading() == f"Layer 1 · vision · expert {route[0]}"


def test_words_carry_the_number_of_their_expert(read: Callable[..., Reader]) -> None:
    page, sample = read(), findings()["samples"][2]
    page.open("samples/2/1")
    shown = page.tab.eval_on_selector_all(
        ".token", "all => all.map(t => [t.firstChild.textContent, t.querySelector('b').textContent])"
    )
    assert shown == [[w, str(r[0])] for w, r in zip(sample["tokens"], sample["routes"]["1/text"]["text"], strict=True)]
    assert len(page.tab.query_selector_all(".token.covered")) == len(sample["hidden"])
    page.tab.select_option("#rank", "1")
    second = page.tab.eval_on_selector_all(".token b", "all => all.map(b => Number(b.textContent))")
    assert second == [r[1] for r in sample["routes"]["1/text"]["text"]]


def test_a_token_of_the_whole_image_is_no_patch(browser: Any, tmp_path: Path) -> None:
    run = findings()
    run["samples"][0]["routes"]["1/vision"]["vision"].insert(0, [7, 2])
    page = Reader(browser, build(run, tmp_path / "whole.html"))
    page.open("samples/0/1")
    assert experts_on_patches(page) == [r[0] for r in findings()["samples"][0]["routes"]["1/vision"]["vision"]]
    assert "Token of the whole image: expert 7" in page.tab.inner_text("main")
    page.context.close()


def test_where_no_router_decides_the_page_says_so(browser: Any, tmp_path: Path) -> None:
    run = findings()
    del run["samples"][0]["routes"]["3/vision"]
    page = Reader(browser, build(run, tmp_path / "dense.html"))
    page.open("samples/0/3")
    assert "no router decides for this image" in page.tab.inner_text("main")
    page.context.close()


# ------------------------------------------------------------------------------------------------------------- keyboard
def test_the_keyboard_reaches_the_content_the_tabs_and_the_heat_map(read: Callable[..., Reader]) -> None:
    page = read()
    page.press("Tab")
    assert page.focused() == "Skip to the content"
    page.press("Enter")
    assert page.tab.evaluate("document.activeElement.id") == "main"
    page.open("overview")
    page.press("Tab", "Tab", "Tab", "Tab")  # skip link, larger text, overview, use
    assert page.focused() == "Use"
    page.press("Enter")
    page.tab.wait_for_selector("text=Balance in numbers")
    page.tab.locator(".heat a").first.focus()
    before = page.focused()
    page.press("ArrowDown", "ArrowRight", "ArrowRight")
    assert before.startswith("Layer 1 · vision, expert 0") and page.focused().startswith("Layer 3 · vision, expert 2")
    page.press("Tab")  # the whole map is one stop
    assert not page.focused().startswith("Layer 3 · vision")
    page.press("Shift+Tab", "Enter")
    page.tab.wait_for_selector("text=What it takes")
    assert page.heading() == "Layer 3 · vision · expert 2"


def test_larger_text_is_larger(read: Callable[..., Reader]) -> None:
    page = read()
    size = "parseFloat(getComputedStyle(document.documentElement).fontSize)"
    before = page.tab.evaluate(size)
    page.tab.click("text=Larger text")
    assert page.tab.evaluate(size) > 1.15 * before
    assert page.tab.get_attribute("button:has-text('Larger text')", "aria-pressed") == "true"


# ------------------------------------------------------------------------------------------------------------ the rest
def test_a_flow_is_followed_from_its_bar(read: Callable[..., Reader]) -> None:
    page = read()
    page.open("paths/text")
    links = [link for link in findings()["paths"]["text"]["links"] if link["from"] == ["1/text", 0]]
    page.tab.locator(".flow .node").first.focus()
    assert "Layer 1 · text, expert 0: serves" in page.tab.inner_text("#flow-readout")
    assert len(page.tab.query_selector_all(".flow path.on")) == len(links) > 0


def test_the_slider_reads_a_step_of_training(read: Callable[..., Reader]) -> None:
    page, history = read(), findings()["history"]
    page.open("history")
    page.tab.focus("#step")
    page.press("Home")
    assert "step 20" in page.tab.inner_text(".stick")
    top = history["sites"]["1/vision"]["max_load"][0]
    assert f"Busiest expert takes {top:.1f}× an even share" in page.tab.inner_text(".multiples")


def test_causes_and_information_of_a_chosen_router(read: Callable[..., Reader]) -> None:
    page = read()
    page.open("agreement/3%2Ftext")
    assert f"{findings()['agreement']['3/text']['spearman']:.2f}" in page.tab.inner_text("main")
    assert page.tab.input_value("#site-picker") == "3/text"
    page.open("information")
    page.tab.select_option("#site-picker", "3/text")
    expect(page.tab).to_have_url(re.compile(r"#information/3%2Ftext$"))
    row = findings()["information"]["3/text"]["word_class"]
    assert f"{row['bits']:.3g}" in page.tab.inner_text(".data")


def test_two_runs_stand_side_by_side(read: Callable[..., Reader]) -> None:
    page = read("two runs")
    page.tab.click("#tabs >> text=A and B")
    page.tab.wait_for_selector("text=Two runs side by side")
    text = page.tab.inner_text("main")
    assert "The same tokens, other experts" in text and "40%" in text
    assert len(page.tab.query_selector_all(".map")) == 2
    a, b = findings(), findings(seed=3)
    shown = experts_on_patches(page)
    assert shown == [r[0] for run in (a, b) for r in run["samples"][0]["routes"]["1/vision"]["vision"]]
    page.tab.click("main a[href='#b/expert/3%2Fvision/2']")
    page.tab.wait_for_selector("text=What it takes")
    assert page.tab.inner_text("#run-title").endswith("other")
    assert f"{100 * b['use']['3/vision']['share'][2]:.1f}% of the tokens" in page.tab.inner_text("main")
    page.tab.click("text=A: synthetic")
    expect(page.tab.locator("#run-title")).to_have_text(re.compile(r"synthetic$"))
    assert page.address() == "#expert/3%2Fvision/2"


def test_a_large_model_is_stepped_through(read: Callable[..., Reader]) -> None:
    page = read("60 layers of 64")
    page.open("use")
    assert len(page.tab.query_selector_all(".heat tbody tr")) == 60
    page.tab.locator(".heat a").nth(59 * 64 + 63).click()
    page.tab.wait_for_selector("text=What it takes")
    assert page.heading() == "Layer 119 · expert 63"
    page.open("samples")
    for _ in range(5):
        page.press("ArrowRight")
    assert layer_now(page) == "Layer 11"
    page.tab.fill("input[aria-label=Layer]", "59")
    assert layer_now(page) == "Layer 119"
    page.open("paths/vision/20")
    assert "Layers 41 to 51" in page.tab.inner_text("main")
    page.tab.click("text=Later layer ▶")
    page.tab.wait_for_selector("text=Layers 43 to 53")
