"""The experiments end to end at toy size: cached, comparable, and blind to unseen names."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from opentrans_lab.clip import Backbone
from opentrans_lab.data import scenes
from opentrans_lab.errors import LabError, OutOfTime
from opentrans_lab.experiments import (
    Recipe,
    segment_stage,
    selection_table,
    speed_table,
    together,
    transfer_table,
)
from opentrans_lab.experiments import recipe as tuning
from opentrans_lab.experiments.lab import Lab, cached
from opentrans_lab.experiments.starts import prune_stage, row_start
from opentrans_lab.files import mini_folder
from opentrans_lab.finetuning import SELECTIONS
from opentrans_lab.masks import prunable
from opentrans_lab.pruning import ROWS, TRAINED, PruneConfig
from opentrans_lab.records import runs_root
from opentrans_lab.runs import run_notebook

LAB = Lab(device="cpu")
PRUNING = PruneConfig(density=0.25, p=0.5, steps=1, batch_size=2)
RECIPE = Recipe(steps=5, batch_size=2, eval_images=4)
NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
COCO = Path(__file__).parents[2] / "shared" / "data" / "coco"


@pytest.fixture(scope="module", autouse=True)
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENTRANS_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield


def test_all_rows_keep_the_same_number_and_differ_as_they_say():
    clip = LAB.load()
    ours = prune_stage(LAB, PRUNING)
    kept = ours.mask.kept
    assert kept == round(ours.mask.total * 0.25) and len(ours.masks()) == 2
    starts = {row: row_start(LAB, row, PRUNING) for row in ROWS}
    assert starts["dense"][1] is None
    assert {mask.kept for row, (_, mask) in starts.items() if row != "dense"} == {kept}
    assert starts["ours"][1] == starts["ours_mask_only"][1] == ours.mask
    assert starts["random_layerwise"][1] == starts["random_layerwise_kd"][1] != ours.mask
    per_layer = ours.mask.layers()["kept"].tolist()
    assert starts["random_layerwise"][1].layers()["kept"].tolist() == per_layer
    trained = {
        row
        for row, (backbone, mask) in starts.items()
        if any(
            not torch.equal(w[m], c[m])
            for (n, w), c in zip(
                prunable(backbone.visual).items(), prunable(clip.visual).values(), strict=True
            )
            for m in [torch.ones_like(w, dtype=torch.bool) if mask is None else mask[n]]
        )
    }
    assert trained == set(TRAINED)


def test_a_table_has_every_row_and_is_computed_once():
    rows = "dense ours random_global"
    table = transfer_table(LAB, RECIPE, PRUNING, rows)
    assert table["row"].tolist() == rows.split()
    for column in ("seen", "unseen", "all", "shifted_seen", "shifted_unseen"):
        assert table[column].between(0, 100).all()
    made = {p: p.stat().st_mtime_ns for p in runs_root().rglob("result.json")}
    assert len([p for p in made if p.parts[-3] == "segment"]) == 3
    again = transfer_table(LAB, RECIPE, PRUNING, rows)
    assert again.equals(table)
    assert made == {p: p.stat().st_mtime_ns for p in runs_root().rglob("result.json")}


def test_forced_work_is_done_again(monkeypatch):
    calls = []
    params = {"a": 1}
    cached("toy", params, lambda folder: calls.append(1) or {"n": 1})
    cached("toy", params, lambda folder: calls.append(2) or {"n": 2})
    assert calls == [1]
    monkeypatch.setenv("OPENTRANS_FORCE", str(time.time() - 60))
    done = runs_root() / "stages" / "toy"
    os.utime(next(done.glob("*/result.json")), (0, 0))  # made long before that
    _, result = cached("toy", params, lambda folder: calls.append(3) or {"n": 3})
    assert calls == [1, 3] and result == {"n": 3}
    cached("toy", params, lambda folder: calls.append(4) or {"n": 4})
    assert calls == [1, 3]


@pytest.fixture
def cut_short(monkeypatch):
    """``rmtree`` removes one file and is interrupted."""

    def cut(folder, ignore_errors=False):
        if Path(folder).exists():
            next(p for p in Path(folder).rglob("*") if p.is_file()).unlink()
            raise KeyboardInterrupt

    def use(work, *args):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(shutil, "rmtree", cut)
            work(*args)

    return use


def _train(folder: Path) -> dict:
    (folder / "checkpoints").mkdir(exist_ok=True)
    for name in ("weights", "moments"):
        (folder / "checkpoints" / name).touch()
    (folder / "model").touch()
    return {"n": 1}


def test_checkpoints_stay_until_the_result_is_there_and_then_go(monkeypatch, cut_short):
    params = {"ends": "badly"}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        cached("toy", params, _train)
    (left,) = (p for p in (runs_root() / "stages" / "toy").iterdir() if (p / "model").exists())
    assert len(list((left / "checkpoints").iterdir())) == 2, "it can go on"
    cut_short(cached, "toy", params, _train)
    assert (left / "checkpoints").exists()
    assert abs((left / "result.json").stat().st_mtime - time.time()) < 3600
    folder, result = cached("toy", params, lambda _: {"n": 2})
    assert folder == left and result == {"n": 1} and not (left / "checkpoints").exists()


def test_a_stage_whose_removal_is_cut_short_is_made_anew(monkeypatch, cut_short):
    params = {"removed": "half"}
    folder, _ = cached("toy", params, _train)
    os.utime(folder / "result.json", (0, 0))
    with monkeypatch.context() as patch:
        patch.setenv("OPENTRANS_FORCE", str(time.time()))
        cut_short(cached, "toy", params, _train)
    assert cached("toy", params, lambda folder: {"left": os.listdir(folder)})[1] == {"left": []}
    assert not [p for p in folder.parent.iterdir() if p.name.startswith(f".{folder.name}.old")]


def test_forced_work_is_done_once_though_a_clock_is_behind(monkeypatch):
    monkeypatch.setenv("OPENTRANS_FORCE", str(time.time() + 3600))
    calls = []
    for _ in range(3):
        cached("toy", {"clock": "behind"}, lambda folder: calls.append(1) or {})
    assert calls == [1]


def test_who_waits_for_a_stage_says_so_and_stops_at_the_deadline(monkeypatch, capsys):
    """The other process is real, and holds the stage until it is told to end."""
    code = (
        "import sys; from opentrans_lab.experiments.lab import cached\n"
        "def work(folder): print('begun', flush=True); sys.stdin.read(); return {'n': 1}\n"
        "cached('slow', {'a': 1}, work)"
    )
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    other = subprocess.Popen([sys.executable, "-c", code], **pipes)
    assert other.stdout.readline() == "begun\n"
    with monkeypatch.context() as patch:
        patch.setenv("OPENTRANS_DEADLINE", str(time.time() + 1))
        with pytest.raises(OutOfTime, match="another process still makes .*slow"):
            cached("slow", {"a": 1}, lambda folder: {"n": 2})
    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", lambda *_, **__: other.stdin.close())  # when it says so
        assert cached("slow", {"a": 1}, lambda folder: {"n": 2})[1] == {"n": 1}
    assert capsys.readouterr().out.count("which another process makes") == 1
    assert other.wait(timeout=60) == 0


def test_selection_freezes_the_half_it_names():
    recipe = replace(RECIPE, warmup=0.4)
    table = selection_table(
        LAB, recipe, PRUNING, "none low_alpha high_alpha", {"few": {"images": 4}}
    )
    assert table["select"].tolist() == ["none", "low_alpha", "high_alpha"]
    assert set(table["select"]) < set(SELECTIONS)
    low, high = (
        segment_stage(LAB, replace(recipe, select=s, images=4), PRUNING)
        for s in ("low_alpha", "high_alpha")
    )
    layers = len(list(prunable(LAB.load().visual))) + 1
    assert len(low.frozen) == len(high.frozen) == layers // 2
    assert not set(low.frozen) & set(high.frozen)
    assert table["frozen_weights"].tolist()[0] == 0 and (table["frozen_weights"][1:] > 0).all()


def test_layers_are_chosen_again_and_a_resumed_run_keeps_its_choices(monkeypatch):
    recipe = replace(RECIPE, select="random", warmup=0.2, reselect=2, seed=3)
    monkeypatch.setenv("OPENTRANS_DEADLINE", "0")
    for _ in range(3):  # stops after every step
        with pytest.raises(OutOfTime):
            segment_stage(LAB, recipe, PRUNING)
    monkeypatch.delenv("OPENTRANS_DEADLINE")
    done = segment_stage(LAB, recipe, PRUNING)
    choices = {p.name: json.loads(p.read_text()) for p in done.folder.glob("frozen-*.json")}
    assert choices.keys() == {"frozen-000001.json", "frozen-000003.json"}
    first, last = (choices[name] for name in sorted(choices))
    assert first != last == done.frozen and len(first) == len(last)
    start, end = LAB.load().visual, load_file(done.folder / "model.safetensors")
    for name in {*first, *last}:  # one that was frozen only later, or only first, has trained
        weight = start.get_parameter(f"{name}.weight")
        assert not torch.equal(end[f"backbone.visual.{name}.weight"], weight), name


def test_a_prefix_and_norms_that_are_held():
    recipe = replace(RECIPE, select="prefix", warmup=0.0, norm="eval")
    start = LAB.load().visual.state_dict()
    for prefix, names in {"stem layer1": ("conv", "bn", "layer1"), "stem": ("conv", "bn")}.items():
        done = segment_stage(LAB, replace(recipe, prefix=prefix), PRUNING)
        assert done.frozen == prefix.split()
        end = load_file(done.folder / "model.safetensors")
        trunk = {k: v for k, v in start.items() if not k.startswith("attnpool")}
        same = {k for k, v in trunk.items() if torch.equal(end[f"backbone.visual.{k}"], v)}
        held = {k for k in trunk if "running" in k or "num_batches" in k}
        assert same == held | {k for k in trunk if k.startswith(names)}
    with pytest.raises(LabError, match="layer9"):
        replace(recipe, prefix="stem layer9")


def test_mask_and_selection_together():
    regimes = {"plenty": {}, "pruned": {"row": "ours"}}
    table = selection_table(LAB, RECIPE, PRUNING, "none low_alpha", regimes)
    both = together(LAB, RECIPE, PRUNING, table).set_index("has")
    assert both.index.tolist() == ["neither", "selection", "mask", "both"]
    assert both["training"].is_monotonic_decreasing and both["training"].iloc[0] == 100
    assert both["params_M"].tolist()[0] == both["params_M"].tolist()[1] > both["params_M"].iloc[2]
    less = together(LAB, RECIPE, PRUNING, table[table["regime"] == "plenty"])
    assert less["has"].tolist() == ["neither", "selection"]
    speed = speed_table(LAB, RECIPE, PRUNING, "none low_alpha").set_index("select")
    assert speed.loc["none", ["paper_saving", "full_saving", "step_saving"]].tolist() == [0, 0, 0]
    assert speed.loc["low_alpha", "layers"] > 0 and (speed["step_s"] > 0).all()


def test_the_trained_model_comes_back():
    recipe = replace(RECIPE, row="ours")
    model = segment_stage(LAB, recipe, PRUNING).model(LAB, recipe)
    assert prune_stage(LAB, PRUNING).mask.verify(model)
    with torch.no_grad():
        assert model.scores(torch.rand(1, 3, 128, 128), scenes.STUFF).shape == (1, 8, 8, 8)


def test_no_unseen_pixel_or_region_enters_training(monkeypatch):
    """Every scene that pruning, distilling and fine-tuning render, and the words they read."""
    drawn, words, render, text = [], [], scenes.render, Backbone.text

    def watch(*args, **kwargs):
        drawn.append(render(*args, **kwargs))
        return drawn[-1]

    def listen(self, names, *args):
        words.append(set(names))
        return text(self, names, *args)

    monkeypatch.setattr("opentrans_lab.data.datasets.scenes.render", watch)
    monkeypatch.setattr(Backbone, "text", listen)
    monkeypatch.setattr(tuning, "_evaluate", lambda *_: {})
    pruning = replace(PRUNING, seed=77)
    for row in ("ours", "random_layerwise_kd"):
        endless = replace(LAB, pool=0, targets="fresh")  # every step draws
        segment_stage(endless, replace(RECIPE, row=row, seed=77), pruning)
    unseen = [i for i, seen in enumerate(scenes.SEEN) if not seen]
    assert len(drawn) == 2 + 2 + 2 * 5  # both stages and both fine-tunings were watched
    for batch in drawn:
        assert not torch.isin(batch.labels, torch.tensor(unseen)).any()
        assert not torch.isin(torch.cat(batch.classes), torch.tensor(unseen)).any()
    assert words and not any(
        vocabulary & {scenes.CLASSES[i] for i in unseen} for vocabulary in words
    )


@pytest.mark.skipif(not COCO.exists(), reason="the COCO-Panoptic subset is not beside the project")
def test_real_photographs_through_the_notebooks():
    """03 trains and evaluates over 133 names, 06 shows image, ground truth and predictions."""
    tiny = dict(
        dataset="coco", data_root=str(COCO), size=64, rows="dense ours", density=0.5, p=0.5,
        prune_steps=1, prune_batch_size=2, steps=2, batch_size=2, eval_images=3, device="cpu",
    )  # fmt: skip
    transfer = run_notebook(NOTEBOOKS / "03_transfer.ipynb", tiny)
    assert transfer.status == "ok", transfer.error
    table = pd.read_csv(transfer.folder / "transfer.csv")
    assert table["seen"].between(0, 100).all() and table["unseen"].isna().all()
    shown = run_notebook(NOTEBOOKS / "06_qualitative.ipynb", tiny | {"shown": 3})
    assert shown.status == "ok", shown.error
    assert (shown.folder / "overlays.png").stat().st_size > 10_000


def test_a_users_mistake_in_a_notebook_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENTRANS_RUNS", str(tmp_path / "none"))
    wrong = {"dataset": "coco", "data_root": str(tmp_path / "nowhere"), "rows": "dense"}
    result = run_notebook(NOTEBOOKS / "03_transfer.ipynb", wrong)
    assert result.users and "nowhere" in result.error
    left = [p for p in (tmp_path / "none").rglob("*") if not p.name.endswith(".lock")]
    assert [p.name for p in left] in ([], ["stages", "segment"])


def test_the_key_follows_the_content_of_the_weights(tmp_path):
    here = Lab(checkpoint=str(mini_folder())).params
    assert here == LAB.params
    shutil.copytree(mini_folder(), tmp_path / "mini")
    assert Lab(checkpoint=str(tmp_path / "mini")).params == here
    with (tmp_path / "mini" / "model.safetensors").open("ab") as file:
        file.write(b"!")
    assert Lab(checkpoint=str(tmp_path / "mini")).params != here


@pytest.mark.parametrize("mistake", ["framework", "preset", "row", "select", "reshape", "rule"])
def test_a_mistyped_word_is_refused_before_anything_runs(mistake, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENTRANS_RUNS", str(tmp_path / "none"))
    with pytest.raises(LabError, match=f"unknown {mistake}='lucky'; use one of"):
        replace(RECIPE, **{mistake: "lucky"})
    with pytest.raises(LabError, match="'oours'"):
        transfer_table(LAB, RECIPE, PRUNING, "dense oours")
    with pytest.raises(LabError, match="'loww'"):
        selection_table(LAB, RECIPE, PRUNING, "none loww", {"plenty": {}})
    with pytest.raises(LabError, match="warmup=1.0"):
        replace(RECIPE, warmup=1.0)
    assert not (tmp_path / "none").exists()
