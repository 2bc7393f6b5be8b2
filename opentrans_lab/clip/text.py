"""Words to embeddings: class names, prompt templates, and CLIP's frozen text tower."""

from __future__ import annotations

import reprlib
import warnings
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..errors import LabError, shown

_GROUNDS = ("grass", "sand", "water", "brick", "sky", "road", "snow", "wood")  # scenes.STUFF

_SIZES = ("small", "medium", "large")

TEMPLATES: dict[str, list[str]] = {
    "bare": ["{}"],
    "photo": ["a photo of a {}."],
    "vild": [  # of ViLD (Gu et al., ICLR 2022), the 14 that FC-CLIP and others use
        "a photo of a {}.",
        "This is a photo of a {}",
        "a photo of a {} in the scene",
        *(f"There is {article} {{}} in the scene" for article in ("a", "the")),
        *(f"{start} a {size} {{}}." for start in ("a photo of", "This is a photo of")
          for size in _SIZES),
        *(f"There is a {size} {{}} in the scene." for size in _SIZES),
    ],
    "scenes": ["a {}", *(f"a {{}} on {ground}" for ground in _GROUNDS)],
}
"""Sets of prompt templates by name; ``{}`` stands for the class name."""

ClassNames = Sequence[str | Sequence[str]]
"""A vocabulary: for each class one name, or several names of the same thing."""

BATCH = 256  # prompts a pass: bounds the memory, however many names there are
CACHED = 32  # vocabularies remembered
LEAST = 32  # tokens that the shortest of our CLIPs reads, the mini; OpenAI's read 77


def find_templates(templates: str | Sequence[str]) -> tuple[str, ...]:
    """A name in ``TEMPLATES``, or templates themselves, as a tuple of templates.

    Raises:
        LabError: unknown name, no template, or one without ``{}``.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise LabError(
                f"unknown templates {templates!r}; use one of {', '.join(TEMPLATES)}, or a list "
                "such as ['a photo of a {}.']"
            )
        templates = TEMPLATES[templates]
    wrong = [template for template in templates if "{}" not in template]
    if wrong or not templates:
        raise LabError(f"templates need '{{}}' for the class name, {wrong or templates!r} has none")
    return tuple(templates)


def flat_names(class_names: ClassNames) -> tuple[tuple[str, ...], list[int]]:
    """(all names in a row, how many each class has).

    Raises:
        LabError: no class, a bare string instead of a list of names, or a class without a name.
    """
    if isinstance(class_names, str) or not hasattr(class_names, "__len__") or not len(class_names):
        raise LabError(f"class names must be a list with at least one name, got {class_names!r}")
    try:
        groups = [(c,) if isinstance(c, str) else tuple(c) for c in class_names]
    except TypeError as error:
        raise LabError(f"class names are texts or lists of texts, got {class_names!r}") from error
    if wrong := [name for group in groups for name in group if not isinstance(name, str)]:
        raise LabError(f"class names are texts or lists of texts, got {wrong[0]!r}")
    if () in groups:
        raise LabError(f"class {groups.index(())} has no name; give each class at least one")
    return tuple(name for group in groups for name in group), [len(group) for group in groups]


def first_names(class_names: ClassNames) -> list[str]:
    """The default name of each class."""
    return [name if isinstance(name, str) else name[0] for name in class_names]


def readings(names: Sequence[str]) -> list[tuple[int, ...]]:
    """What CLIP reads of each name in a prompt, as tokens: equal where it cannot tell two apart.

    Its tokenizer evens out case, blanks, Unicode forms, typographic marks and HTML entities.
    """
    from open_clip.tokenizer import tokenize  # here, as it takes seconds and few tables need it

    rows = tokenize([f"a photo of a {name}" for name in names], LEAST).tolist()
    return [tuple(row[: row.index(max(row))]) for row in rows]  # the tower stops at the end token


def checked_names(class_names: ClassNames) -> tuple[str, ...]:
    """The first name of each class of a vocabulary in which a pixel can be any of them.

    Raises:
        LabError: no names, an empty one, one that is not in UTF-8, or two that CLIP reads alike.
    """
    names = flat_names(class_names)[0]
    if wrong := [name for name in names if name != shown(name)]:
        raise LabError(f"the name {wrong[0]!r} is not in UTF-8; write it so")
    known = {readings([""])[0]: ""}
    for name, read in zip(names, readings(names), strict=True):
        if read not in known:
            known[read] = name
        elif other := known[read]:
            raise LabError(
                f"the name {reprlib.repr(other.strip().lower())} is there twice: CLIP reads "
                f"{reprlib.repr(other)} and {reprlib.repr(name)} alike (case, blanks, marks and "
                f"what is beyond {LEAST} tokens do not count); rename or drop one"
            )
        else:
            raise LabError(f"an empty name means nothing; leave {name!r} out")
    return tuple(first_names(class_names))


def best_name(scores: Tensor, sizes: list[int], dim: int) -> Tensor:
    """Scores of names -> scores of classes along ``dim``: the maximum over the names of a class."""
    if len(sizes) == scores.shape[dim]:
        return scores
    return torch.stack([part.amax(dim) for part in scores.split(sizes, dim)], dim)


class TextEncoder:
    """CLIP's text tower, frozen, with a cache. Not an ``nn.Module`` on purpose.

    Held by a module it adds no parameter and no key to its ``state_dict``, and ``copy.deepcopy``
    shares it: teacher and student read the same words.

    Args:
        clip: open_clip's ``CLIP``, of which only ``encode_text`` is used. It is taken over:
            put in eval mode and frozen, and moved to where embeddings are asked for.
        tokenizer: texts -> (N, context_length) int64; longer texts are cut.
    """

    def __init__(self, clip: nn.Module, tokenizer: Callable[[list[str]], Tensor]) -> None:
        self.clip = clip.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self._cache: dict[tuple, Tensor] = {}

    def __deepcopy__(self, memo: dict) -> TextEncoder:
        return self

    def __call__(
        self, names: Sequence[str], templates: str | Sequence[str], device: torch.device
    ) -> Tensor:
        """Text embeddings (C, D) float32 on ``device``, unit length, without gradient.

        Each prompt's embedding is normalised, those of a name are averaged, and the mean is
        normalised again. Computed once for each tuple of names and templates.

        Raises:
            LabError: no names, a bare string instead of a list of names, or a wrong template.
        """
        if isinstance(names, str) or not len(names):
            raise LabError(f"class names must be a list with at least one name, got {names!r}")
        key = (tuple(names), find_templates(templates), torch.device(device))
        if key not in self._cache:
            if len(self._cache) == CACHED:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = self._encode(*key)
        return self._cache[key].clone()  # a copy: in-place arithmetic must not spoil the cache

    @torch.no_grad()
    def _encode(
        self, names: tuple[str, ...], templates: tuple[str, ...], device: torch.device
    ) -> Tensor:
        self.clip.to(device)
        step = max(1, BATCH // len(templates))
        parts, written = [], {}  # name by what is read of it
        # Never under the caller's autocast: what is cached must not depend on who asked first.
        with torch.autocast(device.type, enabled=False):
            for low in tqdm(range(0, len(names), step), "text embeddings", delay=3, leave=False):
                some = names[low : low + step]
                prompts = [t.replace("{}", name) for name in some for t in templates]
                tokens = self.tokenizer(prompts)  # (c·T, L)
                for name, read in zip(some, tokens.view(len(some), -1).tolist(), strict=True):
                    if (other := written.setdefault(tuple(read), name)) != name:
                        warnings.warn(f"CLIP reads {other!r} and {name!r} alike", stacklevel=5)
                one = self.clip.encode_text(tokens.to(device), normalize=True)  # (c·T, D)
                parts.append(F.normalize(one.view(len(some), len(templates), -1).mean(1), dim=-1))
        return torch.cat(parts)
