"""Test runs write to a folder of their own, and notebooks are compared where they keep output."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import nbformat
import pytest

import opentrans_lab  # noqa: F401, before torch: it says how threads wait


def pytest_configure(config: pytest.Config) -> None:
    # nbval reads a cell's messages after its end, and ZeroMQ drops what is over 1,000 of them, the
    # one that says "done" included: bars may not write ten lines a second for minutes.
    os.environ.setdefault("TQDM_MININTERVAL", "10")
    if hasattr(config, "workerinput"):
        return  # one of several processes: they share what the first of them has set
    # Before any kernel starts: results cached in the user's runs must not hide a broken stage.
    folder = tempfile.TemporaryDirectory(prefix="opentrans-tests-")
    os.environ["OPENTRANS_RUNS"] = folder.name
    os.environ["OPENTRANS_RESULTS"] = f"{folder.name}/published"
    config.add_cleanup(folder.cleanup)


# Tests that start kernels, commands or processes, train, or build RN50; not in `make check`.
SLOW = set(
    """alpha backbone batch beside campaign cli devices fingerprint jupyterlab measure mini_clip
    names notebook outputs overlays parameters parts plan processes prune published readme report
    resume skeleton stages teacher train wheel workers""".split()
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem.removeprefix("test_") in SLOW:
            item.add_marker("slow")
        cell = getattr(item, "cell", None)
        if cell is not None and "keep_output" in cell.metadata.get("tags", []):
            # nbval looks only at cells with a count, which nbstripout removes from all of them.
            cell.execution_count = 1
            item.options["check"] = True


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of runs for one test."""
    monkeypatch.setenv("OPENTRANS_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("OPENTRANS_RESULTS", str(tmp_path / "results"))
    return tmp_path / "runs"


PARAMETERS = 'seed = 0\nscale = 1.0\nname = "a"\nfast = False\ndataset = "scenes"'
SETUP = """from opentrans_lab.records import Run, parameters
params = parameters()
run = Run("{stem}", params)"""


@pytest.fixture(scope="session")
def write_notebook():
    """``write_notebook(path, *cells)``: a small real notebook with the lab's skeleton."""

    def write(path: Path, *body: str, parameters: str = PARAMETERS, setup: str = SETUP) -> Path:
        v4 = nbformat.v4
        cells = [
            v4.new_markdown_cell(f"# {path.stem} at work\n\nIs $\\alpha$ small?\n\n| a |\n|---|")
        ]
        if parameters:
            cells.append(v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
        sources = (setup.format(stem=path.stem), *body) if setup else body
        cells += [v4.new_code_cell(source) for source in sources]
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        path.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
        return path

    return write


@pytest.fixture
def browser():
    """The machine's own headless Chromium; tests that need one are skipped where there is none.

    Of one test: its event loop would be in the way of the kernels of others.
    """
    import chromium  # beside the tests

    if chromium.found() is None:
        pytest.skip("no Chromium is installed (on Debian: apt-get install chromium)")
    with chromium.launched() as running:
        yield running
