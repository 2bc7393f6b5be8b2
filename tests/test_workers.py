"""Grids on real workers of dask.distributed: the same results, whatever dies in between."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from http.client import HTTPException
from ipaddress import ip_address
from urllib.request import urlopen

import psutil
import pytest
from dask.system import CPU_COUNT

from opentrans_lab.errors import LabError
from opentrans_lab.records import PROJECT, load
from opentrans_lab.runs import run_grid
from opentrans_lab.runs.grids import Job
from opentrans_lab.runs.workers import THREADS, share

SAVE = 'run.save({"value": seed * scale, "threads": __import__("os").environ["OMP_NUM_THREADS"]})'
WAIT = """
import os, time
from pathlib import Path
root = Path(os.environ["OPENTRANS_RUNS"])
"""
PATIENCE = 600  # seconds until something hangs; a busy machine is no failure
GRID = "runs:\n  - notebook: 01_tiny\n    parameters: {seed: [0, 1, 2, 3]}\n"


@pytest.fixture
def environment(monkeypatch):
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)


def started(grid, *options, **environment):
    """The command in a process group of its own, as a terminal starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "opentrans_lab.cli", "run", str(grid), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # Where the tests run in the background of a shell they ignore Ctrl-C, and so would this.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        env=os.environ | environment,
    )


def finished(runs):
    return sorted(runs.glob("*/[!.]*/metrics.json"))


def wait_for(condition):
    for _ in range(10 * PATIENCE):
        if found := condition():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def answers_in_clear(port):
    """Whether a page of dask's is to be had without its key."""
    for page in ("info/main/workers.html", "json/identity.json", "metrics", "status"):
        try:
            with urlopen(f"http://127.0.0.1:{port}/{page}", timeout=5) as answer:
                return answer.status == 200
        except (OSError, HTTPException):
            continue
    return False


def asked(ask, processes):
    """``ask(process)`` of those that have not ended meanwhile: kernels start helpers."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            yield ask(process)


def family_of(process):
    return psutil.Process(process.pid).children(recursive=True)


def workers_of(process):
    """The worker processes under their nannies: those that hold kernels."""
    found = asked(lambda p: (p.cmdline(), p.parent()), family_of(process))
    return list({p.pid: p for line, p in found if p and "ipykernel_launcher" in line}.values())


def test_two_workers_give_what_one_gives(
    tmp_path, runs, write_notebook, monkeypatch, environment, capsys
):
    tiny = write_notebook(tmp_path / "01_tiny.ipynb", SAVE)
    reads = "from opentrans_lab.records import collect\nrun.save({'seen': len(collect('01_tiny'))})"
    last = write_notebook(tmp_path / "02_last.ipynb", reads)
    jobs = [Job(tiny, {"seed": s}) for s in range(3)] + [Job(last, {}, True)]
    found = {}
    for workers in (1, 2):
        monkeypatch.setenv("OPENTRANS_RUNS", str(tmp_path / str(workers)))
        if workers == 1:
            monkeypatch.setenv("OMP_NUM_THREADS", "1")
        else:
            monkeypatch.delenv("OMP_NUM_THREADS")
        results = run_grid(jobs, workers=workers)
        assert [r.status for r in results] == ["ok"] * 4, [r.error for r in results]
        assert [r.job.parameters for r in results] == [job.parameters for job in jobs]
        records = [json.loads((r.folder / "metrics.json").read_text()) for r in results]
        found[workers] = [r["metrics"] for r in records]
        cores = max(1, CPU_COUNT // workers)
        assert found[workers][0].pop("threads") == (str(cores) if workers == 2 else "1")
    for metrics in (*found[1], *found[2]):
        metrics.pop("threads", None)
    assert found[1] == found[2] and found[2][-1] == {"seen": 3}
    said = capsys.readouterr().out
    assert "on worker" in said and "4 run now" in said
    again = run_grid(jobs, workers=2)
    assert [r.status for r in again] == ["finished before"] * 4
    assert "OPENTRANS_STAGE" not in os.environ


def test_models_trained_on_two_workers_are_those_of_one(tmp_path, runs, monkeypatch):
    """Real pruning, transfer and evaluation, a thread each, two at a time and one by one."""
    for name in THREADS:
        monkeypatch.setenv(name, "1")
    small = dict(size=64, density=0.25, p=0.5, prune_steps=1, prune_batch_size=2, steps=3,
                 batch_size=4, eval_images=4, device="cpu", rows="dense ours")  # fmt: skip
    jobs = [Job(PROJECT / "notebooks/03_transfer.ipynb", small | {"seed": s}) for s in (0, 1)]
    found = {}
    for workers in (1, 2):
        monkeypatch.setenv("OPENTRANS_RUNS", str(tmp_path / str(workers)))
        results = run_grid(jobs, workers=workers)
        assert [r.status for r in results] == ["ok"] * 2, [r.error for r in results]
        found[workers] = [load(r.folder)["metrics"]["miou"] for r in results]
    assert found[1] == found[2] and found[1][0] != found[1][1]


def test_a_killed_worker_loses_no_finished_run(tmp_path, runs, write_notebook):
    """The first two finish, the others wait for the test; one worker dies under SIGKILL."""
    hold = f"{WAIT}\nwhile seed > 1 and not (root / 'go').exists(): time.sleep(0.1)"
    write_notebook(tmp_path / "01_tiny.ipynb", hold, SAVE)
    (tmp_path / "grid.yaml").write_text(GRID)
    command = started(tmp_path / "grid.yaml", "--workers", "2")
    wait_for(lambda: finished(runs)[1:])
    before = {p: p.stat().st_mtime_ns for p in finished(runs)}
    workers = wait_for(lambda: (found := workers_of(command))[1:] and found)
    everyone = psutil.Process(command.pid), *family_of(command)
    sockets = [c for found in asked(lambda p: p.net_connections("inet"), everyone) for c in found]
    listening = [c.laddr for c in sockets if c.status == psutil.CONN_LISTEN]
    assert listening and all(ip_address(a.ip).is_loopback for a in listening)
    assert not any(answers_in_clear(a.port) for a in {*listening})
    os.kill(workers[0].pid, signal.SIGKILL)
    time.sleep(1)
    (runs / "go").touch()
    said = command.communicate(timeout=PATIENCE)[0]
    assert command.returncode == 0, said
    assert "4 run now" in said and "0 failed" in said
    assert len(finished(runs)) == 4
    assert all(p.stat().st_mtime_ns == at for p, at in before.items())


@pytest.mark.parametrize(
    "how, workers", [(signal.SIGINT, 2), (signal.SIGKILL, 2), (signal.SIGINT, 1)]
)
def test_ctrl_c_and_sigkill_leave_nothing_half_written(
    tmp_path, runs, write_notebook, how, workers
):
    hold = f"{WAIT}\nwhile seed and not (root / 'go').exists(): time.sleep(0.1)"
    write_notebook(tmp_path / "01_tiny.ipynb", hold, SAVE)
    (tmp_path / "grid.yaml").write_text(GRID)
    command = started(tmp_path / "grid.yaml", "--workers", str(workers))
    wait_for(lambda: finished(runs))
    wait_for(lambda: workers_of(command)[workers - 1 :])
    family = family_of(command)
    if how == signal.SIGINT:
        os.killpg(command.pid, how)  # as the terminal does: to all of them
    else:
        command.kill()
    said = command.communicate(timeout=PATIENCE)[0]
    assert how == signal.SIGKILL or (command.returncode == 130 and "finished runs are kept" in said)
    _, alive = psutil.wait_procs(family, timeout=PATIENCE)
    assert not alive, alive
    assert len(finished(runs)) == 1
    whole = {"executed.ipynb", "report.html", "metrics.json"}
    for folder in (runs / "01_tiny").glob("[!.]*"):
        assert {p.name for p in folder.iterdir()} == whole
    (runs / "go").touch()
    again = started(tmp_path / "grid.yaml", "--workers", "2")
    said = again.communicate(timeout=PATIENCE)[0]
    assert again.returncode == 0 and "3 run now" in said and "1 finished before" in said, said
    assert not list((runs / "01_tiny").glob(".*"))  # what the killed ones left is gone


def test_failures_are_tried_once_more_and_then_reported(tmp_path, runs, write_notebook, capsys):
    count = f"{WAIT}\nwith (root / 'tries').open('a') as f: print(seed, file=f)\n"
    body = (
        "from opentrans_lab.errors import LabError\n"
        "tries = (root / 'tries').read_text().split().count(str(seed))\n"
        "if seed == 0: raise LabError('name another')\n"
        "if seed == 1 and tries == 1: raise RuntimeError('a hiccup')\n"
        "print('about to break')\n"
        "if seed == 2: raise RuntimeError('broken')\n"
        "if seed == 3: os.kill(os.getppid(), 9)\n"  # its worker, each time
    )
    tiny = write_notebook(tmp_path / "01_tiny.ipynb", count, body, SAVE)
    results = run_grid([Job(tiny, {"seed": s}) for s in range(4)], workers=2)
    tries = (runs / "tries").read_text().split()
    assert [tries.count(str(s)) for s in range(4)] == [1, 2, 2, 2]
    assert [r.status for r in results] == ["failed", "ok", "failed", "failed"]
    assert [r.users for r in results] == [True, False, False, False]
    assert "worker died 2 times" in results[3].error
    assert "01_tiny.ipynb, cell 5 (In [5]): RuntimeError" in results[2].error
    assert "tried 2 times" in results[2].error
    log = results[2].folder / "failed.ipynb"
    assert str(log) in results[2].error and "about to break" in log.read_text()
    assert "3 failed" in capsys.readouterr().out


@pytest.fixture
def cluster(tmp_path):
    """A scheduler of someone else's: its address, and a function that adds a worker to it."""
    file = tmp_path / "scheduler.json"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/")
    with ExitStack() as processes:

        def dask(*command):
            process = subprocess.Popen([sys.executable, "-m", *command, "--no-dashboard"], **quiet)
            processes.callback(process.wait, timeout=PATIENCE)
            processes.callback(process.terminate)

        def add_worker():
            options = ("--nthreads", "1", "--host", "127.0.0.1")
            dask("distributed.cli.dask_worker", address, *options)

        options = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(file))
        dask("distributed.cli.dask_scheduler", *options)
        wait_for(lambda: file.is_file() and file.read_text().rstrip().endswith("}"))
        address = json.loads(file.read_text())["address"]
        yield address, add_worker


def test_workers_of_someone_elses_scheduler_join_late_and_see_the_callers_data(
    tmp_path, runs, write_notebook, cluster
):
    """Nobody is there at first; then one, and the second when the first is at work already."""
    address, add_worker = cluster
    hold = (
        f"{WAIT}\n(root / f'began{{seed}}').touch()\n"
        "while len(list(root.glob('began*'))) < 2: time.sleep(0.1)\n"
        "assert os.environ['OPENTRANS_DATA'] == '/data of the caller'"
    )
    write_notebook(tmp_path / "01_tiny.ipynb", hold, SAVE)
    (tmp_path / "grid.yaml").write_text(GRID.replace("2, 3", "2"))
    told = {"OPENTRANS_DATA": "/data of the caller", "PYTHONUNBUFFERED": "1"}
    command = started(tmp_path / "grid.yaml", "--scheduler", address, **told)
    said = ""
    while "waiting for a worker" not in said:
        assert (line := command.stdout.readline()), said
        said += line
    add_worker()
    wait_for(lambda: list(runs.glob("began*")))
    add_worker()
    said += command.communicate(timeout=PATIENCE)[0]
    assert command.returncode == 0 and len(finished(runs)) == 3, said
    assert f"waiting for a worker at {address}" in said and "3 run now" in said


def test_a_scheduler_that_dies_under_a_grid_is_said_to_have(
    tmp_path, runs, write_notebook, cluster
):
    address, add_worker = cluster
    add_worker()
    hold = f"{WAIT}\nwhile seed and not (root / 'go').exists(): time.sleep(0.1)"
    write_notebook(tmp_path / "01_tiny.ipynb", hold, SAVE)
    (tmp_path / "grid.yaml").write_text(GRID)
    command = started(tmp_path / "grid.yaml", "--scheduler", address)
    wait_for(lambda: finished(runs))
    lines = asked(lambda p: (p, p.cmdline()), psutil.Process().children())
    (scheduler,) = [p for p, line in lines if "distributed.cli.dask_scheduler" in line]
    scheduler.kill()
    said = command.communicate(timeout=PATIENCE)[0]
    assert command.returncode == 2 and "Traceback" not in said, said
    assert f"the scheduler at {address} no longer answers" in said
    assert "goes on after what has finished" in said and len(finished(runs)) == 1


def test_two_grids_on_one_scheduler_hear_of_their_own_jobs(
    tmp_path, runs, write_notebook, cluster
):
    address, add_worker = cluster
    add_worker()
    write_notebook(tmp_path / "01_tiny.ipynb", SAVE)
    write_notebook(tmp_path / "02_tiny.ipynb", SAVE)
    (tmp_path / "a.yaml").write_text(GRID)
    (tmp_path / "b.yaml").write_text("runs: [02_tiny]")
    both = [started(tmp_path / f"{n}.yaml", "--scheduler", address) for n in "ab"]
    said = [process.communicate(timeout=PATIENCE)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [text.count("on worker") for text in said] == [4, 1]
    assert all(said[0].count(f"seed={seed} on worker") == 1 for seed in range(4))
    with pytest.raises(LabError, match="no dask scheduler answers at tcp://127.0.0.1:1 "):
        run_grid([Job(tmp_path / "01_tiny.ipynb", {"seed": 5})], scheduler="tcp://127.0.0.1:1")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_grid_ends_its_notebooks_on_someone_elses_workers(
    tmp_path, runs, write_notebook, cluster, how
):
    address, add_worker = cluster
    add_worker()
    note = f"{WAIT}\n(root / f'pid{{seed}}').write_text(str(os.getpid()))"
    hold = "while seed == 0 and not (root / 'go').exists(): time.sleep(0.1)"
    write_notebook(tmp_path / "01_tiny.ipynb", note, hold, SAVE)
    (tmp_path / "grid.yaml").write_text(GRID.replace("2, 3", "2"))
    command = started(tmp_path / "grid.yaml", "--scheduler", address)
    wait_for(lambda: (runs / "pid0").is_file() and (runs / "pid0").read_text())
    kernel = psutil.Process(int((runs / "pid0").read_text()))
    command.send_signal(how)
    said = command.communicate(timeout=PATIENCE)[0]
    assert how == signal.SIGKILL or (command.returncode == 130 and "finished runs are kept" in said)
    kernel.wait(timeout=PATIENCE)
    wait_for(lambda: not list((runs / "01_tiny").glob("*")))  # nothing is published, nothing left
    assert not (runs / "pid1").exists()
    (runs / "go").touch()
    again = started(tmp_path / "grid.yaml", "--scheduler", address)  # the worker is free again
    said = again.communicate(timeout=PATIENCE)[0]
    assert again.returncode == 0 and "3 run now" in said, said


def test_workers_share_gpus_and_cores(monkeypatch, environment):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices = [share(i, 8)["CUDA_VISIBLE_DEVICES"] for i in range(8)]
    assert devices == list("01234567")
    assert [share(i, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["0,1,2,3", "4,5,6,7"]
    assert sorted(share(i, 16)["CUDA_VISIBLE_DEVICES"] for i in range(16)) == sorted("01234567" * 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-a")
    assert [share(i, 2)["CUDA_VISIBLE_DEVICES"] for i in range(2)] == ["5", "GPU-a"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert share(0, 2) == dict.fromkeys(THREADS, str(max(1, CPU_COUNT // 2)))
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert share(0, 2)["OMP_NUM_THREADS"] == "3"


def test_zero_workers_are_refused(tmp_path, runs, write_notebook):
    with pytest.raises(LabError, match="workers=0 must be 1 or more"):
        run_grid([Job(write_notebook(tmp_path / "01_tiny.ipynb", SAVE), {})], workers=0)
