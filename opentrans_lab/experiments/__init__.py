"""What notebooks call: cached stages on one set-up, and the tables of each notebook."""

from .devices import check_shares
from .ensemble import part_table
from .gallery import TITLES
from .lab import Lab, stage_folder
from .mini_clip import MiniConfig, train_mini, zero_shot
from .recipe import Recipe, framework_options
from .rows import segment_params, segment_stage, transfer_table
from .selection import selection_table, speed_table, together
from .starts import distill_params, prune_params, prune_stage

__all__ = [
    "Lab",
    "MiniConfig",
    "Recipe",
    "TITLES",
    "check_shares",
    "distill_params",
    "framework_options",
    "part_table",
    "prune_params",
    "prune_stage",
    "segment_params",
    "segment_stage",
    "selection_table",
    "speed_table",
    "stage_folder",
    "together",
    "train_mini",
    "transfer_table",
    "zero_shot",
]
