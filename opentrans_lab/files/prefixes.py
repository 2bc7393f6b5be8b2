"""Names of tensors in anybody's model or file: below which prefix, and standing for which weight.

Wrappers put prefixes before names ("module.", "backbone.clip_model.", "ema."). They are found by
the names that are looked for, and not from a list. torch is imported where it is needed: commands
that read no tensors start at once.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

_WITHIN = re.compile(r"(^|\.)(_orig_mod|_\w+_wrapped_module)(?=\.|$)")
_PARAMETRISED = re.compile(r"(^|\.)parametrizations\.(\w+)\.original\d*$")
_PARTS = {  # two endings of which a weight is computed, and what makes it a plain one again
    ("_orig", "_mask"): "torch.nn.utils.prune.remove",
    ("_orig", "_u"): "torch.nn.utils.remove_spectral_norm",
    ("_v", "_g"): "torch.nn.utils.remove_weight_norm",
}


def bare(name: str) -> str:
    """A name without what torch.compile, FSDP and checkpointing put in the midst of it."""
    return _WITHIN.sub("", name).removeprefix(".")


def parts(state: Mapping, above: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(dotted path, tensors that lie right there) of a checkpoint and all that is nested in it.

    What lies below a number is left out: that is an optimizer's state.
    """
    from torch import Tensor

    yield above, {bare(str(k)): v for k, v in state.items() if isinstance(v, Tensor)}
    for key, value in state.items():
        if isinstance(value, Mapping) and not isinstance(key, int):
            yield from parts(value, f"{above}{key}.")


def flatten(state: Mapping) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their dotted names ("state_dict.module.conv1.weight")."""
    return {bare(above + key): v for above, part in parts(state) for key, v in part.items()}


def prefixes(keys: Iterable[str], names: Collection[str]) -> Counter[str]:
    """How many of ``names`` lie below each prefix of ``keys``: "" or what ends with a dot."""
    counts: Counter[str] = Counter()
    for key in keys:
        at = 0
        while True:
            if key[at:] in names:
                counts[key[:at]] += 1
            if not (at := key.find(".", at) + 1):
                break
    return counts


def below(
    tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: object
) -> tuple[str, dict[str, Tensor]]:
    """(the prefix below which most of ``wanted`` lie, all tensors below it, without it).

    Of several such prefixes, the one with most shapes that agree; see :func:`choose`.
    """
    counts = prefixes(tensors, wanted)
    fits = {
        p: sum(tensors[p + k].shape == v.shape for k, v in wanted.items() if p + k in tensors)
        for p, count in counts.items()
        if count == max(counts.values())
    }
    prefix = choose(fits, source)
    return prefix, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def choose(counts: Mapping[str, int], source: object) -> str:
    """The prefix with the largest count; of equal ones the first that is no moving average.

    A warning then says which.
    """
    most = max(counts.values(), default=0)
    best = sorted((p for p, n in counts.items() if n == most), key=lambda p: "ema" in p.lower())
    if len(best) > 1 and most:
        warnings.warn(
            f"{source} holds as many weights under {', '.join(map(repr, best[1:]))} as under "
            f"{best[0]!r}, which are read; to read others, save them in a file of their own",
            stacklevel=3,
        )
    return best[0] if best else ""


def largest(state: Mapping, source: object, names: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors, as they act, of a checkpoint's part with most ``names``, or most matrices.

    A warning names parts beside it that hold weights of other names, which are left out.
    """
    found = {above: fold_pruned(part) for above, part in parts(state)}
    if names:
        counts = {p: max(prefixes(part, names).values(), default=0) for p, part in found.items()}
    else:
        counts = {p: sum(t.ndim > 1 for t in part.values()) for p, part in found.items()}
    chosen = choose(counts, source)
    known = {key.rpartition("module.")[2] for key in found[chosen]}
    others = [
        above.rstrip(".") for above, part in found.items()
        if above != chosen and any(
            t.ndim > 1 and k.endswith(".weight") and k.rpartition("module.")[2] not in known
            for k, t in part.items()
        )
    ]  # fmt: skip
    if others:
        warnings.warn(
            f"{source}: only {chosen.rstrip('.') or 'its top'!r} is read; {', '.join(others)} "
            "beside it is left out: save all of it as one state dict to keep it",
            stacklevel=3,
        )
    return found[chosen]


def computed(keys: Iterable[str]) -> dict[str, str]:
    """Weights that are not in ``keys`` but are computed from them: name -> what makes it plain."""
    found, keys = {}, set(keys)
    for key in keys:
        if match := _PARAMETRISED.search(key):
            name = key[: match.end(1)] + match[2]
            found[name] = f"torch.nn.utils.parametrize.remove_parametrizations(layer, {match[2]!r})"
        for (one, other), remedy in _PARTS.items():
            if key.endswith(other) and (name := key.removesuffix(other)) + one in keys:
                found[name] = f"{remedy}(layer, {name.rpartition('.')[2]!r})"
    return found


def fold_pruned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """With each ``x_orig`` and ``x_mask`` of torch.nn.utils.prune as the ``x`` that they act as."""
    import torch

    folded = {}
    for key, tensor in tensors.items():
        name = key.removesuffix("_orig")
        mask = tensors.get(f"{name}_mask") if name != key else None
        if mask is not None:  # not a product alone, which would keep NaN
            folded[name] = torch.where(mask != 0, tensor * mask.to(tensor.dtype), 0)
        elif not (key.endswith("_mask") and f"{key.removesuffix('_mask')}_orig" in tensors):
            folded[key] = tensor
    return folded
