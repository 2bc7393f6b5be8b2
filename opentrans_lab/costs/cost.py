"""What a framework costs, in two conventions side by side, without allocating a weight.

- ``uniform``: one counter for everything. All parameters that a forward pass reads; the MACs of
  convolutions, matrix products and attention; of a masked layer exactly those of the weights that
  survive in *this* mask. Norms, activations and interpolation multiply next to nothing: left out.
- ``paper``: reconstructed. The paper's rows were counted with different tools; ``SOURCES`` in
  ``recipes`` says which, and why we think so. Its sparse numbers take a flat share
  off the trunk, whatever the mask. Totals stand beside the printed cells with what is left over.

One FLOP is one MAC in both, as in the paper. CLIP's text tower (whose embeddings are computed once
for a vocabulary) is in neither, nor is its attention pool unless the forward pass runs it.
"""

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path

import pandas as pd
from torch import nn

from ..alpha import AUTHORS_FROZEN
from ..errors import LabError
from ..finetuning import STAGES, stage_of
from ..heads import FRAMEWORKS
from ..masks import Mask
from ..records import paper
from .counter import (
    OUTSIDE,
    Counted,
    count,
    layer_costs,
    meta_framework,
    parse_size,
    products,
    thop,
)
from .recipes import DENSITY, MEDIAN_LAYER, RECIPES, thop_trunk

SIZE = "800x1216"  # of Table 1: the first picture of COCO's validation set
IMAGES, WARMUP = 50_000 * 28, 10_000 * 28  # seen in fine-tuning, and before layers are frozen
TRAINING_SIZE = "512x512"
NUMBERS = ["params", "macs", "sparse_params", "sparse_macs"]


def cost(
    framework: str | nn.Module,
    size: str | tuple[int, int] = SIZE,
    mask: Mask | str | Path | None = None,
    backbone: str = "RN50",
    preset: str = "paper",
) -> pd.DataFrame:
    """Parameters and MACs of one picture, by component, in both conventions.

    Args:
        framework: a key of ``FRAMEWORKS``, or any module that takes images (B, 3, H, W); then
            ``backbone`` and ``preset`` are not read.
        size: height x width. mask: or its file; without one ``uniform`` is dense throughout.

    Returns:
        framework, convention, component, counter, density, params, macs, sparse_params,
        sparse_macs. Components are the trunk, the children of the model, "outside the forward
        pass" (not in the total) and "total". ``paper`` (only for a framework that it has a row of)
        ends with "printed" (Table 1) and "residual" (total - printed), where the settings are the
        paper's; its sparse numbers are for the mask's density, else for 0.1.
    Raises:
        LabError: unknown framework, backbone or preset, malformed size, a mask of another model.
    """
    size = parse_size(size)
    mask = Mask.load(mask) if isinstance(mask, (str, Path)) else mask
    published = isinstance(framework, str) and (backbone, preset) == ("RN50", "paper")
    counted, key = _count(framework, size, backbone, preset)
    tables = [_uniform(counted, mask)]
    if key in RECIPES:
        density = DENSITY if mask is None else mask.density
        printed = published and size == parse_size(SIZE)
        tables.insert(0, _paper(key, counted, density, printed))
    table = pd.concat(tables, ignore_index=True).assign(framework=key)
    table[NUMBERS] = table[NUMBERS].astype("Int64")
    return table[["framework", "convention", "component", "counter", "density", *NUMBERS]]


def _count(
    framework: str | nn.Module,
    size: tuple[int, int],
    backbone: str,
    preset: str,
    training: bool = False,
) -> tuple[Counted, str]:
    """The traced model and its key in ``FRAMEWORKS``, or the name of its class."""
    if isinstance(framework, str):
        model = meta_framework(framework, backbone, preset)
        return count(model, size, training=training), framework
    keys = [key for key, builder in FRAMEWORKS.items() if type(framework) is builder]
    counted = count(framework, size, training=training)
    return counted, keys[0] if keys else type(framework).__name__


def _uniform(counted: Counted, mask: Mask | None) -> pd.DataFrame:
    parts = layer_costs(counted, mask).drop(columns="module")
    parts = parts.groupby("component", sort=False, as_index=False).sum()
    parts = parts[parts[["params", "macs"]].any(axis=1)]
    parts = parts.sort_values("component", key=lambda c: c != "trunk", kind="stable")
    outside = parts["component"] == OUTSIDE
    total = parts[~outside].sum(numeric_only=True).to_frame().T.assign(component="total")
    density = 1.0 if mask is None else mask.density
    table = pd.concat([parts[~outside], parts[outside], total])
    return table.assign(convention="uniform", counter="exact", density=density)


def _paper(key: str, counted: Counted, density: float, printed: bool) -> pd.DataFrame:
    """A framework's row by its recipe; its sparse columns take (1 - density) of thop's trunk."""
    parts = pd.DataFrame(RECIPES[key](counted)).groupby("component", sort=False, as_index=False)
    parts = parts.agg({"counter": "first", "params": "sum", "macs": "sum"})
    trunk, less = thop_trunk(counted), (parts["component"] == "trunk") * (1 - density)
    parts["sparse_params"] = (parts["params"] - less * trunk.params).round()
    parts["sparse_macs"] = (parts["macs"] - less * trunk.macs).round()
    total = parts.sum(numeric_only=True).to_frame().T.assign(component="total", counter="")
    if printed:
        cells = paper("table1").query("framework == @key and metric in ['params', 'flops']")
        cells = cells.set_index(["row", "metric"])["value"]
        found = {"params": cells["dense", "params"] * 1e6, "macs": cells["dense", "flops"] * 1e9}
        if round(density, 2) == DENSITY:
            found["sparse_params"] = cells["ours", "params"] * 1e6
            found["sparse_macs"] = cells["ours", "flops"] * 1e9
        table1 = pd.Series(found).reindex(NUMBERS)
        rest = total[table1.index] - table1
        table1 = table1.round().to_frame().T.assign(component="printed")
        total = pd.concat([total, table1, rest.round().assign(component="residual")])
    table = pd.concat([parts, total]).fillna({"counter": ""})
    return table.assign(convention="paper", density=density)


# --- training -------------------------------------------------------------------------------------


def training_cost(
    framework: str | nn.Module = "han",
    size: str | tuple[int, int] = TRAINING_SIZE,
    mask: Mask | str | Path | None = None,
    frozen: Mapping[str, Sequence[str]] | None = None,
    images: int = IMAGES,
    warmup: int = WARMUP,
    backbone: str = "RN50",
    preset: str = "paper",
) -> pd.DataFrame:
    """MACs of a whole fine-tuning by selection of frozen layers, in both conventions.

    ``paper`` is the reconstructed N (d T + T + H) + Nw T + (N - Nw) (T - C): the trunk's forward
    pass (at density d), its two backward passes (the gradient of its weights from Nw on without
    the frozen convolutions' C) and the head's forward pass only. T is thop's, H the head's matrix
    products without those of attention, C bare MACs.

    ``full`` is 3 N (T + H) - (N - Nw) C, less the gradient of the pictures, with the head's
    backward pass, by the uniform counter, and with the mask in all three passes: what a perfect
    sparse kernel would multiply. Freezing a convolution saves the gradient of its weight; the one
    that passes through is needed all the same, unless whole leading stages are frozen: then neither
    is, nor the one that would pass from the stage behind them. Frozen layers are taken as frozen
    from Nw on; a trunk that is not trained at all costs more here than it does.

    Args:
        frozen: names of layers ("layer1.0.conv1") or stages ("layer1") by selection; by default the
            paper's own (Tables 2 and 4, RN50), the last with the mask, or with density 0.1.
        mask: with ``frozen``, of every row.
        images: N, pictures seen in all (iterations x batch). warmup: Nw, of them before freezing.

    Returns:
        framework, select, row ("dense" or "ours", as in Table 4), density, frozen (layers),
        trunk_macs T, head_macs H, frozen_macs C (``paper``'s, a picture); and in PMACs: paper,
        printed, residual, full.
    Raises:
        LabError: as :func:`cost`; a model without a CLIP ResNet, an unknown layer, a warm-up longer
            than the training.
    """
    if not 0 <= warmup <= images:
        raise LabError(f"warmup={warmup} of images={images}; it must lie between 0 and all images")
    mask = Mask.load(mask) if isinstance(mask, (str, Path)) else mask
    size = parse_size(size)
    published = frozen is None and (images, warmup, size) == (IMAGES, WARMUP, (512, 512))
    published &= (framework, backbone, preset) == ("han", "RN50", "paper")
    published &= mask is None or round(mask.density, 2) == DENSITY
    counted, key = _count(framework, size, backbone, preset, training=True)
    if counted.tower is None:
        raise LabError(f"{key} has no CLIP ResNet whose layers could be frozen; wrap one in it")
    trunk, head = thop(counted.rows("trunk")), products(counted.rows("head"))
    layers = _convolutions(counted, mask)
    total, rows = int(counted.trace.rows["macs"].sum()), []
    for select, row, density, share in _selections(layers, mask, frozen):
        own = layers["dense" if row == "dense" else "sparse"]
        spared = _spared(layers, (frozen or {}).get(select, ()))
        less = round((share * layers["dense"]).sum())
        uniform = 3 * (total - layers["dense"].sum() + own.sum()) - own["conv1"]
        theirs = images * (density * trunk + trunk + head) + warmup * trunk
        theirs += (images - warmup) * (trunk - less)
        full = images * uniform - (images - warmup) * ((share + spared) * own).sum()
        rows.append((select, row, density, round(share.sum()), trunk, head, less, theirs, full))
    columns = ["select", "row", "density", "frozen", "trunk_macs", "head_macs", "frozen_macs"]
    table = pd.DataFrame(rows, columns=[*columns, "paper", "full"])
    table.insert(0, "framework", key)
    table[["paper", "full"]] /= 1e15
    cells = pd.concat([paper("table2").assign(row="dense"), paper("table4")])
    cells = cells[cells["metric"] == "training_flops"].drop_duplicates(["select", "row"])
    printed = cells.set_index(["select", "row"])["value"].reindex(
        list(zip(table["select"], table["row"], strict=True))
    )
    table.insert(9, "printed", printed.to_numpy() if published else float("nan"))
    table.insert(10, "residual", table["paper"] - table["printed"])
    return table


def printed_cells() -> pd.DataFrame:
    """Every cost that the paper prints (Tables 1, 2 and 4) beside its reconstruction.

    Returns:
        framework, cell, counted, printed (parameters, MACs, or PMACs of a training).
    """
    cells = []
    for framework in FRAMEWORKS:
        table = cost(framework).query("convention == 'paper'").set_index("component")
        for cell in NUMBERS:
            counted, printed = table.loc["total", cell], table.loc["printed", cell]
            cells.append((framework, cell, float(counted), float(printed)))
    for line in training_cost("han").itertuples():
        cells.append(("han", f"training, {line.select}, {line.row}", line.paper, line.printed))
    return pd.DataFrame(cells, columns=["framework", "cell", "counted", "printed"])


def _convolutions(counted: Counted, mask: Mask | None) -> pd.DataFrame:
    """MACs of the trunk's convolutions by name, dense and under the mask (without one, at the
    paper's density in all but the first)."""
    layers = layer_costs(counted, mask).query("component == 'trunk' and macs > 0")
    layers = layers.set_index(layers["module"].str.removeprefix(counted.tower))
    sparse = layers["sparse_macs"]
    if mask is None:
        sparse = layers["macs"] * DENSITY
        sparse["conv1"] = layers["macs"]["conv1"]
    return pd.DataFrame({"dense": layers["macs"], "sparse": sparse})


def _selections(
    layers: pd.DataFrame, mask: Mask | None, frozen: Mapping[str, Sequence[str]] | None
) -> list[tuple[str, str, float, pd.Series]]:
    """(select, row, density, share of each layer that is frozen): the user's, else the paper's."""
    density = DENSITY if mask is None else mask.density
    if frozen is not None:
        known = {*layers.index, *STAGES}
        if unknown := [name for names in frozen.values() for name in names if name not in known]:
            raise LabError(
                f"frozen layer {unknown[0]!r} is no convolution of the trunk; write "
                "layer1.0.conv1, or layer1 for a whole stage"
            )
        row = ("dense", 1.0) if mask is None else ("ours", density)
        return [(select, *row, _share(layers, names)) for select, names in frozen.items()]
    if not layers.index.isin(AUTHORS_FROZEN).sum() == len(AUTHORS_FROZEN):
        raise LabError("the paper's selections are of RN50's layers; give your own as frozen=")
    low = _share(layers, AUTHORS_FROZEN)
    high = (1 - low) * (layers.index != MEDIAN_LAYER)
    return [
        ("none", "dense", 1.0, 0 * low),
        ("random", "dense", 1.0, 0 * low + low.mean()),
        ("high_alpha", "dense", 1.0, high),
        ("low_alpha", "dense", 1.0, low),
        ("low_alpha", "ours", density, low),
    ]


def _share(layers: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    names = set(names)
    frozen = [name in names or stage_of(name) in names for name in layers.index]
    return pd.Series(frozen, layers.index).astype(float)


def _spared(layers: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    """1 for the convolutions whose input needs no gradient because whole leading stages are frozen:
    those of these stages but the first, which never has one, and those that read their output."""
    stages = list(takewhile(set(names).__contains__, STAGES))
    if not stages:
        return _share(layers, [])
    spared = [*stages]
    if stages[-1] != STAGES[-1]:
        behind = f"{STAGES[len(stages)]}.0"
        spared += [f"{behind}.conv1", f"{behind}.downsample.0"]
    return _share(layers, spared) * (layers.index != "conv1")
