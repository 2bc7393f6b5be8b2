"""Turn the knobs: one layer's spectrum, with model, layer, reshape and rule to choose."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from torch import nn

from ..alpha import RESHAPES, RULES, Spectrum, fit_alpha, layers, mp_edge, spectra
from ..errors import LabError
from . import plots
from .letters import brief


def compare(model: nn.Module, layer: str, reshapes: Sequence[str] = ("slices",),
            rules: Sequence[str] = RULES, seed: int = 0) -> Figure:
    """One layer of `model` under each reshape and rule: ESD, fit and shuffled control.

    Raises:
        LabError: no such layer.
    """
    found = {x.name: x for x in layers(model)}
    if layer not in found:
        raise LabError(f"no layer {layer!r}; the first are {', '.join(list(found)[:4])}")
    chosen = found[layer]
    size = (3.4 * len(rules), 2.9 * len(reshapes) + 0.3)
    fig, axes = plt.subplots(len(reshapes), len(rules), figsize=size, squeeze=False)
    for line, reshape in zip(axes, reshapes, strict=True):
        (own,) = spectra([chosen], reshape)
        (shuffled,) = spectra([chosen], reshape, "permute", seed)
        if isinstance(own, str):
            raise LabError(f"{layer} has no spectrum: {own}")
        spectrum = Spectrum(own, shuffled, mp_edge(chosen.weight, reshape, chosen.groups))
        for axis, rule in zip(line, rules, strict=True):
            row = asdict(fit_alpha(own, rule)) | {"name": f"{reshape} + {rule}"}
            plots.esd_panel(axis, spectrum, row)
            axis.set(xlabel="eigenvalue λ")
        line[0].set_ylabel("density")
    fig.suptitle(brief(layer, 100), parse_math=False)
    return fig


def explore(models: Mapping[str, nn.Module], seed: int = 0) -> Figure | None:
    """Choose model, layer, reshape and rule in JupyterLab; run headless, a static panel instead.

    The static panel is the middle layer of the first model under every rule. A kernel counts as
    watched when a Jupyter server opened it (it names the session in ``JPY_SESSION_NAME``). Only
    layers with a spectrum are on offer.

    Raises:
        LabError: no model has such a layer.
    """
    names = {}
    for key, model in models.items():
        found = layers(model)
        eigs = zip(found, spectra(found), strict=True)
        if usable := [x.name for x, own in eigs if not isinstance(own, str)]:
            names[key] = usable
    if not names:
        raise LabError("no model with a layer that has a spectrum; nothing to explore")
    first = next(iter(names))
    if "JPY_SESSION_NAME" not in os.environ:
        return compare(models[first], names[first][len(names[first]) // 2], seed=seed)
    import ipywidgets
    from IPython.display import display

    model = ipywidgets.Dropdown(options=list(names), description="model")
    wide = ipywidgets.Layout(width="95%", max_width="700px")
    layer = ipywidgets.SelectionSlider(  # in depth, drawn again when it is let go
        options=names[first], description="layer", continuous_update=False, layout=wide
    )
    reshape = ipywidgets.Dropdown(options=RESHAPES, description="reshape")
    rule = ipywidgets.Dropdown(options=RULES, description="rule")

    def relist(change: dict) -> None:
        chosen = layer.value
        layer.options = names[change["new"]]
        if chosen in layer.options:  # the same layer, to compare models
            layer.value = chosen

    def draw(model: str, layer: str, reshape: str, rule: str) -> None:
        fig = compare(models[model], layer, [reshape], [rule], seed)
        fig.set_size_inches(7, 4.5)
        display(fig)
        plt.close(fig)

    model.observe(relist, "value")
    knobs = dict(model=model, layer=layer, reshape=reshape, rule=rule)
    output = ipywidgets.interactive_output(draw, knobs)
    choices = ipywidgets.HBox([model, reshape, rule])
    display(ipywidgets.VBox([choices, layer, output]))
    return None
