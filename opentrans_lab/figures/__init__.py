"""Everything drawn: spectra, charts over runs, overlays, the explorer."""

from .explorer import explore
from .overlays import compare, overlay, verdicts

__all__ = ["compare", "explore", "overlay", "verdicts"]
