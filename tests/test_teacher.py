"""L_KD's targets: looked up as they would be computed, of nobody else, and whole after a kill."""

import multiprocessing
import os
import signal
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opentrans_lab.clip.backbone import MINI, Backbone, build_mini, mini_tokenizer
from opentrans_lab.data import load_dataset
from opentrans_lab.errors import LabError
from opentrans_lab.experiments.lab import Lab
from opentrans_lab.pruning import losses
from opentrans_lab.pruning.teacher import Teacher

SIZE = 64
ALL = 120  # pictures that processes fill a folder with
TINY = {
    **MINI,
    "embed_dim": 32,
    "vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": SIZE},
}


def clip(seed=0):
    torch.manual_seed(seed)
    return Backbone(build_mini(TINY), mini_tokenizer(TINY), "tiny").eval()


def drawn(limit=6, batch_size=3, steps=1, seed=0):
    data = load_dataset("scenes", "train", size=SIZE, limit=limit)
    return list(islice(data.batches(batch_size, seed=seed), steps))


def ask(teacher, batch, chosen=None):
    chosen = chosen or [torch.arange(len(m)) for m in batch["masks"]]
    return teacher(batch, [m[c] for m, c in zip(batch["masks"], chosen, strict=True)], chosen)


def on_the_spot(backbone, images, masks):
    with torch.no_grad():
        return backbone.embed(losses.crop_regions(images, masks, SIZE))


def files(folder):
    """What is whole there, by its place."""
    return {p.relative_to(folder): p for p in Path(folder).rglob("[!.]*") if p.is_file()}


@pytest.mark.parametrize("on_disk", [False, True])
def test_scenes_are_looked_up_as_they_would_be_computed(tmp_path, on_disk):
    folder = tmp_path if on_disk else None
    teacher = Teacher(clip(), folder=folder)
    for batch in drawn(steps=4):
        want = on_the_spot(clip(), batch["images"], batch["masks"])
        torch.testing.assert_close(ask(teacher, batch), want, rtol=0, atol=1e-5)
    some = [torch.arange(len(m) - 1, -1, -2) for m in batch["masks"]]  # others, in another order
    masks = [m[c] for m, c in zip(batch["masks"], some, strict=True)]
    want = on_the_spot(clip(), batch["images"], masks)
    torch.testing.assert_close(ask(teacher, batch, some), want, rtol=0, atol=1e-5)
    assert len(files(tmp_path)) == (6 if on_disk else 0)


def test_what_is_found_does_not_depend_on_who_asked_first(tmp_path):
    one, other = drawn(batch_size=6), drawn(batch_size=2, steps=3, seed=1)
    alone, shared = Teacher(clip()), Teacher(clip(), folder=tmp_path)
    for batch in other:
        ask(shared, batch)
    again = Teacher(clip(), folder=tmp_path)  # what another process would do
    assert torch.equal(ask(alone, one[0]), ask(again, one[0]))


@pytest.fixture
def folder(tmp_path):
    """Two pictures as large as training shows them, with three classes in blocks, one a pixel."""
    random = np.random.default_rng(0)
    for kind in ("images", "labels"):
        (tmp_path / kind / "train").mkdir(parents=True)
    for i in range(2):
        Image.fromarray(random.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(
            tmp_path / "images" / "train" / f"{i}.png"
        )
        label = np.zeros((SIZE, SIZE), np.uint8)
        label[10:40, 5 + 20 * i : 30] = 1
        label[50, 50] = 2
        Image.fromarray(label).save(tmp_path / "labels" / "train" / f"{i}.png")
    (tmp_path / "classes.csv").write_text("id,name\n0,grass\n1,cow\n2,bee\n")
    return tmp_path


def views(folder, jitter=True, steps=8):
    data = load_dataset("folder", "train", folder, size=SIZE, jitter=jitter)
    return list(islice(data.batches(2, seed=3, device="cpu"), steps))


def plain(folder, name):
    image, label = (
        torch.from_numpy(np.array(Image.open(folder / kind / "train" / name)))
        for kind in ("images", "labels")
    )
    return image.permute(2, 0, 1)[None].float() / 255, label


def test_of_an_augmented_picture_the_target_is_that_of_the_picture_as_it_is(folder):
    teacher, fresh, differ = Teacher(clip()), Teacher(clip(), "fresh"), 0
    for batch in views(folder):
        got, shown = ask(teacher, batch).split([*map(len, batch["masks"])]), ask(fresh, batch)
        for row, name in enumerate(batch["files"]):
            image, label = plain(folder, name)
            masks = label == batch["classes"][row][:, None, None]
            want = on_the_spot(clip(), image, [masks])
            torch.testing.assert_close(got[row], want, rtol=0, atol=1e-5)
        want = on_the_spot(clip(), batch["images"], batch["masks"])
        torch.testing.assert_close(shown, want, rtol=0, atol=1e-5)
        differ += not torch.allclose(torch.cat(got), shown, atol=1e-3)
    assert differ > 4


def test_a_region_that_the_whole_picture_is_too_small_for_is_taught_as_it_is_shown(folder):
    for i in range(2):  # a picture twice as large, in which the bee's pixel is not picked
        for kind, how in (("images", Image.BICUBIC), ("labels", Image.NEAREST)):
            path = folder / kind / "train" / f"{i}.png"
            Image.open(path).resize((2 * SIZE, 2 * SIZE), how).save(path)
        label = np.array(Image.open(path))
        label[label == 2] = 0
        label[80, 80] = 2
        Image.fromarray(label).save(path)
    teacher, seen = Teacher(clip()), 0
    for batch in views(folder, steps=20):
        for row, classes in enumerate(batch["classes"]):
            if (bee := (classes == 2).nonzero().flatten()).numel():
                chosen = [bee if i == row else bee[:0] for i in range(2)]
                masks = [m[c] for m, c in zip(batch["masks"], chosen, strict=True)]
                want = on_the_spot(clip(), batch["images"], masks)
                torch.testing.assert_close(ask(teacher, batch, chosen), want, rtol=0, atol=1e-5)
                seen += 1
    assert seen, "no view showed it"


def test_another_teacher_picture_or_crop_is_never_found(folder, tmp_path, monkeypatch):
    where = tmp_path / "targets"

    def fill(seed=0):
        teacher = Teacher(clip(seed), folder=where)
        for batch in views(folder, jitter=False):
            got = ask(teacher, batch)
        return got, len(files(where))

    first, count = fill()
    assert count == 2 and fill()[1] == 2
    other, count = fill(seed=1)
    assert count == 4 and not torch.allclose(first, other, atol=1e-3)
    monkeypatch.setattr(losses, "ROOM", 1.5)
    wider, count = fill()
    assert count == 6 and not torch.allclose(first, wider, atol=1e-3)
    monkeypatch.undo()
    for kind, value in (("images", (9, 9, 9)), ("labels", 2)):
        path = folder / kind / "train" / "0.png"
        picture = Image.open(path)
        picture.putpixel((2, 2), value)
        picture.save(path)
        assert fill()[1] == count + 1
        count += 1


def test_it_keeps_within_its_bounds_and_says_them_first(tmp_path, capsys):
    small = Teacher(clip(), folder=tmp_path, memory=600, disk=1200)  # bytes: about two pictures
    for batch in drawn(limit=8, steps=6):
        want = on_the_spot(clip(), batch["images"], batch["masks"])
        torch.testing.assert_close(ask(small, batch), want, rtol=0, atol=1e-5)
    kept = [load_file(path) for path in files(tmp_path).values()]
    assert 0 < sum(t.nbytes for entry in kept for t in entry.values()) <= 1200
    assert sum(t.nbytes for _, t in small._held.values()) <= 600
    assert "targets of 8 pictures" in capsys.readouterr().out
    with pytest.raises(LabError, match="unknown targets='warm'; use one of cached, fresh"):
        Teacher(clip(), "warm")


def work(folder: str, seed: int) -> None:
    torch.set_num_threads(1)
    teacher = Teacher(clip(), folder=folder)
    for batch in drawn(limit=ALL, batch_size=4, steps=ALL // 4, seed=seed):
        ask(teacher, batch)


@pytest.fixture
def processes():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["opentrans_lab.pruning.teacher", "opentrans_lab.data"])

    def start(*seeds, folder):
        found = [context.Process(target=work, args=(str(folder), seed)) for seed in seeds]
        for process in found:
            process.start()
        return found

    return start


def test_kills_lose_nothing_whole_and_leave_nothing_half_written(tmp_path, processes):
    known = {}
    for wanted in (10, 30, 60):
        (process,) = processes(0, folder=tmp_path)
        while len(files(tmp_path)) < wanted and process.is_alive():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        there = {name: path.read_bytes() for name, path in files(tmp_path).items()}
        assert len(there) >= wanted and known.items() <= there.items()
        known = there
        assert all(map(load_file, files(tmp_path).values()))
    batches = drawn(limit=ALL, batch_size=4, steps=ALL // 4)
    teacher, alone = Teacher(clip(), folder=tmp_path), Teacher(clip())
    next(tmp_path.glob("*/*")).joinpath(".left-by-a-kill").write_bytes(b"half")
    assert all(torch.equal(ask(teacher, batch), ask(alone, batch)) for batch in batches)
    assert len(files(tmp_path)) == ALL and not list(tmp_path.rglob(".*"))


def test_a_stump_is_not_read(tmp_path):
    (batch,) = drawn()
    want = ask(Teacher(clip(), folder=tmp_path), batch)
    for path in files(tmp_path).values():
        path.write_bytes(path.read_bytes()[:-9])
    assert torch.equal(ask(Teacher(clip(), folder=tmp_path), batch), want)
    assert torch.equal(ask(Teacher(clip(), folder=tmp_path), batch), want)
    assert all(map(load_file, files(tmp_path).values()))


def test_two_processes_fill_one_folder(tmp_path, processes):
    both = processes(0, 1, folder=tmp_path)
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    teacher = Teacher(clip(), folder=tmp_path)
    for batch in drawn(limit=ALL, batch_size=4, steps=4):
        want = on_the_spot(clip(), batch["images"], batch["masks"])
        torch.testing.assert_close(ask(teacher, batch), want, rtol=0, atol=1e-5)
    assert len(files(tmp_path)) == ALL


def test_a_lab_without_a_pool_is_the_lab_that_old_results_are_of(folder):
    old = {"backbone", "checkpoint", "dataset", "data_root", "size"}
    assert Lab(pool=0, targets="fresh").params.keys() == Lab(pool=0).params.keys() == old
    assert Lab().params.keys() == old | {"pool"}
    lab = Lab(dataset="folder", data_root=str(folder), targets="fresh")
    assert lab.params.keys() == old | {"data files"}
    assert replace(lab, targets="cached").params.keys() == old | {"data files", "targets"}
    with pytest.raises(LabError, match="pool=-1"):
        Lab(pool=-1)
