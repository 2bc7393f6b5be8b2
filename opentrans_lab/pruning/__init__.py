"""Prune once, transfer everywhere: Algorithm 1, L_KD, and the rows that are compared."""

from .imp import PruneConfig, distill, prune, wanda_scores
from .losses import GREY, cap_regions, crop_regions, kd_loss, region_images
from .teacher import TARGETS, Teacher
from .transfer import ROWS, TRAINED, recalibrate, row_mask

__all__ = [
    "GREY",
    "PruneConfig",
    "ROWS",
    "TARGETS",
    "TRAINED",
    "Teacher",
    "cap_regions",
    "crop_regions",
    "distill",
    "kd_loss",
    "prune",
    "recalibrate",
    "region_images",
    "row_mask",
    "wanda_scores",
]
