"The site: directives obeyed, links that hold, every public name described, pages that work from a disk without a network."
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / ".ci"), str(ROOT / ".ci" / "pages")]
import links
import make_site
import notebooks as N
import reference

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND")


def code(*lines): return dict(cell_type="code", id="a", metadata={}, execution_count=None, outputs=[], source="\n".join(lines))


@pytest.mark.parametrize("lines,tags", [(("x = 1",), []), (("#| exports", "x = 1"), []), (("#| export", "x = 1"), ["hide-input"]), (("#| echo: false", "x = 1"), ["remove-input"]),
                                        (("#| output: false", "#|exports", "x = 1"), ["remove-output"])])
def test_directives_are_obeyed_and_gone(lines, tags):
    cell = make_site.shown(code(*lines))
    assert cell["source"] == "x = 1" and cell["metadata"]["tags"] == tags


@pytest.mark.parametrize("lines", [("#| hide", "x = 1"), ("#| hide", "#| solution", "x = 1"), ("#| default_exp loss",), ("import nbdev; nbdev.nbdev_export()",), ("",)])
def test_hidden_cells_are_absent(lines): assert make_site.shown(code(*lines)) is None


def test_line_below_the_title_keeps_colab_and_needs_no_picture():
    path = N.NBS / "04_snf.ipynb"
    text = make_site.led(N.source(N.load(path)["cells"][0]), path, "snf", "")
    assert "badge" not in text and "←" not in text and "→" not in text and f"[Open in Colab](https://{N.COLAB}/github/" in text and "(api/snf.md)" in text


def test_links_lead_to_pages_or_to_the_repository():
    at = lambda text: make_site.relinked(text, N.NBS / "train" / "21_barleria.ipynb", "../")
    assert at("[a](../04_snf.ipynb#Recap)") == "[a](../04_snf.ipynb#Recap)"
    assert at("[a](../index.ipynb)") == "[a](../index.ipynb)" == at("[a](../../README.md)")
    assert at("[a](../../CONTRIBUTING.md)") == "[a](../contributing.md)"
    assert at("[a](../../LICENSE)") == f"[a]({make_site.home()}/LICENSE)"
    for same in ("[a](https://example.org/x.ipynb)", "[a](#Recap)", "[a](gone.ipynb)", "x[0](1)"): assert at(same) == same


SAMPLE = '''"A sample."
__all__ = ["SIDE", "area", "Box"]

SIDE = 3 # pixels
def area(
    a:int, # one side | the other
    *,
    b:float=SIDE, # `b`, in $
    key=lambda x: x, # order
)->float: # a*b
    "Area of a box."
    return a * b
@dataclass
class Box:
    "A box."
    a:int # one side
    b:list=field(default_factory=list) # the others
    def grow(self,
        by:int=1, # pixels
    )->"Box": # a larger one
        "Make it larger."
    def forward(self, x): return x
    def _hidden(self): "Nobody's business."
'''


def test_entries_of_the_reference(tmp_path, monkeypatch):
    (tmp_path / "sample.py").write_text(SAMPLE)
    monkeypatch.setattr(N, "LIB", tmp_path)
    side, area, box = (reference.entry("sample", name, node, ("The code", "../x.ipynb#The-code")) for name, node in reference.public("sample").items())
    assert "{py:data} SIDE\n:value: '3'" in side and "pixels [§\u00a0The code](../x.ipynb#The-code)" in side
    assert "{py:function} area(a, *, b=SIDE, key=...)" in area
    assert "| `a` | `int` |  | one side \\| the other |" in area and "| `b` | `float` | `SIDE` | `b`, in \\$ |" in area and "| *returns* | `float` |  | a*b |" in area
    assert "{py:class} Box(a, b=list())" in box and "{py:method} grow(by=1)" in box and "| *returns* | `'Box'` |  | a larger one |" in box and "forward(x)" in box and "_hidden" not in box


@pytest.mark.parametrize("html,slip", [
    ('<a href="gone.html">x</a>', "no such file"), ('<a href="#gone">x</a>', "no such anchor"), ('<a href="other.html#gone">x</a>', "no such anchor"), ('<img src="gone.png">', "no such file"),
    ('<a href="/other.html">x</a>', "root of the host"), ('<script src="https://example.org/x.js"></script>', "loads https://example.org"), ('<link rel="stylesheet" href="//example.org/x.css">', "loads //example.org"),
    ('<p style="background: url(https://example.org/x.png)">x</p>', "loads https://example.org"), ('<a href="http://example.org">x</a>', "not an https address"), ('<div class="cell_input"><pre>#| hide\nx</pre></div>', "shows '#| hide'"), ("<p>::: note</p>", "shows ':::'"),
])
def test_slips_of_pages_are_found(tmp_path, html, slip):
    (tmp_path / "other.html").write_text('<h1 id="here">x</h1>')
    (tmp_path / "index.html").write_text('<a href="other.html#here">x</a><a href="https://example.org/y">y</a><code>#| hide</code><pre>#| hide</pre>')
    assert links.check(tmp_path) == ([], ["https://example.org/y"])
    (tmp_path / "page.html").write_text(html)
    [found] = links.check(tmp_path)[0]
    assert found.startswith("page.html: ") and slip in found


def test_dead_links_of_notebooks_are_slips(tmp_path, monkeypatch):
    md = lambda text: json.dumps(dict(cells=[dict(cell_type="markdown", source=text)]))
    (tmp_path / "nbs").mkdir()
    (tmp_path / "nbs" / "a.ipynb").write_text(md("# First\n\n## By `hand`, twice\n\n[b](b.ipynb#The-end) [c](#By-hand,-twice) [d](../README.md#one-two) `[x](y)` [w](https://example.org/gone)\n\n```\n# No heading\n[x](y)\n```"))
    (tmp_path / "nbs" / "b.ipynb").write_text(md("# The end\n\n[a](a.ipynb#the-end), [gone](c.ipynb)"))
    (tmp_path / "README.md").write_text("# One, two\n[a](nbs/a.ipynb#No-heading)")
    monkeypatch.setattr(N, "ROOT", tmp_path)
    monkeypatch.setattr(N, "NBS", tmp_path / "nbs")
    found = list(N.dead_links())
    assert len(found) == 3 and [s.split(": ")[:2] for s in found] == [["nbs/b.ipynb", "a.ipynb#the-end"], ["nbs/b.ipynb", "c.ipynb"], ["README.md", "nbs/a.ipynb#No-heading"]]


def test_folder_that_is_no_site_stays(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(SystemExit, match="is no site"): make_site.build(tmp_path)
    assert (tmp_path / "mine.txt").exists()


# ---------------------------------------------------------------- the whole of it

@pytest.mark.full
def test_site(tmp_path):
    "Built as `make site` builds it, elsewhere; one test, so that two processes do not build it twice."
    site = tmp_path / "_site"
    done = subprocess.run([sys.executable, str(ROOT / ".ci" / "pages" / "make_site.py"), str(site)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    has_every_chapter_and_every_public_name(site)
    if not (CHROMIUM.exists() and DRIVER.exists()): pytest.skip("built and checked, but not seen: no Chromium (apt-get install chromium chromium-driver)")
    works_from_the_disk_without_a_network(site, tmp_path)


def text(path): return path.read_text(encoding="utf-8")


def has_every_chapter_and_every_public_name(site):
    for p in N.notebooks(): assert (site / make_site.inside(p)).with_suffix(".html").exists()
    sidebar = text(site / "index.html")
    order = [sidebar.index(f'href="{make_site.inside(p)[:-6]}.html">{p.stem.split("_")[0]} ') for p in make_site.chapters()]
    assert order == sorted(order)
    for module in N.modules():
        page = text(site / "api" / f"{module}.html")
        for name in reference.public(module): assert f'id="{N.LIB.name}.{module}.{name}"' in page
    assert 'href="api/metrics.html#barleria_nb.metrics.evaluate"' in text(site / "13_metrics.html")


def works_from_the_disk_without_a_network(site, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"): options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(str(DRIVER), env=os.environ | dict(HOME=str(tmp_path), TMPDIR=str(tmp_path))))
    def until(script, patience=120):
        end = time.monotonic() + patience
        while not driver.execute_script(f"return {script}"):
            assert time.monotonic() < end, script
            time.sleep(.2)
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", dict(offline=True, latency=0, downloadThroughput=0, uploadThroughput=0))
        for width in (1400, 400):
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", dict(width=width, height=900, deviceScaleFactor=1, mobile=width < 500))
            driver.get((site / "04_snf.html").as_uri())
            until("document.readyState == 'complete' && document.querySelectorAll('.math').length > 50 && document.querySelectorAll('mjx-container').length == document.querySelectorAll('.math').length")
            assert driver.execute_script("return document.querySelectorAll('[data-mjx-error]').length") == 0
            assert driver.execute_script("return [...document.images].every(i => i.naturalWidth > 0)")
            assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth"), f"wider than {width} pixels"
        driver.get((site / "search.html").as_uri() + "?q=planar_step")
        until("document.querySelectorAll('ul.search li a').length > 0")
        assert "api/snf.html#barleria_nb.snf.planar_step" in driver.execute_script("return document.querySelector('ul.search li a').href")
    finally: driver.quit()
