"""The page of the server in headless Chromium: typed to, by keyboard alone, on a desktop and on a phone."""

import json
import shutil

import pytest
from test_serve import KEY, Running, folder, model  # noqa: F401 (fixtures)
from tiny_run import HANGS

webdriver = pytest.importorskip("selenium.webdriver")

from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

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
    "--window-size=1100,760",
)

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no chromium and chromedriver (Debian: chromium, chromium-driver)"
)


@pytest.fixture
def server(request, model):  # noqa: F811
    """Its steps are slow, so that the browser sees an answer grow, whose length depends on the processor."""
    running = Running(model, slots=2, slow=getattr(request, "param", 0.03))
    yield running
    running.close()


@pytest.fixture
def browser(tmp_path):
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield found
    found.quit()


def wait(browser, condition, seconds=HANGS):
    return WebDriverWait(browser, seconds, poll_frequency=0.02).until(condition)


def open_page(browser, server):
    browser.get(f"http://localhost:{server.port}/")
    wait(browser, lambda b: b.find_element(By.ID, "name").text == "tiny" or b.find_element(By.ID, "key").is_displayed())
    browser.execute_script("document.getElementById('seed').value = 1")


def type_(browser, *keys):
    browser.switch_to.active_element.send_keys(*keys)


def answers(browser):
    return [element.text for element in browser.find_elements(By.CSS_SELECTOR, "article.assistant p")]


def done(browser):
    return browser.find_element(By.ID, "send").is_displayed()


def test_a_message_is_answered_as_it_comes_with_no_error_and_no_request_elsewhere(browser, server):
    open_page(browser, server)
    assert "base model: continues text, not trained to chat" in browser.find_element(By.ID, "kind").text
    assert "This is a base model, not trained to answer." in browser.find_element(By.ID, "empty").text
    type_(browser, "the tensor", Keys.ENTER)
    lengths = set()
    wait(browser, lambda b: lengths.add(len("".join(answers(b)))) or (len(lengths) > 3 and done(b)))
    assert len(lengths) > 3, "the answer came in one piece"
    (first,) = answers(browser)
    type_(browser, "line one", Keys.SHIFT, Keys.ENTER, Keys.NULL, "line two", Keys.ENTER)
    wait(browser, lambda b: len(answers(b)) == 2 and done(b))
    users = [element.text for element in browser.find_elements(By.CSS_SELECTOR, "article.user p")]
    assert users == ["the tensor", "line one\nline two"]
    assert answers(browser)[0] == first
    assert not [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    own = f"http://localhost:{server.port}"
    assert {f"{own}/", f"{own}/v1/models", f"{own}/v1/chat/completions"} == {
        url
        for url in urls
        if not url.startswith(("chrome:", "data:"))  # of the tab before
    }
    assert server.settles()


def test_output_is_text_and_never_markup(browser, server):
    open_page(browser, server)
    type_(browser, "<img src=x onerror=alert(1)><b>bold</b>", Keys.ENTER)
    wait(browser, done)
    (user,) = browser.find_elements(By.CSS_SELECTOR, "article.user p")
    assert user.text == "<img src=x onerror=alert(1)><b>bold</b>"
    assert not browser.find_elements(By.CSS_SELECTOR, "article img, article b")


@pytest.mark.parametrize("server", [0.3], indirect=True)
def test_the_keyboard_reaches_everything(browser, server):
    open_page(browser, server)
    seen = []
    for _ in range(5):
        seen.append(browser.execute_script("return document.activeElement.id || document.activeElement.tagName"))
        type_(browser, Keys.TAB)
    assert seen[:3] == ["text", "send", "SUMMARY"]
    browser.find_element(By.ID, "text").click()
    type_(browser, "the", Keys.ENTER)
    wait(browser, lambda b: "".join(answers(b)))
    type_(browser, Keys.ESCAPE)
    wait(browser, done)
    assert "stopped" in browser.find_element(By.CSS_SELECTOR, "article.assistant small").text
    assert browser.execute_script("return document.activeElement.id") == "text"
    assert server.settles()
    assert server.server.metrics.gone.values[()] == 1
    browser.find_element(By.ID, "new").send_keys(Keys.ENTER)
    wait(browser, lambda b: not b.find_elements(By.TAG_NAME, "article"))


def test_settings_are_sent(browser, server):
    open_page(browser, server)
    browser.find_element(By.TAG_NAME, "summary").send_keys(Keys.ENTER)
    for name, value in (("temperature", "1.5"), ("tokens", "12"), ("seed", "7")):
        field = browser.find_element(By.ID, name)
        field.clear()
        field.send_keys(value)
    texts = []
    for _ in range(2):
        browser.find_element(By.ID, "new").click()
        type_(browser, "the tensor", Keys.ENTER)
        wait(browser, lambda b: len(answers(b)) == 1 and done(b))
        texts += answers(browser)
    client = server.client()
    messages = [{"role": "user", "content": "the tensor"}]
    expected = client.chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=1.5, seed=7)
    assert texts[0] == texts[1] == expected.choices[0].message.content.strip()
    shown = browser.find_element(By.CSS_SELECTOR, "article.assistant").text
    assert ("stopped after 12 tokens" in shown) == (expected.choices[0].finish_reason == "length")


def test_a_phone_has_no_sideways_scrolling(browser, server, tmp_path):
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    open_page(browser, server)
    type_(browser, "word" * 60, Keys.ENTER)
    wait(browser, lambda b: answers(b) and done(b))
    browser.find_element(By.TAG_NAME, "summary").click()
    width, inside, size = browser.execute_script(
        "const size = getComputedStyle(document.getElementById('seed')).fontSize;"
        "return [document.documentElement.scrollWidth, innerWidth, size]"
    )
    assert width <= inside == 360
    assert size == "16px", "a phone would zoom into a smaller field"
    for name in ("send", "text", "new"):
        box = browser.find_element(By.ID, name).rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
        assert box["height"] >= 30
    assert browser.save_screenshot(str(tmp_path / "phone.png"))


def test_a_key_is_asked_for(browser, model):  # noqa: F811
    server = Running(model, key=KEY)
    try:
        open_page(browser, server)
        field = browser.find_element(By.ID, "key")
        wait(browser, lambda b: field.is_displayed())
        assert "API key is missing or wrong" in browser.find_element(By.ID, "empty").text
        field.send_keys(KEY)
        browser.find_element(By.ID, "text").send_keys("the tensor", Keys.ENTER)
        wait(browser, lambda b: answers(b) and done(b))
        assert not field.is_displayed()
        browser.refresh()
        wait(browser, lambda b: b.find_element(By.ID, "name").text == "tiny")
    finally:
        server.close()


def test_errors_are_shown(browser, server):
    open_page(browser, server)
    server.server.worker.max_waiting = -2
    type_(browser, "the tensor", Keys.ENTER)
    wait(browser, lambda b: b.find_elements(By.CSS_SELECTOR, "small.bad"))
    assert "try again" in browser.find_element(By.CSS_SELECTOR, "small.bad").text
    with pytest.raises(TimeoutException):
        wait(browser, lambda b: not done(b), seconds=0.3)
    server.server.worker.max_waiting = 4
    type_(browser, "the tensor", Keys.ENTER)
    wait(browser, lambda b: len(answers(b)) == 2 and answers(b)[1] and done(b))
