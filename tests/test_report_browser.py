"""A report in a real headless Chromium: errors, pictures and width on a phone, light and dark; each check shown to fail."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from supar_cli.reporting import html as page
from supar_cli.reporting import read as report
from tests.test_report import EVIL, study
from tests.test_report import trained as trained

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
LOOK = """return {
  svgs: [...document.querySelectorAll('svg')].map(s => s.getBoundingClientRect()).map(b => [b.width, b.height]),
  wide: document.documentElement.scrollWidth, view: window.innerWidth}"""


class Browser:
    """A headless Chromium by the WebDriver protocol."""

    def __init__(self, base: str, profile: Path) -> None:
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self._base = base
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        started = self.send("POST", "session", {"capabilities": {"alwaysMatch": wanted}})
        self._base = f"{base}/session/{started['sessionId']}"

    def send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"{self._base}/{path}".rstrip("/"), data, {"Content-Type": "application/json"}, method=method
        )
        with self._open(request, timeout=60) as answer:
            return json.loads(answer.read())["value"]

    def cdp(self, command: str, **parameters: Any) -> Any:
        return self.send("POST", "goog/cdp/execute", {"cmd": command, "params": parameters})

    def shot(self, width: int, scheme: str) -> bytes:
        """A screenshot at a width, light or dark."""
        self.cdp("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.cdp(
            "Emulation.setDeviceMetricsOverride", width=width, height=1600, deviceScaleFactor=1, mobile=width < 600
        )
        return base64.b64decode(self.send("GET", "screenshot"))

    def problems(self, path: Path, svgs: int, width: int = 360) -> list[str]:
        """What is wrong with a page on a phone: errors, pictures that are missing or empty, overflow."""
        self.cdp("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=True)
        self.send("POST", "url", {"url": path.as_uri()})
        seen = self.send("POST", "execute/sync", {"script": LOOK, "args": []})
        found = [entry["message"] for entry in self.send("POST", "se/log", {"type": "browser"})]
        if len(seen["svgs"]) != svgs:
            found.append(f"{len(seen['svgs'])} pictures, not {svgs}")
        found += [f"a picture of {w}×{h}" for w, h in seen["svgs"] if w < 100 or h < 100]
        if seen["wide"] > width or seen["view"] > width:
            found.append(f"{seen['wide']} wide")
        return found


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("no Chromium with its driver on this machine: apt-get install chromium chromium-driver")
    with subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as driver:
        assert driver.stdout is not None
        port = next(found[1] for line in driver.stdout if (found := re.search(r"successfully on port (\d+)", line)))
        try:
            made = Browser(f"http://127.0.0.1:{port}", tmp_path_factory.mktemp("profile"))
            yield made
            made.send("DELETE", "")
        finally:
            driver.terminate()


def colours(png: bytes) -> tuple[float, int]:
    """(mean brightness from 0 to 1, number of different colours)."""
    pixels = image.imread(io.BytesIO(png))[..., :3]
    return float(pixels.mean()), len({tuple(one) for one in pixels[::4, ::4].reshape(-1, 3).tolist()})


@pytest.fixture(scope="module")
def made(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    sources = (str(study(folder / "sweep", title=EVIL)), str(trained))
    parts = [part for source in sources for part in report.read(source)]
    (folder / "report.html").write_text(page.render(parts), "utf-8")
    return folder / "report.html"


class TestInChromium:
    def test_it_loads_without_errors_and_fits_a_phone(self, browser: Browser, made: Path) -> None:
        assert browser.problems(made, 6) == []

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("</main>", EVIL + "</main>", "planted"),
            ("</main>", "<img src='none.png'></main>", "ERR_FILE_NOT_FOUND"),
            ("<svg", "<svg hidden style='display:none'", "picture of 0×0"),
            ("</main>", "<p style='width:700px'>wide</p></main>", "wide"),
            ("</main>", "<svg style='width:200px;height:200px'></svg></main>", "7 pictures"),
        ],
    )
    def test_what_is_planted_is_found(self, browser: Browser, made: Path, old: str, new: str, message: str) -> None:
        text = made.read_text("utf-8")
        planted = made.with_name("planted.html")
        planted.write_text(text.replace(old, new, 1), "utf-8")
        assert any(message in problem for problem in browser.problems(planted, 6))

    @pytest.mark.parametrize("width", [360, 1280])
    def test_light_and_dark(self, browser: Browser, made: Path, width: int) -> None:
        browser.send("POST", "url", {"url": made.as_uri()})
        (light, some), (dark, others) = (colours(browser.shot(width, scheme)) for scheme in ("light", "dark"))
        assert light > 0.75 and dark < 0.35 and min(some, others) > 20
        browser.send("POST", "url", {"url": "about:blank"})
        assert colours(browser.shot(width, "light"))[1] == 1
