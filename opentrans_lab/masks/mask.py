"""``Mask``: which weights of a CLIP tower live. A value that travels between frameworks.

A mask is a dict of boolean tensors keyed by the visual tower's parameter names ("layer1.0.conv1
.weight"). True means kept. *Density* is the fraction kept: the paper's "sparsity s = 10 %" is
density 0.1. The first stem convolution is never pruned and is not in the mask (54 of RN50's 55).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import LabError
from ..files import at_home, atomic_path, check_file, flatten, pack_bits, unpack_bits
from .authors import read_authors, write_authors
from .keeping import Holding
from .topk import count, top_k
from .tower import Match, locate, prunable

FORMAT = "opentrans-mask-1"


class Mask(Mapping[str, Tensor]):
    """An immutable mapping from parameter name to a bool tensor of the parameter's shape."""

    def __init__(self, tensors: Mapping[str, Tensor], **meta: str | int | float) -> None:
        self._tensors = {
            name: tensor.detach().to("cpu", torch.bool, copy=True)
            for name, tensor in tensors.items()
        }
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
        self._same_shapes(other, "the other mask")
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
        self._same_shapes(other, "the other mask")
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
    def by_magnitude(cls, visual: nn.Module, keep: float, within: Mask | None = None) -> Mask:
        """The ``keep`` globally largest |w| (among those kept in ``within``), exactly that many.

        Ties go to the weight that comes first in the tower, so the mask is a function of the
        weights. Used for every round of Algorithm 1 and, in one shot, for ``oneshot``. A ``keep``
        such as ``0.1 * total`` is rounded.

        Raises:
            LabError: ``keep`` is not between 1 and the number of weights, or is a share of them.
        """
        weights = prunable(visual)
        if (keep := count(keep, sum(w.numel() for w in weights.values()))) < 1:
            raise LabError(f"cannot keep {keep:,} weights: a mask keeps at least one")
        if within is not None:
            within._same_shapes(weights, "the tower")
        alive = None if within is None else [within[name] for name in weights]
        best = top_k(weights.values(), keep, alive, score=lambda w: w.abs().float())
        return cls(dict(zip(weights, best, strict=True)))

    @classmethod
    def by_score(cls, scores: Mapping[str, Tensor], like: Mask) -> Mask:
        """As many weights in each layer as ``like`` keeps: those with the largest ``scores``.

        With :func:`opentrans_lab.pruning.imp.wanda_scores` this is a Wanda-like peer of
        ``random_layerwise``.
        """
        return cls({name: top_k([scores[name].cpu()], int(t.sum()))[0] for name, t in like.items()})

    @classmethod
    def random_global(cls, visual: nn.Module, keep: float, seed: int = 0) -> Mask:
        """``keep`` weights drawn uniformly over the whole tower."""
        weights = prunable(visual)
        scores = _uniform(weights, seed).values()
        return cls(dict(zip(weights, top_k(scores, keep), strict=True)))

    @classmethod
    def random_layerwise(cls, like: Mask, seed: int = 0) -> Mask:
        """As many weights in each layer as ``like`` keeps, drawn uniformly within the layer."""
        return cls.by_score(_uniform(like, seed), like)

    # --- put into a model -----------------------------------------------------------------------

    def find(
        self,
        model: nn.Module | Mapping[str, Tensor],
        prefix: str | None = None,
        partial: bool = False,
    ) -> Match:
        """The tensors of ``model`` that this mask speaks of, see :func:`locate`."""
        return locate(model, self, prefix, partial)

    @torch.no_grad()
    def apply(
        self,
        model: nn.Module | Mapping[str, Tensor],
        prefix: str | None = None,
        partial: bool = False,
    ) -> Match:
        """Set pruned weights to exactly 0, in place, wherever the model keeps its CLIP tower.

        Args:
            model: any module that holds the tower (FC-CLIP's ``backbone.clip_model.visual``, Han
                et al.'s ``backbone``), or its state dict.
            prefix: of the tower; found by the parameters' names when it is None.
            partial: go on if only some of the mask's tensors are there.

        Returns:
            what matched; ``str`` of it says how many and where.
        Raises:
            LabError: a name is missing, ambiguous, or of another shape; nothing is changed.
        """
        match = self.find(model, prefix, partial)
        for name, tensor in match.tensors.items():
            tensor.masked_fill_(~self[name].to(tensor.device), 0)
        return match

    def keep(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        prefix: str | None = None,
        partial: bool = False,
    ) -> Holding:
        """Hold the mask through training: pruned weights are 0 again after every ``step``.

        In anybody's training loop, whatever comes: a gradient that is infinite, another optimizer,
        replaced parameters, a deep copy of the model, ``load_state_dict`` (which warns if it brings
        weights that are pruned). The layers hold it, until ``remove()`` of what is returned or
        another mask; call it again where layers are replaced.

        Raises:
            LabError: as :func:`locate`, no optimizer of torch, or one of other parameters.
        """
        if not isinstance(model, nn.Module):
            raise LabError(f"give the module that is trained, not {type(model).__name__}")
        match = self.find(model, prefix, partial)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise LabError(f"give a torch.optim.Optimizer, not {type(optimizer).__name__}")
        trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
        wanted = [p for p in match.tensors.values() if p.requires_grad]
        if wanted and not any(id(p) in trained for p in wanted):
            raise LabError(
                "this optimizer trains none of the tower's weights; is it of this model, and are "
                "their parameters in a group of it?"
            )
        return Holding(model, {weight: ~self[name] for name, weight in match.tensors.items()})

    def verify(self, model: nn.Module | Mapping[str, Tensor], prefix: str | None = None) -> bool:
        """True if every pruned weight of the model is exactly 0."""
        found = self.find(model, prefix).tensors
        return all(not p[~self[name].to(p.device)].any() for name, p in found.items())

    def _same_shapes(self, tensors: Mapping[str, Tensor], whose: str) -> None:
        for name in (*self, *(name for name in tensors if name not in self)):
            shapes = [tuple(t[name].shape) if name in t else "missing" for t in (self, tensors)]
            if shapes[0] != shapes[1]:
                raise LabError(
                    f"the mask's {name!r} is {shapes[0]}, {whose}'s is {shapes[1]}; "
                    "was the mask made for another backbone?"
                )

    # --- on disk --------------------------------------------------------------------------------

    def save(self, path: str | Path) -> None:
        """Write as safetensors, eight weights a byte, atomically."""
        shapes = json.dumps({name: list(t.shape) for name, t in self.items()})
        about = self.meta | {"format": FORMAT, "shapes": shapes}
        with atomic_path(path) as partial:
            save_file({name: pack_bits(t) for name, t in self.items()}, partial, metadata=about)

    @classmethod
    def load(cls, path: str | Path) -> Mask:
        """Read what ``save`` wrote.

        Raises:
            LabError: missing, not safetensors, or not a mask of this lab.
        """
        try:
            check_file(path := at_home(path))
            with safe_open(path, framework="pt") as file:
                meta = file.metadata() or {}
                packed = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise LabError(f"cannot read a mask from {path}: {error}") from error
        if meta.pop("format", None) != FORMAT:
            raise LabError(
                f"{path} is no mask of this lab; make one with `Mask.save`, or convert the authors'"
                " with `opentrans-lab mask convert`"
            )
        try:
            shapes = json.loads(meta.pop("shapes"))
            return cls({name: unpack_bits(packed[name], shapes[name]) for name in shapes}, **meta)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise LabError(
                f"{path} is a damaged mask ({error!r}); copy or make it again"
            ) from error

    @classmethod
    def from_authors(cls, path: str | Path) -> Mask:
        """The mask of the authors' ``seg_backbone_imp{k}.pth``, see ``authors``.

        Raises:
            LabError: unreadable, holds more than tensors, or no mask of torch.nn.utils.prune.
        """
        return cls(read_authors(path), source=Path(path).name)

    def to_authors(
        self, model: nn.Module | Mapping[str, Tensor], path: str | Path, prefix: str | None = None
    ) -> None:
        """Write mask and the tower's weights as the authors' code expects them.

        Raises:
            LabError: the model is of another backbone.
        """
        match = self.find(model, prefix)
        state = model.state_dict() if isinstance(model, nn.Module) else model
        under = len(match.prefix)
        tower = {k[under:]: v for k, v in flatten(state).items() if k.startswith(match.prefix)}
        write_authors(tower, self, path)


def _uniform(like: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Random scores: float32, and so the same ones, whatever torch's default dtype is."""
    generator = torch.Generator().manual_seed(seed)
    about = {"generator": generator, "dtype": torch.float32}
    return {name: torch.rand(t.shape, **about) for name, t in like.items()}
