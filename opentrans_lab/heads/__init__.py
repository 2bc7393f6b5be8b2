"""Segmentation frameworks on a CLIP backbone, one file each; ``frameworks`` lists them."""
