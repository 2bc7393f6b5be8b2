"""Which weights a model has: the layers of a module or of a bare state dict, as they act."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import LabError
from ..files import bare, fold_pruned, largest

_PARAMETRISED = "parametrised: build the model, whose weight is computed from this"
_TABLE = re.compile(r"embed|(^|_)emb(_|$)|wte|wpe", re.IGNORECASE)
_TALL = 20  # rows a column: more than linear maps have, and fewer than tables of words
_BY_NDIM = {2: "linear", 3: "conv1d", 4: "conv2d", 5: "conv3d"}


@dataclass(frozen=True)
class Layer:
    """A named weight (out, in/groups, *kernel), or the reason why it is not analysed."""

    name: str
    type: str
    tensor: Tensor
    mask: Tensor | None = None  # of torch.nn.utils.prune; the effective weight is the product
    groups: int = 1
    reason: str = ""

    @property
    def weight(self) -> Tensor:
        tensor = self.tensor.detach()
        return tensor if self.mask is None else tensor * self.mask.to(tensor.dtype)


def layers(source: nn.Module | Mapping[str, Tensor]) -> list[Layer]:
    """Every weight with two or more axes, in the order of the model: to analyse, or with a reason.

    Convolutions (grouped ones too), linear maps and fused attention projections (``in_proj`` and
    timm's ``qkv``, split into q, k and v). Weights pruned with torch.nn.utils.prune or
    reparametrised (weight norm, spectral norm, …) are read as they act in eval mode. From a bare
    state dict the kind follows from the number of axes and groups cannot be known: a grouped
    convolution is then read as one (out, in/groups) matrix per tap. A matrix with a bias is a
    linear map whatever its name; one without that is named or shaped like an embedding table is not
    analysed, and told. Of a checkpoint that has more than the state dict, that part is read.
    """
    if isinstance(source, nn.Module):
        modules, state, masks = (
            {bare(name): value for name, value in find(remove_duplicate=False)}
            for find in (source.named_modules, source.named_parameters, source.named_buffers)
        )
    elif isinstance(source, Mapping):
        modules, state, masks = {}, fold_pruned(largest(source, "this checkpoint")), {}
    else:
        raise LabError(f"cannot read weights from a {type(source).__name__}; give a torch module "
                       "or a state dict")
    found: dict[str, Layer] = {}
    for key, tensor in state.items():
        owner, _, leaf = key.rpartition(".")
        if ".parametrizations." in f".{key}":
            owner, _, rest = key.rpartition("parametrizations.")
            owner, leaf = owner.removesuffix("."), rest.split(".")[0]
            if owner in modules:
                tensor = _acting(modules[owner], leaf)
            elif tensor.ndim > 1:
                found.setdefault(owner, Layer(owner, "other", tensor, reason=_PARAMETRISED))
                continue
        for hook in _hooks(modules.get(owner)):
            if leaf in (f"{hook.name}_orig", f"{hook.name}_g", f"{hook.name}_v"):
                leaf, tensor = hook.name, _acting(modules[owner], hook.name)
        if tensor.ndim < 2:
            continue
        mask = masks.get(f"{key[:-5]}_mask") if leaf.endswith("_orig") else None
        if leaf.endswith("_orig") and mask is None:
            found.setdefault(owner, Layer(owner, "other", tensor, reason=_PARAMETRISED))
            continue
        biased = f"{owner}.bias".strip(".") in state
        name, module = leaf.removesuffix("_orig"), modules.get(owner)
        for layer in _read(owner, name, tensor, mask, module, biased):
            found.setdefault(layer.name, layer)
    return list(found.values())


def _hooks(module: nn.Module | None) -> list:
    """The hooks of torch.nn.utils.weight_norm and spectral_norm, which compute a weight."""
    hooks = module._forward_pre_hooks.values() if module is not None else ()
    return [hook for hook in hooks if hasattr(hook, "compute_weight")]


def _acting(module: nn.Module, name: str) -> Tensor:
    """A reparametrised weight as `module` uses it in eval mode; no buffer of it is changed."""
    training = [m for m in module.modules() if m.training]
    module.eval()  # in training mode, spectral norm takes a step at each look
    try:
        for hook in _hooks(module):
            hook(module, ())  # what the module holds dates from its last call
        return getattr(module, name).detach()
    finally:
        for m in training:
            m.training = True


def _read(
    owner: str,
    leaf: str,
    tensor: Tensor,
    mask: Tensor | None,
    module: nn.Module | None,
    biased: bool,
) -> Iterator[Layer]:
    kind = type(module).__name__ if module is not None else ""
    full, last = f"{owner}.{leaf}".strip("."), owner.rpartition(".")[2]
    linear = leaf == "weight" and tensor.ndim == 2
    fused = linear and last == "qkv" and tensor.shape[0] == 3 * tensor.shape[1]
    if fused or (leaf == "in_proj_weight" and tensor.shape[0] % 3 == 0):
        parts = zip(tensor.chunk(3), mask.chunk(3) if mask is not None else [None] * 3, strict=True)
        for letter, (part, part_mask) in zip("qkv", parts, strict=True):
            name = f"{owner}.{letter}" if fused else f"{owner}.in_proj.{letter}".strip(".")
            yield _checked(name, "attention", part, part_mask, 1)
    elif leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        yield _checked(full.removesuffix("_weight"), "attention", tensor, mask, 1)
    elif leaf != "weight":
        yield Layer(full, "other", tensor, reason="a bare parameter, not a layer's weight")
    elif module is None and linear and not biased and (like := _like_a_table(last, tensor)):
        yield Layer(owner, "embedding", tensor, reason=f"an embedding table, not a linear map, by "
                    f"its {like} and without a bias: if it is one, build the model")
    elif module is None:
        yield _checked(owner or full, _BY_NDIM.get(tensor.ndim, "other"), tensor, mask, None)
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        yield _checked(owner or full, f"conv{tensor.ndim - 2}d", tensor, mask, module.groups)
    elif isinstance(module, nn.Linear) or kind.endswith("Conv1D"):  # Conv1D: GPT-2's linear map
        yield _checked(owner or full, "linear", tensor, mask, 1)
    else:
        yield Layer(owner or full, kind.lower(), tensor,
                    reason=f"{kind}: only convolutions and linear maps are analysed")


def _like_a_table(name: str, tensor: Tensor) -> str:
    """What of a matrix speaks for a table of embeddings, or an empty string."""
    if _TABLE.search(name):
        return "name"
    return "shape" if len(tensor) >= _TALL * tensor.shape[1] else ""


def _checked(
    name: str, kind: str, tensor: Tensor, mask: Tensor | None, groups: int | None
) -> Layer:
    """A layer to analyse, unless its weight has no spectrum; groups is None where unknown."""
    reason = unfit(tensor)
    if tensor.ndim > 2 and tensor.shape[1] == 1 and groups != 1:
        reason = "one input channel per filter (depthwise): no matrix to analyse"
        if groups is None:
            reason = "one input channel: depthwise, or a single-channel input; build the model"
    return Layer(name, kind, tensor, mask, groups or 1, reason)


def unfit(weight: Tensor) -> str:
    """Why nothing can be computed from this tensor, or an empty string."""
    if weight.numel() == 0:
        return "an empty weight"
    if weight.layout != torch.strided:
        return "a sparse tensor; give weight.to_dense()"
    if weight.is_meta:
        return "no values (meta tensor); load the weights first"
    if not weight.is_floating_point():
        return f"weights of type {str(weight.dtype).removeprefix('torch.')}, not floating point"
    return ""
