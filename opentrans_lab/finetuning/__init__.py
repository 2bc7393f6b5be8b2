"""Fine-tune only what is under-trained: choose layers, freeze them."""

from .finetune import SELECTIONS, STAGES, freeze, hold_norms, select_layers, stage_of, unfreeze

__all__ = ["SELECTIONS", "STAGES", "freeze", "hold_norms", "select_layers", "stage_of", "unfreeze"]
