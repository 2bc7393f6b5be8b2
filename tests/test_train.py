"""The one loop: it learns, resumes exactly, keeps masks, and says when it cannot go on."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from safetensors.torch import load_file
from torch import nn

from opentrans_lab.device import memory_format
from opentrans_lab.errors import LabError, OutOfTime
from opentrans_lab.finetuning import freeze
from opentrans_lab.masks import Mask
from opentrans_lab.train import TrainConfig, fit


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = ModifiedResNet((1, 1, 1, 1), 16, 4, image_size=32, width=8)
        self.head = nn.Sequential(nn.Dropout(0.1), nn.Linear(16, 2))

    def forward(self, images):
        return self.head(self.backbone(images))


def batches(start):
    step = start
    while True:
        generator = torch.Generator().manual_seed(step)
        target = torch.randint(0, 2, (4,), generator=generator)
        images = torch.rand(4, 3, 32, 32, generator=generator) + target[:, None, None, None]
        yield {"images": images, "target": target, "names": ("dark", "light")}
        step += 1


def objective(model, batch):
    return {"loss": F.cross_entropy(model(batch["images"]), batch["target"])}


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


CONFIG = TrainConfig(steps=12, batch_size=4, lr=1e-2, checkpoint_every=4, precision="fp32")


def train(out, at=None, mask=None, stop=None, config=CONFIG, pause=0.0):
    def cut(start):
        for step, batch in enumerate(batches(start), start):
            if step == stop:
                raise KeyboardInterrupt
            time.sleep(pause)
            yield batch

    model = Model()
    result = fit(model, objective, cut, config, out, mask, at, device="cpu")
    return model, result


def test_it_learns():
    config = TrainConfig(steps=60, batch_size=4, lr=1e-3, precision="fp32")
    _, result = train(None, config=config)
    losses = result.history["loss"]
    assert losses.tail(20).median() < 0.2 * losses.head(3).median()
    assert len(losses) == 60 and result.images_per_second > 0


@pytest.mark.parametrize("stop", [3, 5, 8, 11])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop):
    """With dropout (random state), BN, AdamW's moments, a mask and an action before the stop."""
    mask = Mask.random_global(Model().backbone, 2000)

    def freeze(model):
        model.backbone.layer1[0].conv1.weight.requires_grad_(False)

    whole, full = train(tmp_path / "whole", {2: freeze}, mask)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "cut", {2: freeze}, mask, stop=stop)
    resumed, rest = train(tmp_path / "cut", {2: freeze}, mask)
    assert rest.resumed_at == stop // 4 * 4
    assert equal(weights(whole), weights(resumed))
    assert full.history.equals(rest.history)
    assert mask.verify(resumed)
    assert [p.name for p in (tmp_path / "cut").iterdir()] == ["step-12"]


def test_killed_while_running_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL to a real process; a second process ends as if nothing had happened."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_train as t; "
        "from pathlib import Path; m, _ = t.train(Path(sys.argv[2]), pause=float(sys.argv[3])); "
        "import torch; print(sum(float(v.double().sum()) for v in m.state_dict().values()))"
    )
    command = [sys.executable, "-c", script, str(Path(__file__).parent), str(tmp_path / "killed")]
    process = subprocess.Popen(
        [*command, "0.2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not list((tmp_path / "killed").glob("step-*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = subprocess.run([*command, "0"], capture_output=True, text=True, check=True)
    whole, _ = train(tmp_path / "whole")
    want = sum(float(v.double().sum()) for v in whole.state_dict().values())
    assert float(again.stdout) == pytest.approx(want, rel=1e-12)


def test_a_finished_run_is_not_trained_again(tmp_path):
    first, _ = train(tmp_path)
    again, result = train(tmp_path)
    assert result.resumed_at == 12 and equal(weights(first), weights(again))
    assert len(json.loads((tmp_path / "step-12" / "history.json").read_text())) == 12


def test_groups_get_their_rates():
    config = TrainConfig(steps=1, lr=1e-2, backbone_lr=0.0, weight_decay=0.0, precision="fp32")
    model = Model()
    before = weights(model)
    fit(model, objective, batches, config, device="cpu")
    moved = {k for k, v in dict(model.named_parameters()).items() if not torch.equal(v, before[k])}
    assert moved == {"head.1.weight", "head.1.bias"}


def test_schedules():
    cosine = TrainConfig(steps=100, schedule="cosine", warmup=10)
    rates = [cosine.rate(s) for s in range(100)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert max(rates) == 1 and rates[-1] < 0.01
    assert {TrainConfig(steps=9).rate(s) for s in range(9)} == {1.0}
    with pytest.raises(LabError, match="'step'"):
        TrainConfig(steps=9, schedule="step").rate(0)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    def broken(model, batch):
        return {"loss": objective(model, batch)["loss"] * float("nan")}

    with pytest.raises(LabError, match="at step 0.*last good checkpoint: none"):
        fit(Model(), broken, batches, CONFIG, tmp_path, device="cpu")
    assert not list(tmp_path.glob("step-*"))

    def breaks(model, batch):
        breaks.calls += 1
        return {"loss": objective(model, batch)["loss"] * (float("nan") if breaks.calls > 6 else 1)}

    breaks.calls = 0
    with pytest.raises(LabError, match=f"at step 6.*last good checkpoint: {tmp_path / 'step-4'}"):
        fit(Model(), breaks, batches, CONFIG, tmp_path, device="cpu")
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-4"]


def test_losses_go_to_tensorboard_where_a_folder_is_named(tmp_path, monkeypatch):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    monkeypatch.setenv("OPENTRANS_TENSORBOARD", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "out", stop=10)  # the last two of these steps are made again
    history = train(tmp_path / "out")[1].history
    found = events.EventAccumulator(str(tmp_path / "train")).Reload()
    losses = {event.step: event.value for event in found.Scalars("loss")}
    assert losses == pytest.approx(dict(zip(history["step"], history["loss"], strict=True)))
    assert set(found.Tags()["scalars"]) == {"lr", "loss", "gradient"}


def test_bf16_is_close_to_fp32():
    losses = []
    for precision in ("fp32", "bf16"):
        config = TrainConfig(steps=3, batch_size=4, precision=precision)
        losses.append(fit(Model(), objective, batches, config, device="cpu").history["loss"])
    assert not losses[0].equals(losses[1])
    assert losses[0].sub(losses[1]).abs().max() < 0.1


def test_it_stops_at_the_deadline_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENTRANS_DEADLINE", "0")
    with pytest.raises(OutOfTime, match="step 1 of 12"):
        train(tmp_path / "cut")
    with pytest.raises(OutOfTime, match="step 2 of 12"):
        train(tmp_path / "cut")
    monkeypatch.delenv("OPENTRANS_DEADLINE")
    resumed, result = train(tmp_path / "cut")
    whole, _ = train(tmp_path / "whole")
    assert result.resumed_at == 2 and equal(weights(whole), weights(resumed))


class Exploding(torch.autograd.Function):
    """A finite loss whose gradient is not."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * float("inf")


@pytest.mark.parametrize("when", [7, 11])  # on a step with a checkpoint, and on the last
def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path, when):
    seen = iter(range(100))

    def wrong(model, batch):
        loss = objective(model, batch)["loss"]
        return {"loss": Exploding.apply(loss) if next(seen) == when else loss}

    with pytest.raises(LabError, match=f"the gradient is (nan|inf) at step {when}.*step-"):
        fit(Model(), wrong, batches, CONFIG, tmp_path, device="cpu")
    (left,) = tmp_path.glob("step-*")
    assert int(left.name.split("-")[1]) <= when
    assert all(v.isfinite().all() for v in load_file(left / "model.safetensors").values())


def test_what_is_frozen_on_the_way_has_no_moments_left(tmp_path):
    model = Model()
    layers = ["layer1.0.conv1", "layer2.0.conv2"]
    fit(model, objective, batches, CONFIG, tmp_path, None, {6: lambda m: freeze(m, layers)}, "cpu")
    (left,) = tmp_path.glob("step-*")
    states = torch.load(left / "optimizer.bin", weights_only=True)["state"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert len(states) == len(trainable) == sum(1 for _ in model.parameters()) - len(layers)


@pytest.mark.parametrize(("side", "best"), [(0, "channels_last"), (512, "contiguous_format")])
def test_large_pictures_lie_channels_first_on_a_cpu_without_avx512(side, best, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = Model()
    config = TrainConfig(steps=1, batch_size=4, precision="fp32")
    fit(model, objective, batches, config, device="cpu", side=side)
    weight = model.backbone.layer1[0].conv2.weight
    assert weight.is_contiguous(memory_format=getattr(torch, best))
    cuda = torch.device("cuda")
    assert memory_format(cuda, side) == memory_format(cuda, 0) == torch.channels_last
