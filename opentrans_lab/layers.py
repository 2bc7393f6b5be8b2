"""Which weights a model has: the layers of a module or of a bare state dict, as they act."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from .errors import LabError

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

    Convolutions (grouped ones too), linear maps and fused attention projections (``in_proj``,
    split into q, k and v). Weights pruned with torch.nn.utils.prune or reparametrised are read as
    they act. From a bare state dict the kind follows from the number of axes and groups cannot be
    known: a grouped convolution is then read as one (out, in/groups) matrix per tap.
    """
    if isinstance(source, nn.Module):
        modules = dict(source.named_modules(remove_duplicate=False))
        state = dict(source.named_parameters(remove_duplicate=False))
        masks = dict(source.named_buffers(remove_duplicate=False))
    elif isinstance(source, Mapping):
        modules, state = {}, {k: v for k, v in source.items() if isinstance(v, Tensor)}
        masks = state
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
                tensor = getattr(modules[owner], leaf)
            elif tensor.ndim > 1:
                reason = "parametrised: build the model, whose weight is computed from this"
                found.setdefault(owner, Layer(owner, "other", tensor, reason=reason))
                continue
        if tensor.ndim < 2 or (leaf.endswith("_mask") and f"{key[:-5]}_orig" in state):
            continue
        mask = masks.get(f"{key[:-5]}_mask") if leaf.endswith("_orig") else None
        for layer in _read(owner, leaf.removesuffix("_orig"), tensor, mask, modules.get(owner)):
            found.setdefault(layer.name, layer)
    return list(found.values())


def _read(
    owner: str, leaf: str, tensor: Tensor, mask: Tensor | None, module: nn.Module | None
) -> Iterator[Layer]:
    kind = type(module).__name__ if module is not None else ""
    full = f"{owner}.{leaf}".strip(".")
    if leaf == "in_proj_weight" and tensor.shape[0] % 3 == 0:
        parts = zip(tensor.chunk(3), mask.chunk(3) if mask is not None else [None] * 3, strict=True)
        for letter, (part, part_mask) in zip("qkv", parts, strict=True):
            name = f"{owner}.in_proj.{letter}".strip(".")
            yield _checked(name, "attention", part, part_mask, 1)
    elif leaf in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        yield _checked(full.removesuffix("_weight"), "attention", tensor, mask, 1)
    elif leaf != "weight":
        yield Layer(full, "other", tensor, reason="a bare parameter, not a layer's weight")
    elif module is None and _is_table(owner):
        yield Layer(owner, "embedding", tensor, reason="an embedding table, not a linear map")
    elif module is None:
        yield _checked(owner or full, _BY_NDIM.get(tensor.ndim, "other"), tensor, mask, 1)
    elif isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        yield _checked(owner or full, f"conv{tensor.ndim - 2}d", tensor, mask, module.groups)
    elif isinstance(module, nn.Linear) or kind.endswith("Conv1D"):  # Conv1D: GPT-2's linear map
        yield _checked(owner or full, "linear", tensor, mask, 1)
    else:
        yield Layer(owner or full, kind.lower(), tensor,
                    reason=f"{kind}: only convolutions and linear maps are analysed")


def _is_table(owner: str) -> bool:
    return any(word in owner.lower() for word in ("embed", "wte", "wpe"))


def _checked(name: str, kind: str, tensor: Tensor, mask: Tensor | None, groups: int) -> Layer:
    """A layer to analyse, unless its weight cannot have a spectrum."""
    reason = ""
    if tensor.numel() == 0:
        reason = "an empty weight"
    elif tensor.ndim > 2 and tensor.shape[1] == 1 and tensor.shape[0] > 1:
        reason = "one input channel per filter (depthwise): no matrix to analyse"
    elif tensor.is_meta:
        reason = "no values (meta tensor); load the weights first"
    elif not tensor.is_floating_point():
        reason = f"weights of type {str(tensor.dtype).removeprefix('torch.')}, not floating point"
    return Layer(name, kind, tensor, mask, groups, reason)
