"""mIoU, panoptic quality, one picture in any words, and whether a data set is whole."""

from .datacheck import check
from .evaluate import Evaluation, confusion, evaluate, evaluating, predict
from .measure import measure
from .panoptic import evaluate_panoptic
from .segment import Segmentation, fitted, newest, open_model, read_picture, segment

__all__ = [
    "Evaluation",
    "Segmentation",
    "check",
    "confusion",
    "evaluate",
    "evaluate_panoptic",
    "evaluating",
    "fitted",
    "measure",
    "newest",
    "open_model",
    "predict",
    "read_picture",
    "segment",
]
