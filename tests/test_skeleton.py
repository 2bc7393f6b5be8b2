"""The project's own house rules: notebooks, environment, commands and style stay in step."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from dataclasses import fields
from graphlib import TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from opentrans_lab.experiments import Lab, Recipe
from opentrans_lab.pruning import PruneConfig
from opentrans_lab.runs.grids import defaults, load_grid

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [
    "00_index",
    "01_esd_and_alpha",
    "02_prune_imp",
    "03_transfer",
    "04_selective_finetuning",
    "05_paper_tables",
    "06_qualitative",
]
each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])


def code_cells(path: Path, tag: str | None = None) -> list[nbformat.NotebookNode]:
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    return [c for c in cells if tag is None or tag in c.metadata.get("tags", [])]


def code(path: Path) -> ast.Module:
    """All code of a notebook, without IPython's magics."""
    source = "\n".join(cell.source for cell in code_cells(path))
    return ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.M))


def calls(tree: ast.AST, name: str) -> list[ast.Call]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.Call) and ast.unparse(n.func) == name]


def test_all_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} >= set(NAMES)


@each_notebook
def test_notebook_defines_nothing(path):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    assert not [n.name for n in ast.walk(code(path)) if isinstance(n, kinds)]


@each_notebook
def test_notebook_is_stripped_and_keeps_few_outputs(path):
    for cell in code_cells(path):
        assert not cell.outputs or "keep_output" in cell.metadata.get("tags", [])
        assert cell.execution_count is None
    kept = code_cells(path, "keep_output")
    assert all(cell.outputs for cell in kept)
    assert len(kept) <= 3


@each_notebook
def test_notebook_opens_with_a_title_and_runs_on_python3(path):
    nb = nbformat.read(path, as_version=4)
    assert nb.cells[0].cell_type == "markdown" and nb.cells[0].source.startswith("# ")
    assert nb.metadata.kernelspec.name == "python3"


@each_notebook
def test_a_notebook_reads_all_its_parameters_by_one_line(path):
    known = defaults(path)  # literals only, or it raises
    assert known and all(isinstance(v, (bool, int, float, str)) for v in known.values())
    tree = code(path)
    given = [
        ast.unparse(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "params"
    ]
    assert given == ["parameters()"] and len(calls(tree, "parameters")) == 1
    (run,) = calls(tree, "Run")
    assert ast.unparse(run) == f"Run('{path.stem}', params)"
    assert len(calls(tree, "run.save")) == 1
    assert any(isinstance(n, ast.Assert) for n in ast.walk(tree))


@each_notebook
def test_every_parameter_is_explained_and_read_and_stays(path):
    (cell,) = code_cells(path, "parameters")
    tree, known = code(path), defaults(path)
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assert Counter(n.id for n in names if isinstance(n.ctx, ast.Store) and n.id in known) == (
        Counter(known.keys())
    ), "only its cell sets a parameter, so that other cells can run again"
    read = {n.id for n in names if isinstance(n.ctx, ast.Load)}
    for kind in (Lab, PruneConfig, Recipe):
        if calls(tree, f"{kind.__name__}.of"):
            assert set(kind.NEEDS) <= known.keys()
            own = {f.name for f in fields(kind)} - {n.removeprefix(kind.PREFIX) for n in kind.NEEDS}
            read |= own | set(kind.NEEDS)
    explained = re.findall(r"(?m)^(?:# .*\n\w+ = |(\w+) = .*  # )", cell.source)
    assert len(explained) == len(known)
    assert known.keys() - read <= {"data_root"}, "05 has it for the grids that set it for all"


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks/grids").glob("*.yaml")), ids=str)
def test_grids_name_notebooks_and_parameters_that_exist(path):
    for job in load_grid(path):
        assert job.parameters.keys() <= defaults(job.notebook).keys()


def test_demo_runs_every_notebook_and_the_tables_last():
    jobs = [job.notebook.stem for job in load_grid(ROOT / "notebooks/grids/demo.yaml")]
    assert sorted(jobs) == NAMES and jobs[-1] == "05_paper_tables"


def test_environment_installs_the_project_itself_and_nothing_twice():
    text = (ROOT / "environment.yml").read_text()
    environment, project = (
        yaml.safe_load(text),
        tomllib.loads((ROOT / "pyproject.toml").read_text()),
    )
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-c constraints.txt", "-e .[test]"]}
    assert "test" in project["project"]["optional-dependencies"]
    assert environment["name"] == project["project"]["name"]
    names = {re.match(r"[\w-]+", line)[0] for line in conda}
    libraries = {re.match(r"[\w-]+", line)[0] for line in project["project"]["dependencies"]}
    assert names == {"python", "pip", "make", "git"} and not names & libraries
    least = project["project"]["requires-python"]
    assert any(line.startswith(f"python{least}") for line in conda)
    listed = [line for line in text.splitlines() if line.lstrip().startswith("- ")]
    assert all("  # " in line for line in listed if not line.endswith("pip:"))


def test_constraints_name_one_allowed_version_of_every_library():
    lines = [x for x in (ROOT / "constraints.txt").read_text().splitlines() if x[:1] != "#"]
    pinned = {canonicalize_name(name): at for name, at in (x.split("==") for x in lines)}
    assert len(pinned) == len(lines)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    wanted = [Requirement(line) for group in lists for line in group]
    for need in wanted:
        if (name := canonicalize_name(need.name)) != project["name"]:
            assert name in pinned, f"constraints.txt lacks {name}; run `make constraints`"
            assert need.specifier.contains(pinned[name]), f"{need} excludes {pinned[name]}"
    for user in ("Makefile", "environment.yml"):
        assert "constraints.txt" in (ROOT / user).read_text()


def test_every_import_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {re.match(r"[\w-]+", line)[0].lower() for group in lists for line in group}
    called = {"PIL": "pillow", "yaml": "pyyaml", "open_clip": "open_clip_torch"}
    # These come with a declared one and always will.
    brought = {"numpy": "torch", "nbformat": "nbconvert", "nbclient": "papermill"}
    brought |= {"jupyter_client": "nbconvert", "ipykernel": "jupyterlab", "IPython": "ipywidgets"}
    brought |= {"huggingface_hub": "open_clip_torch", "dask": "distributed"}
    sources = [ast.parse(p.read_text()) for p in (ROOT / "opentrans_lab").rglob("*.py")]
    sources += [code(path) for path in NOTEBOOKS]
    nodes = [node for tree in sources for node in ast.walk(tree)]
    # An import under `if find_spec(…)` is optional: the notebook says what is missing and goes on.
    asked = [n for n in nodes if isinstance(n, ast.If) and "find_spec(" in ast.unparse(n.test)]
    optional = {id(n) for branch in asked for part in branch.body for n in ast.walk(part)}
    found = set()
    for node in (node for node in nodes if id(node) not in optional):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    found -= set(sys.stdlib_module_names) | {"opentrans_lab"}
    names = {called.get(name, brought.get(name, name)).lower() for name in found}
    assert names <= declared, names - declared


def test_text_is_read_and_written_as_utf8_whatever_the_locale():
    """Where no encoding is given, the locale decides: on some machines that is ASCII."""
    loose = []
    for path in sorted((ROOT / "opentrans_lab").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name, told = ast.unparse(call.func), {keyword.arg for keyword in call.keywords}
            opened = name.split(".")[-1] == "open" and name != "Image.open"
            opened &= "b'" not in ast.unparse(call)
            started = name.startswith("subprocess.") and "text" in told
            if opened or started or name.endswith(("read_text", "write_text")):
                loose += [f"{path.name}: {ast.unparse(call)}"] * ("encoding" not in told)
    assert not loose


def test_no_two_modules_import_each_other():
    """A module imports only what lies below it; the package's own lazy shortcut is no module."""
    below = {}
    for path in (ROOT / "opentrans_lab").rglob("*.py"):
        here = path.relative_to(ROOT).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and path.name != "__init__.py":
                base = [*here[: -node.level], *(node.module or "").split(".")]
                names = {".".join(filter(None, [*base, alias.name])) for alias in node.names}
                below.setdefault(".".join(here), set()).update(names | {".".join(base)})
    assert len(below) > 50
    TopologicalSorter(below).prepare()  # raises CycleError, which names the circle


def test_dependencies_are_installed_in_the_versions_asked_for():
    assert version("powerlaw").startswith("2.0.") and version("transformers").startswith("5.")
    assert tuple(map(int, version("torch").split("+")[0].split(".")[:2])) >= (2, 9)


def test_makefile_has_the_targets_that_are_written_about():
    makefile = (ROOT / "Makefile").read_text()
    documented = set(re.findall(r"^([a-z-]+):.*?## ", makefile, flags=re.M))
    phony = set(re.search(r"^\.PHONY: (.*)$", makefile, flags=re.M)[1].split())
    assert documented == phony
    told = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert all(f"make {name}" in told.stdout for name in documented)
    readme = (ROOT / "README.md").read_text()
    blocks, spans = (
        re.findall(r"```\w*\n(.*?)```", readme, re.S),
        re.findall(r"`(make [^`]+)`", readme),
    )
    shell = "\n".join(blocks + spans)
    written = set(re.findall(r"^(?:[A-Z]+=\S+ )*make ([a-z][a-z-]*)", shell, flags=re.M))
    assert {"demo", "test"} <= written <= documented


def test_pytest_fails_on_a_broken_assert_and_on_a_changed_kept_output(tmp_path, write_notebook):
    """Pytest with our configuration on notebooks of which two are broken, as ``make test`` does."""
    for name in ("pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "tests").mkdir()
    here = str(tmp_path / "users-runs")
    kept = "print(6 * 7)"
    fresh = f"import os, sys\nassert os.environ['OPENTRANS_RUNS'] not in ({here!r}, None)\n"
    fresh += f"assert sys.executable == {sys.executable!r}"
    write_notebook(tmp_path / "notebooks/01_good.ipynb", fresh, kept, "run.save({})")
    write_notebook(tmp_path / "notebooks/02_assert.ipynb", "assert seed == 1")
    write_notebook(tmp_path / "notebooks/03_kept.ipynb", kept)
    for name, text in (("01_good", "42\n"), ("03_kept", "41\n")):
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        nb = nbformat.read(path, as_version=4)
        (cell,) = [c for c in nb.cells if c.source == kept]
        cell.metadata["tags"] = ["keep_output"]
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
        nbformat.write(nb, path)
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env=os.environ | {"OPENTRANS_RUNS": here},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 1
    failed = re.findall(r"^FAILED notebooks/(\w+)\.ipynb::Cell (\d+)", told.stdout, flags=re.M)
    assert failed == [("02_assert", "2"), ("03_kept", "2")], told.stdout
    assert not Path(here).exists()


def test_ci_runs_make_test():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.rstrip().endswith("make test") and "set -euo pipefail" in script
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100


def test_style():
    ruff = [sys.executable, "-m", "ruff", "check", "--no-cache", "."]
    told = subprocess.run(ruff, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout
