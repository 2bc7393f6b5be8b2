"""What runs say: tables beside the paper's, the five claims, one static site."""

from .claims import claim_table, freezing_verdict, gains, judged
from .listing import published_page
from .page import duration, number, run_page
from .side_by_side import as_csv, cells, side_by_side
from .site import build_report
from .tables import experiment, literal, summary

__all__ = [
    "as_csv",
    "build_report",
    "cells",
    "claim_table",
    "duration",
    "experiment",
    "freezing_verdict",
    "gains",
    "judged",
    "literal",
    "number",
    "published_page",
    "run_page",
    "side_by_side",
    "summary",
]
