"""A browser opens the pages: pictures load, nothing errs, telephones fit."""

import html
import json
import re
import shutil
import subprocess

import pytest

from fusionlab import report
from tests.report import fakes

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = pytest.mark.skipif(
  CHROMIUM is None, reason="no chromium on the PATH to open the page with"
)

# Whatever is not in the page itself is refused, and the refusal is an error.
POLICY = (
  '<meta http-equiv="Content-Security-Policy" content="default-src \'none\';'
  " img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)
MEASURE = """<script>
const errors = [];
addEventListener("error", e => errors.push(String(e.message || e.target)), true);
addEventListener("securitypolicyviolation", e => errors.push(e.blockedURI));
addEventListener("load", () => {
  const root = document.documentElement, images = [...document.images];
  parent.postMessage(JSON.stringify({
    width: root.scrollWidth,
    images: images.length,
    empty: images.filter(i => !(i.complete && i.naturalWidth > 0)).length,
    charts: [...document.querySelectorAll(".chart svg")].filter(
      s => s.getBoundingClientRect().width > 200).length,
    background: getComputedStyle(document.body).backgroundColor,
    axis: getComputedStyle(document.querySelector(".chart text")).fill,
    errors,
  }), "*");
});
</script>"""
WRAPPER = """<!doctype html><body><script>
addEventListener("message", e => { document.body.dataset.found = e.data; });
</script><iframe src="page.html" style="width:%dpx;height:900px;border:0">
</iframe>"""


def opened(page, folder, width: int, *flags: str) -> dict:
  """What a copy of the page measures of itself, `width` CSS pixels wide."""
  folder.mkdir()
  copy = page.read_text("utf-8").replace("<head>", "<head>" + POLICY + MEASURE)
  (folder / "page.html").write_text(copy, "utf-8")
  (folder / "wrapper.html").write_text(WRAPPER % width)
  done = subprocess.run(
    [
      str(CHROMIUM),
      "--headless",
      "--no-sandbox",
      "--disable-gpu",
      "--disable-quic",
      "--disable-dev-shm-usage",
      "--no-first-run",
      "--disable-background-networking",
      "--disable-component-update",
      "--disable-sync",
      "--enable-logging=stderr",
      "--hide-scrollbars",
      f"--user-data-dir={folder / 'profile'}",
      "--window-size=1300,1000",
      "--virtual-time-budget=10000",
      *flags,
      "--dump-dom",
      (folder / "wrapper.html").as_uri(),
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )
  assert "CONSOLE" not in done.stderr, done.stderr
  found = re.search(r'data-found="([^"]*)"', done.stdout)
  assert found, f"{done.stdout}\n{done.stderr}"
  return json.loads(html.unescape(found[1]))


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
  root = tmp_path_factory.mktemp("runs")
  long = "a_very_long_word_" * 8
  runs = [
    fakes.write_run(root / "mot", caption=fakes.EVIL),
    fakes.write_run(
      root / f"dense_{long}"[:120], fakes.experiment(untie=""), fakes.EVIL
    ),
    fakes.write_run(root / "other", caption=long),
  ]
  return {
    "report": report.write(runs[0]),
    "long": report.write(runs[2]),
    "comparison": report.compare(runs, root / "comparison.html"),
  }


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["report", "long", "comparison"])
def test_pictures_load_and_nothing_scrolls_sideways(
  pages, tmp_path, name, width
):
  found = opened(pages[name], tmp_path / "browser", width)
  assert found["errors"] == []
  assert found["images"] > 10
  assert found["empty"] == 0
  assert found["charts"] >= 7
  assert found["width"] <= width


def test_a_dark_page_has_light_axes(pages, tmp_path):
  """Text of a drawing has the page's own colour."""
  colors = {}
  for scheme, number in (("dark", 0), ("light", 1)):
    flag = f"--blink-settings=preferredColorScheme={number}"
    found = opened(pages["report"], tmp_path / scheme, 1200, flag)
    colors[scheme] = [
      sum(map(int, re.findall(r"\d+", found[name])[:3]))
      for name in ("background", "axis")
    ]
  assert colors["dark"][0] < 150 < 600 < colors["dark"][1]
  assert colors["light"][1] < 150 < 600 < colors["light"][0]
