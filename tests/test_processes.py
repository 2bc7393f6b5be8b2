"""Two processes that share a batch train as one process with all of it does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn

from opentrans_lab.clip import frozen_copy, load_backbone
from opentrans_lab.data import load_dataset
from opentrans_lab.evaluation.evaluate import _digest
from opentrans_lab.experiments import Recipe
from opentrans_lab.experiments import recipe as tuning
from opentrans_lab.finetuning import freeze, hold_norms
from opentrans_lab.heads import FRAMEWORKS, build
from opentrans_lab.pruning import cap_regions
from opentrans_lab.pruning.imp import PruneConfig, Student, distillation
from opentrans_lab.train import TrainConfig, fit
from opentrans_lab.train.processes import Chance, picture_seeds, shared_mean

STEPS = 5


def train(what: str, out: Path, norms: str = "held") -> None:
    """Five steps of four pictures; writes losses, the last checkpoint and a digest a process."""
    torch.manual_seed(0)
    data = load_dataset("scenes", "train", size=64)

    backbone, dense = (load_backbone("mini", device="cpu") for _ in range(2))
    if what == "distil":
        model = Student(backbone)
        objective = distillation(model, frozen_copy(dense), PruneConfig())
    else:
        options = {"han": {"teacher": dense}, "fcclip": {"clip": "tuned"}}
        model = build(what, backbone, "mini", **options.get(what, {}))

        def objective(net, batch):
            return model.loss(net(batch["images"]), batch)

    if hasattr(model, "criterion"):  # which points are the least sure hangs on the last digit
        model.criterion.preset = replace(model.criterion.preset, importance=0.0)
    if norms == "held":
        hold_norms(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    config = TrainConfig(STEPS, 4, lr=1e-3, precision="fp32")
    batches = partial(data.batches, 4, 1)
    at = {2: lambda m: freeze(m, ["stem", "layer2.0.conv2"])}  # nobody waits for its gradients
    if os.environ.get("RANK") == "1":
        Accelerator.save_state = _late(Accelerator.save_state)
    done = fit(model, objective, batches, config, out / "checkpoints", at=at, device="cpu")
    rank = int(os.environ.get("RANK", 0))
    (out / f"model-{rank}").write_text(_digest(model))
    if rank == 0:
        (out / "losses.json").write_text(json.dumps(done.history.to_dict("list")))


def choose(out: Path) -> None:
    """Every process would freeze other layers, drawn with its own seed."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    model = build("deeplabv3", load_backbone("mini", device="cpu"), "mini")
    tuning._freeze_by_alpha(Recipe(select="random", seed=rank), out, 0, model)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    (out / f"frozen-by-{rank}.json").write_text(json.dumps(frozen))
    dist.destroy_process_group()


def _late(save):
    """A checkpoint is whole when the slowest process has written its part."""

    def slow(*args):
        time.sleep(1)
        return save(*args)

    return slow


LAUNCHERS = {"one": [], "two": "-m torch.distributed.run --standalone --nproc_per_node=2".split()}


def _run(launcher: str, what: str, out: Path, *more: str) -> None:
    out.mkdir()
    command = [sys.executable, *LAUNCHERS[launcher], __file__, what, str(out), *more]
    where = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=where)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("what", ["distil", *FRAMEWORKS])
def test_two_processes_train_as_one_with_the_doubled_batch(what, tmp_path):
    """Batch norm on its running statistics, no dropout; points and capped regions are seeded."""
    found = {}
    for name, launcher in LAUNCHERS.items():
        out = tmp_path / name
        _run(name, what, out)
        found[name] = json.loads((out / "losses.json").read_text())
        assert [p.name for p in (out / "checkpoints").iterdir()] == [f"step-{STEPS}"]
        parts = (out / "checkpoints" / f"step-{STEPS}").glob("random_states_*")
        assert len(list(parts)) == (2 if launcher else 1)
    assert found["one"].keys() == found["two"].keys() and "loss" in found["one"]
    for term, values in found["one"].items():
        assert len(values) == STEPS
        assert found["two"][term] == pytest.approx(values, abs=1e-4, rel=1e-4), term
    assert len(set(found["one"]["loss"])) == STEPS


def test_all_processes_end_with_one_model_though_each_normalised_its_own_pictures(tmp_path):
    """Else the shares of an evaluation would be of different models."""
    _run("two", "distil", tmp_path / "two", "trained")
    first, second = (tmp_path / "two" / f"model-{rank}" for rank in range(2))
    assert first.read_text() == second.read_text()


def test_one_process_decides_what_all_freeze(tmp_path):
    """Else they would wait for each other's gradients."""
    _run("two", "choose", tmp_path / "two")
    first, second = (
        json.loads((tmp_path / "two" / f"frozen-by-{rank}.json").read_text()) for rank in range(2)
    )
    assert first == second and first


def test_a_picture_draws_the_same_numbers_whoever_its_neighbours_are():
    seeds = picture_seeds(3, 7, 4)
    assert len(set(seeds)) == 4 and seeds == picture_seeds(3, 7, 4) != picture_seeds(3, 8, 4)
    cpu = torch.device("cpu")
    whole = Chance(seeds, cpu)
    first, second = whole.rand([2, 0, 3, 1], 5), whole.rand([1, 1, 1, 1])
    half = Chance(seeds[::2], cpu)
    assert torch.equal(half.rand([2, 3], 5), torch.cat([first[:2], first[2:5]]))
    assert torch.equal(half.rand([1, 1]), second[::2])
    torch.manual_seed(0)
    free = Chance(None, cpu).rand([2, 4], 5)
    torch.manual_seed(0)
    assert torch.equal(free, torch.rand(6, 5))


def test_the_cap_leaves_a_random_subset_of_the_pictures_own():
    masks = [torch.rand(n, 4, 4) < 0.5 for n in (3, 0, 5, 2)]
    classes = [torch.arange(len(m)) for m in masks]
    kept, names = cap_regions(masks, classes, 6, Chance(picture_seeds(0, 0, 4), masks[0].device))
    assert sum(map(len, names)) == 6 and [len(m) for m in kept] == [len(c) for c in names]
    for mask, name, before in zip(kept, names, masks, strict=True):
        assert torch.equal(mask, before[name])


def test_a_mean_of_nothing_is_nothing_and_can_be_differentiated():
    nothing = torch.zeros(0, requires_grad=True)
    mean = shared_mean(nothing * 2)
    mean.backward()
    assert mean == 0
    values, weights = torch.tensor([1.0, 5.0]), torch.tensor([3.0, 1.0])
    assert shared_mean(values, weights) == pytest.approx(2.0)
    columns = torch.stack([values, 2 * values], 1)
    assert shared_mean(columns, weights[:, None].expand(2, 2)).tolist() == pytest.approx([2.0, 4.0])


if __name__ == "__main__":
    what, out, *more = sys.argv[1:]
    choose(Path(out)) if what == "choose" else train(what, Path(out), *more)
