"""CLIP ResNets and their words: towers, weights from wherever they are, the text tower."""

from .backbone import (
    MINI,
    RESNETS,
    Backbone,
    build_mini,
    embed,
    frozen_copy,
    load_backbone,
    mini_tokenizer,
    trunk,
)
from .text import TEMPLATES, ClassNames, best_name, checked_names, first_names, flat_names, readings
from .weights import fetch

__all__ = [
    "Backbone",
    "ClassNames",
    "MINI",
    "RESNETS",
    "TEMPLATES",
    "best_name",
    "build_mini",
    "checked_names",
    "embed",
    "fetch",
    "first_names",
    "flat_names",
    "frozen_copy",
    "load_backbone",
    "mini_tokenizer",
    "readings",
    "trunk",
]
