"""The demo in a real browser: what a visitor sees, does and is told."""

from __future__ import annotations

import json
import os
import re
import time
from io import BytesIO
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
import pytest
from browser import find
from conftest import HUB, ROOT
from PIL import Image

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = find()
if CHROMIUM is None:
    pytest.skip("no Chromium on this machine: python tests/browser.py", allow_module_level=True)

from steered_moe import demo_html  # noqa: E402
from steered_moe.demo import launch  # noqa: E402
from steered_moe.demo_actions import Actions  # noqa: E402
from steered_moe.problems import problems  # noqa: E402
from steered_moe.question import Answers, Column  # noqa: E402

SWAHILI = next(one for one in problems("embedded") if one.language == "sw")
HOSTILE = '<img src=x onerror="alert(1)"><script>alert(2)</script> ${alert(3)} {{7*7}}'
STRENGTH = "#strength input[type=range]"
WAIT = 60_000  # milliseconds, for a machine that is busy


@pytest.fixture(scope="module")
def address():
    return launch("embedded", prevent_thread_lock=True, quiet=True)[1]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as running:
        chromium = running.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory) -> Path:
    given = os.environ.get("STEERED_MOE_ARTIFACTS")
    folder = Path(given) if given else tmp_path_factory.mktemp("screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="module")
def context(browser):
    """One for all pages: what one has loaded is in the cache of the next."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.fixture
def page(context, address):
    """The open app; at the end: no console error, no page error, no dialog, no foreign host."""
    page = context.new_page()
    page.set_default_timeout(WAIT)
    errors, hosts, dialogs = [], set(), []
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda r: hosts.add(re.sub(r"^(\w+:/*[^/]*).*", r"\1", r.url)))
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    opened(page, address)
    yield page
    page.close()
    assert errors == []
    assert dialogs == []
    assert {host for host in hosts if host.startswith(("http", "ws"))} == {address.rstrip("/")}


def opened(page, url: str) -> None:
    page.goto(url)
    page.locator("#steered img").wait_for(state="attached")  # the last step of loading


def fill(page, prompt: str, english: str = "", answer: str = "") -> None:
    page.locator("#prompt textarea").fill(prompt)
    page.locator("#english textarea").fill(english)
    page.get_by_label("Known answer").fill(answer)


def choose(page, label: str, text: str) -> None:
    page.get_by_label(label, exact=True).click()
    page.get_by_role("option", name=text, exact=True).click()


def number(page, label: str, value: float) -> None:
    box = page.get_by_label(f"number input for {label}")
    box.fill(str(value))
    box.press("Enter")


def ask(page, how=lambda page: page.locator("#run").click()) -> dict[str, str]:
    """Click, wait for the end, and give the columns."""
    page.evaluate(
        "() => document.querySelectorAll('#status .message').forEach(m => m.dataset.old = 1)"
    )
    how(page)
    page.locator("#status .message:not([data-old])", has_text="Done.").wait_for()
    return texts(page)


def texts(page) -> dict[str, str]:
    return {
        section.get_attribute("data-column"): section.locator(".answer").inner_text()
        for section in page.locator("#columns section").all()
    }


def test_three_columns_stream(page, artifacts):
    choose(page, "Examples", f"sw: {SWAHILI.prompt}")
    page.wait_for_function(
        "text => document.querySelector('#prompt textarea').value == text", arg=SWAHILI.prompt
    )
    page.evaluate(
        """() => { window.states = []; new MutationObserver(() => window.states.push(
          [...document.querySelectorAll('#columns .answer')].map(p => p.innerText)))
          .observe(document.querySelector('#columns'), {childList: true, subtree: true,
          characterData: true}) }"""
    )
    columns = ask(page)
    assert list(columns) == ["English, base", "base", "steered"]
    end = tuple(columns.values())
    states = [tuple(state) for state in page.evaluate("window.states") if len(state) == 3]
    between = [state for state in states if any(state) and sum(map(len, state)) < len("".join(end))]
    assert len(set(between)) >= 2, states  # they grew while they were looked at
    assert all(end[i].startswith(state[i]) for state in between for i in range(3))
    assert str(SWAHILI.answer) in columns["English, base"]
    assert page.locator('[data-column="English, base"] footer.right').count() == 1
    assert "per second" in page.locator('[data-column="steered"] footer').inner_text()
    page.screenshot(path=artifacts / "columns.png", full_page=True)


def test_strength_0_gives_identical_columns_and_another_marked_ones(page):
    fill(page, SWAHILI.prompt, SWAHILI.english)
    number(page, "Strength", 0)
    columns = ask(page)
    assert columns["base"] == columns["steered"]
    assert page.locator("#columns mark").count() == 0
    choose(page, "Method", "random experts")
    number(page, "Strength", 8)
    changed = ask(page)
    assert changed["base"] == columns["base"]
    assert changed["steered"] != columns["steered"]
    marks = page.locator("#columns mark").all_inner_texts()
    assert marks
    assert all(mark in changed["base"] + changed["steered"] for mark in marks)


def test_the_keyboard_is_enough_and_a_slider_changes_the_answer(page):
    fill(page, SWAHILI.prompt)
    before = ask(page, lambda page: page.locator("#prompt textarea").press("Shift+Enter"))
    page.locator(STRENGTH).press("End")
    after = ask(page, lambda page: page.locator("#run").press("Enter"))
    assert page.locator("#columns h3", has_text="steered, strength 8").count() == 1
    assert after["base"] == before["base"]
    assert after["steered"] != before["steered"]


def test_what_is_steered_is_drawn_at_once(page):
    def redrawn(change, *words: str) -> None:
        before = page.locator("#steered img").get_attribute("src")
        change()
        page.wait_for_function(
            "words => words.every(w => document.querySelector('#steered figcaption')"
            ".innerText.includes(w))",
            arg=words,
        )
        assert page.locator("#steered img").get_attribute("src") != before

    slider = page.locator(STRENGTH)
    redrawn(lambda: [slider.press("ArrowLeft") for _ in range(4)], "as saved, strength 0.8:")
    assert float(slider.input_value()) == pytest.approx(0.8)
    redrawn(lambda: number(page, "Strength", -2), "strength -2:")
    redrawn(lambda: choose(page, "Method", "never select"), "never select, strength -2:")
    page.get_by_label("range slider for First layer").press("End")
    page.get_by_label("range slider for Last layer").press("End")
    alert = page.locator("#problem [role=alert]")
    alert.wait_for()  # the last layer is not steered
    page.get_by_label("range slider for First layer").press("Home")
    alert.wait_for(state="detached")


def test_stop_ends_the_answer_and_the_next_one_is_given(page):
    fill(page, SWAHILI.prompt)
    page.get_by_text("Length and sampling").click()
    number(page, "Temperature", 2)
    number(page, "Longest answer, in tokens", 400)
    page.get_by_label("Seed").fill("3")  # 400 tokens, which take seconds
    page.locator("#run").click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('#columns .answer')].some(p => p.innerText.length > 9)"
    )
    page.locator("#stop").click()
    page.locator("#status", has_text="Stopped.").wait_for()
    stopped = texts(page)
    page.wait_for_timeout(1000)  # some 20 tokens
    assert texts(page) == stopped
    number(page, "Temperature", 0)
    number(page, "Longest answer, in tokens", 24)
    assert ask(page)["base"] != stopped["base"]


def test_a_repo_named_while_the_last_one_is_drawn_is_not_dropped(page, monkeypatch):
    drawn = demo_html.steering_map
    monkeypatch.setattr(demo_html, "steering_map", lambda *a: (time.sleep(2), drawn(*a))[1])
    box = page.get_by_label("Steering repo", exact=True)
    alert = page.locator("#problem [role=alert]")
    for name in ("nobody/one", "embedded", "nobody/two"):
        box.fill(name)
        box.press("Enter")
        page.wait_for_timeout(700)  # described, but not yet drawn
    page.wait_for_timeout(4000)
    assert "nobody/two" in alert.inner_text(timeout=3000)


def test_a_wrong_repo_is_told_as_text(page):
    box = page.get_by_label("Steering repo", exact=True)
    alert = page.locator("#problem [role=alert]")
    for name in ("nobody/nothing", "../../etc", "<img src=x onerror=alert(1)>", "examples"):
        box.fill(name)
        box.press("Enter")
        alert.wait_for()
        assert name in alert.inner_text()
        assert page.locator("#problem").locator("img, script").count() == 0
        box.fill("embedded")
        box.press("Enter")
        alert.wait_for(state="detached")
    assert len(ask(page)) == 3


def ink(page, selector: str) -> float:
    """Where the text of the first line is: 0 at the left of the element, 1 at its right."""
    picture = Image.open(BytesIO(page.locator(selector).screenshot())).convert("L")
    pixels = np.asarray(picture, dtype=int)[4:34, 4:-4]
    return float(np.nonzero(abs(pixels - np.median(pixels)) > 60)[1].mean() / pixels.shape[1])


@pytest.mark.parametrize("prompt", ["كم عدد التفاح؟", "כמה תפוחים יש לי?"])
def test_arabic_and_hebrew_start_at_the_right_and_english_at_the_left(page, artifacts, prompt):
    fill(page, prompt, "How many apples?")
    ask(page)
    assert ink(page, "#prompt textarea") > 0.7
    assert ink(page, "#english textarea") < 0.3
    assert ink(page, '[data-column="base"] .asked') > 0.7
    assert ink(page, '[data-column="English, base"] .asked') < 0.3
    page.screenshot(path=artifacts / "right_to_left.png", full_page=True)


def test_markup_in_a_prompt_stays_text(page):
    fill(page, HOSTILE, HOSTILE, HOSTILE)
    ask(page)
    assert page.locator('[data-column="base"] .asked').inner_text() == HOSTILE
    assert page.locator("#columns").locator("img, script").count() == 0
    page.get_by_role("tab", name="Why").click()
    assert HOSTILE in page.locator("#why .tokens").inner_text()
    assert page.locator("#why .tokens").locator("img, script").count() == 0


def test_markup_in_an_answer_stays_text(page, monkeypatch):
    columns = [
        Column(name, "-", [(HOSTILE, False), (HOSTILE, True)], 2, 1.0) for name in ("base", HOSTILE)
    ]
    monkeypatch.setattr(Actions, "ask", lambda self, _: iter([Answers(tuple(columns), 1.0, True)]))
    answer = ask(page)
    assert answer == {"base": HOSTILE * 2, HOSTILE: HOSTILE * 2}
    assert page.locator("#columns mark").all_inner_texts() == [HOSTILE] * 2
    assert page.locator("#columns").locator("img, script").count() == 0


def test_a_hostile_card_stays_text(page):
    folder = ROOT / "examples" / "tiny_multilingual_moe"
    HUB.commit("user/tiny-base", {p.name: p.read_bytes() for p in (folder / "base").iterdir()})
    files = {p.name: p.read_bytes() for p in (folder / "steered").iterdir()}
    config = json.loads(files["config.json"]) | {"base_model_name_or_path": "user/tiny-base"}
    card = b"# <img src=x onerror=alert(1)>\n<script>alert(2)</script>"
    HUB.commit("user/hostile", {**files, "config.json": json.dumps(config).encode(),
                                "README.md": card})  # fmt: skip
    page.get_by_text("About this steering").click()
    box = page.get_by_label("Steering repo", exact=True)
    box.fill("user/hostile")
    box.press("Enter")
    page.wait_for_function(
        "() => [...document.querySelectorAll('textarea')].some(t => t.value.includes('alert(2)'))"
    )
    assert "user/tiny-base" in page.locator("#facts").inner_text()
    assert page.locator("img[src=x]").count() == 0


FAINT = """() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true})
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1)
    return [...canvas.getImageData(0, 0, 1, 1).data] }
  const over = (ground, [r, g, b], a) => ground.map((x, i) => x * (1 - a) + [r, g, b][i] * a)
  const luminance = colour => {
    const [r, g, b] = colour.map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b }
  const texts = [...document.querySelectorAll('body *')].filter(e =>
    [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) &&
    e.checkVisibility({visibilityProperty: true}))
  const measured = texts.map(e => {
    const styles = []
    for (let parent = e; parent; parent = parent.parentElement)
      styles.unshift(getComputedStyle(parent))
    const ground = styles.map(s => rgba(s.backgroundColor))
      .reduce((below, one) => over(below, one, one[3] / 255), [255, 255, 255])
    const colour = rgba(styles.at(-1).color)
    const opacity = styles.reduce((all, s) => all * s.opacity, colour[3] / 255)
    const [dark, light] = [luminance(over(ground, colour, opacity)), luminance(ground)]
      .sort((a, b) => a - b)
    return [(light + 0.05) / (dark + 0.05), e.textContent.trim().slice(0, 60)] })
  return {seen: measured.length, faint: measured.filter(([contrast]) => contrast < 4.5)} }"""
"""Texts with less contrast to what is behind them than WCAG 2 asks for."""


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_all_text_can_be_read_in_both_themes(page, address, artifacts, theme):
    opened(page, f"{address}?__theme={theme}")
    page.get_by_text("Length and sampling").click()
    ask(page)
    page.screenshot(path=artifacts / f"{theme}.png", full_page=True)
    ground = np.asarray(Image.open(artifacts / f"{theme}.png").convert("L"))
    assert (np.median(ground) < 60) == (theme == "dark")
    for tab in ("Why", "Share", "Routing by language", "Build a steering"):
        page.get_by_role("tab", name=tab).click()
        measured = page.evaluate(FAINT)
        assert measured["seen"] > 10
        assert measured["faint"] == [], tab


def test_a_phone_shows_one_column_under_the_other(page, address, artifacts):
    page.set_viewport_size({"width": 390, "height": 844})
    opened(page, address)
    ask(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 390
    boxes = [section.bounding_box() for section in page.locator("#columns section").all()]
    assert len({round(box["x"]) for box in boxes}) == 1
    assert len({round(box["y"]) for box in boxes}) == 3
    page.screenshot(path=artifacts / "phone.png", full_page=True)
    page.set_viewport_size({"width": 1280, "height": 900})
    boxes = [section.bounding_box() for section in page.locator("#columns section").all()]
    assert len({round(box["y"]) for box in boxes}) == 1


CONTROLS = {"button", "textbox", "combobox", "slider", "spinbutton", "checkbox", "tab", "link"}


def test_every_control_has_a_name_for_a_screen_reader(page, context):
    page.get_by_text("Length and sampling").click()
    ask(page)
    reader = context.new_cdp_session(page)
    for tab in ("Why", "Share", "Routing by language", "Build a steering"):
        page.get_by_role("tab", name=tab).click()
        nodes = reader.send("Accessibility.getFullAXTree")["nodes"]
        controls = [
            (node["role"]["value"], node.get("name", {}).get("value", ""), node["backendDOMNodeId"])
            for node in nodes
            if not node["ignored"] and node["role"]["value"] in CONTROLS
        ]
        assert len(controls) >= 7
        nameless = [(role, number) for role, name, number in controls if not name.strip()]
        html = [
            reader.send("DOM.getOuterHTML", {"backendNodeId": number})["outerHTML"][:200]
            for _, number in nameless
        ]
        assert html == [], tab


def test_a_link_asks_the_same_again(page, address):
    fill(page, SWAHILI.prompt, SWAHILI.english)
    page.get_by_text("Length and sampling").click()
    choose(page, "Method", "random experts")
    wanted = {"Strength": 6.5, "First layer": 2, "Last layer": 5, "Temperature": 1.5, "Top k": 9}
    for label, value in wanted.items():
        number(page, label, value)
    page.get_by_label("Seed").fill("7")
    columns = ask(page)
    page.get_by_role("tab", name="Share").click()
    page.locator("#link .cm-content", has_text="question=").wait_for()
    link = page.locator("#link .cm-content").inner_text().strip()
    assert link.startswith(f"{address.rstrip('/')}/?question=")
    code = page.locator("#python .cm-content").inner_text()
    for line in (
        "strength=6.5",
        "edit='random experts'",
        "first_layer=2",
        "last_layer=5",
        "seed=7",
    ):
        assert f"    {line},\n" in code
    opened(page, link)
    page.get_by_text("Length and sampling").click()
    for label, value in wanted.items():
        assert float(page.get_by_label(f"number input for {label}").input_value()) == value
    assert page.get_by_label("Seed").input_value() == "7"
    assert page.get_by_label("Method", exact=True).input_value() == "random experts"
    assert page.locator("#prompt textarea").input_value() == SWAHILI.prompt
    assert ask(page) == columns
    page.get_by_label("Seed").fill("8")
    assert ask(page) != columns


def test_a_damaged_link_is_told(page, address):
    for text in ("{", '{"prompt": 5}', '{"a": "<img src=x onerror=alert(1)>"}'):
        opened(page, f"{address}?{urlencode({'question': text})}")
        assert "link cannot be read" in page.locator("#status [role=alert]").inner_text()
    assert len(ask(page)) == 3


def test_a_profile_is_drawn_with_words_for_those_who_do_not_see_it(page, artifacts):
    page.get_by_role("tab", name="Routing by language").click()
    page.get_by_role("button", name="Profile the example problems").click()
    page.locator("#analysis table").first.wait_for()
    pictures = page.locator("#analysis img")
    assert pictures.count() == 4
    names = {pictures.nth(i).get_attribute("alt") for i in range(4)}
    assert len(names) == 4
    assert all(" " in name for name in names)  # more than the name of a file
    table = page.locator("#analysis table").last
    assert table.locator("tr").count() == 12  # a head and eleven languages
    assert table.get_by_role("cell", name="sw", exact=True).count() == 1
    page.screenshot(path=artifacts / "analysis.png", full_page=True)


def test_a_steering_is_built_tried_downloaded_and_pushed(page):
    page.get_by_role("tab", name="Build a steering").click()
    page.get_by_label("Steer towards this text").fill("Tom has 2 apples.\nSara has 5 stamps.")
    page.get_by_label("Compared with this text").fill("The sky is blue.\nA dog runs home.")
    page.locator("#build").click()
    name = page.get_by_label("Name to try it by in the first tab")
    page.wait_for_function("() => document.querySelector('#built img')")
    built = name.input_value()
    with page.expect_download() as download:
        page.locator("a[download]").first.click()
    assert Path(download.value.path()).read_bytes()[:2] == b"PK"
    page.get_by_role("button", name="Push to the Hub").click()
    page.locator("#pushed [role=alert]", has_text="token").wait_for()
    page.get_by_label("Push to (user/name)").fill("user/from-the-demo")
    page.get_by_label("Hub id of the base model, if it is a folder here").fill("user/tiny-moe")
    base = ROOT / "examples" / "tiny_multilingual_moe" / "base"
    HUB.commit("user/tiny-moe", {path.name: path.read_bytes() for path in base.iterdir()})
    page.get_by_label("Your Hugging Face token").fill("hf_test")
    page.get_by_role("button", name="Push to the Hub").click()
    page.locator("#pushed", has_text="Pushed").wait_for()
    assert HUB.repos.pop("user/from-the-demo")  # other tests list what is on this Hub
    page.get_by_role("tab", name="Compare").click()
    page.get_by_text("About this steering").click()
    box = page.get_by_label("Steering repo", exact=True)
    box.fill(built)
    box.press("Enter")
    page.locator("#facts", has_text=built).wait_for(state="attached")
    assert set(ask(page)) == {"English, base", "base", "steered"}
