"""`opentrans-lab evaluate`: a trained model on another split, data set or measure."""

import shutil

import numpy as np
import pytest
from PIL import Image

from opentrans_lab.errors import LabError
from opentrans_lab.evaluation import measure
from opentrans_lab.experiments import Lab, Recipe, segment_stage
from opentrans_lab.pruning import PruneConfig

CPU = dict(device="cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """``trained(framework)``: the stage of a model that two steps made."""
    patch = pytest.MonkeyPatch()
    patch.setenv("OPENTRANS_RUNS", str(tmp_path_factory.mktemp("runs")))
    lab, pruning = Lab(size=64, device="cpu"), PruneConfig(density=0.5, p=0.5, steps=1)

    def train(framework: str):
        recipe = Recipe(framework, steps=2, batch_size=2, eval_images=5)
        return segment_stage(lab, recipe, pruning)

    yield train
    patch.undo()


def test_it_finds_what_the_stage_found(trained, tmp_path):
    done = trained("deeplabv3")
    found = measure(done.folder, size=64, images=5, batch_size=2, **CPU)
    told, table = str(found), found.table
    assert f"{done.metrics['all']:.2f} %" in told and f"{done.metrics['unseen']:.2f} %" in told
    assert np.allclose(table["iou"], done.per_class["iou"], equal_nan=True)
    assert set(table["data"]) == {"mini lab scenes (val, 5 images)"}  # no path check
    assert not list((done.folder / "evaluations").rglob("*.safetensors"))


def test_another_data_set_with_a_broken_image(trained, tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind / "val").mkdir(parents=True)
    (tmp_path / "classes.csv").write_text("id,name\n0,sky\n1,road\n")
    for i in range(3):
        Image.fromarray(np.full((40, 50, 3), 60 * i, np.uint8)).save(
            tmp_path / f"images/val/{i}.png"
        )
        Image.fromarray(np.full((40, 50), i % 2, np.uint8)).save(tmp_path / f"labels/val/{i}.png")
    (tmp_path / "images/val/1.png").write_bytes(b"")
    where = dict(dataset="folder", root=tmp_path, **CPU)
    with pytest.raises(LabError, match="1.png cannot be decoded"):
        measure(trained("deeplabv3").folder, **where)
    told = str(measure(trained("deeplabv3").folder, on_error="skip", window=36, **where))
    assert "1 images were skipped" in told and "1.png cannot be decoded" in told
    assert "sky" in told and "road" not in told  # the only picture of road is broken
    assert "(val, 3 images); a path check: the mini CLIP" in told
    for mistake, words in (({}, "no panoptic quality"), ({"window": 36}, "leave --window out")):
        with pytest.raises(LabError, match=words):
            measure(trained("fcclip").folder, panoptic=True, **mistake, **where)


def test_a_model_where_nothing_can_be_written_is_measured(trained):
    """Only its progress is not kept, and a warning says so."""
    folder = trained("deeplabv3").folder
    shutil.rmtree(folder / "evaluations", ignore_errors=True)
    (folder / "evaluations").touch()
    with pytest.warns(UserWarning, match="progress of the evaluation, .* cannot be written"):
        assert "mIoU" in str(measure(folder, size=64, images=2, **CPU))
    (folder / "evaluations").unlink()


def test_panoptic_quality_of_a_mask_framework_only(trained):
    told = str(measure(trained("fcclip").folder, images=3, size=64, panoptic=True, **CPU))
    assert "PQ of things" in told and " tp " in told
    with pytest.raises(LabError, match="DeepLabV3 labels pixels"):
        measure(trained("deeplabv3").folder, images=3, size=64, panoptic=True, **CPU)


def test_a_folder_without_a_model_is_named(tmp_path):
    with pytest.raises(LabError, match="holds no trained model"):
        measure(tmp_path, **CPU)
