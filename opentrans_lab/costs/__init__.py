"""Parameters and MACs counted, the paper's recipes, and what steps and zeros cost when measured."""

from .cost import SIZE, TRAINING_SIZE, cost, printed_cells, training_cost
from .counter import meta_backbone, meta_framework, trace
from .payoff import disk_sizes, payoff, save_sparse
from .speed import kept_for_backward, savings, step_costs

__all__ = [
    "SIZE",
    "TRAINING_SIZE",
    "cost",
    "disk_sizes",
    "kept_for_backward",
    "meta_backbone",
    "meta_framework",
    "payoff",
    "printed_cells",
    "save_sparse",
    "savings",
    "step_costs",
    "trace",
    "training_cost",
]
