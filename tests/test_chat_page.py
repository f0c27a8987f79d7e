"""The chat page in a headless Chromium, under the Content-Security-Policy that the front end sends."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_server import FakeServer
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver (apt-get install chromium chromium-driver)"
)
FLAGS = "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update --disable-sync"
# In a container Chromium's sandbox has no user namespaces, and as root it refuses to start; the page comes from this test alone.
FLAGS += " --no-sandbox --disable-dev-shm-usage"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM or ""
    for flag in [*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """What a person does and sees."""

    def __init__(self, browser: webdriver.Chrome, server: FakeServer):
        self.browser = browser
        self.server = server

    def __getitem__(self, id: str) -> WebElement:
        return self.browser.find_element(By.ID, id)

    def messages(self, kind: str) -> list[str]:
        return [e.text.strip() for e in self.browser.find_elements(By.CSS_SELECTOR, f".message.{kind} > .text")]

    def say(self, text: str) -> None:
        self["prompt"].send_keys(text, Keys.ENTER)

    def until(self, condition: Any) -> None:
        WebDriverWait(self.browser, 5, poll_frequency=0.02).until(lambda _: condition())

    def until_answered(self, count: int = 1) -> None:
        self.until(lambda: len(self.messages("assistant")) == count and self["send"].is_displayed())

    def resize(self, width: int, height: int) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


@pytest.fixture
def page(browser: webdriver.Chrome, fake_server: FakeServer) -> Iterator[Page]:
    opened = Page(browser, fake_server)
    opened.resize(1280, 800)
    browser.get(fake_server.url + "/chat")
    opened.until(lambda: opened["model"].text)
    yield opened
    complaints = [entry for entry in browser.get_log("browser") if "status of" not in entry["message"]]
    assert complaints == []  # no script error, and nothing that the policy refused


def test_a_conversation(page: Page) -> None:
    assert page["model"].text == "fake-model"
    page.say("Hi there")
    page.until_answered()
    assert page.messages("user") == ["Hi there"]
    assert page.messages("assistant") == ["Hello, world!"]
    assert "4 tokens" in page.browser.find_element(By.CLASS_NAME, "figures").text
    page.say("And again")
    page.until_answered(2)
    first, second = page.server.bodies
    assert first["messages"] == [{"role": "user", "content": "Hi there"}]
    assert second["messages"][1:] == [{"role": "assistant", "content": "Hello, world!"}, {"role": "user", "content": "And again"}]
    assert first["model"] == "fake-model" and first["stream"] is True and "temperature" not in first
    page["reset"].click()
    assert page.messages("user") == [] and page["empty"].is_displayed()
    page.say("Anew")
    page.until_answered()
    assert page.server.bodies[2]["messages"] == [{"role": "user", "content": "Anew"}]


def test_tokens_appear_as_they_come(page: Page) -> None:
    page.server.pieces = ["one ", "two ", "three"]
    page.server.delay = 0.2
    page.say("count")
    page.until(lambda: page.messages("assistant") == ["one"])
    page.until(lambda: page.messages("assistant") == ["one two three"])


def test_stop_cancels_and_keeps_what_came(page: Page) -> None:
    page.server.pieces = ["tick "] * 1000
    page.server.delay = 0.02
    page.say("go")
    page.until(lambda: "tick" in "".join(page.messages("assistant")))
    page["stop"].click()
    page.until(lambda: page["send"].is_displayed() and page.server.cancelled == 1)
    page.server.pieces = ["done"]
    page.say("next")
    page.until_answered(2)
    assert page.server.bodies[1]["messages"][1]["content"].startswith("tick")


def test_a_new_chat_in_midstream_starts_clean(page: Page) -> None:
    page.server.pieces = ["old "] * 1000
    page.server.delay = 0.02
    page.say("go")
    page.until(lambda: "old" in "".join(page.messages("assistant")))
    page["reset"].click()
    page.until(lambda: page.server.cancelled == 1)
    page.server.pieces, page.server.delay = ["new"], 0.0
    page.say("next")
    page.until_answered()
    assert page.messages("assistant") == ["new"] and page.server.bodies[1]["messages"] == [{"role": "user", "content": "next"}]


def test_model_text_is_never_html(page: Page) -> None:
    page.server.pieces = ["<img src=x onerror=alert(1)> **bold** and `a<b`\n\n```html\n", "<script>alert(1)</script>\n", "```\n", "after"]
    page.say("attack")
    page.until_answered()
    answer = page.browser.find_element(By.CSS_SELECTOR, ".message.assistant > .text")
    assert answer.find_elements(By.CSS_SELECTOR, "img, script") == []
    assert [e.text for e in answer.find_elements(By.TAG_NAME, "pre")] == ["<script>alert(1)</script>"]
    assert [e.text for e in answer.find_elements(By.CSS_SELECTOR, "strong, :not(pre) > code")] == ["bold", "a<b"]
    assert "<img src=x onerror=alert(1)>" in answer.text and answer.text.endswith("after")


def test_settings_are_sent_and_kept(page: Page) -> None:
    page["settings-toggle"].click()
    assert page["settings-toggle"].get_attribute("aria-expanded") == "true"
    for name, value in {"system": "Be brief.", "temperature": "0.5", "max-tokens": "9", "api-key": "secret"}.items():
        page[name].send_keys(value)
    page.say("Hi")
    page.until_answered()
    body = page.server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["temperature"], body["max_tokens"]) == (0.5, 9)
    assert page.server.headers[0]["Authorization"] == "Bearer secret"
    page.browser.refresh()
    assert page["system"].get_attribute("value") == "Be brief."
    kept = json.loads(page.browser.execute_script("return JSON.stringify({...localStorage})"))
    assert "secret" not in kept.values()
    page.browser.execute_script("localStorage.clear(); sessionStorage.clear()")


@pytest.mark.parametrize("error", [{"error": {"message": "too long"}}, {"error": "too long", "error_type": "validation"}])
def test_a_refusal_is_told_and_the_question_kept(page: Page, error: dict[str, Any]) -> None:
    page.server.status, page.server.error = 422, error
    page.say("Hi")
    page.until(lambda: page.messages("error") == ["too long"])
    assert page["prompt"].get_attribute("value") == "Hi" and page.messages("user") == []
    page.server.status = 200
    page["prompt"].send_keys(Keys.ENTER)
    page.until_answered()
    assert len(page.server.bodies[1]["messages"]) == 1


def test_a_broken_stream_is_told(page: Page) -> None:
    page.server.break_off = True
    page.say("Hi")
    page.until(lambda: page.messages("error") != [])
    assert page.messages("assistant") == ["Hello, world!"]


def test_keyboard_and_labels(page: Page) -> None:
    page["prompt"].send_keys("one", Keys.SHIFT, Keys.ENTER)
    page["prompt"].send_keys("two")
    assert page["prompt"].get_attribute("value") == "one\ntwo" and page.server.bodies == []
    page["prompt"].send_keys(Keys.ENTER)
    page.until_answered()
    assert page.server.bodies[0]["messages"][0]["content"] == "one\ntwo"
    unlabelled = """return [...document.querySelectorAll("button, input, textarea")]
        .filter(e => !(e.ariaLabel || e.labels?.length || e.textContent.trim())).map(e => e.id)"""
    assert page.browser.execute_script(unlabelled) == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_overflows(page: Page, width: int, tmp_path: Path) -> None:
    page.resize(width, 700)
    page.server.pieces = ["```\n" + "x" * 300 + "\n```\n", "y" * 300]
    page["settings-toggle"].click()
    page.say("z" * 200)
    page.until_answered()
    assert page.browser.execute_script("return document.documentElement.scrollWidth") <= width
    for id in ("send", "prompt", "settings-toggle", "reset"):
        box = page[id].rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["y"] + box["height"] <= 700
