"""Which layers are well trained, judged from their weights alone: spectra, fits, tables."""

from .alphas import (
    AUTHORS_FROZEN,
    Spectrum,
    compare_authors,
    layer_alphas,
    layer_spectra,
    sensitivity,
)
from .esd import RESHAPES, esd, mp_edge, spectra
from .layers import layers
from .tailfit import RULES, fit_alpha

__all__ = [
    "AUTHORS_FROZEN",
    "RESHAPES",
    "RULES",
    "Spectrum",
    "compare_authors",
    "esd",
    "fit_alpha",
    "layer_alphas",
    "layer_spectra",
    "layers",
    "mp_edge",
    "sensitivity",
    "spectra",
]
