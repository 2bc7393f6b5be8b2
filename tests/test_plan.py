"""A plan names the stages that notebooks will really make, and counts what they really take."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from opentrans_lab.cli import main
from opentrans_lab.costs import step_costs
from opentrans_lab.errors import LabError
from opentrans_lab.experiments import Lab, framework_options
from opentrans_lab.heads import FRAMEWORKS, build
from opentrans_lab.pruning.imp import PruneConfig, Student, distillation
from opentrans_lab.runs import estimate as working
from opentrans_lab.runs import run_grid
from opentrans_lab.runs.estimate import step_macs, work_of
from opentrans_lab.runs.grids import Job, load_grid
from opentrans_lab.runs.plan import _fitting, describe_plan, measured, past_speed, plan, reference

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
TINY = dict(
    size=64, density=0.25, p=0.5, prune_steps=1, prune_batch_size=2, steps=2, batch_size=2,
    eval_images=2, device="cpu",
)  # fmt: skip


def job(name: str, **given) -> Job:
    return Job(NOTEBOOKS / f"{name}.ipynb", given)


def test_the_plan_is_what_the_notebooks_do(runs, tmp_path):
    """Of 03 and 04: the same folders, their size on disk, and nothing left afterwards."""
    both = dict(regimes="plenty pruned", selects="none low_alpha prefix")
    jobs = [
        job("03_transfer", **TINY, rows="dense ours ours_mask_kd"),
        job("04_selective_finetuning", **TINY, **both),
    ]
    before = plan(jobs, 1e12)
    works = {work.folder: work for one in jobs for work in work_of(one)}
    # 04 shares the pruning and the two rows that freeze nothing only where all else is equal.
    assert before["stages"].sum() == len(works) < sum(len(work_of(one)) for one in jobs)
    assert math.isnan(past_speed(jobs))
    assert [r.status for r in run_grid(jobs)] == ["ok", "ok"]
    made = {path.parent for path in runs.glob("stages/*/*/result.json")}
    made = {folder for folder in made if folder.parent.name != "parts"}  # an evaluation more
    assert made == works.keys()
    for folder, work in works.items():
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        assert size == pytest.approx(work.disk, rel=0.15), (work.kind, size, work.disk)
        if work.kind == "distill":
            steps = json.loads((folder / "result.json").read_text())["result"]["steps"]
            assert work.pictures == steps * TINY["prune_batch_size"]
        if work.kind == "segment":
            assert work.pictures == TINY["steps"] * TINY["batch_size"]
    left = plan(jobs, 1e12)
    assert left[["stages", "pictures", "macs", "hours", "disk"]].to_numpy().sum() == 0
    assert past_speed(jobs) > 0
    more = plan([*jobs, job("03_transfer", **TINY, rows="dense ours wanda")], 1e12)
    assert more["stages"].tolist() == [0, 0, 1], "one row is new"


def test_hours_follow_from_macs_and_speed(runs):
    """Of the paper's grid, and the README shows what this plan says."""
    grid = load_grid(NOTEBOOKS / "grids" / "paper.yaml")
    printed = describe_plan(plan(grid, 400 * step_macs(reference(grid))))
    readme = (NOTEBOOKS.parent / "README.md").read_text()
    assert printed.replace(str(runs), "runs") in readme
    slow, fast = plan(grid, 1e12), plan(grid, 2e12)
    assert slow["hours"].sum() == pytest.approx(2 * fast["hours"].sum())
    assert slow["macs"].tolist() == fast["macs"].tolist()
    first = slow.iloc[0]
    # two seeds of Algorithm 1: 22 rounds of 5000 steps of 28 pictures
    assert (first["stages"], first["pictures"]) == (2, 2 * 22 * 5000 * 28)
    pruned_again = slow[slow["notebook"] == "03_transfer"].iloc[0]
    # it finds the mask of 02, and pays the L_KD budget of random_layerwise_kd
    assert pruned_again["pictures"] == 22 * 5000 * 28 + 7 * 50_000 * 28


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_memory_is_what_a_real_step_keeps(framework):
    """The head's loss comes on top, which shapes alone cannot run; it is a small part."""
    lab = Lab(checkpoint="random", device="cpu")
    (work,) = [
        w for w in work_of(job("03_transfer", framework=framework, rows="dense", batch_size=4))
    ]
    model = build(framework, lab.load(), "mini", **framework_options(lab, work.recipe))
    batch = next(lab.batches(4, 0)(0))
    kept = (
        step_costs(
            model, lambda b: model.loss(model(b["images"]), b), batch, {"none": []}, 1, "cpu"
        )["memory_MB"].iloc[0]
        * 1e6
    )
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = 20 if framework == "han" else 16  # with its teacher
    assert work.memory - held * weights == pytest.approx(kept, rel=0.35), framework


def test_pruning_costs_what_a_real_step_multiplies(monkeypatch):
    lab = Lab(checkpoint="random", device="cpu")
    config = PruneConfig(density=0.25, p=0.5, steps=1, batch_size=2)
    (work,) = [w for w in work_of(job("03_transfer", rows="ours", prune_batch_size=2, prune_steps=1,
               density=0.25, p=0.5)) if w.kind == "prune"]  # fmt: skip
    batch = next(lab.batches(2, 0)(0))
    monkeypatch.setattr(working, "REGIONS", sum(len(m) for m in batch["masks"]))
    backbone, teacher = lab.load(), lab.load().requires_grad_(False)
    student = Student(backbone)
    objective = distillation(student, teacher, config)
    teacher.text(batch["names"])  # once for all, so not a part of the step
    with FlopCounterMode(display=False) as counted:
        objective(student, batch)["loss"].backward()
    macs = counted.get_total_flops() / 2
    assert work.macs / config.rounds == pytest.approx(macs, rel=0.05)


def test_a_given_or_a_measured_speed(runs, tmp_path, capsys):
    (tmp_path / "grid.yaml").write_text(
        f"runs:\n  - notebook: ../{'../' * len(tmp_path.parts)}{NOTEBOOKS}/03_transfer\n"
        "    parameters: {rows: dense ours, seed: [0, 1]}\n"
    )
    grid = str(tmp_path / "grid.yaml")
    for given in ([], ["--images-per-second", "400", "--out", str(tmp_path / "plan.csv")]):
        with pytest.raises(SystemExit) as end:
            main(["plan", grid, *given])
        said = capsys.readouterr().out
        assert end.value.code == 0
        for word in ("hours of one device", "peak GB", "disk GB", "assumptions:", "GMACs a"):
            assert word in said
        assert ("400 training pictures" in said and "as given" in said) == bool(given)
        assert ("measured here (cpu" in said) != bool(given)
    assert "hours" in (tmp_path / "plan.csv").read_text()
    with pytest.raises(SystemExit) as end:
        main(["plan", grid, "--images-per-second", "-1"])
    assert end.value.code == 2


def test_notebooks_share_their_stages():
    """What 06 shows is what 03 has trained, and the first mask of 02 is theirs, too."""
    stages = {
        name: [work.folder for work in work_of(job(name))]
        for name in ("02_prune_imp", "03_transfer", "06_qualitative")
    }
    assert len(stages["06_qualitative"]) > 3
    assert {*stages["06_qualitative"]} <= {*stages["03_transfer"]}
    assert stages["02_prune_imp"][0] in stages["03_transfer"]
    assert stages["02_prune_imp"][1] not in stages["03_transfer"], "of another seed"


def test_the_papers_grid_pays_what_two_tables_share_once(runs):
    """Full fine-tuning of 04 is the dense and the pruned row of 03, at the same rates."""
    jobs = load_grid(NOTEBOOKS / "grids" / "paper.yaml")
    works = [work for one in jobs for work in work_of(one) if work.recipe]
    assert len({(w.recipe.lr, w.recipe.backbone_lr, w.recipe.batch_size) for w in works}) == 1
    rows = {w.folder for one in jobs if one.notebook.stem == "03_transfer" for w in work_of(one)}
    full = {w.folder for one in jobs if one.notebook.stem.startswith("04") for w in work_of(one)
            if w.recipe and w.recipe.select == "none"}  # fmt: skip
    assert len(full) == 6 and full <= rows


def test_devices_share_a_batch_in_the_plan_as_in_the_run(runs):
    one, four = (work_of(job("03_transfer", rows="dense", devices=n, batch_size=16))[0]
                 for n in (1, 4))  # fmt: skip
    assert one.folder == four.folder and one.macs == four.macs
    least = work_of(job("03_transfer", rows="dense", batch_size=4))[0]
    assert four.memory == least.memory < one.memory
    with pytest.raises(LabError, match="batch_size=28 cannot be shared by devices=8; use .*=7"):
        work_of(job("03_transfer", rows="dense", devices=8, batch_size=28))


def test_a_small_device_is_measured_with_as_many_pictures_as_fit():
    def steps(pictures, room):
        if pictures > room:
            raise torch.OutOfMemoryError
        return 10.0 * pictures

    assert _fitting(partial(steps, room=64), 28) == (280.0, 28)
    assert _fitting(partial(steps, room=8), 28) == (70.0, 7)
    assert _fitting(partial(steps, room=2), 28) == (20.0, 2)
    with pytest.raises(LabError, match="not even two pictures .* give --images-per-second"):
        _fitting(partial(steps, room=1), 28)


def test_numbers_of_parameters_stay_whole_beside_runs_that_lack_them(runs):
    table = plan([job("03_transfer", seed=1), job("02_prune_imp")], 1e12)
    assert " 1.0" not in describe_plan(table).splitlines()[1]


def test_what_cannot_be_planned_says_so(runs):
    with pytest.raises(LabError, match="no notebook of this grid trains anything"):
        reference([job("01_esd_and_alpha")])
    pruning = [job("02_prune_imp")]
    assert reference(pruning).recipe.framework == "deeplabv3"
    assert plan(pruning, 1e12)["hours"].iloc[0] > 0
    with pytest.raises(LabError, match="unknown framework"):
        work_of(job("03_transfer", framework="deeplab"))
    assert work_of(job("05_paper_tables")) == []


def test_measured_speed_scales_to_macs():
    work = reference([job("03_transfer", **TINY)])
    speed, told = measured(work)
    assert speed > 0 and "64 px" in told
    assert step_macs(work) * 4 == pytest.approx(
        step_macs(replace(work, lab=replace(work.lab, size=128))), rel=0.05
    )
    assert torch.get_default_device().type == "cpu"
