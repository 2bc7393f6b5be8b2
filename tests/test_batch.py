"""Real notebooks in real kernels: names are checked, runs are whole, finished ones stay."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest

from opentrans_lab.errors import LabError
from opentrans_lab.records import run_dir
from opentrans_lab.runs import run_grid, run_notebook
from opentrans_lab.runs.grids import Job, complete, defaults, load_grid
from opentrans_lab.runs.job import _alive

SAVE = 'run.save({"value": seed * scale})'
DEFAULTS = {"seed": 0, "scale": 1.0, "name": "a", "fast": False, "dataset": "scenes"}

GRID = """
defaults: {name: b}
runs:
  - 00_plain
  - notebook: 01_tiny
    parameters: {seed: [0, 1], scale: [2, 3]}
  - {notebook: 01_tiny, parameters: {name: c}}
"""


@pytest.fixture
def tiny(tmp_path, write_notebook):
    return write_notebook(tmp_path / "01_tiny.ipynb", SAVE)


def grid(tmp_path, text):
    path = tmp_path / "grids" / "g.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


def test_values_take_the_types_of_the_defaults(tiny):
    assert defaults(tiny) == DEFAULTS
    given = {"seed": "2", "scale": "1e-3", "name": 7, "fast": "true"}
    assert complete(tiny, given) == DEFAULTS | {"seed": 2, "scale": 1e-3, "name": "7", "fast": True}
    full = complete(tiny, {"seed": 2.0, "scale": 3})
    assert type(full["seed"]) is int and type(full["scale"]) is float


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", "x"), ("seed", "1.5"), ("seed", 1.5), ("seed", True), ("seed", None), ("seed", [1])]
    + [("scale", "a"), ("scale", False), ("name", True), ("fast", "maybe"), ("fast", 1)],
)
def test_value_of_another_type_is_refused(tiny, name, value):
    with pytest.raises(LabError, match=f"parameter '{name}' is of type"):
        complete(tiny, {name: value})


def test_mistyped_name_lists_the_valid_ones(tiny):
    with pytest.raises(
        LabError, match="no parameter 'sede'; did you mean 'seed'.*seed, scale, name"
    ):
        complete(tiny, {"sede": 1})


def test_missing_notebook_and_foreign_file_are_named(tiny, tmp_path):
    with pytest.raises(LabError, match="no notebook.*02_tiny.ipynb; there are: 01_tiny.ipynb"):
        complete(tmp_path / "02_tiny.ipynb", {})
    (tmp_path / "text.ipynb").write_text("hello")
    with pytest.raises(LabError, match="text.ipynb is not a readable notebook"):
        complete(tmp_path / "text.ipynb", {})


def test_grid_multiplies_lists_and_keeps_the_order(tiny, tmp_path, write_notebook):
    write_notebook(tmp_path / "00_plain.ipynb", "1", parameters="", setup="")
    path = grid(tmp_path, GRID)
    jobs = load_grid(path)
    assert [job.notebook.stem for job in jobs] == ["00_plain"] + ["01_tiny"] * 5
    assert [tuple(job.parameters.values()) for job in jobs[1:]] == [
        ("b", 0, 2), ("b", 0, 3), ("b", 1, 2), ("b", 1, 3), ("c",),
    ]  # fmt: skip
    path.write_text(GRID + "outermost: scale\n")
    assert [job.parameters.get("scale") for job in load_grid(path)] == [None, 2, 2, 3, 3, None]
    path.write_text(GRID + "  - {notebook: 00_plain, after_all: true}\noutermost: name\n")
    assert [job.parameters.get("name") for job in load_grid(path)] == [None, *"bbbbc", None]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("runs: [", "is no YAML"),
        ("runs:\n- {notebook: 01_tiny, parameters: {seed: 0, seed: 1}}", "'seed' twice.*line 2"),
        ("runs: [01_tiny]\nruns: [01_tiny]", "'runs' twice"),
        ("? [a]\n: 1", "is no YAML"),
        ("runs: !!map [a]", "is no YAML"),
        ("hello", "must hold `runs`"),
        ("runs: [01_tiny]\nworker: 2", "must hold `runs`"),
        ("runs: [{notebok: 01_tiny}]", "must hold `notebook`"),
        ("runs: [{parameters: [1]}]", "must hold `notebook`"),
        ("runs: [{notebook: 01_tiny, parameters: [1]}]", "must map names to values"),
        ("runs: [{notebook: 01_tiny, parameters: {on: 1}}]", "01_tiny.ipynb has no parameter 'on'"),
        ("runs: [01_tiny]\ndefaults: {1: 2}", "no notebook that it names has the parameters 1"),
        ("runs: [01_tiny]\ndefaults: [1]", "`defaults` a mapping of names"),
        ("runs: [{notebook: 01_tiny, after_all: 2}]", "`after_all` of 01_tiny must be true"),
        ("runs: [01_tiny]\noutermost: sede", "no notebook has the parameter 'sede'"),
        ("runs: [01_tiny]\noutermost: [seed]", "`outermost` one name"),
        ("runs: [{notebook: 01_tiny, parameters: {seed: []}}]", "'seed' of 01_tiny is a list with"),
        ("runs: [09_none]", "no notebook '09_none'"),
        ("defaults: {sede: 1}\nruns: [01_tiny]", "no notebook that it names has the .* sede"),
    ],
)
def test_faulty_grid_is_explained(tiny, tmp_path, text, match):
    with pytest.raises(LabError, match=match):
        load_grid(grid(tmp_path, text))


def test_typo_in_the_last_job_runs_nothing(tiny, runs):
    with pytest.raises(LabError, match="sede"):
        run_grid([Job(tiny, {}), Job(tiny, {"sede": 1})])
    assert not runs.exists()


def test_run_is_whole_then_kept_then_redone_by_force(tiny, runs, write_notebook):
    result = run_notebook(tiny, {"seed": "3", "scale": 2})
    folder = run_dir("01_tiny", DEFAULTS | {"seed": 3, "scale": 2.0})
    assert result.status == "ok" and result.folder == folder
    assert {p.name for p in folder.iterdir()} == {"executed.ipynb", "report.html", "metrics.json"}
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]  # no stage is left
    record = json.loads((folder / "metrics.json").read_text())
    assert record["metrics"] == {"value": 6.0} and record["parameters"]["seed"] == 3

    before = (folder / "metrics.json").stat().st_mtime_ns
    again = run_notebook(tiny, {"seed": 3, "scale": "2"})
    assert again.status == "finished before" and not again.note
    write_notebook(tiny, "import os", "assert os.environ['OPENTRANS_FORCE']", SAVE)
    assert "changed since" in run_notebook(tiny, {"seed": 3, "scale": 2}).note
    assert (folder / "metrics.json").stat().st_mtime_ns == before

    (folder / "old.txt").touch()
    assert run_notebook(tiny, {"seed": 3, "scale": 2}, force=True).status == "ok"
    assert (folder / "metrics.json").stat().st_mtime_ns > before
    assert not (folder / "old.txt").exists() and len(list(folder.parent.iterdir())) == 1
    assert "OPENTRANS_FORCE" not in os.environ and "OPENTRANS_STAGE" not in os.environ


def test_failure_is_named_and_the_others_go_on(tiny, tmp_path, runs, write_notebook, capsys):
    late = write_notebook(tmp_path / "02_late.ipynb", SAVE, "x = 1\nassert x == 2, 'unequal'")
    user = "from opentrans_lab.errors import LabError\nraise LabError('no folder /x; name another')"
    users = write_notebook(tmp_path / "03_user.ipynb", user)
    dead = write_notebook(tmp_path / "04_dead.ipynb", "import os; os._exit(1)")
    wrong = write_notebook(
        tmp_path / "05_wrong.ipynb",
        SAVE,
        setup='from opentrans_lab.records import Run\nrun = Run("05_wrong", dict(seed=seed))',
    )
    results = run_grid([Job(p, {}) for p in (late, users, dead, wrong, tiny)])
    assert [r.status for r in results] == ["failed"] * 4 + ["ok"]
    assert [r.users for r in results] == [False, True, False, False, False]
    said = capsys.readouterr().out
    assert "02_late.ipynb, cell 5 (In [4]): AssertionError" in said and "unequal" in said
    assert "----> 2 assert x == 2" in said and "1 run now" in said and "4 failed" in said
    assert results[1].error == "no folder /x; name another"
    assert "kernel died" in results[2].error
    assert "differs in: dataset, fast, name, scale" in results[3].error
    # A save before the failing assert does not count, and a user's mistake leaves nothing.
    assert [p.name for p in results[0].folder.iterdir()] == ["failed.ipynb"]
    assert not results[1].folder.exists()
    (late_again,) = run_grid([Job(late, {})])
    assert late_again.status == "failed"


def test_a_run_that_stops_at_the_deadline_is_no_failure(runs, tmp_path, write_notebook):
    stop = (
        "import os, time\nfrom opentrans_lab.errors import OutOfTime\n"
        "if time.time() < float(os.environ.get('OPENTRANS_DEADLINE', 0)) + 60:\n"
        "    raise OutOfTime('stopped at step 3 of 9')\n"
    )
    jobs = [(write_notebook(tmp_path / "01_long.ipynb", stop, 'run.save({"value": 1})'), {})]
    (result,) = run_grid(jobs, deadline=5)
    assert result.status == "out of time" and "step 3 of 9" in result.note
    assert not result.folder.exists()
    (result,) = run_grid(jobs)
    assert result.status == "ok"


def test_deadline_stops_between_runs_and_the_next_slice_goes_on(
    tmp_path, runs, write_notebook, capsys
):
    wait = "import time; time.sleep(10 - 10 * seed)"
    slow = write_notebook(tmp_path / "01_slow.ipynb", wait, SAVE)
    jobs = [Job(slow, {"seed": seed}) for seed in (0, 1)]
    assert [r.status for r in run_grid(jobs, deadline=0)] == ["out of time"] * 2
    # The first begins in time and ends late, for it trains nothing that could stop.
    assert [r.status for r in run_grid(jobs, deadline=0.15)] == ["ok", "out of time"]
    assert "1 not finished" in capsys.readouterr().out
    assert [r.status for r in run_grid(jobs, deadline=10)] == ["finished before", "ok"]


def test_two_runners_and_a_killed_one_leave_one_whole_run(tmp_path, runs, write_notebook):
    slow = write_notebook(tmp_path / "01_slow.ipynb", "import time; time.sleep(2)", SAVE)
    run = f"run_notebook({str(slow)!r}).status"
    code = f"from opentrans_lab.runs.batch import run_notebook; print({run})"
    start = [sys.executable, "-c", code]
    killed = subprocess.Popen(start)
    folder = run_dir("01_slow", DEFAULTS)
    while not list(folder.parent.glob(".*")):
        assert killed.poll() is None
        time.sleep(0.1)
    killed.kill()
    killed.wait()
    left = list(folder.parent.iterdir())
    assert len(left) == 1 and left[0].name.startswith(f".{folder.name}@")

    both = [subprocess.Popen(start, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [p.communicate(timeout=600)[0].strip() for p in both]
    assert [p.returncode for p in both] == [0, 0] and "ok" in said
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]
    assert {p.name for p in folder.iterdir()} == {"executed.ipynb", "report.html", "metrics.json"}


def test_a_kernel_that_cannot_start_is_tried_again_and_the_others_go_on(
    tiny, tmp_path, runs, write_notebook, monkeypatch
):
    """One that exits at once, the first time or every time."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\nfrom pathlib import Path\n"
        "if any('ipykernel_launcher' in a for a in sys.orig_argv):\n"
        f"    tries = Path({str(tmp_path)!r}, 'tries')\n"
        "    with tries.open('a') as file: file.write('x')\n"
        "    if tries.stat().st_size <= int(os.environ['FAILS']): os._exit(1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FAILS", "3")
    never, later = run_grid([Job(tiny, {}), Job(tiny, {"seed": 1})])
    assert (tmp_path / "tries").read_text() == "xxxx"
    assert never.status == "failed" and "no kernel could be started" in never.error
    assert "tried 2 times" in never.error and later.status == "ok"
    assert not (never.folder / "metrics.json").exists()


def test_equal_jobs_are_one(tiny, runs):
    (result,) = run_grid([Job(tiny, {}), Job(tiny, {"seed": "0"}), Job(tiny, {}, True)])
    assert result.status == "ok"


def test_other_data_are_another_run(tmp_path, runs, write_notebook, monkeypatch):
    named = "data_root = ''\ndataset = 'coco'"
    setup = (
        "from opentrans_lab.records import Run\n"
        'run = Run("{stem}", dict(data_root=data_root, dataset=dataset))'
    )
    path = write_notebook(
        tmp_path / "01_data.ipynb", "run.save({})", parameters=named, setup=setup
    )
    folders = {}
    for root in ("a", "b"):
        monkeypatch.setenv("OPENTRANS_DATA", str(tmp_path / root))
        result = run_notebook(path)
        assert result.status == "ok", result.error
        record = json.loads((result.folder / "metrics.json").read_text())
        folders[record["parameters"]["data_root"]] = result.folder
    assert folders.keys() == {str(tmp_path / "a"), str(tmp_path / "b")}
    assert run_notebook(path).status == "finished before"
    assert run_notebook(path, {"data_root": str(tmp_path / "a")}).status == "finished before"
    assert complete(path, {"dataset": "scenes"})["data_root"] == ""
    monkeypatch.delenv("OPENTRANS_DATA")
    monkeypatch.setenv("DETECTRON2_DATASETS", "/d")
    assert complete(path, {})["data_root"] == "/d"
    assert complete(path, {"dataset": "folder"})["data_root"] == ""


def test_a_stage_of_a_runner_that_had_our_number_is_in_nobodys_way(tiny, runs):
    """As in a container that was killed and started again with the same host name."""
    folder = Job(tiny, {}).folder
    left = folder.with_name(f".{folder.name}@{socket.gethostname()}@{os.getpid()}-0123")
    left.mkdir(parents=True)
    assert run_notebook(tiny).status == "ok"
    assert [p.name for p in folder.parent.iterdir()] == [folder.name]


def test_the_old_run_stays_until_the_new_one_is_there(tiny, runs, monkeypatch):
    """Also where the last rename fails, or the runner dies between two of them."""
    old = run_notebook(tiny).folder
    record = (old / "metrics.json").read_text()
    rename = os.rename

    def full(source, target):
        if target == old and not str(source).endswith("-old"):
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", full)
        result = run_notebook(tiny, force=True)
    assert result.status == "failed" and "No space left on device" in result.error
    assert (old / "metrics.json").read_text() == record

    def stopped(source, target):
        if target == old and not str(source).endswith("-old"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", stopped)
        run_notebook(tiny, force=True)
    assert (old / "metrics.json").read_text() == record
    gone = 2**22 + 1  # more than any process's number
    rename(old, old.with_name(f".{old.name}@{socket.gethostname()}@{gone}-0123-old"))
    assert run_notebook(tiny).status in ("ok", "finished before")
    assert (old / "metrics.json").read_text() == record
    assert [p.name for p in old.parent.iterdir()] == [old.name]


def test_a_dead_runner_that_nobody_has_buried_is_dead():
    """In a container the first process may not ask for the ends of others."""
    child = subprocess.Popen(["true"])
    while psutil.Process(child.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert not _alive(child.pid) and _alive(os.getppid())
    child.wait()
    assert not _alive(child.pid)


@pytest.mark.parametrize(
    ("ask", "error"),
    [("psutil.Process", psutil.NoSuchProcess(1)), ("os.kill", PermissionError())],
)
def test_another_users_runner_is_alive_though_we_may_not_look(monkeypatch, ask, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr(ask, refuse)
    assert _alive(os.getppid())


def test_kernel_is_this_python_whatever_is_registered(tmp_path, runs, write_notebook, monkeypatch):
    spec = tmp_path / "share" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text('{"argv": ["/bin/false"], "display_name": "x", "language": "python"}')
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "share"))
    check = f"import sys; assert sys.executable == {sys.executable!r}, sys.executable"
    path = write_notebook(tmp_path / "00_plain.ipynb", check, parameters="", setup="")
    result = run_notebook(path)
    assert result.status == "ok", result.error
    assert json.loads((result.folder / "metrics.json").read_text())["parameters"] == {}
