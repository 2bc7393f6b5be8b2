"""What every framework must do, and DeepLabV3's own parts."""

import pytest
import torch
import torch.nn.functional as F

from opentrans_lab.clip import load_backbone
from opentrans_lab.data import scenes
from opentrans_lab.errors import LabError
from opentrans_lab.heads import FRAMEWORKS, build
from opentrans_lab.heads.deeplabv3 import DeepLabV3, set_output_stride
from opentrans_lab.masks import Mask

VOCABULARY = tuple(scenes.THINGS[:5]) + scenes.STUFF


def model_of(framework, **options):
    torch.manual_seed(0)
    return build(framework, load_backbone("mini", device="cpu"), "mini", **options)


@pytest.fixture(params=[*FRAMEWORKS, "han fpn", "fcclip fpn"])
def model(request):
    framework, *decoder = request.param.split()
    return model_of(framework, **({"pixel_decoder": decoder[0]} if decoder else {}))


def batch(n=2):
    drawn = scenes.render(range(n), names=range(5), seed=4)
    labels = torch.where(drawn.labels >= 192, drawn.labels - 192 + 5, drawn.labels)
    ids = [*range(5), *range(192, 200)]
    classes = [torch.tensor([ids.index(int(c)) for c in one]) for one in drawn.classes]
    return {"images": drawn.images, "labels": labels, "names": VOCABULARY,
            "masks": drawn.masks, "classes": classes}  # fmt: skip


def test_scores_take_any_vocabulary(model):
    images = batch()["images"]
    model.eval()
    with torch.no_grad():
        scores = model.scores(images, VOCABULARY)
        few = model.scores(images, VOCABULARY[:3])
        turned = model.scores(images, VOCABULARY[::-1])
    assert scores.shape[:2] == (2, 13) and few.shape[1] == 3
    torch.testing.assert_close(turned.flip(1), scores, rtol=1e-4, atol=1e-5)
    if isinstance(model, DeepLabV3):  # cosines; the others give probabilities over the vocabulary
        torch.testing.assert_close(few, scores[:, :3])


def test_it_learns_one_batch_and_keeps_the_mask(model):
    data = batch()
    mask = Mask.by_magnitude(model.backbone.visual, Mask.dense(model.backbone.visual).total // 2)
    assert len(mask.apply(model).tensors) == len(mask)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 2e-3)
    mask.keep(model, optimizer)
    losses = []
    for _ in range(15):
        losses.append(model.loss(model(data["images"]), data)["loss"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.6 * losses[0]
    assert mask.verify(model)


def test_ignored_pixels_do_not_count():
    """Where a whole half is ignored, what the model says there changes nothing."""
    data, model = batch(), model_of("deeplabv3").eval()
    outputs = model(data["images"])  # (B, D, 8, 8)
    other = outputs.clone()
    other[..., 5:] = outputs[..., 5:].flip(1)  # a column beyond what bilinear reads from the left
    half = data["labels"].clone()
    half[:, :, 64:] = scenes.IGNORE
    left = data | {"labels": half}
    assert torch.equal(model.loss(outputs, left)["loss"], model.loss(other, left)["loss"])
    assert not torch.equal(model.loss(outputs, data)["loss"], model.loss(other, data)["loss"])


def test_scores_of_odd_sizes_lie_where_the_pixels_are(model):
    """Cutting a padded picture's scores equals scoring; the far edge is not stretched."""
    model.eval()
    images = torch.rand(1, 3, 128, 171)
    with torch.no_grad():
        scores = model.scores(images, VOCABULARY)
        padded = model.scores(F.pad(images, (0, 21), value=0.5), VOCABULARY)  # 128 x 192
    wide = F.interpolate(padded, (128, 192), mode="bilinear")[..., :171]
    mine = F.interpolate(scores, (128, 171), mode="bilinear")
    inner = (wide - mine)[..., 8:-8].abs().mean() / wide.std()
    stretched = F.interpolate(padded[..., :10], (128, 171), mode="bilinear")
    wrong = (wide - stretched)[..., 8:-8].abs().mean() / wide.std()
    assert inner < 0.5 * wrong


def test_text_is_no_part_of_the_state(model):
    keys = model.state_dict()
    assert not any("text" in k or "token" in k or "teacher" in k for k in keys)
    assert {k for k in keys if k.startswith("backbone.")} == {
        f"backbone.visual.{k}" for k in model.backbone.visual.state_dict()
    }
    assert all(p.grad is None and not p.requires_grad
               for p in model.backbone.visual.attnpool.parameters())  # fmt: skip


def test_output_stride_changes_resolution_and_nothing_else():
    coarse, fine = model_of("deeplabv3", output_stride=32), model_of("deeplabv3", output_stride=16)
    images = batch()["images"]
    assert coarse(images).shape[-2:] == (4, 4) and fine(images).shape[-2:] == (8, 8)
    assert coarse.state_dict().keys() == fine.state_dict().keys()
    with torch.no_grad():  # the first three stages are the same
        for a, b in zip(
            coarse.eval().backbone(images)[:3], fine.eval().backbone(images)[:3], strict=True
        ):
            torch.testing.assert_close(a, b)
    with pytest.raises(LabError, match="output_stride=8"):
        set_output_stride(coarse.backbone.visual, 8)


def test_the_plus_decoder_is_finer_and_sees_the_early_map():
    """DeepLabV3+: embeddings at stride 4, gradients into both maps, the same scores' contract."""
    model, images = model_of("deeplabv3", decoder="plus"), batch()["images"]
    embeddings = model(images)
    assert embeddings.shape[-2:] == (32, 32)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2, 32, 32))
    plain = set(model_of("deeplabv3").state_dict())
    new = set(model.state_dict()) - plain
    assert not plain - set(model.state_dict()) and {k.split(".")[0] for k in new} == {
        "low", "refine"
    }  # fmt: skip
    model.loss(embeddings, batch())["loss"].backward()
    assert all(
        p.grad.abs().sum() > 0 for p in (*model.low.parameters(), *model.refine.parameters())
    )
    paper = build("deeplabv3", load_backbone("mini", device="cpu"), "paper", decoder="plus")
    assert paper.low[0].out_channels == 48 and paper.refine[0][0].in_channels == 256 + 48
    with pytest.raises(LabError, match="decoder='minus'"):
        model_of("deeplabv3", decoder="minus")


def test_dilation_reads_what_striding_reads():
    """A dilated block at the even cells of a map equals the plain block on those cells alone."""
    visual, dilated = (load_backbone("mini", device="cpu").visual for _ in range(2))
    set_output_stride(dilated, 16)
    fine = torch.randn(1, 768, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(
            dilated.layer4[1](fine)[..., ::2, ::2], visual.layer4[1](fine[..., ::2, ::2])
        )
        x = torch.randn(1, 384, 8, 8)
        torch.testing.assert_close(
            F.avg_pool2d(dilated.layer4[0].downsample(x), 2), visual.layer4[0].downsample(x)
        )


def test_pixel_embeddings_are_classified_by_cosine():
    model = model_of("deeplabv3").eval()
    with torch.no_grad():
        model.log_scale.fill_(0.0)
        embeddings = model(batch()["images"])
        scores = model.logits(embeddings, VOCABULARY)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2, 8, 8))
    text = model.backbone.text(VOCABULARY)
    torch.testing.assert_close(scores[1, 3, 2, 5], embeddings[1, :, 2, 5] @ text[3])


@pytest.mark.parametrize(
    ("names", "sentence"),
    [((), "at least one name"), ("grass", "list"), (("grass", ()), "class 1 has no name")],
)
def test_a_vocabulary_that_is_none_is_refused(model, names, sentence):
    with torch.no_grad(), pytest.raises(LabError, match=sentence):
        model.eval().scores(batch()["images"], names)


def test_unknown_words_are_refused():
    with pytest.raises(LabError, match="'unet'.*deeplabv3"):
        build("unet", load_backbone("mini", device="cpu"))
    with pytest.raises(LabError, match="preset='huge'"):
        build("deeplabv3", load_backbone("mini", device="cpu"), "huge")


def test_a_backbone_belongs_to_one_model():
    backbone = load_backbone("mini", device="cpu")
    build("deeplabv3", backbone)
    with pytest.raises(LabError, match="part of a model of 'deeplabv3' already"):
        build("fcclip", backbone)
