"""One static site from all runs: cards with numbers, tables and figures, and the notebooks' pages.

Everything is copied into the site, so the folder can be zipped, mailed or put on any web server.
"""

import shutil
import tempfile
from datetime import datetime
from itertools import groupby
from pathlib import Path

import nbformat
import pandas as pd
from pandas.errors import EmptyDataError

from ..errors import LabError
from ..files import at_home, href, shipped, writable_folder
from ..records import (
    defaults,
    put,
    read_table,
    records,
    revision,
    run_name,
    runs_root,
    writable_runs,
)
from .page import (
    BACK,
    TO_NOTEBOOK,
    TO_RUN,
    changed_parameters,
    heading,
    is_mini_lab,
    number,
    render,
)

OURS = 'content="opentrans-lab"'  # in every page of ours: such a folder may be replaced
CLAIMS = "claims"  # a run's table that the site begins with, of several the newest
WIDE = 24  # letters of a parameter that still stands in a table of runs
ROWS, OPEN_ROWS = 60, 14  # of a table: shown at most, and shown without a click
OPEN_METRICS = 24  # of a run: shown without a click


def build_report(out: Path | None = None) -> Path:
    """Write the site of all finished runs and return its ``index.html``.

    Args:
        out: folder of the site, ``runs/report`` by default. An older report there is replaced
            when the new one is complete.

    Raises:
        LabError: ``out`` holds something that is not a report, or a run's file is damaged.
    """
    out = at_home(out) if out else writable_runs() / "report"
    index = out / "index.html"
    if out.exists() and not (index.is_file() and OURS.encode() in index.read_bytes()[:2000]):
        raise LabError(f"{out} exists and is no report; name another folder or remove it")
    writable_folder(out.parent, "--out").mkdir(parents=True, exist_ok=True)
    site = Path(tempfile.mkdtemp(prefix=".report-", dir=out.parent))
    try:
        _write(site)
        site.chmod(0o755)
        put(site, out, index.is_file)
    finally:
        shutil.rmtree(site, ignore_errors=True)
    return index


def _write(site: Path) -> None:
    found = records()
    failed = [_failed(p) for p in sorted(runs_root().glob("[!.]*/[!.]*/failed.ipynb"))]
    names = {record["notebook"] for _, record in found} | {f["notebook"] for f in failed}
    pages = {
        href(run_name(folder)): f"{_name(record)}/index.html" if (folder / "report.html").is_file()
        else f"index.html#{_name(record)}"
        for folder, record in found
    }  # fmt: skip
    grouped = {k: list(g) for k, g in groupby(found, key=lambda r: r[1]["notebook"])}
    lost = {name: [f for f in failed if f["notebook"] == name] for name in names}
    sections = [
        _section(name, grouped.get(name, []), lost[name], site, pages) for name in sorted(names)
    ]
    judged = [
        {"run": run, "frame": table["frame"]}
        for section in sections
        for run in section["runs"]
        for table in run["tables"]
        if table["name"] == CLAIMS
    ]
    page = render(
        "index.html.j2",
        title="OpenTrans Lab",
        answer=judged[-1] if judged else None,
        sections=sections,
        count=len(found),
        published=sum(not folder.is_relative_to(runs_root()) for folder, _ in found),
        wall=sum(record["wall_s"] for _, record in found),
        mini_lab=any(is_mini_lab(record["parameters"]) for _, record in found),
        made=datetime.now().strftime("%Y-%m-%d %H:%M"),
        revision=revision(),
    )
    ids = {href(name) for name in names}
    page = TO_NOTEBOOK.sub(lambda link: _section_link(link[1], ids), page)
    _save(page, site / "index.html")


def _section_link(notebook: str, names: set[str], index: str = "") -> str:
    """To a notebook's section, if the site has one."""
    return f'href="{index}#{notebook}"' if notebook in names else ""


def _save(page: str, path: Path) -> None:
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def _name(record: dict) -> str:
    """A run's name in links."""
    return href(f"{record['notebook']}/{record['key']}")


def _section(
    name: str,
    found: list[tuple[Path, dict]],
    failed: list[dict],
    site: Path,
    pages: dict[str, str],
) -> dict:
    """What the index shows of one notebook."""
    title, question = name, ""
    notebooks = [shipped(f"notebooks/{name}.ipynb")]  # published runs come without theirs
    for path in notebooks + [folder / "executed.ipynb" for folder, _ in found]:
        if path.is_file():
            title, question = heading(nbformat.read(path, as_version=4), name)
    runs = [_card(folder, record, site, pages) for folder, record in found]
    return {
        "id": href(name),
        "title": title,
        "question": question,
        "runs": runs,
        "compared": _compared(runs) if len(runs) > 1 else None,
        "failed": failed,
    }


def _card(folder: Path, record: dict, site: Path, pages: dict[str, str]) -> dict:
    """Copy a run's page, figures and tables into the site and say where they are.

    ``pages`` are where the site shows each run, which pages that speak of others link to.
    """
    target = site / record["notebook"] / record["key"]
    target.mkdir(parents=True)
    place = _name(record)
    page = folder / "report.html"
    if page.is_file():
        back = '<a class="button" href="../../index.html">All runs</a>'
        text = page.read_text(encoding="utf-8").replace(BACK, back)
        text = TO_RUN.sub(lambda link: f'href="../../{pages.get(link[1], "index.html")}"', text)
        names = {name.partition("/")[0] for name in pages}
        text = TO_NOTEBOOK.sub(lambda x: _section_link(x[1], names, "../../index.html"), text)
        _save(text, target / "index.html")
    metrics = _flat(record["metrics"])
    figures, tables = sorted(folder.glob("[!.]*.png")), sorted(folder.glob("[!.]*.csv"))
    for path in (*figures, *tables):
        shutil.copy2(path, target / path.name)
    return {
        "id": place,
        "record": record,
        "mini_lab": is_mini_lab(record["parameters"]),
        "changed": _changed(folder, record),
        "metrics": metrics,
        "short": len(metrics) <= OPEN_METRICS,
        "page": f"{place}/index.html" if page.is_file() else "",
        "figures": [{"name": _words(p), "href": f"{place}/{href(p.name)}"} for p in figures],
        "tables": [_table(p, f"{place}/{href(p.name)}") for p in tables],
    }


def _changed(folder: Path, record: dict) -> dict:
    """What differs from the defaults: its own, or those of the notebook as it is now."""
    executed = folder / "executed.ipynb"
    if executed.is_file():
        return changed_parameters(nbformat.read(executed, as_version=4))
    path = shipped(f"notebooks/{record['notebook']}.ipynb")
    usual = defaults(path) if path.is_file() else {}
    return {k: v for k, v in record["parameters"].items() if k not in usual or usual[k] != v}


def _flat(metrics: dict) -> dict:
    """Nested metrics under dotted names; lists are left to the tables."""
    flat = pd.json_normalize(metrics).to_dict("records")[0] if metrics else {}
    return {name: value for name, value in flat.items() if not isinstance(value, list)}


def _table(path: Path, href: str) -> dict:
    try:
        frame = read_table(path)
    except EmptyDataError:
        frame = pd.DataFrame()
    return {
        "name": _words(path),
        "href": href,
        "frame": frame.head(ROWS),
        "short": len(frame) <= OPEN_ROWS,
        "left_out": max(0, len(frame) - ROWS),
    }


def _words(path: Path) -> str:
    return path.stem.replace("_", " ")


def _compared(runs: list[dict]) -> pd.DataFrame:
    """Runs of one notebook side by side: the parameters that vary, then their common metrics.

    Lists of words would push all else out of sight; each run's own card has them.
    """
    parameters = pd.DataFrame([run["record"]["parameters"] for run in runs])
    texts = parameters.astype(str)
    short = texts.apply(lambda column: column.str.len().max()) <= WIDE
    varying = parameters.loc[:, (texts.nunique() > 1) & short]
    metrics = pd.DataFrame([run["metrics"] for run in runs]).dropna(axis=1, how="all")
    return pd.concat([varying, metrics.iloc[:, :10].map(number)], axis=1)


def _failed(path: Path) -> dict:
    """A failed run from the notebook that it left."""
    nb = nbformat.read(path, as_version=4)
    errors = [
        out for cell in nb.cells for out in cell.get("outputs", []) if out.output_type == "error"
    ]
    return {
        "notebook": path.parent.parent.name,
        "changed": changed_parameters(nb),
        "error": f"{errors[-1].ename}: {errors[-1].evalue}" if errors else "its kernel died",
        "where": path.relative_to(runs_root()).as_posix(),
    }
