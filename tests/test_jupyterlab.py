"""A user's hands: JupyterLab in a real browser, its menus, its slider, its second process."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest

from opentrans_lab.records import PROJECT

SETTINGS = {
    # Cells that are out of sight must have outputs to look at; no dialog may be in the way.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
PATIENCE = 900_000  # milliseconds: a busy machine is no failure
STREAMED = """() => {
    window.streamed = '';
    new MutationObserver(() => {
        for (const out of document.querySelectorAll('[data-mime-type*="stderr"]'))
            window.streamed += out.textContent;
    }).observe(document.body, {subtree: true, childList: true, characterData: true});
}"""  # a progress bar is gone when its work is done: keep what was to be seen on the way
PICTURES = ".widget-output img"


class Lab:
    """A JupyterLab server in a folder with a copy of the notebooks."""

    def __init__(self, folder):
        shutil.copytree(PROJECT / "notebooks", folder / "notebooks")
        for plugin, settings in SETTINGS.items():
            path = folder / "settings" / "@jupyterlab" / f"{plugin}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings))
        self.notebooks, self.runs = folder / "notebooks", folder / "runs"
        self.token = secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        own = {
            "OPENTRANS_RUNS": self.runs,
            "OMP_NUM_THREADS": "1",
            "JUPYTER_PREFER_ENV_PATH": "1",
            "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
            **{
                name: folder / name.lower()
                for name in (
                    "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR",
                    "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR",
                )
            },
        }  # fmt: skip
        self.log = (folder / "server.log").open("w")
        root = ["--allow-root"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
        self.process = subprocess.Popen(
            [
                sys.executable, "-m", "jupyterlab", "--no-browser", f"--ServerApp.port={port}",
                "--ServerApp.ip=127.0.0.1", f"--IdentityProvider.token={self.token}",
                "--ServerApp.port_retries=0", *root,
            ],
            cwd=folder, env=os.environ | {k: str(v) for k, v in own.items()},
            stdout=self.log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            self._wait(folder / "server.log")
        except BaseException:
            self.stop()
            raise

    def _wait(self, log):
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        for _ in range(1800):
            try:
                with direct.open(f"{self.url}/api?token={self.token}", timeout=5):
                    return
            except OSError:
                assert self.process.poll() is None, log.read_text()
                time.sleep(0.5)
        raise AssertionError(log.read_text())

    def stop(self):
        """As Ctrl-C twice does: the server ends its kernels and goes."""
        self.process.terminate()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:  # how it ends is not what is tested
            self.process.kill()
            self.process.wait()
        self.log.close()

    def change(self, name, **parameters):
        """Type other values into the parameters cell."""
        path = self.notebooks / f"{name}.ipynb"
        notebook = nbformat.read(path, as_version=4)
        cell = next(c for c in notebook.cells if "parameters" in c.metadata.get("tags", []))
        for key, value in parameters.items():
            line = rf"(?m)^{key} = .*$"
            assert re.search(line, cell.source), key
            cell.source = re.sub(line, f"{key} = {value!r}", cell.source)
        nbformat.write(notebook, path)

    def run_all(self, browser, name):
        """Open a notebook, Run > Run All Cells, wait, save; the page."""
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        page.set_default_timeout(PATIENCE)
        said = []
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(f"{self.url}/lab/tree/notebooks/{name}.ipynb?token={self.token}&reset")
        page.wait_for_selector(".jp-NotebookPanel-notebook .jp-CodeCell")
        page.get_by_text(re.compile(r"Python 3.*\| Idle")).wait_for()  # the kernel is connected
        page.evaluate(STREAMED)
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_text("Run All Cells", exact=True).click()
        # A number in brackets is a cell that has run, a star one that waits.
        page.wait_for_function(
            """() => {
                const cells = [...document.querySelectorAll(
                    '.jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell .jp-InputArea-prompt')];
                const error = document.querySelector('[data-mime-type*="error"]');
                return error || cells.every(cell => /\\[\\d+\\]/.test(cell.textContent));
            }"""
        )
        page.keyboard.press("Escape")
        page.keyboard.press("Control+s")
        path = self.notebooks / f"{name}.ipynb"
        for _ in range(120):
            notebook = nbformat.read(path, as_version=4)
            code = [cell for cell in notebook.cells if cell.cell_type == "code"]
            if all(cell.execution_count for cell in code):  # and not what was saved on the way
                break
            page.wait_for_timeout(500)
        outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
        wrong = [out for out in outputs if out.output_type == "error"]
        assert not wrong, "\n".join(wrong[0].traceback)
        assert outputs and not said, said
        return page


@pytest.fixture
def lab(browser, tmp_path):
    server = Lab(tmp_path)
    yield server
    server.stop()


def test_the_explorers_slider_moves_the_plot(browser, lab):
    lab.change("01_esd_and_alpha", bootstrap=2, distil_steps=2)
    page = lab.run_all(browser, "01_esd_and_alpha")
    page.wait_for_selector(PICTURES)
    slider = page.locator(".widget-slider .noUi-handle")
    readout = page.locator(".widget-slider .widget-readout")
    assert slider.count() == 1
    seen = {}
    for _ in range(3):
        picture = page.locator(PICTURES).get_attribute("src")
        assert picture not in seen, "the slider moved and the plot did not"
        seen[picture] = readout.inner_text()
        slider.press("ArrowRight")
        page.wait_for_function(
            "([where, old]) => { const now = document.querySelector(where);"
            " return now && now.src !== old }",
            arg=[PICTURES, picture],
        )
    assert len(set(seen.values())) == 3, "each step names another layer"
    rules = page.locator(".widget-dropdown select").nth(2)
    picture = page.locator(PICTURES).get_attribute("src")
    rules.select_option("mid")
    page.wait_for_function(
        "([where, old]) => { const now = document.querySelector(where);"
        " return now && now.src !== old }",
        arg=[PICTURES, picture],
    )
    (record,) = lab.runs.glob("01_esd_and_alpha/*/metrics.json")
    assert json.loads(record.read_text())["status"] == "ok"
    page.close()


def test_two_devices_in_jupyterlab(browser, lab):
    """03 with its parameters changed: torchrun's progress comes into the notebook as it goes."""
    lab.change(
        "03_transfer", devices=2, device="cpu", rows="dense ours", density=0.5, p=0.5, size=64,
        prune_steps=1, prune_batch_size=2, steps=20, batch_size=4, eval_images=4,
    )  # fmt: skip
    page = lab.run_all(browser, "03_transfer")
    streamed = page.evaluate("window.streamed")
    for row in ("dense", "ours"):
        assert f"deeplabv3, {row}, freeze none" in streamed and "step/s" in streamed
    (record,) = lab.runs.glob("03_transfer/*/metrics.json")
    metrics = json.loads(record.read_text())
    assert metrics["parameters"]["devices"] == 2 and metrics["metrics"]["miou"].keys() == {
        "dense", "ours"
    }  # fmt: skip
    assert len(list(lab.runs.glob("stages/segment/*/job.json"))) == 2, "both rows went to torchrun"
    page.close()
