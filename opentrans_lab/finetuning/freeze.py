"""Freeze what was chosen, so that it stays bit-identical, and undo it."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from ..checks import checked
from ..masks import FIRST, locate
from .select import STAGES, stage_of

_FUSED = {"in_proj": "_weight", "qkv": ".weight"}  # one tensor of q, k and v; a spectrum each


@checked
def freeze(model: nn.Module, names: Iterable[str], norm: bool = False) -> int:
    """Stop training the weights of these layers; returns how many weights that freezes.

    The tower is found in any nested module. Gradients are never computed, so an optimiser neither
    moves nor decays them: they stay bit-identical. q, k and v of a fused attention are one tensor,
    which is frozen if all three are named; else a warning says that it is not.

    Args:
        names: of layers, as ``layer_alphas`` gives them; or of whole ``STAGES`` of a CLIP ResNet,
            with batch normalisation and its statistics. Backward ends behind the leading ones.
        norm: also the batch normalisation behind each convolution, running statistics included.
            The authors' code, and so the default, leaves it trainable.

    Raises:
        LabError: a layer that the model does not have.
    """
    names = list(names)
    frozen = _stage_parameters(model, [name for name in names if name in STAGES])
    if layers := _parameters(name for name in names if name not in STAGES):
        anchors = set(_anchors(model, layers)).difference(layers)
        found = locate(model, [*layers, *anchors])
        frozen += (tensor for name, tensor in found.tensors.items() if name not in anchors)
        if norm:
            tower = model.get_submodule(found.prefix.rstrip("."))
            for name in found.tensors:
                frozen += _hold(_norm_behind(tower, name.removesuffix(".weight")))
    return _stop(model, frozen)


def hold_norms(model: nn.Module) -> None:
    """Leave all batch normalisation on its running statistics; its scales and shifts train on.

    A picture's features then do not depend on its neighbours in the batch.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            _hold(module)


def unfreeze(model: nn.Module) -> None:
    """Undo ``freeze`` and ``hold_norms``: the model trains as before."""
    for module in model.modules():
        for name in module.__dict__.pop("_frozen", ()):
            module.get_parameter(name).requires_grad_(True)
        if held := module.__dict__.pop("_held", None):
            handle, was_apart = held
            handle.remove()
            module.train(model.training and not was_apart)


def _stage_parameters(model: nn.Module, stages: list[str]) -> list[nn.Parameter]:
    """All parameters of whole stages, whose normalisation is held."""
    if not stages:
        return []
    found = locate(model, [FIRST, *(f"{stage}.0.conv1.weight" for stage in STAGES[1:])])
    tower = model.get_submodule(found.prefix.rstrip("."))
    parameters: list[nn.Parameter] = []
    for name, module in tower.named_modules():
        if stage_of(name) in stages:
            parameters += module.parameters(recurse=False)
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                _hold(module)
    return parameters


def _anchors(model: nn.Module, layers: list[str]) -> list[str]:
    """What tells a CLIP ResNet's stem, named alone, from its blocks, which have a conv1, too."""
    block = "layer1.0.conv1.weight"
    if not all(stage_of(name) == "stem" for name in layers):
        return []
    return [block] if any(n.endswith(block) for n, _ in model.named_parameters()) else []


def _stop(model: nn.Module, parameters: Iterable[nn.Parameter]) -> int:
    chosen = {id(parameter): parameter for parameter in parameters}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in chosen and parameter.requires_grad:
                parameter.requires_grad_(False)
                # By us: what was frozen before stays so. On the module, for a copy has it, too.
                module.__dict__.setdefault("_frozen", set()).add(name)
    for parameter in chosen.values():
        parameter.grad = None
    return sum(parameter.numel() for parameter in chosen.values())


def _hold(norm: nn.Module | None) -> Iterator[nn.Parameter]:
    """Keep a normalisation in eval mode, whatever ``train`` says; its parameters."""
    if norm is None:
        return iter(())
    if "_held" not in norm.__dict__:
        norm._held = (norm.register_forward_pre_hook(_evaluates), not norm.training)
    return norm.parameters()


def _evaluates(module: nn.Module, _: tuple[torch.Tensor, ...]) -> None:
    module.training = False


def _norm_behind(tower: nn.Module, conv: str) -> nn.Module | None:
    """CLIP's names: bn2 behind conv2, downsample.1 behind downsample.0."""
    owner, _, last = conv.rpartition(".")
    after = str(int(last) + 1) if last.isdecimal() else last.replace("conv", "bn")
    norm = dict(tower.named_modules()).get(f"{owner}.{after}".lstrip("."))
    return norm if isinstance(norm, nn.modules.batchnorm._BatchNorm) else None


def _parameters(names: Iterable[str]) -> list[str]:
    """Parameter names of layers; those of a fused attention only where it is named whole."""
    plain, parts = [], {}
    for name in names:
        owner, _, last = name.rpartition(".")
        if last in ("q", "k", "v") and owner.rpartition(".")[2] in _FUSED:
            parts.setdefault(owner, []).append(last)
        else:
            plain.append(f"{name}.weight")
    if torn := [owner for owner, found in parts.items() if len(found) < 3]:
        warnings.warn(
            f"q, k and v of {torn[0]} are one tensor and not all to be frozen: it stays trainable"
            + (f" (and {len(torn) - 1} more)" if len(torn) > 1 else ""),
            stacklevel=3,
        )
    whole = [owner for owner in parts if owner not in torn]
    return plain + [owner + _FUSED[owner.rpartition(".")[2]] for owner in whole]
