"""A fine-tuning that is killed and goes on ends bit for bit where it would have ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opentrans_lab.clip import load_backbone
from opentrans_lab.data import load_dataset
from opentrans_lab.finetuning import freeze
from opentrans_lab.heads import FRAMEWORKS, build
from opentrans_lab.masks import Mask
from opentrans_lab.pruning.teacher import Teacher
from opentrans_lab.train import TrainConfig, fit

STEPS = 7


def fine_tune(framework: str, out: Path, pause: float = 0.0) -> None:
    """Masked, with layers frozen on the way, on endless scenes; writes the weights at the end.

    Han et al. on a pool whose targets are looked up, and whose every picture comes again.
    """
    torch.manual_seed(0)
    teacher = Teacher(load_backbone("mini", device="cpu"), folder=out / "targets")
    options = {"han": {"teacher": teacher}, "fcclip": {"clip": "tuned"}}
    model = build(
        framework, load_backbone("mini", device="cpu"), "mini", **options.get(framework, {})
    )
    mask = Mask.by_magnitude(model.backbone.visual, 50_000)
    data = load_dataset("scenes", "train", size=64, limit=6 if framework == "han" else None)

    def batches(start: int):
        for batch in data.batches(2, seed=1, start=start):
            time.sleep(pause)
            yield batch

    def objective(net, batch):
        return model.loss(net(batch["images"]), batch)

    actions = {
        2: lambda m: freeze(m, ["layer2.0.conv2", "layer4.1.conv1"], norm=True),
        4: lambda m: freeze(m, ["stem"]),
    }
    config = TrainConfig(STEPS, 2, lr=1e-3, schedule="cosine", checkpoint_every=1, precision="fp32")
    fit(model, objective, batches, config, out / "checkpoints", mask, actions, device="cpu")
    assert mask.verify(model)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out / "done.safetensors")


def _step(folder: Path) -> int:
    """Of its last checkpoint."""
    found = (folder / "checkpoints").glob("step-*")
    return max((int(path.name.removeprefix("step-")) for path in found), default=0)


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_sigkill_and_resume_is_bit_identical(framework, tmp_path):
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    command = [sys.executable, __file__, framework]
    where = os.environ | {"OMP_NUM_THREADS": "1"}
    kills = 0
    for wanted in (1, 4):  # before and after layers are frozen
        process = subprocess.Popen([*command, str(killed), "0.3"], env=where)
        while process.poll() is None and _step(killed) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills == 2 and not (killed / "done.safetensors").exists()
    for folder in (killed, whole):
        subprocess.run([*command, str(folder), "0"], env=where, check=True, capture_output=True)
    if framework == "han":
        assert len(list(killed.rglob("targets/*/*/[!.]*"))) == 6
    a, b = (load_file(folder / "done.safetensors") for folder in (killed, whole))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


if __name__ == "__main__":
    fine_tune(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
