"""Algorithm 1 on a small tower: exact, nested, reproducible, blind to labels, and resumable."""

import pytest
import torch

from opentrans_lab import scenes
from opentrans_lab.backbone import MINI, Backbone, build_mini, frozen_copy, mini_tokenizer
from opentrans_lab.errors import LabError
from opentrans_lab.masks import Mask
from opentrans_lab.prune import PruneConfig, Student, distill, distillation, prune

TINY = {
    **MINI,
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
}
CONFIG = PruneConfig(density=0.5, p=0.2, steps=2, batch_size=3, lr=1e-3)


def backbone():
    torch.manual_seed(0)
    return Backbone(build_mini(TINY), mini_tokenizer(TINY), "tiny")


def batches(start, names=scenes.CLASSES):
    for step in range(start, 10**6):
        drawn = scenes.render(range(3 * step, 3 * step + 3), 64, objects=(1, 2), radius=(10, 16))
        yield {"images": drawn.images, "labels": drawn.labels, "masks": drawn.masks,
               "classes": drawn.classes, "names": names}  # fmt: skip


def test_rounds_follow_the_paper():
    config = PruneConfig()
    assert config.rounds == 22
    n = 23_473_152  # RN50's convolution weights without the first
    assert config.kept(n, 22) / n == pytest.approx(0.9**22, abs=1e-7)
    assert config.kept(n, 21) > 0.1 * n > config.kept(n, 22)
    with pytest.raises(LabError, match="density=1.5"):
        PruneConfig(density=1.5)


def test_counts_are_exact_masks_nested_and_the_stem_untouched(tmp_path):
    tower = backbone()
    mask, rounds = prune(tower, batches, CONFIG, tmp_path, "cpu")
    total = mask.total
    assert rounds["kept"].tolist() == [round(total * 0.8**k) for k in (1, 2, 3, 4)]
    masks = [Mask.load(tmp_path / f"round_0{k}" / "mask.safetensors") for k in (1, 2, 3, 4)]
    assert all(new.within(old) for old, new in zip(masks, masks[1:], strict=False))
    assert masks[-1] == mask and mask.verify(tower) and "conv1.weight" not in mask
    assert tower.visual.conv1.weight.all()
    assert rounds["loss"].gt(0).all()


def test_one_seed_one_mask(tmp_path):
    first, _ = prune(backbone(), batches, CONFIG, tmp_path / "a", "cpu")
    again, _ = prune(backbone(), batches, CONFIG, tmp_path / "b", "cpu")
    assert first == again


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_interrupted_anywhere_equals_uninterrupted(tmp_path, stop):
    whole = backbone()
    mask, _ = prune(whole, batches, CONFIG, tmp_path / "whole", "cpu")

    def cut(start):
        for step, batch in enumerate(batches(start), start):
            if step == stop:
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        prune(backbone(), cut, CONFIG, tmp_path / "cut", "cpu")
    resumed = backbone()
    again, rounds = prune(resumed, batches, CONFIG, tmp_path / "cut", "cpu")
    assert again == mask and len(rounds) == 4
    state = whole.visual.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in resumed.visual.state_dict().items())


def gradient(classes_of, names):
    torch.manual_seed(1)
    tower = backbone()
    student, teacher = Student(tower), frozen_copy(tower)
    batch = next(batches(0, names))
    batch["classes"] = [classes_of(c) for c in batch["classes"]]
    batch["labels"] = None  # the stage may not look
    loss = distillation(student, teacher, CONFIG)(student, batch)["loss"]
    loss.backward()
    return tower.visual.conv1.weight.grad


def test_class_ids_do_not_matter_but_names_do():
    names = scenes.CLASSES
    plain = gradient(lambda c: c, names)
    assert plain.abs().max() > 1e-3
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    renumbered = [None] * len(names)
    for old, new in enumerate(order.tolist()):
        renumbered[new] = names[old]
    torch.testing.assert_close(gradient(lambda c: order[c], tuple(renumbered)), plain)
    assert not torch.allclose(gradient(lambda c: c, tuple(renumbered)), plain, atol=1e-7)


def test_the_student_starts_where_clip_is():
    """One region that fills the picture: value and output maps of the pooled position."""
    tower = backbone()
    student = Student(tower).eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        pooled = tower(images)[-1].mean((2, 3))
        pool = tower.visual.attnpool
        want = torch.nn.functional.normalize(pool.c_proj(pool.v_proj(pooled)), dim=-1)
        got = student(images, [torch.ones(1, 64, 64, dtype=torch.bool)])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_distilling_a_control_holds_its_mask_and_lowers_the_loss(tmp_path):
    tower = backbone()
    teacher = frozen_copy(tower)
    mask = Mask.random_global(tower.visual, Mask.dense(tower.visual).total // 2)
    history = distill(tower, batches, CONFIG, 30, mask, device="cpu", teacher=teacher)
    assert mask.verify(tower)
    assert history["loss"].tail(5).mean() < history["loss"].head(3).mean()
