"""Keys follow values alone, writes are whole or absent, and what is saved is found again."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

from opentrans_lab.errors import LabError
from opentrans_lab.files import atomic_path
from opentrans_lab.records import (
    PROJECT,
    Run,
    collect,
    paper,
    put,
    results,
    run_dir,
    run_key,
)
from opentrans_lab.report.tables import ADDED, lines, summary
from opentrans_lab.runs.grids import defaults
from opentrans_lab.runs.published import publish

matplotlib.use("Agg")


def test_key_depends_on_names_and_values_only():
    key = run_key({"seed": 1, "lr": 0.5, "name": "a"})
    assert key == run_key({"name": "a", "lr": 0.5, "seed": 1.0})
    assert key == run_key({"seed": np.int64(1), "lr": torch.tensor(0.5), "name": "a"})
    others = [{"seed": 2, "lr": 0.5, "name": "a"}, {"seed": 1, "lr": 0.5, "name": "1"}, {"seed": 1}]
    assert len({key, *map(run_key, others)}) == 4
    assert run_key({"x": True}) != run_key({"x": 1})
    assert re.fullmatch("[0-9a-f]{10}", key)


def test_key_is_the_same_in_another_process():
    code = "from opentrans_lab.records import run_key; print(run_key({'b': 1e-3, 'a': 'x'}))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == run_key({"a": "x", "b": 0.001})


def test_parameter_of_no_plain_type_is_refused():
    with pytest.raises(LabError, match="parameter.model"):
        Run("03_transfer", {"model": torch.nn.Linear(1, 1)})


def test_atomic_path_leaves_the_old_file_or_the_new_one(tmp_path):
    target = tmp_path / "deep" / "a.json"
    with atomic_path(target) as path:
        path.write_text("old")
        assert path.suffix == ".json" and path.parent == target.parent and not target.exists()
    with pytest.raises(RuntimeError), atomic_path(target) as path:
        path.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert [p.name for p in target.parent.iterdir()] == ["a.json"]


def test_runs_root_is_the_project_around_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENTRANS_RUNS")
    inner = tmp_path / "project" / "notebooks"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    assert results.runs_root() == inner / "runs"
    (tmp_path / "project" / "pyproject.toml").touch()
    assert results.runs_root() == tmp_path / "project" / "runs"
    monkeypatch.setenv("OPENTRANS_RUNS", "elsewhere")
    assert results.runs_root() == inner / "elsewhere"


def test_save_writes_who_when_where_and_what(runs):
    import matplotlib.pyplot as plt

    run = Run("03_transfer", {"seed": 3, "lr": 1e-3})
    figure, axes = plt.subplots()
    axes.plot([1, 2])
    run.figure(figure, "curve")
    plt.close(figure)
    table = pd.DataFrame({"miou": [0.5]}, index=pd.Index(["ours"], name="row"))
    run.save(
        {"miou": torch.tensor(0.25), "nothing": math.nan, "deep": {"a": np.float32(2)}}, t=table
    )

    folder = run_dir("03_transfer", {"seed": 3, "lr": 1e-3})
    assert sorted(p.name for p in folder.iterdir()) == ["curve.png", "metrics.json", "t.csv"]
    record = json.loads((folder / "metrics.json").read_text())
    assert record["metrics"] == {"miou": 0.25, "nothing": None, "deep": {"a": 2.0}}
    assert record["parameters"] == {"seed": 3, "lr": 1e-3} and record["seed"] == 3
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["revision"] and record["device"] and record["wall_s"] >= 0
    assert pd.read_csv(folder / "t.csv").to_dict("list") == {"row": ["ours"], "miou": [0.5]}


def test_collect_finds_finished_runs_only(runs):
    assert collect().empty and "notebook" in collect()
    Run("03_transfer", {"seed": 1}).save({"miou": {"ours": 0.5}})
    Run("04_other", {"seed": 0}).save({"x": 1})
    (runs / "03_transfer" / "unfinished").mkdir()
    found = collect("03_transfer")
    assert len(found) == 1 and len(collect()) == 2
    assert found.loc[0, "parameters.seed"] == 1 and found.loc[0, "metrics.miou.ours"] == 0.5


def test_damaged_metrics_are_named(runs):
    Run("03_transfer", {"seed": 1}).save({})
    path = run_dir("03_transfer", {"seed": 1}) / "metrics.json"
    path.write_text(path.read_text()[:20])
    with pytest.raises(LabError, match="metrics.json is damaged"):
        collect()


def test_revision_is_gits_and_else_the_versions(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "PROJECT", tmp_path)
    revision = results.revision.__wrapped__
    assert revision() == results.__version__
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    subprocess.run([*git, "init", "-q"], check=True)
    assert revision() == results.__version__  # nothing committed
    (tmp_path / "a").write_text("1")
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    assert re.fullmatch("[0-9a-f]{7,}", revision())
    (tmp_path / "a").write_text("2")
    assert revision().endswith("-dirty")


def test_papers_tables_are_whole_and_sourced():
    one, two, three, four = (paper(f"table{i}") for i in (1, 2, 3, 4))
    assert len(one) == 9 * (7 + 2) and len(two) == 4 * (7 + 1) and len(four) == 3
    assert three.system.nunique() == 15 and len(three) == 15 * (4 + 2)
    for table in (one, two, three, four):
        assert table.source.str.contains("Table [1-4], row").all()
        assert not table.drop(columns=["value", "source"]).duplicated().any()
    # The same number stands in several tables of the paper: copying errors would show.
    dense = one[(one.row == "dense") & (one.metric == "miou")]
    again = three[(three.row == "dense") & (three.metric == "miou")]
    both = dense.merge(again, on=["framework", "dataset"])
    assert len(both) == 12 and (both.value_x == both.value_y).all()
    base = two[(two["select"] == "none") & (two.metric == "miou")].merge(dense, on="dataset")
    assert (base[base.framework_y == "han"].pipe(lambda t: t.value_x == t.value_y)).all()
    totals = two[two.metric == "training_flops"].set_index("select").value
    assert four.value.tolist() == [totals["none"], totals["low_alpha"], 122.2]


def test_unknown_paper_table_lists_the_known_ones():
    with pytest.raises(LabError, match="table1, table2, table3, table4"):
        paper("table9")
    assert (PROJECT / "pyproject.toml").is_file()


def test_summary_averages_seeds_and_never_different_experiments(runs):
    for seed, lr, rule in itertools.product((0, 1, 2), (0.1, 0.5), ("csn", "mid")):
        run = Run("04_toy", {"seed": seed, "lr": lr, "rule": rule, "device": "cpu"})
        table = pd.DataFrame({"select": ["none", "low"], "seen": [10 * lr + seed, 50 + seed]})
        run.save({}, selection=table)
    found = summary("04_toy", "selection", ["select"], ["seen", "absent"])
    assert found.index.names == ["parameters.lr", "parameters.rule", "select"]
    assert len(found) == 8 and (found["n"] == 3).all() and "absent" not in found
    assert found.loc[(0.5, "mid", "none"), "seen"] == pytest.approx(6.0)
    assert found.loc[(0.1, "csn", "low"), "seen ±"] == pytest.approx(4.302653 / 3**0.5)
    some = summary("04_toy", "selection", ["select"], ["seen"], lr=0.1, rule="csn")
    assert some.index.names == ["select"] and some["seen"].tolist() == [2.0, 51.0]
    assert summary("05_none", "selection", ["select"], ["seen"]).empty


def test_a_run_that_is_not_saved_yet_counts_once(runs):
    table = pd.DataFrame({"row": ["ours"], "seen": [20.0]})
    for seed, framework in ((0, "han"), (1, "han"), (0, "fcclip")):
        run = Run("03_toy", {"seed": seed, "framework": framework})
        run.save({}, transfer=table.assign(seen=20.0 + seed), none=pd.DataFrame())
        assert not (run.dir / "none.csv").exists()  # a table without columns
    mine = ({"seed": 2, "framework": "han"}, table.assign(seen=30.0))
    found = summary("03_toy", "transfer", ["row"], ["seen"], mine=mine)
    assert found["n"].to_dict() == {("han", "ours"): 3, ("fcclip", "ours"): 1}
    assert found.loc[("han", "ours"), "seen"] == pytest.approx((20 + 21 + 30) / 3)
    again = ({"seed": 1, "framework": "han"}, table.assign(seen=99.0))  # goes before the saved one
    found = summary("03_toy", "transfer", ["row"], ["seen"], mine=again, framework="han")
    assert found.loc["ours", "seen"] == pytest.approx((20 + 99) / 2)


def test_a_line_that_two_runs_made_counts_once_with_the_newest(runs):
    for rows, score in (("dense ours", 1.0), ("dense", 2.0)):
        run = Run("03_toy", {"seed": 0, "rows": rows})
        run.save({}, transfer=pd.DataFrame({"row": rows.split(), "seen": score}))
        time.sleep(1.1)  # records are ordered by the second
    found = lines("03_toy", "transfer").set_index("row")["seen"]
    assert found.to_dict() == {"ours": 1.0, "dense": 2.0}
    mine = ({"seed": 0, "rows": "dense ours"}, pd.DataFrame({"row": ["dense"], "seen": [3.0]}))
    assert lines("03_toy", "transfer", mine)["seen"].tolist() == [3.0]


def test_a_narrower_run_takes_nothing_away(runs):
    """Costs in percent of a line that the second run did not make, and a first one run again."""
    for params, table in (
        ({"regimes": "plenty pruned"}, {"seen": [10.0, 9.0], "training": [100.0, 60.0]}),
        ({"regimes": "pruned"}, {"seen": [8.0], "training": [math.nan]}),
    ):
        has = ["neither", "both"][-len(table["seen"]) :]
        Run("04_toy", {"seed": 0} | params).save({}, both=pd.DataFrame({"has": has, **table}))
        time.sleep(1.1)  # records are ordered by the second
    line = lines("04_toy", "both").set_index("has").loc["both"]
    assert (line["seen"], line["training"]) == (8.0, 60.0)
    again = {"seed": 0, "regimes": "plenty pruned", "devices": 2}
    table = pd.DataFrame({"has": ["neither", "both"], "seen": [10.0, 7.0]})
    Run("04_toy", again).save({}, both=table)
    assert lines("04_toy", "both").set_index("has")["seen"].to_dict() == {"neither": 10, "both": 7}


@pytest.fixture
def folders(tmp_path):
    """(an old folder, what is to replace it, where the old one goes meanwhile)."""
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "said").write_text(name)
    return tmp_path / "old", tmp_path / "new", tmp_path / "new-old"


def meanwhile(monkeypatch, when, act):
    """``act`` after the rename to ``when``."""
    rename = os.rename

    def then(source, target):
        rename(source, target)
        if target == when:
            act()

    monkeypatch.setattr(os, "rename", then)


def test_a_folder_is_replaced_or_stays(folders, monkeypatch):
    old, new, aside = folders
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        meanwhile(patch, aside, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        put(new, old, bool)
    assert (old / "said").read_text() == "old" and new.exists() and not aside.exists()
    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(PermissionError()))
        put(new, old, lambda: True)  # it cannot be put aside, and is no other's
    assert (old / "said").read_text() == "old" and new.exists()
    put(new, old, bool)
    assert (old / "said").read_text() == "new" and not new.exists() and not aside.exists()


def test_the_old_folder_is_never_lost(folders, monkeypatch):
    """Its stage is gone; or it cannot come back: then it stays aside."""
    old, new, aside = folders
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError):
        meanwhile(patch, aside, lambda: shutil.rmtree(new))
        put(new, old, bool)
    assert (old / "said").read_text() == "old" and not aside.exists()
    rename = os.rename

    def once(source, target):
        if target == old:
            raise OSError("disk")
        rename(source, target)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk"):
        patch.setattr(os, "rename", once)
        put(new, old, bool)
    assert (aside / "said").read_text() == "old"


def test_a_folder_of_a_faster_process_stays_if_it_is_whole(folders, monkeypatch):
    old, new, aside = folders

    def other():
        old.mkdir()
        (old / "said").write_text("other")

    with monkeypatch.context() as patch:
        meanwhile(patch, aside, other)
        with pytest.raises(OSError):
            put(new, old, lambda: False)
        assert (old / "said").read_text() == "other" and new.exists() and not aside.exists()
        put(new, old, lambda: (old / "said").is_file())
    assert (old / "said").read_text() == "other" and not aside.exists()


def test_a_folder_that_another_process_has_just_put_aside_is_none(folders, monkeypatch):
    """Neither before ours is there, nor after: the older one must not come back then."""
    old, new, aside = folders
    os.rename(old, old.with_name("others"))
    put(new, old, bool)
    assert (old / "said").read_text() == "new"
    shutil.copytree(old, new)

    def other():
        old.rename(old.with_name("asides"))
        raise KeyboardInterrupt

    meanwhile(monkeypatch, old, other)
    with pytest.raises(KeyboardInterrupt):
        put(new, old, bool)
    assert not old.exists() and not aside.exists()
    assert (old.with_name("asides") / "said").read_text() == "new"


def test_published_runs_are_small_and_found_beside_the_own_ones(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "revision", lambda: "1234567")
    for seed in (0, 1):
        run = Run("03_transfer", {"seed": seed})
        run.save({"miou": seed}, transfer=pd.DataFrame({"row": ["ours"], "seen": [10.0 + seed]}))
        (run.dir / "executed.ipynb").write_text("large")
    one, two = (run_dir("03_transfer", {"seed": seed}) for seed in (0, 1))
    where = {folder: Path("t", "clip", f"seed-{i}") for i, folder in enumerate((one, two))}
    first, place = publish(where)
    (first / "older.csv").touch()

    def full(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr(Path, "write_bytes", full)
        publish({two: where[two]})
    assert not (place / "metrics.json").exists(), "half a run is none"
    assert publish(where) == [first, place]
    assert place == tmp_path / "results" / where[two]
    for folder in (first, place):
        assert {p.name for p in folder.iterdir()} == {"metrics.json", "transfer.csv"}
    shutil.rmtree(runs)
    assert set(collect("03_transfer")["metrics.miou"]) == {0, 1}
    assert summary("03_transfer", "transfer", ["row"], ["seen"]).loc["ours", "n"] == 2
    Run("03_transfer", {"seed": 1}).save({"miou": 7})  # an own run goes before a published one
    assert set(collect("03_transfer")["metrics.miou"]) == {0, 7}


def test_a_run_from_before_a_parameter_counts_with_the_value_it_had(runs):
    old = {"seed": 0, "steps": 5}
    for params, value in (
        (old, 1.0),
        (old | {"norm": "train", "precision": "auto"}, 2.0),  # the same experiment again
        ({"seed": 1, "steps": 5, "norm": "train", "precision": "auto"}, 4.0),
        ({"seed": 0, "steps": 5, "norm": "eval", "precision": "auto"}, 50.0),
    ):
        Run("03_x", params).save({}, t=pd.DataFrame({"row": ["a"], "seen": [value]}))
        time.sleep(1.1)  # records are ordered by the second
    found = summary("03_x", "t", ["row"], ["seen"])
    assert found.index.names == ["parameters.norm", "row"]
    assert found.loc[("train", "a"), ["n", "seen"]].tolist() == [2, 3.0]
    assert found.loc[("eval", "a"), ["n", "seen"]].tolist() == [1, 50.0]
    notebook = defaults(PROJECT / "notebooks" / "04_selective_finetuning.ipynb")
    since = {"pool", "targets"}  # new runs have other values of these
    same = ADDED.keys() - since
    assert {name: notebook[name] for name in same} == {name: ADDED[name] for name in same}
    assert since < notebook.keys() and all(notebook[name] != ADDED[name] for name in since)
