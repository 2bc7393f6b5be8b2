"""The record of a run: parameters, sources, what it leaves; and the paper's own tables."""

from .found import collect, published, quoted, records, results_root, run_name
from .notebook import SWITCHES, code, defaults, given_in_types, place, read_notebook
from .paper import paper, paper_wide
from .parameters import OfParameters, parameters
from .results import (
    ASIDE,
    PROJECT,
    STAGE,
    Run,
    described,
    load,
    plain,
    put,
    read_table,
    revision,
    run_dir,
    run_key,
    runs_root,
    save_table,
    versions,
    writable_runs,
)
from .sources import absolute, data_files, identity, weights

__all__ = [
    "ASIDE",
    "OfParameters",
    "PROJECT",
    "Run",
    "STAGE",
    "SWITCHES",
    "absolute",
    "code",
    "collect",
    "data_files",
    "defaults",
    "described",
    "given_in_types",
    "identity",
    "load",
    "paper",
    "paper_wide",
    "parameters",
    "place",
    "plain",
    "published",
    "put",
    "quoted",
    "read_notebook",
    "read_table",
    "records",
    "results_root",
    "revision",
    "run_dir",
    "run_key",
    "run_name",
    "runs_root",
    "save_table",
    "versions",
    "weights",
    "writable_runs",
]
