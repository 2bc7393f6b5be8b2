"""Hold a mask through training: pruned weights are 0 again after every step of any optimizer."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_HELD: WeakSet[Kept] = WeakSet()


class Kept:
    """Which weights of one layer are held at 0, in this layer and in copies of it.

    It hangs on the layer as a hook of ``load_state_dict``: other weights do not undo the mask in
    silence, and ``copy.deepcopy`` and pickles of the model take it along.
    """

    def __init__(self, layer: nn.Module, leaf: str, pruned: Tensor) -> None:
        """Hold ``layer.<leaf>`` where ``pruned`` (bool, of its shape) says, and only there."""
        for other in [k for k in _HELD if k.layer is layer and k.leaf == leaf]:
            other.remove()
        self.layer, self.leaf, self.pruned = layer, leaf, pruned
        self._handle = layer.register_load_state_dict_post_hook(self)
        _HELD.add(self)

    def __setstate__(self, state: dict) -> None:
        self.__dict__ |= state
        _HELD.add(self)  # a copy

    def __call__(self, *_) -> None:
        """The layer was loaded."""
        weight = self._weight()
        if weight is not None and weight[self.pruned].any():
            warnings.warn(
                "load_state_dict brought weights that a mask of mask.keep prunes, so they are 0 "
                "again; to have them, let the mask go first, with remove() of what keep returned",
                stacklevel=2,
            )
        self.clear()

    @torch.no_grad()
    def clear(self) -> None:
        """Set what is pruned to 0, NaN and infinities too, which a product would keep."""
        weight = self._weight()
        if weight is not None:
            weight.masked_fill_(self.pruned, 0)
            return
        self.remove()  # once, and not in the step of whoever trains something else
        warnings.warn(
            f"{self.leaf} of a {type(self.layer).__name__} is no parameter of the held shape any "
            "more, so its mask is let go; make it plain again (torch.nn.utils.prune.remove, "
            "parametrize.remove_parametrizations) and call mask.keep anew",
            stacklevel=2,
        )

    def remove(self) -> None:
        """Let go."""
        self._handle.remove()
        _HELD.discard(self)

    def _weight(self) -> Tensor | None:
        """The layer's weight of today, with the mask where it is and as it lies in memory; None
        where that is computed, replaced by one of another shape, or gone."""
        weight = self.layer._parameters.get(self.leaf)
        if weight is None or weight.shape != self.pruned.shape:
            return None
        if (self.pruned.device, self.pruned.stride()) != (weight.device, weight.stride()):
            self.pruned = torch.empty_like(weight, dtype=torch.bool).copy_(self.pruned)
        return weight.detach()


class Holding:
    """All that one mask holds in a model."""

    def __init__(self, model: nn.Module, pruned: Mapping[nn.Parameter, Tensor]) -> None:
        """Hold each of these parameters of ``model`` where its bool tensor says."""
        self._kept = [
            Kept(layer, leaf, pruned[parameter])
            for layer in model.modules()
            for leaf, parameter in layer.named_parameters(recurse=False)
            if parameter in pruned
        ]

    def __repr__(self) -> str:
        return f"Holding({len(self._kept)} layers; remove() lets go)"

    def remove(self) -> None:
        """Let go: the next step may change pruned weights."""
        for kept in self._kept:
            kept.remove()


def _after_step(*_) -> None:
    for kept in list(_HELD):
        kept.clear()


register_optimizer_step_post_hook(_after_step)
