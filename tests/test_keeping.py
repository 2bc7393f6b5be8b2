"""Masks in other people's training: pruned weights are exactly 0 after every step."""

import copy
import gc
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from open_clip.modified_resnet import ModifiedResNet
from torch import nn
from torch.nn.utils import prune

from opentrans_lab.errors import LabError
from opentrans_lab.masks import Mask, keeping, prunable
from opentrans_lab.masks.topk import count


def make_tower():
    torch.manual_seed(0)
    return ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=8)


@pytest.fixture
def tower():
    return make_tower()


@pytest.fixture
def mask(tower):
    return Mask.random_global(tower, 3000)


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), 0.1, **options)


def step(model, optimizer, gradient=1.0):
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
    "foreach": lambda p: torch.optim.Adam(p, 0.1, amsgrad=True, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1, momentum=0.9),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("gradient", [float("inf"), float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_bad_gradient_never_sticks_to_pruned_weights(tower, mask, make, gradient, dtype):
    tower.to(dtype, memory_format=torch.channels_last)
    optimizer = make(tower.parameters())
    mask.apply(tower)
    mask.keep(tower, optimizer)
    for bad in (gradient, 1.0, 1.0):
        step(tower, optimizer, bad)
        assert mask.verify(tower)


def test_autocast_with_a_scaler_whose_scale_overflows(tower, mask):
    optimizer, scaler = sgd(tower, momentum=0.9), torch.amp.GradScaler("cpu")
    mask.apply(tower)
    mask.keep(tower, optimizer)
    for factor in (1.0, 1e38, 1.0, 1.0):
        for _ in range(2):  # accumulated
            with torch.autocast("cpu", torch.bfloat16):
                loss = tower(torch.randn(2, 3, 64, 64)).square().sum()
            scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert mask.verify(tower)
        optimizer = sgd(tower, momentum=0.9)  # a fresh one for each phase
        optimizer.zero_grad()


def test_another_optimizer_and_groups_added_later(tower, mask):
    first, *others = tower.parameters()
    optimizer = torch.optim.AdamW([first, tower.conv2.weight], 0.1)
    mask.apply(tower)
    mask.keep(tower, optimizer)
    optimizer.add_param_group({"params": [p for p in others if p is not tower.conv2.weight]})
    step(tower, optimizer)
    assert mask.verify(tower)
    step(tower, sgd(tower), float("nan"))
    assert mask.verify(tower)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_the_model_is_held_as_well(tower, mask, copied):
    model = nn.ModuleDict({"backbone": tower})
    mask.apply(model)
    held = mask.keep(model, sgd(model))
    twin = copied(model)
    held.remove()
    step(twin, sgd(twin))
    step(model, sgd(model))
    assert mask.verify(twin) and not mask.verify(model)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_weights_in_between_keeps_the_mask_and_tells(tower, mask, assign):
    dense = copy.deepcopy(tower.state_dict())
    mask.apply(tower)
    pruned = copy.deepcopy(tower.state_dict())
    held = mask.keep(tower, sgd(tower))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tower.load_state_dict(pruned)
    with pytest.warns(UserWarning, match="load_state_dict brought weights"):
        tower.load_state_dict(copy.deepcopy(dense), assign=assign)
    assert mask.verify(tower)
    step(tower, sgd(tower))
    assert mask.verify(tower)
    held.remove()
    tower.load_state_dict(dense)
    assert not mask.verify(tower)


@pytest.mark.parametrize("wrap", [
    torch.compile, nn.DataParallel, lambda m: nn.ModuleDict({"module": torch.compile(m)}),
])  # fmt: skip
def test_wrapped_models(tower, mask, wrap, tmp_path):
    model = wrap(nn.ModuleDict({"visual": tower}))
    tower.layer1 = torch.compile(tower.layer1)
    assert mask.apply(model).prefix in ("visual.", "module.visual.")
    optimizer = sgd(model)
    mask.keep(model, optimizer)
    step(model, optimizer, float("nan"))
    assert mask.verify(model) and mask.verify(model.state_dict())
    mask.to_authors(model, tmp_path / "imp.pth")
    assert Mask.from_authors(tmp_path / "imp.pth") == mask


def test_another_mask_takes_the_place_of_the_first(tower):
    one, two = (Mask.random_global(tower, 3000, seed) for seed in (1, 2))
    optimizer = sgd(tower)
    one.keep(tower, optimizer)
    two.apply(tower)
    new = two.keep(tower, optimizer)
    step(tower, optimizer)
    assert two.verify(tower) and all(w[two[n]].all() for n, w in prunable(tower).items())
    new.remove()
    step(tower, optimizer)
    assert not two.verify(tower)


def test_a_model_that_is_gone_is_forgotten(mask):
    def held():
        gc.collect()
        return len(keeping._HELD)

    before, tower = held(), make_tower()
    mask.keep(tower, sgd(tower))
    assert held() == before + len(mask)
    del tower
    assert held() == before


def test_what_cannot_be_kept_is_refused(tower, mask):
    for model, optimizer, word in (
        (tower, object(), "torch.optim.Optimizer, not object"),
        (tower.state_dict(), sgd(tower), "the module that is trained"),
        ([tower], sgd(tower), "the module that is trained"),
    ):
        with pytest.raises(LabError, match=word):
            mask.keep(model, optimizer)


# --- counts and what cells print ------------------------------------------------------------------


@settings(deadline=None)
@given(total=some.integers(1, 10**8), share=some.floats(0, 1, exclude_min=True))
def test_counts_computed_from_shares(total, share):
    number = share * total
    for keep in (number, np.float64(number), torch.tensor(number, dtype=torch.float64)):
        if number > 1:
            assert count(keep, total) == round(number)
        else:
            with pytest.raises(LabError, match="is a share"):
                count(keep, total)
    with pytest.raises(LabError, match=f"keep={round(share * total)}$"):
        count(share, total)


def test_floats_keep_as_many_as_their_whole_numbers(tower):
    for make in (Mask.by_magnitude, Mask.random_global):
        assert make(tower, 3000.0) == make(tower, np.int64(3000)) == make(tower, 3000)
        assert make(tower, 2999.6).kept == 3000
        for keep in (True, "3000", float("nan"), None, [3000]):
            with pytest.raises(LabError, match="is no number of weights"):
                make(tower, keep)


def test_masks_do_not_depend_on_the_default_dtype(tower):
    def masks():
        ours = Mask.by_magnitude(tower, 3000)
        return ours, Mask.random_global(tower, 3000, 1), Mask.random_layerwise(ours, 1)

    expected = masks()
    torch.set_default_dtype(torch.float64)
    try:
        assert masks() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_cell_that_ends_with_a_mask_at_work_prints_a_line(tower, mask):
    model = nn.ModuleDict({"backbone": tower})
    for shown in (mask.apply(model), mask.find(model.state_dict()), mask.keep(model, sgd(model))):
        assert len(repr(shown)) < 100 and "\n" not in repr(shown)
    assert "under 'backbone.'" in repr(mask.apply(model))


@pytest.mark.parametrize("change", ["pruned by torch", "gone"])
def test_a_weight_that_is_no_parameter_any_more_is_told_once_and_let_go(tower, mask, change):
    mask.apply(tower)
    mask.keep(tower, sgd(tower))
    layer = tower.layer1[0].conv1
    if change == "gone":
        del layer.weight
    else:
        prune.identity(layer, "weight")
    other = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="weight of a Conv2d is no parameter.*mask.keep anew"):
        step(other, sgd(other))  # of somebody else, who is not stopped
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(other, sgd(other))
