"""``opentrans-lab``: commands, nothing else."""

from .main import main

__all__ = ["main"]
