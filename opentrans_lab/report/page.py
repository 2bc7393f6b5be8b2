"""HTML pages that need no network: one look for the report's index and for every executed notebook.

Formulas become MathML, which browsers draw by themselves; figures are embedded; code is folded.
"""

import os
import re
from functools import cache
from html import escape, unescape
from pathlib import Path

import nbformat
from jinja2 import Environment, PackageLoader, pass_context
from latex2mathml.converter import convert
from nbconvert.exporters import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath

from ..files import href, linked

MINI_LAB = "mini lab – procedural scenes, not COCO"
WIDGET = "application/vnd.jupyter.widget-view+json"
BACK = "<!-- back -->"  # the report puts its link to the index here
TO_RUN = re.compile(r'data-run="([^"]*)" href="([^"]*)"')  # a link to a run from a notebook's table
TO_NOTEBOOK = re.compile(r'data-notebook="([^"]*)"')  # the prose's link to another notebook
BESIDE = re.compile(r'<a href="(?!#|/|[a-z]+:)([^"]*)"')  # to a file beside the notebook


def is_mini_lab(parameters: dict) -> bool:
    """Whether a run's numbers come from the procedural scenes and must be labelled so."""
    return parameters.get("backbone") == "mini" or parameters.get("dataset") == "scenes"


def number(value) -> str:
    """A metric for readers: thousands grouped, four digits; a dash for what is not there."""
    if value is None or value != value:
        return "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int) or (value.is_integer() and abs(value) < 1e15):
        return f"{int(value):,}"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def duration(seconds: float) -> str:
    """Seconds as people say them: "42 s", "3 min 05 s", "2 h 10 min"."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


@cache
def _environment() -> Environment:
    loader = PackageLoader("opentrans_lab.report", "site")
    env = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    env.filters |= {"number": number, "duration": duration}
    env.globals |= {"MINI_LAB": MINI_LAB, "BACK": BACK}
    return env


def render(template: str, **values) -> str:
    """One of ``site/*.html.j2``, filled in."""
    return _environment().get_template(template).render(**values)


def heading(nb: nbformat.NotebookNode, default: str) -> tuple[str, str]:
    """The notebook's title and, as HTML, the paragraph under it."""
    text = next((c.source for c in nb.cells if c.cell_type == "markdown"), "")
    match = re.match(r"#\s+(.+?)\s*(?:\n+([^#\n|].*?))?(?:\n\s*\n|\Z)", text, re.S)
    if not match:
        return default, ""
    return match[1].splitlines()[0], _markdown(match[2] or "")


def run_page(folder: Path, record: dict) -> str:
    """The page of one run: its ``executed.ipynb`` with figures inside and code folded away."""
    nb = nbformat.read(folder / "executed.ipynb", as_version=4)
    title, _ = heading(nb, record["notebook"])
    return render(
        "run.html.j2",
        title=title,
        record=record,
        changed=changed_parameters(nb),
        mini_lab=is_mini_lab(record["parameters"]),
        body=TO_RUN.sub(lambda link: _from(folder, link), _body(nb)),
    )


def _from(folder: Path, link: re.Match) -> str:
    """A link that the kernel, which ran in this very folder, made: from ``folder`` instead."""
    page = linked(unescape(link[2]))
    return f'data-run="{link[1]}" href="{href(os.path.relpath(page, folder))}"'


def changed_parameters(nb: nbformat.NotebookNode) -> dict:
    """The parameters that the runner injected: those that differ from the notebook's defaults."""
    return dict(nb.metadata.get("papermill", {}).get("parameters", {}))


def _body(nb: nbformat.NotebookNode) -> str:
    """The cells as HTML, without what is no result: widgets, progress bars and warnings."""
    for cell in nb.cells:
        if cell.cell_type == "code":
            cell.outputs = [
                out
                for out in cell.outputs
                if WIDGET not in out.get("data", {}) and out.get("name") != "stderr"
            ]
    nb.cells = [c for c in nb.cells if "injected-parameters" not in c.metadata.get("tags", [])]
    nb.metadata.pop("widgets", None)
    return _Exporter(template_name="basic").from_notebook_node(nb)[0]


class _Renderer(IPythonRenderer):
    """Markdown with its formulas as MathML, so that no script has to be fetched."""

    def inline_math(self, body: str) -> str:
        return _formula(body)

    def block_math(self, body: str) -> str:
        return _formula(body, "block")

    def multiline_math(self, text: str) -> str:
        return _formula(text.strip().strip("$"), "block")


def _formula(source: str, display: str = "inline") -> str:
    """As MathML; one that is no LaTeX, or more than the converter knows, as its source."""
    try:
        return convert(source, display=display)
    except Exception:  # its errors have no common class, and some are Python's own
        return f"<code>{escape(source)}</code>"


def _markdown(source: str) -> str:
    """As HTML. Files beside a notebook are not beside its page, so links to them lead nowhere; of
    notebooks they keep the name, by which the report leads to its section."""
    renderer = _Renderer(escape=False, exclude_anchor_links=True)
    return BESIDE.sub(_placeholder, MarkdownWithMath(renderer=renderer).render(source))


def _placeholder(link: re.Match) -> str:
    path = Path(linked(unescape(link[1])))
    return f'<a data-notebook="{href(path.stem)}"' if path.suffix == ".ipynb" else "<a"


class _Exporter(HTMLExporter):
    @pass_context
    def markdown2html(self, context, source):
        return _markdown(source)
