"""Find a CLIP tower, by the names of its parameters, in anybody's module or state dict."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from ..errors import LabError
from ..files import bare, computed, flatten, prefixes

FIRST = "conv1.weight"  # the first stem convolution: it reads pixels and is never pruned


class Match(NamedTuple):
    """Which tensors of a model a tower's names mean."""

    prefix: str  # of the tower in the model, such as "backbone.clip_model.visual."
    tensors: dict[str, Tensor]  # by the tower's own names; parameters of a module
    wanted: int  # names that were looked for

    def __repr__(self) -> str:  # in a notebook, not every weight
        return f"Match({self})"

    def __str__(self) -> str:
        where = f"under {self.prefix!r}" if self.prefix else "at the top"
        return f"{len(self.tensors)} of {self.wanted} tensors matched {where}"


def prunable(visual: nn.Module) -> dict[str, nn.Parameter]:
    """Convolution weights that Algorithm 1 prunes: all but the first, by parameter name.

    Raises:
        LabError: no CLIP ResNet tower.
    """
    weights = {
        f"{name}.weight": module.weight
        for name, module in visual.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    if FIRST not in weights:
        raise LabError("this is no CLIP ResNet tower: it has no 'conv1.weight'")
    return {name: weight for name, weight in weights.items() if name != FIRST}


def locate(
    model: nn.Module | Mapping[str, Tensor],
    names: Iterable[str] | Mapping[str, Tensor],
    prefix: str | None = None,
    partial: bool = False,
) -> Match:
    """The tensors that a tower's ``names`` mean in ``model``, whichever module holds the tower.

    Args:
        model: a module (its parameters are searched), a state dict, or a checkpoint with one in it.
        names: of the tower's parameters; with tensors as values, shapes have to agree too.
        prefix: of the tower, with or without the last dot; found when it is None.
        partial: take what matches when not all does.

    Raises:
        LabError: no nested module has them all (or, with ``partial``, any), more than one has, or
            one is computed from other tensors there (pruned by torch, or parametrised).
    """
    shapes = {n: names[n].shape if isinstance(names, Mapping) else None for n in names}
    if isinstance(model, nn.Module):
        state = {bare(name): parameter for name, parameter in model.named_parameters()}
        made = computed([*state, *(bare(name) for name, _ in model.named_buffers())])
    elif isinstance(model, Mapping):
        state = flatten(model)
        made = computed(state)
    else:
        raise LabError(f"a {type(model).__name__} holds no tower; give a module or a state dict")
    if prefix is None:
        prefix = _find_prefix([*state, *made], shapes, partial)
    elif prefix := bare(prefix.rstrip(".")):
        prefix += "."
    for name in (prefix + name for name in shapes):
        if name in made:
            raise LabError(
                f"{name!r} is computed from other tensors, so a mask would not last: make all such "
                f"weights plain in the model first, each layer with {made[name]}"
            )
    found, wrong = {}, ""
    for name, shape in shapes.items():
        tensor = state.get(prefix + name)
        if tensor is not None and shape in (None, tensor.shape):
            found[name] = tensor
        elif not wrong:
            theirs = "missing" if tensor is None else f"{tuple(tensor.shape)}"
            ours = "" if shape is None else f" {tuple(shape)}"
            wrong = f"{prefix + name!r}{ours} is {theirs} in the model"
    match = Match(prefix, found, len(shapes))
    if shapes and (not found or (wrong and not partial)):
        remedy = "partial=True takes what matches" if found else "name the prefix of its tower"
        raise LabError(
            f"{match}: {wrong}; were they named for another backbone? If you mean it, {remedy}"
        )
    return match


def _find_prefix(keys: Iterable[str], names: Mapping, partial: bool) -> str:
    """The prefix under which most names are found; a tie is an error."""
    counts = prefixes(keys, names)
    if not counts:
        return ""
    most = max(counts.values())
    best = [prefix for prefix, count in counts.items() if count == most]
    if len(best) > 1 and (partial or most == len(names)):
        raise LabError(
            f"{len(best)} towers match, {best}: name the prefix of the one that is meant"
        )
    return best[0]
