"""A headless Chromium for tests of pages, driven by selenium."""

import os
import shutil
from contextlib import contextmanager

# What a model could write to do something in a page.
ATTACK = (
    "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<!--<script>\u2028]]>&lt;b&gt;&amp;"
)


def why_not() -> str:
    """Return why there can be no browser, "" where there can."""
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "selenium is not installed (pip install -e '.[test]')"
    missing = [name for name in ("chromium", "chromedriver") if not shutil.which(name)]
    return f"no {' and no '.join(missing)} (Debian: chromium, chromium-driver)" if missing else ""


@contextmanager
def chromium(profile, width: int = 1200, height: int = 900):
    """Open a browser with an empty profile that is kept from asking for anything by itself."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--disable-dev-shm-usage", f"--user-data-dir={profile}", f"--window-size={width},{height}",
    ):  # fmt: skip
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    service = Service(shutil.which("chromedriver"), env=environment)
    driver = webdriver.Chrome(options=options, service=service)
    try:
        yield driver
    finally:
        driver.quit()
