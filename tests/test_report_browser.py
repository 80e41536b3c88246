"""The report in headless Chromium, on a screen, on a small one, and printed.

Skipped where there is none: `apt-get install chromium`, or set CHROMIUM to the browser's path.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests run as root in containers
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--no-pdf-header-footer",
)
PROBE = """
<script>
addEventListener("load", () => {
  const box = (e) => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
  document.documentElement.dataset.probe = JSON.stringify({
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    images: [...document.images].map((i) => ({
      id: i.parentElement.id, complete: i.complete, natural: i.naturalWidth, box: box(i),
    })),
    captions: [...document.querySelectorAll("figcaption")].map(box),
    requests: performance.getEntriesByType("resource").filter((r) => !r.name.startsWith("data:")).length,
  });
});
</script>
"""  # noqa: E501


@pytest.fixture(scope="module")
def browser() -> str:
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip("no Chromium: apt-get install chromium, or set CHROMIUM")


def _run(browser: str, profile: Path, page: Path, *arguments: str) -> str:
    command = [browser, *FLAGS, f"--user-data-dir={profile}", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _probe(browser: str, report: Path, tmp_path: Path, width: int) -> Any:
    """Open the page in a window of that width and return what a script in it sees."""
    page = tmp_path / "probed.html"
    text = (report / "index.html").read_text(encoding="utf-8")
    page.write_text(text.replace("</body>", PROBE + "</body>"), encoding="utf-8")
    dom = _run(browser, tmp_path / "chromium", page, f"--window-size={width},900", "--dump-dom")
    found = re.search(r'data-probe="([^"]*)"', dom)
    assert found, "the script did not run"
    return json.loads(html.unescape(found[1]))


@pytest.mark.parametrize("width", [1280, 520])
def test_page_fits_the_window_and_shows_every_figure(
    browser: str, simulated_report: Path, tmp_path: Path, width: int
) -> None:
    seen = _probe(browser, simulated_report, tmp_path, width)
    assert seen["overflow"] <= 0, "the page scrolls sideways"
    assert seen["requests"] == 0, "the page fetched something"
    names = {path.stem for path in simulated_report.glob("*.png")}
    assert {image["id"] for image in seen["images"]} == names
    bottom_before = 0.0
    for image, caption in zip(seen["images"], seen["captions"], strict=True):
        left, top, right, bottom = image["box"]
        assert image["complete"], image
        assert image["natural"] > 300, image
        assert 0.5 * width < right - left <= width, image
        assert bottom_before <= top < bottom <= caption[1], f"{image} lies on something else"
        bottom_before = caption[3]


def test_screenshot_shows_text_and_coloured_curves(
    browser: str, simulated_report: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "page.png"
    arguments = ["--window-size=1280,3000", f"--screenshot={picture}"]
    _run(browser, tmp_path / "chromium", simulated_report / "index.html", *arguments)
    with Image.open(picture) as image:
        colors = image.convert("RGB").getcolors(maxcolors=1 << 24)
    counts = {color: count for count, color in colors}
    total = sum(counts.values())
    assert 0.5 < counts[255, 255, 255] / total < 0.99
    assert counts[0x00, 0x72, 0xB2] > 3000, "our curves are not blue, or not there"
    assert counts[0x11, 0x11, 0x11] > 500, "there is no text"


def test_print_has_all_figures_on_a_few_pages(
    browser: str, simulated_report: Path, tmp_path: Path
) -> None:
    document = tmp_path / "page.pdf"
    page = simulated_report / "index.html"
    _run(browser, tmp_path / "chromium", page, f"--print-to-pdf={document}")
    data = document.read_bytes()
    assert data.startswith(b"%PDF")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 8
