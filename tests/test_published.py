"""Every published run has a place of its own that says what it is, and the index lists it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from opentrans_lab.files import linked
from opentrans_lab.records import PROJECT, Run, collect, load, records, results, results_root
from opentrans_lab.report import published_page
from opentrans_lab.runs.grids import Job, load_grid
from opentrans_lab.runs.published import INDEX, places, publish

GRIDS = PROJECT / "notebooks" / "grids"
TRANSFER = PROJECT / "notebooks" / "03_transfer.ipynb"
WHERE = Path("t/han/seed-0")


@pytest.fixture
def revision(monkeypatch):
    """``revision("1234567")``: what runs are made at from now on."""

    def made_at(name):
        monkeypatch.setattr(results, "revision", lambda: name)

    made_at("1234567")
    return made_at


@pytest.fixture
def committed(monkeypatch, runs):
    """What is published in the project, and no runs of one's own."""
    monkeypatch.setenv("OPENTRANS_RESULTS", str(PROJECT / "results"))


def saved(value=1, **parameters):
    run = Run("03_transfer", Job(TRANSFER, parameters).full)
    run.save({"value": value})
    return run.dir


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_two_jobs_of_a_grid_never_share_a_place(path):
    jobs = [job for job in load_grid(path) if not job.after_all]
    found = places(jobs)
    assert found.keys() == {job.folder for job in jobs}
    assert len({str(place).lower() for place in found.values()}) == len(found)
    assert all(re.fullmatch(r"\w+/\w+/seed-\d+[\w.-]*", p.as_posix()) for p in found.values())


def test_a_place_says_table_framework_seed_and_what_is_swept(tmp_path):
    for line in ("norm: [train, eval]", "norm: [train, eval, recalibrated]"):
        text = f"{{framework: [han, fcclip], steps: 9, rows: dense ours, seed: [0, 1], {line}}}"
        (tmp_path / "mine.yaml").write_text(
            f"runs:\n  - notebook: 03_transfer\n    parameters: {text}\n"
        )
        found = {place.as_posix() for place in places(load_grid(tmp_path / "mine.yaml")).values()}
        assert {"mine/han/seed-0-norm-train", "mine/fcclip/seed-1-norm-eval"} < found
    (tmp_path / "all.yaml").write_text("runs:\n  - grid: mine\n  - 02_prune_imp\n")
    whole = {place.as_posix() for place in places(load_grid(tmp_path / "all.yaml")).values()}
    assert whole == found | {"02_prune_imp/clip/seed-0"}


def test_a_run_of_another_experiment_goes_beside_what_is_there(runs, revision):
    first, other = saved(1, framework="han"), saved(2, framework="han", steps=7)
    (place,) = publish({first: WHERE})
    (beside,) = publish({other: WHERE})
    assert place == results_root() / WHERE
    assert beside == place.with_name(f"seed-0-{load(other)['key']}")
    assert [load(folder)["metrics"]["value"] for folder in (place, beside)] == [1, 2]
    assert publish({other: WHERE, first: WHERE}) == [beside, place]
    assert [load(folder)["metrics"]["value"] for folder in (place, beside)] == [1, 2]


def test_an_older_run_does_not_replace_a_newer_one(runs, revision):
    folder = saved(2)
    (place,) = publish({folder: WHERE})
    record = json.loads((folder / "metrics.json").read_text())
    record |= {"created": "2020-01-01T00:00:00+00:00", "metrics": {"value": 1}}
    (folder / "metrics.json").write_text(json.dumps(record))
    assert publish({folder: WHERE}) == []
    assert load(place)["metrics"] == {"value": 2}


def test_a_run_of_uncommitted_code_is_kept_and_not_quoted(runs, tmp_path, revision, monkeypatch):
    clean = saved(1, framework="han")
    publish({clean: WHERE})
    revision("1234567-dirty")
    (place,) = publish({saved(2, framework="han"): WHERE})
    assert place == results_root() / "t/han/seed-0-uncommitted"
    assert collect()["metrics.value"].tolist() == [2], "one's own run, which is at hand"
    monkeypatch.setenv("OPENTRANS_RUNS", str(tmp_path / "others"))
    assert collect()["metrics.value"].tolist() == [1]
    (line,) = [x for x in (results_root() / INDEX).read_text().splitlines() if "uncommitted]" in x]
    assert "not quoted" in line and "value" not in line


def test_the_index_lists_every_published_run(committed):
    there = {path.parent for path in results_root().glob("*/*/*/metrics.json")}
    page = (results_root() / INDEX).read_text()
    assert page == published_page(), "opentrans-lab campaign writes it"
    links = re.findall(r"^\| \[[^]]+\]\(([^)]+)\)", page, flags=re.M)
    assert len(links) == len(there)
    assert {results_root() / linked(link) for link in links} == there
    for line in page.splitlines():
        if line.startswith("| ["):
            assert "mini lab" in line and re.search(r"\| \w{7}(-dirty)? \|", line), line


def test_the_index_takes_whatever_a_notebook_saves(runs, revision):
    for seed, metrics in enumerate(({"miou": {"a": 3}}, {"miou": {"a": {"seen": None}}}, {})):
        run = Run("my own", {"seed": seed, "words": f"grass|meadow {seed}"})
        run.save(metrics)
        publish({run.dir: Path(f"mine/clip/seed-{seed}")})
    lines = [x for x in published_page().splitlines() if x.startswith("|")]
    assert len(lines) == 5 and len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "| a – / – |" in lines[3] and r"grass\|meadow 2" in lines[4]


def test_what_is_published_is_of_the_campaigns_tables(committed):
    tables = {job.table or job.notebook.stem for job in load_grid(GRIDS / "campaign.yaml")}
    for folder, record in records():
        table, framework, name = folder.relative_to(results_root()).parts
        params = record["parameters"]
        assert table in tables and framework == params.get("framework", "clip")
        assert name.split("-")[:2] == ["seed", str(record["seed"])]
        assert not record["revision"].endswith("-dirty")
