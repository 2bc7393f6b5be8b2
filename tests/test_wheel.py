"""Installed from a wheel, without a checkout, the lab has all that it needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from test_benchmarks import write as write_benchmark
from test_data import write_coco

ROOT = Path(__file__).resolve().parents[1]
USES = """
from pathlib import Path
import numpy as np
import opentrans_lab
from opentrans_lab import segment
from opentrans_lab.alpha import layer_alphas
from opentrans_lab.clip import load_backbone
from opentrans_lab.costs import cost
from opentrans_lab.data import load_dataset
from opentrans_lab.heads import build

assert not Path(opentrans_lab.__file__).is_relative_to({root!r}), opentrans_lab.__file__
clip = load_backbone("mini", device="cpu")
assert layer_alphas(clip.visual)["alpha"].notna().any()
assert cost("han")["macs"].notna().any()
for name, classes in (("coco", 133), ("voc20", 20)):
    assert len(load_dataset(name, "val", Path("data") / name).names) == classes
picture = np.zeros((64, 96, 3), dtype=np.uint8)
assert segment(picture, ["grass", "sky"], model=build("deeplabv3", clip, "mini")).labels.numel()
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The interpreter of an environment that holds our wheel, and borrows other libraries."""
    place = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    # From a copy: a build leaves folders beside its source, whose stale files get into the next.
    for name in ("opentrans_lab", "data", "notebooks"):
        left_out = shutil.ignore_patterns(".*", "__pycache__")
        shutil.copytree(ROOT / name, place / "source" / name, symlinks=True, ignore=left_out)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place / "source")
    built = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", place]
    subprocess.run([*pip, *built, place / "source"], check=True)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", place / "env"], check=True)
    python = place / "env/bin/python"
    (wheel,) = place.glob("*.whl")
    into = ["--python", python, "install", "--no-deps", "--no-index", "--force-reinstall"]
    subprocess.run([*pip, *into, wheel], check=True)
    (own,) = place.glob("env/lib/python*/site-packages")
    # The outer .pth files, our editable one among them, are not read there.
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return python


def told(python: Path, *args: str, cwd: Path) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHONPATH", "OPENTRANS"))}
    # What Jupyter's libraries keep outside of site-packages is borrowed, too.
    borrowed = {"JUPYTER_PATH": f"{sys.prefix}/share/jupyter"}
    env = clean | borrowed | {"OPENTRANS_RUNS": str(cwd / "runs")}
    done = subprocess.run([python, *args], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_an_installed_wheel_has_its_weights_tables_and_notebooks(
    installed, tmp_path, write_notebook
):
    write_coco(tmp_path / "data/coco")
    write_benchmark("voc20", tmp_path / "data/voc20", [[1, 2], [255, 0]])
    told(installed, "-c", USES.format(root=str(ROOT)), cwd=tmp_path)
    write_notebook(tmp_path / "mine.ipynb", "run.save({})")
    told(installed, "-m", "opentrans_lab.cli", "run", "mine.ipynb", cwd=tmp_path)
    assert list(tmp_path.glob("runs/mine/*/metrics.json"))
    told(installed, "-m", "opentrans_lab.cli", "notebooks", "lab", cwd=tmp_path)
    names = {path.relative_to(tmp_path / "lab") for path in (tmp_path / "lab").rglob("*.*")}
    shipped = ROOT / "notebooks"
    assert names == {p.relative_to(shipped) for p in shipped.rglob("*.*") if "/." not in str(p)}


def test_the_wheel_holds_every_file_of_data(installed):
    (own,) = installed.parents[1].glob("lib/python*/site-packages/opentrans_lab")
    tracked = subprocess.run(
        ["git", "ls-files", "data"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert tracked and all((own / "_shipped" / name).is_file() for name in tracked)
