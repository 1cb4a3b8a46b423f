"""What a real browser makes of a page, at a given width."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--window-size=1300,900",
)
# Runs beside the page, which is in a frame of the wanted width: the window of a browser is never as narrow as a phone.
_MEASURE = """
function size(x) { const r = x.getBoundingClientRect(); return [r.width, r.height]; }
function clipped(x) {
  const inner = x.getBoundingClientRect(), outer = x.ownerSVGElement.getBoundingClientRect();
  return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1 ||
    inner.bottom > outer.bottom + 1;
}
function scale(matrix) { return Math.hypot(matrix.a, matrix.b); }
function measure(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  const texts = [...page.querySelectorAll("svg text")].filter(x => x.textContent.trim());
  return {
    width: frame.contentWindow.innerWidth,
    scroll_width: root.scrollWidth,
    pictures: [...page.querySelectorAll("svg")].map(size),
    images: [...page.querySelectorAll("svg image")].map(x => x.href.baseVal.slice(0, 22)),
    clipped: texts.filter(clipped).map(x => x.textContent),
    letters: texts.map(x => parseFloat(getComputedStyle(x).fontSize) * scale(x.getScreenCTM())),
    too_wide: [...page.querySelectorAll("h1, h2, h3, p, summary")].filter(x => x.scrollWidth > x.clientWidth).length,
    loaded: frame.contentWindow.performance.getEntriesByType("resource").map(x => x.name),
  };
}
onload = () => {
  const out = document.createElement("pre");
  out.textContent = JSON.stringify([...document.querySelectorAll("iframe")].map(measure));
  document.body.append(out);
};
"""


def measured(page: Path, folder: Path, *widths: int) -> list[dict[str, Any]]:
    """Lay a page out at some widths; skip where there is no browser, fail where it has anything to complain about."""
    if not BROWSER:
        pytest.skip("no Chromium or Chrome is installed")
    content = html.escape(page.read_text(encoding="utf-8"))
    frames = "".join(
        f'<iframe style="width:{w}px;border:0" srcdoc="{content}"></iframe>' for w in widths
    )
    around = folder / "around.html"
    around.write_text(
        f"<!DOCTYPE html><script>{_MEASURE}</script><body>{frames}</body>", encoding="utf-8"
    )
    profile = folder / "profile"
    done = subprocess.run(
        [BROWSER, *_FLAGS, f"--user-data-dir={profile}", "--dump-dom", around.as_uri()],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    # Where a page's own errors and what it could not load are written.
    assert "CONSOLE" not in done.stderr, done.stderr
    (found,) = re.findall(r"<pre>(.*)</pre>", done.stdout)
    return json.loads(html.unescape(found))
