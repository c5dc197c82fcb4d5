"""The report in a real browser: quiet, safe against what models write, usable without a mouse."""

import json

import pytest
from report_browser import chromium, why_not

reason = why_not()
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.fixture(scope="module")
def page(small_run, tmp_path_factory):
    """The file of a report and a browser to open it in."""
    from gemma_cot.report.gather import gather
    from gemma_cot.report.page import report_html

    path = small_run / "report.html"
    path.write_text(report_html(gather(small_run)), encoding="utf-8")
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver, path.as_uri()


def opened(page, width=1200, height=900, scheme="light", fragment=""):
    """Load the page anew on a screen of this size; return the driver."""
    driver, address = page
    driver.get_log("browser"), driver.get_log("performance")
    command = driver.execute_cdp_cmd
    command("Emulation.setEmulatedMedia",
            {"features": [{"name": "prefers-color-scheme", "value": scheme}]})  # fmt: skip
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    command("Emulation.setDeviceMetricsOverride", size)
    command("Emulation.setFocusEmulationEnabled", {"enabled": True})
    driver.get("about:blank")
    driver.get(address + fragment)
    return driver


def press(driver, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    chain = ActionChains(driver)
    for key in keys:
        chain.send_keys(key)
    chain.perform()


def choose(driver, name, value):
    """Choose an option of a select as a user does; the page hears of it."""
    driver.execute_script(
        "const one = document.getElementById(arguments[0]); one.value = arguments[1];"
        "one.dispatchEvent(new Event('change'))", name, value
    )  # fmt: skip


def test_loads_without_a_request_and_without_a_word_on_the_console(page):
    driver = opened(page)
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [e["params"] for e in events if e["method"] == "Network.requestWillBeSent"]
    asked = {one["request"]["url"] for one in sent if one["documentURL"] == page[1]}
    assert asked - {"data:,"} == {page[1]}  # the page itself and its empty icon
    assert driver.get_log("browser") == []
    assert len(driver.find_elements("css selector", "figure svg")) > 10


def test_what_a_model_writes_stays_text(page):
    driver = opened(page)
    for kind in ("text", "log-prob", "ratio", "KL", "entropy", "clip", "mask"):
        choose(driver, "kind", kind)
    assert driver.execute_script("return window.hacked") is None
    assert driver.find_elements("css selector", "img") == []
    assert len(driver.find_elements("css selector", "script")) == 2  # the data and page.js
    assert "onerror='window.hacked = 2'" in driver.find_element("id", "microscope").text
    assert driver.get_log("browser") == []


def test_a_script_that_got_into_the_page_would_not_run(page):
    driver = opened(page)
    driver.execute_script(
        "const s = document.createElement('script'); s.textContent = 'window.hacked = 3';"
        "document.body.append(s)"
    )
    assert driver.execute_script("return window.hacked") is None  # the Content-Security-Policy
    assert any("Content Security Policy" in e["message"] for e in driver.get_log("browser"))


def test_the_microscope_shows_every_group_and_tells_a_token(page):
    driver = opened(page, fragment="#step=20&group=2&show=ratio")
    text = driver.find_element("id", "microscope").text
    assert "Step 20, group 2 of 3" in text and "What is 4 * 2 + 1?" in text
    assert "A = (r − mean) / (std + ε) = (1.4 − 1.15) / (0.1915 + 0.0001) = 1.305" in text
    assert "mean = (1.4 + 1.2 + 1 + 1) / 4 = 1.15; std with n - 1 = 0.1915" in text
    tokens = driver.find_elements("css selector", ".member:nth-of-type(1) .tokens span")
    coloured = [t for t in tokens if t.get_attribute("style")]
    assert len(coloured) > len(tokens) / 2
    driver.execute_script("arguments[0].focus()", tokens[0])
    from selenium.webdriver.common.keys import Keys

    press(driver, Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    told = driver.find_element("id", "token").text
    assert told.startswith(f"token 3 of {len(tokens)} “e”: log-prob -") and "ratio" in told
    assert "weight 0.001" in told and "entropy 0.25" in told and "KL 0.001" in told
    driver.find_element("id", "after").click()
    assert "all rewards are equal: no signal" in driver.find_element("id", "microscope").text
    driver.find_element("id", "after").click()
    assert "Step 40, group 1 of 3" in driver.find_element("id", "microscope").text
    choose(driver, "kind", "text")
    hit = driver.find_element("css selector", ".member .hit")
    assert hit.text == "4 * 2 = 8"
    tags = driver.find_elements("css selector", ".member:nth-of-type(1) .tag")
    assert [tag.text for tag in tags] == ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
    assert driver.get_log("browser") == []


def test_everything_can_be_reached_by_keyboard(page):
    from selenium.webdriver.common.keys import Keys

    driver = opened(page)
    reached = set()
    for _ in range(120):
        press(driver, Keys.TAB)
        reached.add(
            driver.execute_script(
                "const e = document.activeElement;"
                "return e.id || e.dataset.panel && 'panel ' + e.dataset.panel || e.className || "
                "e.tagName"
            )
        )
    assert {"skip", "step", "group", "kind", "before", "after", "panel 0", "SUMMARY"} <= reached
    figure = driver.find_element("css selector", "figure[data-panel='0']")
    driver.execute_script("arguments[0].focus()", figure)
    press(driver, Keys.END, Keys.ARROW_LEFT)
    assert figure.find_element("css selector", "output").text.startswith("step 39: mean 1.9")
    outline = driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # what has the focus shows it


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_both_colour_schemes(page, scheme):
    driver = opened(page, scheme=scheme)
    pairs = driver.execute_script(
        """const seen = [];
        const kinds = 'p, td, th, li, b, small, summary, pre, text, a, h1, h2, h4, code, label';
        for (const e of document.querySelectorAll(kinds)) {
          if (!e.getClientRects().length) continue;
          let under = e;
          while (getComputedStyle(under).backgroundColor === 'rgba(0, 0, 0, 0)'
                 && under.parentElement) under = under.parentElement;
          const style = getComputedStyle(e);
          seen.push([e.tagName === 'text' ? style.fill : style.color,
                     getComputedStyle(under).backgroundColor, e.tagName === 'text' ? 3 : 4.5]);
        }
        return [...new Set(seen.map((pair) => pair.join('|')))];"""
    )
    assert len(pairs) >= 5
    for front, back, least in (pair.split("|") for pair in pairs):
        assert contrast(front, back) >= float(least), (front, back)  # WCAG 2.2: 4.5, graphics 3
    body = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) > 0.5) == (scheme == "light")


def channels(colour: str) -> list[float]:
    return [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]


def luminance(colour: str) -> float:
    """Return the relative luminance of WCAG 2.2."""
    parts = [c / 255 for c in channels(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(front: str, back: str) -> float:
    high, low = sorted((luminance(front), luminance(back)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [320, 360, 1200])
def test_nothing_is_wider_than_the_screen(page, width):
    driver = opened(page, width=width)
    choose(driver, "kind", "mask")
    widths = driver.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert widths[0] <= widths[1] == width
