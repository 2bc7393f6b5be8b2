"""A campaign goes on where it stopped, with what is missing most, and says what is left."""

from __future__ import annotations

import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd
import pytest

from opentrans_lab.errors import LabError
from opentrans_lab.heads import FRAMEWORKS
from opentrans_lab.pruning import ROWS
from opentrans_lab.pruning.imp import TERMS
from opentrans_lab.records import PROJECT, Run, load, results, results_root
from opentrans_lab.runs import run_grid
from opentrans_lab.runs.campaign import campaign, missing_first, outlook
from opentrans_lab.runs.grids import Job, complete, load_grid
from opentrans_lab.runs.published import places, publish

GRID = """
runs:
  - notebook: 01_tiny
    parameters: {seed: [0, 1, 2], name: [a, b]}
"""


@pytest.fixture
def grid(tmp_path, runs, write_notebook):
    write_notebook(tmp_path / "01_tiny.ipynb", "run.save({'value': seed})")
    reads = "from opentrans_lab.records import collect\nrun.save({'seen': len(collect('01_tiny'))})"
    write_notebook(tmp_path / "05_paper_tables.ipynb", reads)
    (tmp_path / "grids").mkdir()
    (tmp_path / "grids" / "g.yaml").write_text(GRID)
    return tmp_path / "grids" / "g.yaml"


def told(jobs):
    return [f"{job.parameters['name']}{job.parameters['seed']}" for job in jobs]


def ran(job, **others):
    Run(job.notebook.stem, complete(*job[:2]) | others).save({"value": 1})


def test_fewest_seeds_first(grid):
    jobs = load_grid(grid)
    assert told(missing_first(jobs)) == ["a0", "b0", "a1", "b1", "a2", "b2"]
    by_name = {name: job for name, job in zip(told(jobs), jobs, strict=True)}
    ran(by_name["a1"])
    assert told(missing_first(jobs)) == ["b0", "a0", "b1", "a2", "b2", "a1"]
    ran(by_name["b0"])
    ran(by_name["b2"])
    assert told(missing_first(jobs))[:3] == ["a0", "b1", "a2"]


def test_published_seeds_count_and_run_again_only_at_the_end(grid, runs, monkeypatch):
    monkeypatch.setattr(results, "revision", lambda: "1234567")
    jobs = load_grid(grid)
    ran(jobs[0])
    publish(places(jobs))
    shutil.rmtree(runs)
    assert told(missing_first(jobs)) == ["b0", "a1", "b1", "a2", "b2", "a0"]
    assert outlook(jobs).startswith("campaign: 0 of 6 runs finished, 1 more published; ")


def test_slices_finish_the_grid_and_publish_each_run_under_its_table(
    grid, runs, tmp_path, capsys, monkeypatch
):
    done, page = campaign(grid, 0)
    assert [r.status for r in done] == ["out of time"] * 6 + ["ok"] and page.is_file()
    assert not list(results_root().glob("[!.]*"))
    monkeypatch.chdir(grid.parent)
    campaign(Path(grid.name), 10)  # from its own folder
    tables = json.loads((Job(grid.parents[1] / "05_paper_tables.ipynb", {}).folder / "metrics.json")
                        .read_text())  # fmt: skip
    assert tables["metrics"] == {"seen": 6}, "made anew after the runs"
    said = capsys.readouterr().out
    assert "0 of 6 runs finished" in said and "6 of 6 runs finished" in said
    assert {path.name for path in results_root().glob("[!.]*")} == {"g", "README.md"}
    there = {path.name: path for path in results_root().glob("g/clip/*")}
    assert {name.removesuffix("-uncommitted") for name in there} == {
        f"seed-{seed}-name-{name}" for seed in range(3) for name in "ab"
    }
    for name, path in there.items():
        record = load(path)
        params = record["parameters"]
        assert name.startswith(f"seed-{params['seed']}-name-{params['name']}")
        assert record["revision"] == results.revision()
    moved = tmp_path / "carried"
    shutil.move(runs, moved)  # the state is this one folder
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENTRANS_RUNS", str(moved))
        again, _ = campaign(grid, 10)
    assert [r.status for r in again] == ["finished before"] * 6 + ["ok"]


def test_the_outlook_is_the_plan_at_the_speed_so_far(tmp_path, runs):
    """One tiny transfer that has run tells how long another one takes."""
    small = (
        "size: 64, density: 0.25, p: 0.5, prune_steps: 1, prune_batch_size: 2, steps: 2,"
        " batch_size: 2, eval_images: 2, device: cpu, rows: dense ours"
    )
    text = f"runs:\n  - notebook: 03_transfer\n    parameters: {{{small}, seed: [0, 1]}}\n"
    folder = tmp_path / "notebooks" / "grids"
    folder.mkdir(parents=True)
    shutil.copy(PROJECT / "notebooks" / "03_transfer.ipynb", folder.parent)
    (folder / "g.yaml").write_text(text)
    jobs = load_grid(folder / "g.yaml")
    assert "can be told after the first" in outlook(jobs)
    (folder / "one.yaml").write_text(text.replace("[0, 1]", "0"))
    (first,) = run_grid(load_grid(folder / "one.yaml"))
    assert first.status == "ok", first.error
    said = outlook(jobs)
    assert re.match(r"campaign: 1 of 2 runs finished; the others take one device about \d", said)


def test_a_grid_of_grids(grid):
    whole = grid.with_name("whole.yaml")
    whole.write_text("runs:\n  - grid: g\n  - 01_tiny\n")
    jobs = load_grid(whole)
    assert jobs[:6] == load_grid(grid) and len(jobs) == 7
    whole.write_text("runs:\n  - grid: whole\n")
    with pytest.raises(LabError, match="holds itself"):
        load_grid(whole)
    whole.write_text("runs:\n  - grid: none\n")
    with pytest.raises(LabError, match="no grid .*none.yaml"):
        load_grid(whole)


def test_the_campaign_holds_every_framework_row_and_setting():
    grids = PROJECT / "notebooks" / "grids"
    jobs = load_grid(grids / "campaign.yaml")
    parts = ("table1", "table2", "table4", "regimes", "frozen", "ablation")
    assert all(job in jobs for part in parts for job in load_grid(grids / f"{part}.yaml"))
    given = pd.DataFrame([job.full for job in jobs])
    for name, needed in {"framework": FRAMEWORKS, "terms": TERMS, "rows": ROWS}.items():
        found = {word for text in given[name].dropna() for word in text.split()}
        assert found == {*needed}, name


def test_two_campaigns_publish_one_after_the_other(runs, monkeypatch):
    run = Run("03_transfer", {"seed": 0})
    run.save({"miou": 1})
    inside, write = [], Path.write_bytes

    def slow(path, data):
        inside.append(path)
        time.sleep(0.2)
        write(path, data)
        assert inside == [path], "one at a time"
        inside.clear()

    monkeypatch.setattr(Path, "write_bytes", slow)
    with ThreadPoolExecutor() as both:
        where = {run.dir: Path("t/clip/seed-0"), runs / "01_tiny" / "none": Path("t/clip/none")}
        found = list(both.map(publish, [where] * 2))
    assert found[0] == found[1] and len(found[0]) == 1
    assert load(found[0][0])["metrics"] == {"miou": 1}


@pytest.mark.parametrize("when", ["before", "after", "a file"])
def test_a_run_that_is_replaced_while_it_is_read_stays_as_it_was_published(
    runs, monkeypatch, when
):
    table = pd.DataFrame({"row": ["ours"], "seen": [1.0]})
    run = Run("03_transfer", {"seed": 0})
    run.save({"miou": 1}, t=table)
    where = {run.dir: Path("t/clip/seed-0")}
    (place,) = publish(where)
    read = Path.read_bytes

    def replaced(path):
        """Another runner takes the run away, has put a new one there, or a file vanishes."""
        if when == "a file":
            raise FileNotFoundError
        data = read(path)
        shutil.rmtree(run.dir)
        if when == "before":
            return read(path)
        Run("03_transfer", {"seed": 0}).save({"miou": 2}, t=table)
        return data

    (run.dir / ".1-2-t.csv").touch()  # somebody writes
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", replaced)
        assert publish(where) == []
    assert load(place)["metrics"] == {"miou": 1} and (place / "t.csv").is_file()
    if when == "a file":
        publish(where)
    assert {path.name for path in place.iterdir()} == {"metrics.json", "t.csv"}
