"""One call from a picture to labels, whatever the picture's form."""

import numpy as np
import pytest
import torch
from PIL import Image

import opentrans_lab
from opentrans_lab.clip import load_backbone
from opentrans_lab.data import scenes
from opentrans_lab.errors import LabError
from opentrans_lab.evaluation.segment import newest, read_picture, segment
from opentrans_lab.experiments import Lab, Recipe, segment_stage
from opentrans_lab.heads import build
from opentrans_lab.pruning import PruneConfig

NAMES = ["striped red star", "grass", "plain blue circle"]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build("deeplabv3", load_backbone("mini", device="cpu"), "mini")


@pytest.fixture
def rgb():
    image = scenes.render([7], 96).images[0]
    return (255 * image.permute(1, 2, 0)).round().to(torch.uint8).numpy()[:64]  # 64 x 96


def test_every_pixel_gets_one_of_the_names(model, rgb, tmp_path):
    Image.fromarray(rgb).save(tmp_path / "photo.png")
    done = opentrans_lab.segment(tmp_path / "photo.png", NAMES, model=model, device="cpu")
    assert done.labels.shape == (64, 96) and done.scores.shape == (3, 64, 96)
    assert torch.equal(done.scores.argmax(0), done.labels) and done.names == tuple(NAMES)
    assert done.overlay.size == (96, 64) and sum(done.shares.values()) == pytest.approx(1)
    assert len(done.figure.axes) == 2
    again = segment(done.image, NAMES[::-1], model=model, device="cpu")
    torch.testing.assert_close(again.scores.flip(0), done.scores, rtol=1e-4, atol=1e-4)


def test_of_several_names_the_best_counts(model, rgb):
    images = read_picture(Image.fromarray(rgb))[None]
    with torch.no_grad():
        alone = model.eval().scores(images, ["grass", "sand", "water"])
        both = model.scores(images, [("grass", "sand"), "water"])
    torch.testing.assert_close(both[:, 0], alone[:, :2].amax(1))
    torch.testing.assert_close(both[:, 1], alone[:, 2])
    done = segment(images[0], [("grass", "sand"), "water"], model=model, device="cpu")
    assert done.names == ("grass", "water")


def test_forms_of_a_picture(rgb, tmp_path):
    plain = read_picture(Image.fromarray(rgb))
    assert plain.shape == (3, 64, 96) and torch.equal(
        plain, torch.from_numpy(rgb).permute(2, 0, 1) / 255
    )
    grey = Image.fromarray(rgb).convert("L")
    assert torch.equal(read_picture(grey)[0], torch.from_numpy(np.array(grey)) / 255)
    assert torch.equal(*read_picture(grey)[:2])
    deep = np.array(grey).astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "deep.png")
    torch.testing.assert_close(read_picture(tmp_path / "deep.png"), read_picture(grey))
    clear = np.dstack([rgb, np.full(rgb.shape[:2], 255, np.uint8)])
    clear[:10, :, 3] = 0
    seen = read_picture(Image.fromarray(clear))
    assert torch.equal(seen[:, 10:], plain[:, 10:])
    assert (seen[:, :10] - 128 / 255).abs().max() < 0.01  # what is transparent is grey
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    Image.fromarray(rgb).save(tmp_path / "turned.png", exif=exif)
    torch.testing.assert_close(read_picture(tmp_path / "turned.png"), plain.rot90(-1, (1, 2)))


def test_small_pictures_are_enlarged_and_give_their_own_size(model, rgb):
    done = segment(Image.fromarray(rgb[:9, :20]), NAMES, model=model, device="cpu")
    assert done.labels.shape == (9, 20)


@pytest.mark.parametrize(
    ("names", "said"),
    [([], "at least one name"), ("grass", "must be a list"), (["grass", "grass"], "'grass' is"),
     (["sky", ()], "class 1 has no name"), (["Grass", " grass"], "'grass' is"),
     ([""], "empty name"), (["sky", 3], "got"), (None, "must be a list")],
)  # fmt: skip
def test_wrong_names_are_refused(model, rgb, names, said):
    with pytest.raises(LabError, match=said):
        segment(Image.fromarray(rgb), names, model=model, device="cpu")


def test_wrong_pictures_are_named(model, tmp_path):
    with pytest.raises(LabError, match="there is no picture .*none.jpg"):
        segment(tmp_path / "none.jpg", NAMES, model=model)
    (tmp_path / "cut.jpg").write_bytes(b"no picture")
    with pytest.raises(LabError, match="cut.jpg cannot be decoded"):
        segment(tmp_path / "cut.jpg", NAMES, model=model)
    for wrong in (255 * torch.rand(3, 40, 40), torch.full((3, 40, 40), torch.nan)):
        with pytest.raises(LabError, match="lies in .0, 1."):
            segment(wrong, NAMES, model=model)
    with pytest.raises(LabError, match="bytes, got .40, 40, 3. float64"):
        segment(np.zeros((40, 40, 3)), NAMES, model=model)
    with pytest.raises(LabError, match="32-bit floats"):
        segment(Image.fromarray(np.zeros((40, 40), np.float32)), NAMES, model=model)
    with pytest.raises(LabError, match="use one of deeplabv3, han, fcclip"):
        segment(torch.zeros(3, 40, 40), NAMES, framework="unet", model=model)
    with pytest.raises(LabError, match="divide bytes by 255"):
        segment(torch.zeros(3, 40, 40, dtype=torch.uint8), NAMES, model=model)


def test_the_newest_trained_model_is_found(runs, rgb):
    with pytest.raises(LabError, match="no trained model of 'deeplabv3'"):
        segment(Image.fromarray(rgb), NAMES, device="cpu")
    lab, recipe = Lab(size=64, device="cpu"), Recipe(steps=1, batch_size=2, eval_images=2)
    trained = segment_stage(lab, recipe, PruneConfig())
    assert newest("deeplabv3") == trained.folder
    done = segment(Image.fromarray(rgb), NAMES, device="cpu")
    own = trained.model(lab, recipe)
    same = segment(Image.fromarray(rgb), NAMES, model=own, size=64, device="cpu")
    torch.testing.assert_close(done.scores, same.scores)
    assert done.model == str(trained.folder)


def test_an_array_is_read_and_a_module_stays_as_it_was(model, rgb):
    torch.testing.assert_close(read_picture(rgb), read_picture(Image.fromarray(rgb)))
    faint = Image.fromarray(rgb).convert("L").convert("I")  # 32-bit integers of 8 bits' range
    torch.testing.assert_close(read_picture(faint), read_picture(Image.fromarray(rgb).convert("L")))
    model.train()
    model.aspp.eval()
    done = segment(rgb, (name for name in NAMES), model=model, device="cpu")
    assert model.training and model.backbone.training and not model.aspp.training
    assert not done.labels.is_inference() and done.names == tuple(NAMES)
