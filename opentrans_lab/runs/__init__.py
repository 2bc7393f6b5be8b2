"""Headless: grids of notebooks, on one machine or many, planned, resumed, published."""

from .batch import outcome, run_grid, run_notebook
from .campaign import campaign
from .estimate import step_macs
from .grids import load_grid
from .plan import ASSUMPTIONS, describe_plan, measured, plan, reference

__all__ = [
    "ASSUMPTIONS",
    "campaign",
    "describe_plan",
    "load_grid",
    "measured",
    "outcome",
    "plan",
    "reference",
    "run_grid",
    "run_notebook",
    "step_macs",
]
