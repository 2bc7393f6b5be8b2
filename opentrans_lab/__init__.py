"""OpenTrans Lab: transferable and principled efficiency for open-vocabulary segmentation."""

__version__ = "0.1.0"
