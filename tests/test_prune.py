"""Algorithm 1 on a small tower: exact, nested, reproducible, blind to labels, and resumable."""

import multiprocessing
import random
import shutil
import time
from dataclasses import replace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from opentrans_lab.clip.backbone import (
    MEAN,
    MINI,
    STD,
    Backbone,
    build_mini,
    frozen_copy,
    mini_tokenizer,
)
from opentrans_lab.data import scenes
from opentrans_lab.errors import LabError
from opentrans_lab.masks import Mask, prunable
from opentrans_lab.pruning.imp import (
    PruneConfig,
    Student,
    distill,
    distillation,
    prune,
    wanda_scores,
)

TINY = {
    **MINI,
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64},
}
CONFIG = PruneConfig(density=0.5, p=0.2, steps=2, batch_size=3, lr=1e-3)
KILLED = PruneConfig(density=0.3, p=0.11, steps=4, batch_size=2, lr=1e-3, checkpoint_every=1)


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


def test_what_a_kill_after_a_round_left_goes_when_pruning_goes_on(tmp_path):
    prune(backbone(), batches, CONFIG, tmp_path, "cpu")
    kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    for left in ("round_02/checkpoints/step-2/weights", "round_01/student.safetensors"):
        (tmp_path / left).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "round_04" / "student.safetensors", tmp_path / left)
    prune(backbone(), batches, CONFIG, tmp_path, "cpu")
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept


def worker(out: str, drawn: str) -> None:
    torch.set_num_threads(1)

    def watched(start):
        for batch in batches(start):
            with open(drawn, "ab") as file:
                file.write(b".")
            time.sleep(0.03)  # a fast machine would end before it is killed ten times
            yield batch

    tower = backbone()
    prune(tower, watched, KILLED, out, "cpu")
    torch.save(tower.visual.state_dict(), f"{out}/done.pt")


def test_killed_ten_times_equals_uninterrupted(tmp_path):
    """SIGKILL at random moments, within rounds and between them: real processes, real files."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opentrans_lab.pruning.imp", "opentrans_lab.data.scenes"])
    drawn = tmp_path / "drawn"  # a byte a batch

    def run(name: str, steps: int | None = None, seconds: float = 0) -> int:
        """Start, let it draw ``steps`` batches and work on a little, kill: the exit code."""
        drawn.write_bytes(b"")
        process = context.Process(target=worker, args=(str(tmp_path / name), str(drawn)))
        process.start()
        while steps is not None and drawn.stat().st_size < steps and process.is_alive():
            time.sleep(0.001)
        process.join(seconds if steps is not None else None)
        process.kill()
        process.join()
        return process.exitcode

    assert run("whole") == 0
    moments, rounds = random.Random(0), set()
    for _ in range(10):
        assert run("cut", moments.randint(1, 4), moments.uniform(0, 0.1)) == -9  # it was at work
        rounds.add(len(list((tmp_path / "cut").glob("round_*/history.csv"))))
    assert len(rounds) >= 3, f"all kills fell into few rounds: {rounds}"
    assert run("cut") == 0
    last = f"round_{KILLED.rounds:02d}/mask.safetensors"
    assert Mask.load(tmp_path / "whole" / last) == Mask.load(tmp_path / "cut" / last)
    states = [torch.load(tmp_path / n / "done.pt", weights_only=True) for n in ("whole", "cut")]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_a_folder_of_another_run_is_refused(tmp_path):
    prune(backbone(), batches, CONFIG, tmp_path, "cpu")
    with pytest.raises(LabError, match=r"holds a run with p=0.2, not 0.3"):
        prune(backbone(), batches, replace(CONFIG, p=0.3), tmp_path, "cpu")


def test_two_seeds_two_masks(tmp_path):
    def seeded(seed):
        def draw(start):
            yield from batches(1000 * seed + start)

        return prune(backbone(), draw, replace(CONFIG, seed=seed), tmp_path / str(seed), "cpu")[0]

    assert seeded(0) != seeded(1)


def test_the_dense_stage_comes_first_and_resumes(tmp_path):
    config = replace(CONFIG, dense_steps=3)
    whole = backbone()
    mask, rounds = prune(whole, batches, config, tmp_path / "whole", "cpu")
    assert len(rounds) == 4 and len(pd.read_csv(tmp_path / "whole/round_00/history.csv")) == 3
    assert mask != prune(backbone(), batches, CONFIG, tmp_path / "none", "cpu")[0]

    def cut(start):
        for step, batch in enumerate(batches(start), start):
            if step == 4:  # within round 1: the dense stage is on disk
                raise KeyboardInterrupt
            yield batch

    with pytest.raises(KeyboardInterrupt):
        prune(backbone(), cut, config, tmp_path / "cut", "cpu")
    resumed = backbone()
    assert prune(resumed, batches, config, tmp_path / "cut", "cpu")[0] == mask
    state = whole.visual.state_dict()
    assert all(torch.equal(v, state[k]) for k, v in resumed.visual.state_dict().items())


def test_rewinding_puts_the_survivors_back(tmp_path):
    tower, dense = backbone(), prunable(backbone().visual)
    mask, _ = prune(tower, batches, replace(CONFIG, rewind=True), tmp_path, "cpu")
    for name, weight in prunable(tower.visual).items():
        assert torch.equal(weight, dense[name] * mask[name])
    assert torch.equal(tower.visual.bn1.running_mean, backbone().visual.bn1.running_mean)
    later = backbone()
    config = replace(CONFIG, rewind=True, dense_steps=2)
    mask, _ = prune(later, batches, config, tmp_path / "later", "cpu")
    begin = load_file(tmp_path / "later" / "round_00" / "student.safetensors")
    for name, weight in prunable(later.visual).items():
        assert torch.equal(weight, begin[f"backbone.visual.{name}"] * mask[name])


def test_wanda_scores_are_weight_times_input_norm():
    tower = backbone()
    batch = next(batches(0))
    scores = wanda_scores(tower, iter([batch]), count=5)
    assert scores.keys() == prunable(tower.visual).keys()
    tower.eval()
    with torch.no_grad():
        first = tower.visual.act1(tower.visual.bn1(tower.visual.conv1(normal(batch["images"]))))
    norm = first.square().sum((0, 2, 3)).sqrt()
    want = tower.visual.conv2.weight.abs() * norm[:, None, None]
    torch.testing.assert_close(scores["conv2.weight"], want)
    assert not tower.visual.conv2._forward_pre_hooks


def normal(images):
    return (images - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def test_the_class_ablation_looks_at_labels_and_l_kd_does_not(tmp_path):
    shuffled = torch.randperm(len(scenes.CLASSES), generator=torch.Generator().manual_seed(0))
    order = [scenes.CLASSES[i] for i in shuffled.argsort()]
    for terms, moves in (("both", False), ("class", True)):
        config = replace(CONFIG, terms=terms)
        plain = gradient(lambda c: c, scenes.CLASSES, config)
        renumbered = gradient(lambda c: shuffled[c], tuple(order), config)  # ids, with their names
        torch.testing.assert_close(renumbered, plain)
        relabelled = gradient(lambda c: shuffled[c], scenes.CLASSES, config)
        assert not torch.allclose(relabelled, plain, atol=1e-7)
        without = gradient(lambda c: c, scenes.CLASSES, config, dense_teacher=False)
        assert torch.equal(without, plain) == moves  # labels alone teach the class loss
    with pytest.raises(LabError, match="terms='labels'"):
        PruneConfig(terms="labels")


def gradient(classes_of, names, config=CONFIG, dense_teacher=True):
    torch.manual_seed(1)
    tower = backbone()
    student, teacher = Student(tower), frozen_copy(tower)
    if not dense_teacher:
        teacher.visual.attnpool.c_proj.weight.data.neg_()
    batch = next(batches(0, names))
    batch["classes"] = [classes_of(c) for c in batch["classes"]]
    batch["labels"] = None  # the stage may not look
    loss = distillation(student, teacher, config)(student, batch)["loss"]
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
