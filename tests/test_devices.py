"""devices=2 from a notebook: torchrun underneath, the same result as with one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib import import_module
from ipaddress import ip_address
from pathlib import Path

import pandas as pd
import psutil
import pytest

from opentrans_lab.errors import LabError, OutOfTime
from opentrans_lab.experiments import Lab, Recipe, check_shares, segment_stage
from opentrans_lab.pruning import PruneConfig
from opentrans_lab.runs import run_notebook
from opentrans_lab.runs.job import _alive

evaluate = import_module("opentrans_lab.evaluation.evaluate")  # its face has the function
NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "03_transfer.ipynb"
PRUNING = PruneConfig(density=0.5, p=0.5, steps=1, batch_size=2)
RECIPE = Recipe("han", steps=5, batch_size=4, eval_images=6, norm="eval", precision="fp32")
LAB = Lab(size=64, device="cpu")


@pytest.fixture
def root(tmp_path, monkeypatch):
    def use(name: str) -> Path:
        monkeypatch.setenv("OPENTRANS_RUNS", str(tmp_path / name))
        return tmp_path / name

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return use


def test_papermill_gives_with_two_devices_what_it_gives_with_one(root):
    """03 whole: a pruned and a dense row, losses and scores; layers freeze in the test below."""
    small = dict(framework="han", rows="dense ours", density=0.5, p=0.5, prune_steps=1, size=64,
                 prune_batch_size=2, steps=5, batch_size=4, eval_images=6, norm="eval",
                 precision="fp32", device="cpu")  # fmt: skip
    losses, metrics = {}, {}
    for devices in (1, 2):
        runs = root(str(devices))
        done = run_notebook(NOTEBOOK, small | {"devices": devices})
        assert done.status == "ok", done.error
        metrics[devices] = json.loads((done.folder / "metrics.json").read_text())["metrics"]
        stages = {
            json.loads(path.read_text())["parameters"]["row"]: path.parent
            for path in runs.glob("stages/segment/*/result.json")
        }
        losses[devices] = {k: pd.read_csv(v / "history.csv")["loss"] for k, v in stages.items()}
        for folder in stages.values():
            assert (folder / "job.json").exists() == (devices == 2)
            assert not (folder / "checkpoints").exists() and not (folder / "end.json").exists()
    for row in ("dense", "ours"):
        assert len(losses[1][row]) == 5
        assert losses[2][row].tolist() == pytest.approx(losses[1][row].tolist(), abs=1e-4, rel=0)
        for split in ("seen", "unseen"):
            one, two = (metrics[n]["miou"][row][split] for n in (1, 2))
            assert two == pytest.approx(one, abs=0.5)  # a pixel may tip over


def test_layers_freeze_in_all_processes_and_a_stopped_run_goes_on(root, monkeypatch):
    recipe = replace(RECIPE, select="low_alpha", warmup=0.4)
    root("one")
    one = segment_stage(LAB, recipe, PRUNING)
    root("two")
    monkeypatch.setenv("OPENTRANS_DEADLINE", "0")
    for step in (1, 2):
        with pytest.raises(OutOfTime, match=f"stopped at step {step} of 5"):
            segment_stage(replace(LAB, devices=2), recipe, PRUNING)
    monkeypatch.delenv("OPENTRANS_DEADLINE")
    two = segment_stage(replace(LAB, devices=2), recipe, PRUNING)
    assert one.frozen == two.frozen and one.metrics.keys() == two.metrics.keys()
    assert two.history["loss"].tolist() == pytest.approx(one.history["loss"].tolist(), rel=1e-4)
    assert one.metrics["frozen_weights"] == two.metrics["frozen_weights"] > 0


def test_an_interrupted_evaluation_goes_on_with_another_number_of_devices(root, monkeypatch):
    root("interrupted")
    recipe = replace(RECIPE, framework="deeplabv3", steps=2, norm="train")

    def stopped(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "SAVE_SECONDS", -1.0)
        patch.setattr(evaluate, "_together", stopped)  # after the last picture
        with pytest.raises(KeyboardInterrupt):
            segment_stage(LAB, recipe, PRUNING)
    two = segment_stage(replace(LAB, devices=2), recipe, PRUNING)
    assert not (two.folder / "checkpoints").exists()
    root("uninterrupted")
    one = segment_stage(LAB, recipe, PRUNING)
    assert two.metrics["all"] == pytest.approx(one.metrics["all"], abs=0.5)


def test_what_cannot_be_shared_is_refused(root):
    root("none")
    with pytest.raises(LabError, match="batch_size=4 cannot be shared by devices=3"):
        segment_stage(replace(LAB, devices=3), RECIPE, PRUNING)
    with pytest.raises(LabError, match="needs two pictures on each; use devices=1"):
        segment_stage(replace(LAB, devices=2), replace(RECIPE, batch_size=2, norm="train"), PRUNING)
    for size, count, fits in ((28, 8, 7), (7, 8, 1), (8, 8, 4), (16, 5, 4)):
        recipe = replace(RECIPE, batch_size=size, norm="train")
        with pytest.raises(LabError, match=f"devices={count}.* use devices={fits},"):
            check_shares(replace(LAB, devices=count), recipe)
        check_shares(replace(LAB, devices=fits), recipe)
    check_shares(replace(LAB, devices=8), replace(RECIPE, batch_size=8))  # norm="eval"
    with pytest.raises(LabError, match="devices=0"):
        replace(LAB, devices=0)


def test_processes_end_with_a_notebook_that_nobody_has_buried():
    notebook = subprocess.Popen(["sleep", "600"])
    watch = f"from opentrans_lab.experiments.devices import _die_with; _die_with({notebook.pid})"
    process = subprocess.Popen([sys.executable, "-c", watch])
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=10)
    notebook.kill()  # a zombie until somebody waits for it
    assert process.wait(timeout=120) == 1
    notebook.wait()


KILLED = """
import sys
from test_devices import LAB, PRUNING, RECIPE
from dataclasses import replace
from opentrans_lab.experiments import segment_stage
segment_stage(replace(LAB, devices=2), replace(RECIPE, steps=10_000), PRUNING)
"""


def test_processes_listen_on_the_loopback_alone_and_a_killed_notebook_leaves_none(root):
    runs = root("killed")
    command = [sys.executable, "-c", KILLED]
    parent = subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE)
    while b"step" not in (piece := os.read(parent.stderr.fileno(), 4096)):
        assert piece, "it ended before it trained"
    family = psutil.Process(parent.pid).children(recursive=True)
    assert sum("opentrans_lab.experiments.devices" in " ".join(p.cmdline()) for p in family) >= 2
    sockets = [c for p in family for c in p.net_connections("inet")]
    listening = [c.laddr.ip for c in sockets if c.status == psutil.CONN_LISTEN]
    assert listening and all(ip_address(ip).is_loopback for ip in listening)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.time() + 600
    while any(_alive(process.pid) for process in family):
        assert time.time() < end, "they still run"
        time.sleep(0.2)
    assert not list(runs.glob("stages/segment/*/result.json"))
