"""L_KD against a naive loop, and what it may not depend on."""

import pytest
import torch
import torch.nn.functional as F

from opentrans_lab.errors import LabError
from opentrans_lab.pruning import losses

IMAGE = torch.tensor([0, 0, 0, 1, 1, 2])


def unit(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive(v, c, t, s):
    plain = [((v[i] - c[i]) ** 2).sum() for i in range(6)]
    pairs = [
        (s**2 * t[i] @ t[j] - v[i] @ c[j]) ** 2
        for i in range(6)
        for j in range(6)
        if IMAGE[i] == IMAGE[j]
    ]
    return torch.stack(plain), torch.stack(pairs)


@pytest.mark.parametrize("terms", ["both", "plain", "text"])
@pytest.mark.parametrize("mean", ["joint", "two"])
def test_equals_the_double_loop(terms, mean):
    v, c, t = (unit(6, 8, seed=i) for i in range(3))
    plain, pairs = naive(v, c, t, 0.9)
    used = {"both": [plain, pairs], "plain": [plain], "text": [pairs]}[terms]
    want = torch.cat(used).mean() if mean == "joint" else sum(u.mean() for u in used)
    got = losses.kd_loss(v, c, t, IMAGE, scale=0.9, terms=terms, mean=mean)["loss"]
    torch.testing.assert_close(got, want)


def test_no_pair_leaves_its_image():
    v, c, t = (unit(6, 8, seed=i).requires_grad_() for i in range(3))
    losses.kd_loss(v, c, t, IMAGE, terms="text")["loss"].backward()
    alone = unit(6, 8, seed=0).requires_grad_()
    other = unit(6, 8, seed=1)
    other[3:] = unit(3, 8, seed=9)  # change images 1 and 2 only
    losses.kd_loss(alone, other, t.detach(), IMAGE, terms="text")["loss"].backward()
    torch.testing.assert_close(alone.grad[:3], v.grad[:3])
    assert not torch.allclose(alone.grad[3:], v.grad[3:])


def test_cap_keeps_regions_with_their_image():
    masks = [torch.zeros(n, 4, 4, dtype=torch.bool) for n in (5, 0, 7)]
    classes = [torch.arange(5), torch.arange(0), 100 + torch.arange(7)]
    same = losses.cap_regions(masks, classes, most=12)
    assert same[0] is masks
    _, kept = losses.cap_regions(masks, classes, most=6)
    assert sum(map(len, kept)) == 6 and len(kept) == 3 and len(kept[1]) == 0
    assert (kept[0] < 5).all() and (kept[2] >= 100).all()
    assert all(torch.equal(k, k.sort().values) for k in kept)


def test_pooling_is_the_mean_under_the_mask():
    features = torch.randn(2, 3, 4, 4)
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[0, :8, :8] = True  # exactly four cells
    mask[1, 0, 0] = True  # one pixel: its cell alone counts
    pooled = losses.pool_regions(features, [mask, mask[:0]])
    torch.testing.assert_close(pooled[0], features[0, :, :2, :2].mean((1, 2)))
    torch.testing.assert_close(pooled[1], features[0, :, 0, 0])
    assert pooled.shape == (2, 3)


def test_crops_show_the_region_and_grey():
    images = torch.zeros(1, 3, 32, 32)
    images[:, 0] = 1.0  # red everywhere
    mask = torch.zeros(2, 32, 32, dtype=torch.bool)
    mask[0, 8:16, 8:12] = True  # twice as tall as wide
    mask[1, :, :4] = True  # at the border: its square reaches over the edge
    crops = losses.crop_regions(images, [mask], 20)
    assert crops.shape == (2, 3, 20, 20)
    red, grey = torch.tensor([1.0, 0, 0]), torch.full((3,), losses.GREY)
    torch.testing.assert_close(crops[0, :, 10, 10], red)
    torch.testing.assert_close(crops[0, :, 10, 1], grey)
    torch.testing.assert_close(crops[1, :, 10, 0], grey)
    assert (crops[1, 0] > 0.99).any()


def test_unknown_terms_are_refused():
    v = unit(6, 8, seed=0)
    with pytest.raises(LabError, match="terms='class'"):
        losses.kd_loss(v, v, v, IMAGE, terms="class")
