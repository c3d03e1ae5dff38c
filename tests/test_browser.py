"The explorer as a person meets it: JupyterLab in a headless Chromium, keys and files going in, pictures and messages coming out."
import base64
import io
import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

CHROMIUM, DRIVER = Path("/usr/bin/chromium"), Path("/usr/bin/chromedriver")
FLAGS = ("--headless", "--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--window-size=1500,1500")
MARK = "BARLERIA_BROWSER_TEST"  # in the environment of every process that the test starts
PATIENCE = 150  # seconds for one answer at most: other tests may hold both cores

pytestmark = pytest.mark.skipif(not (CHROMIUM.exists() and DRIVER.exists()), reason="no Chromium: apt-get install chromium chromium-driver")

CELLS = ["from barleria_nb.explore import Explorer\nexplorer = Explorer.default()", "explorer.ui"]
SETTINGS = {  # no prompts, nothing fetched, every cell in the page
    "@jupyterlab/apputils-extension/notification": dict(fetchNews="false", checkForUpdates=False, doNotDisturbMode=True),
    "@jupyterlab/notebook-extension/tracker": dict(windowingMode="none"),
    "@jupyterlab/docmanager-extension/plugin": dict(autosave=False),
}


@contextmanager
def ended(mark):
    "On leaving, end every process that carries the mark, politely and then not."
    import psutil
    def ours():
        found = []
        for p in psutil.process_iter():
            try:
                if p.pid != os.getpid() and p.environ().get(MARK) == mark: found.append(p)
            except (psutil.Error, OSError): pass
        return found
    try: yield
    finally:
        for p in ours():
            try: p.terminate()
            except psutil.Error: pass
        psutil.wait_procs(ours(), timeout=10)
        for p in ours():
            try: p.kill()
            except psutil.Error: pass
        psutil.wait_procs(ours(), timeout=10)
        assert not ours()


def start_lab(folder, env):
    "A JupyterLab on a free port, its settings and everything it writes inside `folder`: (address, token)."
    for name, value in SETTINGS.items():
        path = folder / "settings" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    (folder / "work").mkdir()
    cells = [dict(cell_type="code", id=f"c{i}", metadata={}, execution_count=None, outputs=[], source=c) for i, c in enumerate(CELLS)]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    (folder / "work" / "explore.ipynb").write_text(json.dumps(dict(nbformat=4, nbformat_minor=5, metadata=kernel, cells=cells)))
    token, runtime = uuid4().hex, folder / "runtime"
    places = dict(JUPYTER_CONFIG_DIR="config", JUPYTER_DATA_DIR="data", JUPYTER_RUNTIME_DIR="runtime", JUPYTERLAB_SETTINGS_DIR="settings", JUPYTERLAB_WORKSPACES_DIR="workspaces", IPYTHONDIR="ipython")
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", "--expose-app-in-browser", "--ip=127.0.0.1", "--port=0", f"--IdentityProvider.token={token}",
               "--LabApp.extension_manager=readonly", "--LabApp.news_url=None", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate", f"--ServerApp.root_dir={folder / 'work'}"]
    with open(folder / "lab.log", "w") as log:
        lab = subprocess.Popen(command, env=env | {k: str(folder / v) for k, v in places.items()}, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        for path in runtime.glob("jpserver-*.json"):
            try: return json.loads(path.read_text())["url"], token
            except ValueError: pass  # not written to its end yet
        assert lab.poll() is None, (folder / "lab.log").read_text()
        time.sleep(.1)
    raise AssertionError((folder / "lab.log").read_text())


def start_browser(folder, env):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in (*FLAGS, f"--user-data-dir={folder / 'profile'}"): options.add_argument(flag)
    driver = webdriver.Chrome(options, Service(str(DRIVER), env=env | dict(HOME=str(folder), TMPDIR=str(folder))))
    driver.set_script_timeout(PATIENCE)
    return driver


class Lab:
    "What a person does and sees in the page."
    def __init__(self, driver, shots): self.driver, self.shots = driver, shots

    def until(self, what, why):
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.support.ui import WebDriverWait
        def look(_):
            try: return what()
            except (StaleElementReferenceException, IndexError): return False  # not drawn yet, or drawn anew
        try: return WebDriverWait(self.driver, PATIENCE, .1).until(look)
        except Exception:
            self.shot("failed")
            raise AssertionError(f"no {why} after {PATIENCE} s; the page says: {self.driver.find_element('tag name', 'body').text[-1500:]}")

    def shot(self, name): self.driver.save_screenshot(str(self.shots / f"{name}.png"))

    def all(self, css): return self.driver.find_elements("css selector", css)

    def open(self, url, token):
        self.driver.get(f"{url}doc/tree/explore.ipynb?reset&token={token}")
        self.until(lambda: self.driver.execute_script("return !!(window.jupyterapp && jupyterapp.shell.currentWidget && jupyterapp.shell.currentWidget.sessionContext)"), "notebook")
        done = "const done = arguments[arguments.length - 1]; "
        self.driver.execute_async_script(done + "jupyterapp.shell.currentWidget.sessionContext.ready.then(() => done())")
        self.driver.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
        self.until(lambda: self.page() or self.errors(), "explorer")
        assert not self.errors(), self.errors()[-1].text[-1500:]
        self.driver.execute_script("arguments[0].scrollIntoView()", self.all(".jp-OutputArea-output .widget-hbox")[0])

    def page(self):
        "The page's picture: its bytes and its text; the picture has been decoded by the browser."
        img = self.all("img[alt*=' answers ']")[0]
        source = img.get_attribute("src")
        if not source or not self.driver.execute_script("return arguments[0].complete && arguments[0].naturalWidth > 500", img): return None
        return base64.b64decode(source.split(",", 1)[1]), img.get_attribute("alt")

    def errors(self): return self.all("[data-mime-type*=stderr], [data-mime-type*=stdout], [data-mime-type*=error]")

    def message(self): return self.all("[role=alert]")[0].text

    def labelled(self, name, kind): return self.driver.find_element("xpath", f"//label[.='{name}']/following-sibling::{kind}")

    def say(self, sentence):
        from selenium.webdriver.common.keys import Keys
        field = self.labelled("Sentence", "input")
        field.send_keys(Keys.CONTROL, "a")  # held down to the end of the call
        field.send_keys(sentence, Keys.ENTER)

    def choose(self, name, text):
        from selenium.webdriver.support.ui import Select
        Select(self.labelled(name, "select")).select_by_visible_text(text)

    def options(self, name):
        from selenium.webdriver.support.ui import Select
        return [o.text for o in Select(self.labelled(name, "select")).options]

    def press(self, key, times=1): self.all(".noUi-handle")[0].send_keys(*[key] * times)

    def changed(self, before, *words):
        "Wait for another picture whose text has all the words; it is a PNG that is not empty."
        def new():
            now = self.page()
            return now and now[0] != before[0] and all(w in now[1] for w in words) and now
        now = self.until(new, f"new page with {words}")
        pixels = np.asarray(Image.open(io.BytesIO(now[0])).convert("RGB"))
        assert pixels.shape[1] > 900 and pixels.std() > 10
        return now

    def refused(self, before, *words):
        "Wait for a message of one line with the words; the page stays as it was."
        said = self.until(lambda: all(w in self.message() for w in words) and self.message(), f"message with {words}")
        assert "\n" not in said and self.page() == before
        return said

    def upload(self, path):
        "Press the button; the field behind it is put into the page in place of the system's window for choosing files."
        self.driver.execute_script("HTMLInputElement.prototype.click = function () { document.body.appendChild(this) }")
        self.all("button.widget-upload")[0].click()
        field = self.until(lambda: self.all("body > input[type=file]")[-1], "field for a file")
        field.send_keys(str(path))


def test_explorer(tmp_path):
    from selenium.webdriver.common.keys import Keys
    shots = Path(os.environ.get("BARLERIA_SHOTS") or tmp_path / "shots")
    shots.mkdir(parents=True, exist_ok=True)
    mark = uuid4().hex
    env = os.environ | {MARK: mark, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with ExitStack() as stack:
        stack.enter_context(ended(mark))
        url, token = start_lab(tmp_path, env)
        driver = start_browser(tmp_path, env)
        stack.callback(driver.quit)
        lab = Lab(driver, shots)
        lab.open(url, token)
        first = lab.page()
        assert "scene 0: " in driver.find_element("css selector", "figure img").get_attribute("alt")
        lab.shot("1_first")

        lab.say("the large one on the left")
        second = lab.changed(first, "“the large one on the left”", "threshold 0.35", "left for right")
        lab.press(Keys.ARROW_RIGHT, 3)
        third = lab.changed(second, "threshold 0.50")
        lab.shot("2_threshold")

        lab.say("the " * 40 + "circle")
        lab.refused(third, "shorten it")
        lab.say(" ")
        lab.refused(third, "is empty")
        said = lab.message()
        lab.press(Keys.ARROW_LEFT)
        third = lab.changed(third, "threshold 0.45")
        assert lab.message() == said  # the sentence in the box is still none
        lab.shot("3_message")

        lab.say("the square")
        fourth = lab.changed(third, "“the square”")
        assert lab.message() == ""
        lab.choose("Inside", next(o for o in lab.options("Inside") if o.startswith("head 1")))
        fifth = lab.changed(fourth, "At head 1")
        lab.choose("Picture", "scene 4")
        sixth = lab.changed(fifth)
        lab.choose("Model", lab.options("Model")[-1])
        seventh = lab.changed(sixth, *lab.options("Model")[:-1])
        lab.shot("4_models")

        drawn = np.full((90, 160, 3), 90, np.uint8)
        drawn[20:70, 30:80] = 200, 30, 30
        Image.fromarray(drawn).save(tmp_path / "mine.png")
        (tmp_path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
        Image.new("1", (10_000, 9500)).save(tmp_path / "huge.png")
        lab.choose("Model", lab.options("Model")[0])
        eighth = lab.changed(seventh)
        lab.upload(tmp_path / "mine.png")
        ninth = lab.changed(eighth)
        assert "yours: mine.png" in lab.options("Picture") and "truth" not in ninth[1]
        lab.shot("5_upload")
        lab.upload(tmp_path / "bad.png")
        lab.refused(ninth, "bad.png", "convert or replace it")
        lab.upload(tmp_path / "huge.png")
        lab.refused(ninth, "huge.png", "95,000,000", "shrink it")
        lab.shot("6_refused")
        lab.choose("Picture", "scene 0")
        lab.changed(ninth)
        assert lab.message() == ""

        assert not lab.errors()  # nothing was printed, no traceback
