"""``Mask``: which weights of a CLIP tower live. A value that travels between frameworks.

A mask is a dict of boolean tensors keyed by the visual tower's parameter names ("layer1.0.conv1
.weight"). True means kept. *Density* is the fraction kept: the paper's "sparsity s = 10 %" is
density 0.1. The first stem convolution is never pruned and is not in the mask (54 of RN50's 55).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .errors import LabError

FIRST = "conv1.weight"  # the first stem convolution: it reads pixels and is never pruned


def prunable(visual: nn.Module) -> dict[str, nn.Parameter]:
    """Convolution weights that Algorithm 1 prunes: all but the first, by parameter name."""
    weights = {
        f"{name}.weight": module.weight
        for name, module in visual.named_modules()
        if isinstance(module, nn.Conv2d)
    }
    if FIRST not in weights:
        raise LabError("this is no CLIP ResNet tower: it has no 'conv1.weight'")
    return {name: weight for name, weight in weights.items() if name != FIRST}


def locate(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters that a tower's ``names`` mean in ``model``, whichever module holds the tower.

    Raises:
        LabError: no nested module has them all, or more than one has.
    """
    names, parameters = list(names), dict(model.named_parameters())
    if not names:
        return {}
    first = names[0]
    prefixes = [n.removesuffix(first) for n in parameters if f".{n}".endswith(f".{first}")]
    prefixes = [p for p in prefixes if all(p + name in parameters for name in names)]
    if len(prefixes) != 1:
        kind = f"{len(prefixes)} towers {prefixes}" if prefixes else "no tower"
        raise LabError(
            f"{kind} in this model with all of the {len(names)} weights named, such as {first!r}; "
            "were they named for another backbone?"
        )
    return {name: parameters[prefixes[0] + name] for name in names}


class Mask(Mapping[str, Tensor]):
    """An immutable mapping from parameter name to a bool tensor of the parameter's shape."""

    def __init__(self, tensors: Mapping[str, Tensor], **meta: str | int | float) -> None:
        self._tensors = {name: tensor.detach().cpu().bool() for name, tensor in tensors.items()}
        self.meta = {key: str(value) for key, value in meta.items()}
        if not self._tensors:
            raise LabError("a mask needs at least one tensor")

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self):
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        return (
            f"Mask({len(self)} tensors, {self.kept:,} of {self.total:,} kept, {self.density:.4f})"
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Mask)
            and self.keys() == other.keys()
            and all(torch.equal(self[name], other[name]) for name in self)
        )

    __hash__ = None

    def __and__(self, other: Mask) -> Mask:
        """Kept in both."""
        self._same_shapes({name: other[name] for name in other}, "the other mask")
        return Mask({name: self[name] & other[name] for name in self})

    @property
    def total(self) -> int:
        return sum(t.numel() for t in self.values())

    @property
    def kept(self) -> int:
        return sum(int(t.sum()) for t in self.values())

    @property
    def density(self) -> float:
        """Fraction of the prunable weights that is kept."""
        return self.kept / self.total

    def within(self, other: Mask) -> bool:
        """True if every weight kept here is kept in ``other`` (masks of one run are nested)."""
        return all(bool((~self[name] | other[name]).all()) for name in self)

    def layers(self) -> pd.DataFrame:
        """One row a layer: name, shape, weights, kept, density."""
        return pd.DataFrame(
            {
                "name": name.removesuffix(".weight"),
                "shape": "x".join(map(str, t.shape)),
                "weights": t.numel(),
                "kept": int(t.sum()),
                "density": float(t.float().mean()),
            }
            for name, t in self.items()
        )

    # --- made from weights ----------------------------------------------------------------------

    @classmethod
    def dense(cls, visual: nn.Module) -> Mask:
        """Everything kept."""
        return cls(
            {name: torch.ones_like(w, dtype=torch.bool) for name, w in prunable(visual).items()}
        )

    @classmethod
    def by_magnitude(cls, visual: nn.Module, keep: int, within: Mask | None = None) -> Mask:
        """The ``keep`` globally largest |w| (among those kept in ``within``), exactly that many.

        Ties go to the weight that comes first in the tower, so the mask is a function of the
        weights. Used for every round of Algorithm 1 and, in one shot, for ``oneshot``.
        """
        weights = prunable(visual)
        scores = torch.cat([w.detach().abs().flatten().float() for w in weights.values()])
        if within is not None:
            alive = torch.cat([within[name].flatten() for name in weights]).to(scores.device)
            scores = torch.where(alive, scores, -1.0)
        if not 0 < keep <= (len(scores) if within is None else within.kept):
            raise LabError(f"cannot keep {keep:,} of {len(scores):,} weights")
        return cls(_split(_top(scores, keep), weights))

    @classmethod
    def random_global(cls, visual: nn.Module, keep: int, seed: int = 0) -> Mask:
        """``keep`` weights drawn uniformly over the whole tower."""
        weights = prunable(visual)
        total = sum(w.numel() for w in weights.values())
        scores = torch.rand(total, generator=torch.Generator().manual_seed(seed))
        return cls(_split(_top(scores, keep), weights))

    @classmethod
    def random_layerwise(cls, like: Mask, seed: int = 0) -> Mask:
        """As many weights in each layer as ``like`` keeps, drawn uniformly within the layer."""
        generator = torch.Generator().manual_seed(seed)
        return cls(
            {
                name: _top(torch.rand(t.numel(), generator=generator), int(t.sum())).view(t.shape)
                for name, t in like.items()
            }
        )

    # --- put into a model -----------------------------------------------------------------------

    def find(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters that this mask speaks of, by mask name, in any nested module.

        Raises:
            LabError: a name is missing, ambiguous, or of another shape (nothing is changed).
        """
        found = locate(model, self)
        self._same_shapes(found, "the model")
        return found

    @torch.no_grad()
    def apply(self, model: nn.Module) -> int:
        """Set pruned weights to exactly 0 in place; returns how many tensors matched."""
        found = self.find(model)
        for name, parameter in found.items():
            parameter.mul_(self[name].to(parameter.device))
        return len(found)

    def keep(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        """Hold the mask through training: pruned weights are 0 again after every ``step``.

        One fused multiplication an update. Returns a handle; ``handle.remove()`` lets go.
        """
        parameters = list(self.find(model).values())
        masks: list[Tensor] = []

        @torch.no_grad()
        def hook(*_) -> None:
            if not masks or masks[0].device != parameters[0].device:
                masks[:] = [
                    torch.empty_like(p).copy_(t)
                    for t, p in zip(self.values(), parameters, strict=True)
                ]
            torch._foreach_mul_([p.data for p in parameters], masks)

        return optimizer.register_step_post_hook(hook)

    def verify(self, model: nn.Module) -> bool:
        """True if every pruned weight of the model is exactly 0."""
        return all(not p[~self[name].to(p.device)].any() for name, p in self.find(model).items())

    def _same_shapes(self, tensors: Mapping[str, Tensor], whose: str) -> None:
        for name, tensor in self.items():
            if name not in tensors or tensors[name].shape != tensor.shape:
                shape = tuple(tensors[name].shape) if name in tensors else "missing"
                raise LabError(
                    f"the mask's {name!r} is {tuple(tensor.shape)}, {whose}'s is {shape}; "
                    "was the mask made for another backbone?"
                )

    # --- on disk --------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write as safetensors, eight weights a byte, atomically."""
        path = Path(path)
        packed = {n: torch.from_numpy(np.packbits(t.numpy().reshape(-1))) for n, t in self.items()}
        shapes = json.dumps({name: list(t.shape) for name, t in self.items()})
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        save_file(
            packed, partial, metadata=self.meta | {"format": "opentrans-mask-1", "shapes": shapes}
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read what ``save`` wrote.

        Raises:
            LabError: missing, not safetensors, or not a mask of this lab.
        """
        try:
            with safe_open(path, framework="np") as file:
                meta = file.metadata() or {}
                packed = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise LabError(f"cannot read a mask from {path}: {error}") from error
        if meta.pop("format", None) != "opentrans-mask-1":
            raise LabError(f"{path} is no mask of this lab; make one with `Mask.save`")
        tensors = {}
        for name, shape in json.loads(meta.pop("shapes")).items():
            bits = np.unpackbits(packed[name], count=int(np.prod(shape)))
            tensors[name] = torch.from_numpy(bits.astype(bool)).view(shape)
        return cls(tensors, **meta)


def _top(scores: Tensor, keep: int) -> Tensor:
    """Exactly ``keep`` True at the largest scores; of equal ones the earliest."""
    if keep >= len(scores):
        return torch.ones_like(scores, dtype=torch.bool)
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = scores.kthvalue(len(scores) - keep + 1).values
    chosen = scores > threshold
    tied = torch.nonzero(scores == threshold).flatten()
    chosen[tied[: keep - int(chosen.sum())]] = True
    return chosen


def _split(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.cpu().split([w.numel() for w in like.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(like.items(), parts, strict=True)}
