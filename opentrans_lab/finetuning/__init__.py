"""Fine-tune only what is under-trained: choose layers, freeze them."""

from .freeze import freeze, hold_norms, unfreeze
from .select import SELECTIONS, STAGES, select_layers, stage_of

__all__ = ["SELECTIONS", "STAGES", "freeze", "hold_norms", "select_layers", "stage_of", "unfreeze"]
