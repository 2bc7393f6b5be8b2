"""OpenTrans Lab: transferable and principled efficiency for open-vocabulary segmentation.

    import opentrans_lab
    opentrans_lab.segment("photo.jpg", ["zebra", "grass", "sky"]).overlay
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """``segment`` when it is asked for: a command such as --help shall not wait for torch."""
    if name == "segment":
        from .evaluation.segment import segment

        return segment
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
