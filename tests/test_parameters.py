"""One line reads the parameters of a notebook's cell, whatever else its kernel has run."""

from __future__ import annotations

import linecache
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import papermill
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from IPython.core.interactiveshell import InteractiveShell
from papermill.translators import PythonTranslator
from traitlets.config import Config

from opentrans_lab.errors import LabError
from opentrans_lab.experiments import Lab, Recipe
from opentrans_lab.pruning import PruneConfig
from opentrans_lab.records import code, defaults, parameters

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))
CELL = 'seed = 0  # any\nlr: float = 1e-3  # of the head\ndataset = "scenes"\nrows = "dense ours"'
SETUP = "from opentrans_lab.records import parameters\nfound = parameters()"
KNOWN = dict(seed=0, lr=1e-3, dataset="scenes", rows="dense ours")
injected = PythonTranslator.codify
asked = pytest.mark.parametrize("kind", [Lab, PruneConfig, Recipe])


class Kernel:
    """A real shell: ``run(cell, …)`` gives what ``found`` is in the end, or raises its error."""

    def __init__(self, history: bool = True):
        InteractiveShell.clear_instance()
        linecache.clearcache()
        self.history = history
        config = Config({"HistoryManager": {"enabled": False}})  # on disk
        module = ModuleType("notebook")  # not in the place of pytest's own __main__
        self.shell = InteractiveShell.instance(config=config, user_module=module)

    def run(self, *cells: str):
        for cell in cells:
            self.shell.run_cell(cell, store_history=self.history).raise_error()
        return self.shell.user_ns.get("found")


@pytest.fixture
def kernel():
    return Kernel()


@pytest.fixture(autouse=True)
def left():
    """Other tests of this process are in no notebook."""
    yield
    InteractiveShell.clear_instance()


def test_values_are_those_of_now(kernel):
    assert kernel.run(CELL, SETUP) == KNOWN
    assert kernel.run("seed = 1", SETUP) == KNOWN | {"seed": 1}, "a value that is tried"
    assert kernel.run("lr = 2 * lr", SETUP) == KNOWN | {"seed": 1, "lr": 2e-3}
    assert kernel.run(CELL, SETUP) == KNOWN, "the cell again"


def test_nbval_keeps_no_history():
    kernel = Kernel(history=False)
    assert kernel.run(CELL, injected({"seed": 3}), SETUP) == KNOWN | {"seed": 3}
    assert kernel.run("label = 'a'", SETUP) == KNOWN | {"seed": 3}
    with pytest.raises(LabError, match="no 'sed'; did you mean 'seed'"):
        kernel.run(injected({"sed": 4}), SETUP)


def test_a_cell_that_was_edited_counts_as_it_is(kernel):
    kernel.run(CELL, SETUP)
    renamed = CELL.replace("rows =", "row =")
    assert kernel.run(renamed, SETUP).keys() == {*KNOWN, "row"} - {"rows"}
    assert kernel.run(f"{CELL}\nsize = 64", SETUP) == KNOWN | {"size": 64}
    without = CELL.replace("seed = 0  # any\n", "")
    assert kernel.run(without, SETUP).keys() == KNOWN.keys() - {"seed"}
    assert kernel.run(injected({"lr": 2.0}), SETUP)["lr"] == 2


@settings(max_examples=30, deadline=None)
@given(
    before=st.lists(st.sampled_from(("tried = 1", "1 + 1", "import os", "x = [i for i in 'ab']"))),
    after=st.lists(
        st.sampled_from((CELL, SETUP, "label = 'a'", "print(seed)", "%pwd", "seed = 0"))
    ),
)
def test_cells_may_run_in_any_order_and_several_times(before, after):
    assert Kernel().run(*before, CELL, SETUP, *after, SETUP) == KNOWN


def test_what_papermill_sets_must_be_there(kernel):
    assert kernel.run(CELL, injected({"seed": 3}), SETUP) == KNOWN | {"seed": 3}
    with pytest.raises(LabError, match="no 'sed'; did you mean 'seed'"):
        kernel.run(injected({"sed": 4}), SETUP)
    assert kernel.run(CELL, SETUP) == KNOWN, "the values of the cell again"


def test_papermill_itself_fails_on_an_unknown_parameter(tmp_path, runs, write_notebook):
    path = write_notebook(tmp_path / "01_tiny.ipynb", "run.save({'value': seed})")
    run = dict(kernel_name="python3", progress_bar=False)
    papermill.execute_notebook(path, tmp_path / "done.ipynb", {"seed": 7}, **run)
    (record,) = runs.glob("01_tiny/*/metrics.json")
    assert '"seed": 7' in record.read_text()
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'scale'"):
        papermill.execute_notebook(path, tmp_path / "done.ipynb", {"scal": 7}, **run)


def test_what_is_missing_is_named(kernel):
    with pytest.raises(LabError, match="no parameters cell has run"):
        kernel.run("import os", SETUP)
    with pytest.raises(LabError, match="parameter 'lr' has been deleted"):
        kernel.run(CELL, "del lr", SETUP)
    InteractiveShell.clear_instance()
    with pytest.raises(LabError, match="reads a notebook's cells"):
        parameters()


@pytest.mark.parametrize("path", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_no_other_cell_of_a_notebook_passes_for_its_parameters(path, kernel):
    first, *others = code(path)
    kernel.run(first)
    for number, cell in enumerate(others, 2):
        kernel.shell.history_manager.store_inputs(number, cell)
    assert kernel.run(SETUP) == defaults(path)
    assert list(kernel.run(SETUP)) == list(defaults(path)), "in the order of the cell"


@asked
def test_a_record_takes_its_fields_and_names_what_it_misses(kind):
    fields = asdict(kind())
    needed = {name: fields[name.removeprefix(kind.PREFIX)] for name in kind.NEEDS}
    others = {name: value for name, value in fields.items() if name not in needed}
    if kind is PruneConfig:
        others |= {"steps": 1, "batch_size": 2, "lr": 3.0}  # of a fine-tuning
    assert kind.of(needed | others | {"unread": 1}) == kind()
    assert kind.of(needed) == kind(), "the others stay at their defaults"
    for name in needed:
        left = {key: value for key, value in needed.items() if key != name}
        typo = {f"{name}_": needed[name]}
        with pytest.raises(LabError, match=f"needs the parameter '{name}'; did you mean '{name}_'"):
            kind.of(left | typo)
        with pytest.raises(LabError, match=f"needs the parameter '{name}'"):
            kind.of(others | left)  # lr is not prune_lr
        field = name.removeprefix(kind.PREFIX)
        assert kind.of(others | left, **{field: fields[field]}) == kind()


def test_records_of_a_notebook_hold_its_values():
    params = defaults(NOTEBOOKS[3]) | dict(
        prune_steps=7, steps=8, prune_lr=0.5, lr=0.25, devices=2, terms="text", norm="eval"
    )
    lab, pruning, recipe = Lab.of(params), PruneConfig.of(params), Recipe.of(params, row="ours")
    assert (pruning.steps, pruning.lr, pruning.terms) == (7, 0.5, "text")
    assert (recipe.steps, recipe.lr, recipe.norm, recipe.row) == (8, 0.25, "eval", "ours")
    assert (lab.devices, lab.size) == (2, 128)
    with pytest.raises(LabError, match="terms='none'"):
        PruneConfig.of(params | {"terms": "none"})
