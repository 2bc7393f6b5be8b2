"""Notebook 04's tables: what a selection of layers does to accuracy, to cost, and with the mask."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pandas as pd

from ..costs import savings, step_costs, training_cost
from ..heads import build
from ..pruning import PruneConfig
from .lab import Lab
from .recipe import Recipe, framework_options
from .rows import segment_stage
from .starts import prune_stage, row_start


def selection_table(
    lab: Lab, recipe: Recipe, config: PruneConfig, selects: str, regimes: Mapping[str, dict]
) -> pd.DataFrame:
    """``segment_stage`` for each selection in each regime (changes to ``recipe``): a line each."""
    recipes = [
        (regime, replace(recipe, select=select, **changes))
        for regime, changes in regimes.items()
        for select in selects.split()
    ]
    lines = []
    for regime, changed in recipes:
        done = segment_stage(lab, changed, config)
        line = {"regime": regime, "select": changed.select, "layers_frozen": len(done.frozen)}
        lines.append(line | done.metrics)
    return pd.DataFrame(lines)


def speed_table(lab: Lab, recipe: Recipe, config: PruneConfig, selects: str) -> pd.DataFrame:
    """Savings of each selection that ``recipe`` has made, on paper and in measured steps.

    See ``speed.savings``; on one of ``lab``'s devices, with its share of a batch.
    """
    backbone, mask = row_start(lab, recipe.row, config)
    model = build(recipe.framework, backbone, recipe.preset, **framework_options(lab, recipe))
    order = sorted(selects.split(), key=lambda select: select != "none")  # the rest against it
    frozen = {
        select: segment_stage(lab, replace(recipe, select=select), config).frozen
        for select in order
    }
    share = recipe.batch_size // lab.devices  # what one device has held in training
    batch = next(lab.batches(share, recipe.seed, recipe.images or None)(0))
    found = step_costs(
        model, lambda b: model.loss(model(b["images"]), b), batch, frozen, device=lab.device,
        precision=recipe.precision,
    )  # fmt: skip
    about = {"mask": mask, "backbone": lab.backbone, "preset": recipe.preset}
    return savings(recipe.framework, frozen, found, size=(lab.size,) * 2, **about)


def together(
    lab: Lab, recipe: Recipe, config: PruneConfig, table: pd.DataFrame, select: str = "low_alpha"
) -> pd.DataFrame:
    """Mask and selection: neither, each alone, and both (the paper's Tables 3 and 4).

    Args:
        table: ``selection_table`` with the regimes "plenty" and "pruned"; lines that it lacks are
            left out.

    Returns:
        has (neither, selection, mask, both), mIoU in percent, params_M and GMACs of a picture, and
        training: MACs of the whole fine-tuning in percent of what it takes with neither (the full
        formula of ``training_cost``, with the mask in all three passes).
    """
    lines, mask = [], None
    for has, regime, chosen, row in (
        ("neither", "plenty", "none", "dense"),
        ("selection", "plenty", select, "dense"),
        ("mask", "pruned", "none", "ours"),
        ("both", "pruned", select, "ours"),
    ):
        found = table[(table["regime"] == regime) & (table["select"] == chosen)]
        if found.empty:
            continue
        if row != "dense":
            mask = prune_stage(lab, config).mask
        done = segment_stage(lab, replace(recipe, select=chosen, row=row), config)
        images = recipe.steps * recipe.batch_size
        training = training_cost(
            recipe.framework, (lab.size,) * 2, mask, {chosen: done.frozen}, images,
            int(recipe.warmup * recipe.steps) * recipe.batch_size, lab.backbone, recipe.preset,
        )["full"].iloc[0]  # fmt: skip
        line = found.iloc[0]
        scores = {k: line[k] for k in line.index if str(k).endswith("seen")}
        cost = {"params_M": line["params"] / 1e6, "GMACs": line["macs"] / 1e9}
        lines.append({"has": has, **scores, **cost, "training": training})
    both = pd.DataFrame(lines)
    if lines:
        neither = both.loc[both["has"] == "neither", "training"]
        both["training"] *= 100 / (neither.iloc[0] if len(neither) else float("nan"))
    return both
