"""OpenTrans Lab: transferable and principled efficiency for open-vocabulary segmentation.

    import opentrans_lab
    opentrans_lab.segment("photo.jpg", ["zebra", "grass", "sky"]).overlay

What people come for, each from the room that holds it (docs/house.md shows all rooms).
"""

import os
from importlib import import_module

__version__ = "0.1.0"
_FACE = {
    "segment": "evaluation",
    "load_backbone": "clip",
    "Mask": "masks",
    "prune": "pruning",
    "layer_alphas": "alpha",
    "select_layers": "finetuning",
    "freeze": "finetuning",
    "build": "heads",
    "evaluate": "evaluation",
    "cost": "costs",
}
__all__ = [*_FACE]

# The threads of torch's OpenMP (libgomp, in its wheels) wait for work by spinning for milliseconds,
# and where the machine does anything else they take the cores from each other: a step of L_KD took
# ten times as long. A spin as short as this hands over to the next operation all the same. It must
# be said before torch is loaded; your own setting wins.
if not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
    os.environ["GOMP_SPINCOUNT"] = "1000"


def __getattr__(name: str):
    """A name of the face when it is asked for, so that --help need not wait for torch."""
    if name in _FACE:
        return getattr(import_module(f".{_FACE[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *_FACE]
