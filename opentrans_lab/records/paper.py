"""The paper's own tables (``data/paper``), to stand beside ours."""

import pandas as pd

from ..errors import LabError
from ..files import shipped
from .results import read_table


def paper(name: str) -> pd.DataFrame:
    """One of the paper's tables in tidy form (``data/paper/<name>.csv``: one number a row).

    Raises:
        LabError: no such table.
    """
    path = shipped(f"data/paper/{name}.csv")
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.csv")))
        raise LabError(f"the paper's {name!r} is not in data/paper; choose one of: {known}")
    return read_table(path)


def paper_wide(name: str) -> pd.DataFrame:
    """A paper's table as it is printed: a line a system, a column a data set or metric."""
    table = paper(name)
    table["column"] = (
        table["dataset"].fillna(table["metric"]) if "dataset" in table else table["metric"]
    )
    about = {"dataset", "metric", "value", "unit", "source", "column", "backbone", "training_set"}
    lines = [c for c in table if c not in about]
    table[lines] = table[lines].fillna("")
    return table.pivot_table("value", lines, "column", sort=False)
