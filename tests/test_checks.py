"""One check holds every parameter against its annotation: in Python and on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Annotated, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opentrans_lab.alpha.alphas import layer_alphas, layer_spectra, sensitivity
from opentrans_lab.checks import Part, Positive, Rate, Seed, Share, checked, choose
from opentrans_lab.cli import main
from opentrans_lab.costs import step_costs
from opentrans_lab.data import load_dataset
from opentrans_lab.errors import LabError
from opentrans_lab.experiments import Lab, MiniConfig, Recipe
from opentrans_lab.finetuning import freeze
from opentrans_lab.pruning import PruneConfig
from opentrans_lab.runs import run_grid
from opentrans_lab.train import TrainConfig

STATE = {
    "conv1.weight": torch.randn(30, 3, 3, 3),
    "attnpool.q_proj.weight": torch.randn(30, 30),
    "layer1.0.conv1.weight": torch.randn(30, 30, 1, 1),
}
NAN = math.nan


@pytest.mark.parametrize("seed", [-1, 2**63, 1.5, True, "0", None, NAN])
@pytest.mark.parametrize("config", [PruneConfig, Recipe, MiniConfig, partial(TrainConfig, 1)])
def test_a_seed_is_a_whole_number_that_generators_take(config, seed):
    with pytest.raises(LabError, match=f"seed={seed!r} must be"):
        config(seed=seed)
    assert config(seed=np.int64(3)).seed == 3


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (PruneConfig, {"lr": -1.0}), (PruneConfig, {"lr": NAN}), (PruneConfig, {"density": 0}),
        (PruneConfig, {"density": NAN}), (PruneConfig, {"p": "0.1"}), (PruneConfig, {"steps": 0}),
        (PruneConfig, {"steps": 10.0}), (PruneConfig, {"rewind": "False"}),
        (PruneConfig, {"mean": "three"}), (PruneConfig, {"dense_steps": -1}),
        (Recipe, {"lr": math.inf}), (Recipe, {"backbone_lr": -0.1}), (Recipe, {"warmup": NAN}),
        (Recipe, {"fraction": NAN}), (Recipe, {"batch_size": 1}), (Recipe, {"images": -1}),
        (Recipe, {"prefix": ["stem"]}), (Recipe, {"select": ["low_alpha"]}),
        (Lab, {"size": 0}), (Lab, {"size": -128}), (Lab, {"devices": 0}), (Lab, {"jitter": "no"}),
        (Lab, {"dataset": 3}), (MiniConfig, {"steps": 0}), (MiniConfig, {"crops": 1.5}),
        (TrainConfig, {"steps": 1, "weight_decay": NAN}), (TrainConfig, {"steps": 1, "lr": -1e-3}),
        (TrainConfig, {"steps": 1, "checkpoint_every": 0}),
        (TrainConfig, {"steps": 1, "precision": "fp16"}),
    ],
)  # fmt: skip
def test_impossible_values_are_refused_by_name_before_any_work(config, wrong):
    name, value = list(wrong.items())[-1]
    with pytest.raises(LabError, match=f"{name}=") as told:
        config(**wrong)
    assert repr(value) in str(told.value) and len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("config", [PruneConfig(), Recipe(), MiniConfig(), TrainConfig(1), Lab()])
def test_every_number_of_a_config_has_bounds(config):
    """NaN and less than nothing are never what somebody meant."""
    for field in fields(config):
        if type(getattr(config, field.name)) in (int, float):
            for value in (NAN, -1):
                with pytest.raises(LabError, match=field.name):
                    type(config)(**vars(config) | {field.name: value})


@checked
def taker(
    seed: Seed = 0,
    share: Share = 0.5,
    part: Part = 0.5,
    rate: Rate = 1.0,
    n: Positive | None = None,
    word: Literal["a", "b"] = "a",
    names: Sequence[str] = (),
    by: Mapping[str, Sequence[str]] | None = None,
    size: Annotated[int, "pixels"] = 1,
    other: nn.Module | None = None,
) -> tuple:
    return seed, share, part, rate, n


@given(
    seed=st.integers(0, 2**63 - 1),
    share=st.floats(0, 1),
    part=st.floats(0, 1, exclude_min=True, exclude_max=True),
    rate=st.floats(0, exclude_min=True, allow_infinity=False),
    n=st.none() | st.integers(1),
)
def test_whatever_is_within_bounds_arrives_unchanged(seed, share, part, rate, n):
    assert taker(seed, share, part, rate, n) == (seed, share, part, rate, n)
    assert taker(np.int64(seed), 1, np.float64(part)) == (seed, 1, part, 1.0, None)


@given(st.integers(max_value=-1) | st.integers(2**63) | st.floats() | st.text() | st.booleans())
def test_whatever_is_not_is_refused_in_a_sentence(value):
    with pytest.raises(LabError, match="seed="):
        taker(value)
    if isinstance(value, (str, bool)) or not 0 <= value <= 1:
        with pytest.raises(LabError, match="share="):
            taker(share=value)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"n": 0}, "n=0 must be 1 or more"),
        ({"word": "c"}, "unknown word='c'; use one of a, b"),
        ({"names": "conv1"}, r"names='conv1' must be a list of texts; write \['conv1'\]"),
        ({"names": 3}, "names=3 must be a list"),
        ({"by": {"low": "layer1"}}, r"by\['low'\]='layer1' must be a list"),
        ({"size": 1.0}, "size=1.0 must be a whole number"),
    ],
)
def test_lists_words_and_numbers_are_told_apart(wrong, sentence):
    with pytest.raises(LabError, match=sentence):
        taker(**wrong)
    assert taker(names=("a",), by={"low": ["a"], "none": []}, other=nn.ReLU())


@pytest.mark.parametrize("measure", [layer_alphas, layer_spectra, sensitivity])
def test_an_exclude_must_name_a_layer_or_all_below_a_name(measure):
    for wrong, hint in {"atnpool": "'attnpool'", "attnpool.qproj": "'attnpool.q_proj'",
                        "layer1.0.conv2": "'layer1.0.conv1'", "": "conv1, attnpool, layer1",
                        "attn": "valid names: conv1"}.items():  # fmt: skip
        with pytest.raises(LabError, match=f"exclude={wrong!r} is no layer.*{hint}"):
            measure(STATE, exclude=["conv1", wrong])
    with pytest.raises(LabError, match="must be a list"):
        measure(STATE, exclude="attnpool")


def test_an_exclude_leaves_out_what_it_names_and_no_more():
    def left(*names):
        return list(layer_alphas(STATE, exclude=names)["name"])

    assert left("attnpool", "conv1") == left("attnpool.", "conv1") == ["layer1.0.conv1"]
    assert left("layer1.0", "attnpool.q_proj") == ["conv1"]


def test_a_name_where_a_list_of_names_is_meant_is_refused_everywhere():
    model = nn.Sequential(nn.Conv2d(3, 3, 1))
    for work in (
        lambda: freeze(model, "layer1"),
        lambda: step_costs(model, lambda b: b, {}, {"low_alpha": "layer1"}),
        lambda: step_costs(model, lambda b: b, {}, {"none": []}, repeats=0),
        lambda: load_dataset("scenes", "val", size=-1),
        lambda: load_dataset("scenes", "val", limit="8"),
        lambda: run_grid([], workers=0),
        lambda: run_grid([], deadline=NAN),
    ):
        with pytest.raises(LabError, match="must be"):
            work()


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ("run n.ipynb -p seed 0 -p seed 1", "-p seed is there twice"),
        ("run n.ipynb -p seed 0 --parameter seed 0", "-p seed is there twice"),
        ("alpha mini --seed 0 --seed 1", "--seed is there twice"),
        ("evaluate m --batch-size 2 --batch_size=4", "--batch-size is there twice"),
        ("run n.ipynb --force --force", "--force is there twice"),
        ("alpha none.pt --seed -1", "seed=-1 must be"),
        ("alpha none.pt --bootstrap -5", "bootstrap=-5 must be 0 or more"),
        ("alpha mini --exclude conv1 --exclude atnpool", "did you mean 'attnpool'?"),
        ("evaluate none --batch-size 0", "batch_size=0 must be 1 or more"),
        ("evaluate none --window 30", "window=30 must be a multiple of 4"),
        ("mini-clip --steps 0", "steps=0 must be 1 or more"),
        ("plan none.yaml --images-per-second inf", "images_per_second=inf must be"),
        ("campaign --minutes -1", "minutes=-1.0 must be 0 or more"),
    ],
)
def test_the_command_line_refuses_the_same_in_one_line(args, sentence, capsys, runs, monkeypatch):
    monkeypatch.chdir(runs.parent)
    with pytest.raises(SystemExit) as ended:
        main(args.split())
    told = capsys.readouterr()
    assert ended.value.code == 2 and sentence in told.err and told.out == ""
    assert len(told.err.splitlines()) == 1 and not runs.exists()


def test_lists_where_a_word_or_texts_are_meant():
    with pytest.raises(LabError, match=r"exclude=\[1\] must hold texts only"):
        layer_alphas({"a.weight": torch.randn(30, 30)}, exclude=[1])
    with pytest.raises(LabError, match=r"unknown framework=\['han'\]"):
        choose("framework", ["han"], {"han": None})
