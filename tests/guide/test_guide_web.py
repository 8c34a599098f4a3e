"""The pages of the guide in headless Chromium, opened from their files with the network off."""

import json
import math
import re
import shutil
from pathlib import Path

import book
import pytest
import torch

from nanochat_native import exercises, ops
from nanochat_native.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer
from nanochat_native.ops.newton_schulz import COEFFICIENTS, NORM_FACTOR

pytest.importorskip("pypandoc")
webdriver = pytest.importorskip("selenium.webdriver")

from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",  # a page that still scrolls cannot be clicked
    "--window-size=1280,900",
)
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
HANGS = 60

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (Debian: chromium, chromium-driver)"
    ),
]


@pytest.fixture(scope="module")
def site(built):
    """Return the folder of the HTML pages of the guide and the other documentation."""
    return built


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    found.execute_cdp_cmd("Network.enable", {})
    offline = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    found.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
    yield found
    found.quit()


@pytest.fixture
def browser(started):
    """Yield a desktop browser without memory of earlier pages."""
    yield started
    started.execute_script("try { localStorage.clear() } catch (error) {}")
    started.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    started.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": []})
    started.get_log("browser")
    started.get_log("performance")


def wait(browser, condition):
    return WebDriverWait(browser, HANGS, poll_frequency=0.02).until(condition)


def open_page(browser, site, name):
    browser.get((site / f"{name}.html").as_uri())


def address(browser):
    return Path(browser.current_url.partition("#")[0]).stem


def press(browser, *keys):
    browser.switch_to.active_element.send_keys(*keys)


def page_names(site):
    return sorted(path.stem for path in site.glob("*.html"))


def page_with(site, text):
    """Return the name of the first page that contains a text."""
    found = [path.stem for path in sorted(site.glob("*.html")) if text in path.read_text(encoding="utf-8")]
    assert found, f"no page contains {text}"
    return found[0]


# --- every page ---


def test_no_page_reports_an_error_or_asks_for_anything_outside_its_folder(browser, site):
    wrong = {}
    for name in page_names(site):
        open_page(browser, site, name)
        entries = [entry["message"] for entry in browser.get_log("browser")]
        messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
        urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        entries += [url for url in urls if not url.startswith((site.as_uri() + "/", "data:", "chrome:"))]
        if entries:
            wrong[name] = entries
        assert any(url.endswith("/page.js") for url in urls)
    assert wrong == {}


def test_an_error_of_a_page_is_seen(browser, tmp_path):
    (tmp_path / "a.html").write_text("<script src=missing.js></script><script>nothing()</script>", encoding="utf-8")
    browser.get((tmp_path / "a.html").as_uri())
    assert len([entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]) == 2


def test_no_page_scrolls_sideways_on_a_phone(browser, site):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    wrong = {}
    for name in page_names(site):
        open_page(browser, site, name)
        browser.execute_script("for (const answer of document.querySelectorAll('details')) answer.open = true")
        width = browser.execute_script("return document.documentElement.scrollWidth")
        if width > PHONE["width"]:
            wrong[name] = [width, browser.execute_script(WIDEST, PHONE["width"])]
    assert wrong == {}


WIDEST = """
const clips = (element) => ['auto', 'scroll', 'hidden'].includes(getComputedStyle(element).overflowX);
const scrolls = (element) => element && (clips(element) || scrolls(element.parentElement));
return [...document.querySelectorAll('main *')]
  .filter((element) => element.getBoundingClientRect().right > arguments[0] + 1 && !scrolls(element))
  .slice(0, 3).map((element) => element.outerHTML.slice(0, 120))"""


def test_every_formula_uses_the_math_font(browser, site):
    open_page(browser, site, page_with(site, 'display="block"'))
    browser.execute_async_script("document.fonts.ready.then(arguments[0])")
    assert browser.execute_script("return [...document.fonts].map((font) => font.status)") == ["loaded"]
    assert "Guide Math" in browser.execute_script("return getComputedStyle(document.querySelector('math')).fontFamily")


# --- reading ---


def test_search_finds_by_words_and_prefixes_and_enter_opens_the_section(browser, site):
    open_page(browser, site, "index")
    press(browser, "/")
    assert browser.execute_script("return document.activeElement.id") == "ui-search"
    press(browser, "newton sch")
    results = browser.find_elements(By.CSS_SELECTOR, "#ui-results a")
    assert 1 < len(results) <= 20
    marks = {mark.text.lower() for mark in browser.find_elements(By.CSS_SELECTOR, "#ui-results mark")}
    assert any(mark.startswith("newton") for mark in marks)
    assert any(mark.startswith("sch") for mark in marks)
    assert results[0].get_attribute("aria-selected") == "true"
    target = results[1].get_attribute("href")
    press(browser, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_UP, Keys.ENTER)
    wait(browser, lambda b: b.current_url == target)
    assert browser.execute_script("return !location.hash || !!document.getElementById(location.hash.slice(1))")


def test_search_ranks_a_heading_before_the_text_and_says_when_it_finds_nothing(browser, site):
    open_page(browser, site, "index")
    field = browser.find_element(By.ID, "ui-search")
    heading = browser.execute_script("return SEARCH.find((entry) => /^\\d+\\.\\d+ /.test(entry.title)).title")
    field.send_keys(heading)
    shown = browser.find_elements(By.CSS_SELECTOR, "#ui-results a b")
    assert heading in [element.text for element in shown[:3]]
    claim = browser.execute_script("return SEARCH.find((entry) => entry.id.startsWith('claim-'))")
    field.clear()
    field.send_keys(claim["title"].lower())
    first = browser.find_element(By.CSS_SELECTOR, "#ui-results a")
    assert first.get_attribute("href").endswith(f"{claim['page']}.html#{claim['id']}")
    field.clear()
    field.send_keys("xyzzyx")
    assert browser.find_element(By.CSS_SELECTOR, "#ui-results p").text == "Nothing found."
    press(browser, Keys.ESCAPE)
    assert not browser.find_element(By.ID, "ui-results").is_displayed()
    press(browser, Keys.ESCAPE)
    assert browser.execute_script("return document.activeElement.tagName") == "BODY"


def test_the_theme_follows_the_system_until_it_is_switched_and_the_choice_is_remembered(browser, site):
    def dark():
        return browser.execute_script("return getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"

    first, second = page_names(site)[:2]
    for theme in ("dark", "light"):
        feature = {"name": "prefers-color-scheme", "value": theme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        open_page(browser, site, first)
        assert dark() == (theme == "dark")
    browser.find_element(By.ID, "ui-theme").click()
    assert dark()
    open_page(browser, site, second)
    assert dark()
    press(browser, "d")
    assert not dark()


def test_keys_turn_pages_and_can_be_switched_off(browser, site):
    chapters = [page.name for page in book.chapters()]
    open_page(browser, site, chapters[0])
    for keys, expected in ((("n",), 1), ((Keys.ARROW_LEFT,), 0), ((Keys.ARROW_RIGHT,), 1), (("p",), 0)):
        press(browser, *keys)
        wait(browser, lambda b, expected=expected: address(b) == chapters[expected])
    press(browser, "?")
    assert browser.find_element(By.ID, "ui-keys").is_displayed()
    browser.find_element(By.ID, "ui-keys-on").click()
    press(browser, Keys.ESCAPE)
    wait(browser, lambda b: not b.find_element(By.ID, "ui-keys").is_displayed())
    press(browser, "n")
    assert browser.execute_script("return document.activeElement.id") != "ui-search"
    browser.execute_async_script("setTimeout(arguments[0], 200)")
    assert address(browser) == chapters[0]


def test_the_menu_of_a_phone_covers_the_page_and_closes(browser, site):
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", PHONE)
    chapter = book.chapters()[0].name
    open_page(browser, site, chapter)
    chapters, menu = browser.find_element(By.ID, "ui-chapters"), browser.find_element(By.ID, "ui-menu")
    assert not chapters.is_displayed()
    menu.click()
    assert menu.get_attribute("aria-expanded") == "true"
    assert chapters.rect["width"] == PHONE["width"]
    assert chapters.rect["height"] > 700
    press(browser, Keys.ESCAPE)
    assert not chapters.is_displayed()
    menu.click()
    browser.find_element(By.CSS_SELECTOR, "#ui-chapters ul ul a").click()
    assert not chapters.is_displayed()
    assert address(browser) == chapter


def test_the_first_tab_leads_to_the_text(browser, site):
    open_page(browser, site, book.chapters()[0].name)
    press(browser, Keys.TAB)
    assert browser.switch_to.active_element.text == "Skip to the text"
    press(browser, Keys.ENTER)
    assert browser.execute_script("return document.activeElement.id") == "ui-content"


WITHOUT_CLIPBOARD = """
Object.defineProperty(navigator, 'clipboard', { value: undefined });
document.execCommand = () => { window.copied = String(getSelection()) || document.activeElement.value; return true };"""


def test_a_code_fence_is_copied_without_its_colors(browser, site):
    open_page(browser, site, page_with(site, 'class="sourceCode'))
    fence = browser.find_element(By.CSS_SELECTOR, ".fence:has(> .copy)")
    code = browser.execute_script("return arguments[0].querySelector('pre').textContent", fence)
    browser.execute_script(WITHOUT_CLIPBOARD)
    browser.execute_script("arguments[0].querySelector('.copy').click()", fence)
    wait(browser, lambda b: b.execute_script("return window.copied"))
    assert browser.execute_script("return window.copied").rstrip("\n") == code.rstrip("\n")


def test_print_shows_figures_and_hides_controls(browser, site):
    open_page(browser, site, page_with(site, 'class="widget"'))
    parts = "['.widget img', '.live-part', '.bar', '#ui-chapters']"
    visible = f"return {parts}.map((part) => document.querySelector(part).checkVisibility())"
    assert browser.execute_script(visible) == [True, True, True, True]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert browser.execute_script(visible) == [True, False, False, False]


# --- exercises ---


SUBMIT = """
const [form, texts] = arguments;
return texts.map((text) => {
  form.querySelector('input').value = text;
  form.requestSubmit();
  return [form.querySelector('output').dataset.verdict, form.querySelector('output').textContent];
});"""


def test_a_field_judges_answers_as_the_command_does(browser, site):
    keys = list(exercises.as_results())
    for key in keys:
        exercise = exercises.find(key.replace("_", "."))
        name = page_with(site, f'data-exercise="{key}"')
        if address(browser) != name:
            open_page(browser, site, name)
        form = browser.find_element(By.CSS_SELECTOR, f"form.check[data-exercise='{key}']")
        right = exercise.answer()
        texts = [repr(float(right)), repr(right * 3.7 + 1e-3), repr(-right - 1e-3), "1/3", "3.1M", "50%", "12,345"]
        texts += [repr(float(mistake())) for mistake in exercise.mistakes.values()]
        for text, (verdict, sentence) in zip(texts, browser.execute_script(SUBMIT, form, texts), strict=True):
            expected = exercise.check(exercise.parse(text))
            assert (verdict == "right") == expected.right, (key, text, sentence)
            assert expected.right or re.sub(r"\d\S*.*", "", expected.text) in sentence, (key, text, expected, sentence)
    assert keys


def test_a_field_is_filled_by_keyboard(browser, site):
    open_page(browser, site, page_with(site, 'class="check"'))
    form = browser.find_element(By.CSS_SELECTOR, "form.check")
    label = form.find_element(By.TAG_NAME, "label")
    label.click()
    press(browser, "many", Keys.ENTER)
    assert "Enter a number" in form.text
    exercise = exercises.find(form.get_attribute("data-exercise").replace("_", "."))
    form.find_element(By.TAG_NAME, "input").clear()
    label.click()
    press(browser, repr(float(exercise.answer())), Keys.ENTER)
    assert "Right." in form.text


# --- widgets ---


class Widget:
    """A widget on its page, and its controls by their labels."""

    def __init__(self, browser, site, name):
        open_page(browser, site, page_with(site, f'data-widget="{name}"'))
        self.browser = browser
        self.part = browser.find_element(By.CSS_SELECTOR, f"[data-widget='{name}'] .live-part")

    @property
    def value(self):
        return float(self.part.get_attribute("data-value"))

    def field(self, label):
        xpath = f".//label[contains(., '{label}')]//*[self::input or self::select or self::textarea]"
        return self.part.find_element(By.XPATH, xpath)

    def set(self, label, value):
        """Give a range field or a text field a value, as a reader's input does."""
        script = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', { bubbles: true }))"
        self.browser.execute_script(script, self.field(label), value)

    def choose(self, label, text):
        Select(self.field(label)).select_by_visible_text(text)

    def press(self, text):
        self.part.find_element(By.XPATH, f".//button[normalize-space()='{text}']").click()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "the cat sat on the mat, the other cat sat on the other mat",
        "aaaaaaa aaaaaa aaaaa\n\n\n  aaaa 1234567 12 12",
        "naïve café — naïve CAFÉ; “quotes”, don't DON'T we'll\r\n\tx_i += x_i  # 日本日本",
    ],
)
def test_merges_are_those_of_the_tokenizer(browser, site, text):
    widget = Widget(browser, site, "bpe")
    widget.set("Your text", text)
    shown = widget.field("Your text").get_property("value")
    most = int(widget.field("Merges").get_attribute("max"))
    for merges in {0, min(1, most), min(7, most), most}:
        widget.set("Merges", merges)
        tokenizer = Tokenizer.train([shown], MIN_VOCAB_SIZE + merges)
        assert widget.value == len(tokenizer.encode(shown)), merges
    if most:
        widget.press("Back")
        before = widget.value
        widget.press("Merge")
        assert widget.value < before


def test_rotated_scores_are_those_of_the_model(browser, site):
    from nanochat_native.ops.rotary_norm import _rotate

    widget = Widget(browser, site, "rope")

    def score(m, n, pair):
        theta = 10000 ** (-2 * pair / 128)
        vectors = []
        for position, vector in ((m, (1.0, 0.0)), (n, (0.8, 0.6))):
            angle = torch.tensor([[position * theta]], dtype=torch.float64)
            x = torch.tensor(vector, dtype=torch.float64).view(1, 1, 1, 2)
            vectors.append(_rotate(x, angle.cos(), angle.sin()).view(2))
        return float(vectors[0] @ vectors[1])

    assert widget.value == pytest.approx(score(6, 2, 16), abs=1e-12)
    widget.set("Position m", 40)
    widget.set("Position n", 11)
    widget.set("Pair", 5)
    before = widget.value
    assert before == pytest.approx(score(40, 11, 5), abs=1e-12)
    widget.press("+ 5")
    assert widget.field("Position m").get_property("value") == "45"
    assert widget.value == pytest.approx(before, abs=1e-12)
    widget.set("Position n", 17)
    assert widget.value != pytest.approx(before, abs=1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_the_tile_walk_ends_at_the_softmax(browser, site, size):
    widget = Widget(browser, site, "tiles")
    widget.choose("Tile", f"{size} by {size}")
    assert widget.value == 0
    scores = torch.tensor([[(7 * i * i + 11 * j + 3 * i * j) % 41 / 10 - 2 for j in range(8)] for i in range(8)])
    values = torch.arange(1.0, 9.0, dtype=torch.float64)

    def outputs(scores):
        hidden = torch.ones(8, 8, dtype=torch.bool).triu(1)
        return scores.double().masked_fill(hidden, -math.inf).softmax(-1) @ values

    widget.press("Next tile")
    first = scores[:size, :size].double().masked_fill(torch.ones(size, size, dtype=torch.bool).triu(1), -math.inf)
    assert widget.value == pytest.approx(float((first.softmax(-1) @ values[:size]).sum()), abs=1e-5)
    for _ in range(size):
        widget.press("Next tile")
    widget.set("Tiles done", widget.field("Tiles done").get_attribute("max"))
    assert widget.value == pytest.approx(float(outputs(scores).sum()), abs=1e-5)
    assert "NaN" not in widget.part.text
    widget.choose("Scores", "one of 800")
    scores[5, 3] = 800
    assert widget.value == pytest.approx(float(outputs(scores).sum()), abs=1e-5)
    assert "NaN" in widget.part.text, "the naive softmax overflows"


def test_singular_values_are_those_of_the_operator(browser, site):
    widget = Widget(browser, site, "newton-schulz")
    source = (book.ROOT / "docs/tools/widgets/newton-schulz.js").read_text(encoding="utf-8")
    numbers = {float(number) for number in re.findall(r"-?\d+\.\d+", source)}
    wanted = {number for triples in COEFFICIENTS.values() for triple in triples for number in triple if number}
    assert numbers >= wanted | set(NORM_FACTOR.values())
    for name, shown in (("cubic", "cubic"), ("quintic", "quintic (Jordan)"), ("polar_express", "Polar Express")):
        widget.choose("Coefficients", shown)
        for steps, smallest in ((5, -3), (7, -1.5)):
            widget.set("Steps", steps)
            widget.set("Smallest", smallest)
            matrix = torch.diag(10 ** (smallest * torch.arange(32, dtype=torch.float64) / 31))
            found = ops.newton_schulz(matrix, steps=steps, coefficients=name)
            error = float((found - torch.eye(32)).norm() / 32**0.5)
            assert widget.value == pytest.approx(error, rel=1e-9), (name, steps, smallest)
            assert float(widget.part.get_attribute("data-largest")) == pytest.approx(float(found.max()), rel=1e-9)


def test_memory_is_the_prediction_of_the_command(browser, site):
    from nanochat_native.lab.memory.options import Options, sized
    from nanochat_native.lab.memory.prediction import snapshots

    widget = Widget(browser, site, "memory")
    parts = len(browser.execute_script("return WIDGET_DATA.memory.columns")) - 7

    def predicted(**sizes):
        options = sized(Options(**sizes))
        return max(snapshot.bytes for snapshot in snapshots(options)) / 2**20

    assert widget.value == pytest.approx(predicted(), abs=parts / 2)
    widget.press("Keep for comparison")
    widget.choose("Depth", "12")
    widget.choose("Rows", "4")
    widget.choose("Sequence", "1024")
    widget.choose("Ranks", "2")
    widget.choose("checkpointing", "on")
    widget.choose("Optimizer", "AdamW")
    sizes = {"depth": 12, "device_batch_size": 4, "max_seq_len": 1024, "nproc": 2}
    expected = predicted(**sizes, grad_checkpoint=True, optimizer="adamw")
    assert widget.value == pytest.approx(expected, abs=parts / 2)
    assert "times as much" in widget.part.text


def test_a_ring_sums_on_all_ranks_and_sends_what_the_formula_says(browser, site):
    widget = Widget(browser, site, "ring")
    gradients = torch.tensor([[10**rank * (chunk + 1) for chunk in range(4)] for rank in range(4)])
    assert json.loads(widget.part.get_attribute("data-sums")) == gradients.tolist()
    for _ in range(3):
        widget.press("Next step")
    held = torch.tensor(json.loads(widget.part.get_attribute("data-sums")))
    total = gradients.sum(0)
    assert [int((held[rank] == total).sum()) for rank in range(4)] == [1, 1, 1, 1]
    assert (held == total).any(0).all(), "each chunk is whole on one rank"
    for _ in range(3):
        widget.press("Next step")
    assert json.loads(widget.part.get_attribute("data-sums")) == [total.tolist()] * 4
    assert widget.value == 2 * (4 - 1) / 4 * 64
    widget.set("Size", 100)
    assert widget.value == 2 * (4 - 1) / 4 * 100
