"""Notebooks that others wrote: their parameters are read as Python does, or refused in words."""

from __future__ import annotations

import itertools
import json

import pytest
import tyro
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opentrans_lab.cli import main
from opentrans_lab.cli.main import RunCommand
from opentrans_lab.errors import LabError
from opentrans_lab.records import load
from opentrans_lab.runs import run_grid, run_notebook
from opentrans_lab.runs.grids import Job, complete, defaults, load_grid

NUMBERS = itertools.count()
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
LINE = st.text(st.characters(exclude_categories=["C", "Zl", "Zp"]))
LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | ANY_TEXT,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(ANY_TEXT, inner),
    max_leaves=5,
)  # fmt: skip
LIKE_NUMBERS = """2024_01 007 010 12:30 1.10 1e5 0x1F 1_000 .5 +1 0o17 1. .inf NaN -0 on off yes No
    true null ~ = 2024-01-01 2024-01-01T10:00:00 1:30:00""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("notebooks")


@pytest.fixture(scope="module")
def words(folder, write_notebook):
    """A notebook with a text, a number of each kind, a switch, and one of no kind."""
    parameters = 'text = "a"\ncount = 1\nrate = 0.5\nfast = False\nlimit = None\nnames = ["a"]'
    return write_notebook(folder / "words.ipynb", "1", parameters=parameters, setup="")


def cell(folder, write_notebook, source):
    path = folder / f"n{next(NUMBERS)}.ipynb"
    return write_notebook(path, "1", parameters=source or " ", setup="")


def raw(folder, *cells, **notebook):
    """A notebook's file, by hand: ``cells`` are (tags, source)."""
    path = folder / f"r{next(NUMBERS)}.ipynb"
    bare = {"cell_type": "code", "execution_count": None, "outputs": []}
    cells = [bare | {"metadata": {"tags": t}, "source": source} for t, source in cells]
    about = {"nbformat": 4, "nbformat_minor": 5, "metadata": {}, "cells": cells}
    path.write_text(json.dumps(about | notebook))
    return path


def grid(folder, notebook, parameters):
    path = folder / f"g{next(NUMBERS)}.yaml"
    path.write_text(f"runs:\n- notebook: {notebook.stem}\n  parameters:\n{parameters}")
    return load_grid(path)


fast = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@fast
@given(value=LITERALS, comment=st.just("") | LINE.map("  # {}".format), end=st.sampled_from(" ;"))
def test_any_literal_is_read_back_with_a_comment_behind(
    folder, write_notebook, value, comment, end
):
    source = f"before = 1{comment}\nvalue = {value!r}{end}{comment}\nafter: int = -2{comment}"
    found = defaults(cell(folder, write_notebook, source))
    assert found == {"before": 1, "value": value, "after": -2}
    assert type(found["value"]) is type(value)


@fast
@given(text=ANY_TEXT)
def test_any_text_survives_yaml_into_a_text_parameter(folder, words, text):
    lines = yaml.safe_dump({"text": [text, "b"]}, allow_unicode=True)
    jobs = grid(folder, words, "".join(f"    {line}" for line in lines.splitlines(True)))
    assert [job.full["text"] for job in jobs] == [text, "b"]


@fast
@given(text=ANY_TEXT.filter(lambda text: not text.startswith("-")))
def test_any_text_survives_the_command_line_into_a_text_parameter(words, text):
    command = tyro.cli(RunCommand, args=[str(words), "-p", "text", text])
    assert complete(words, dict(command.parameters))["text"] == text


@pytest.mark.parametrize("word", LIKE_NUMBERS)
def test_a_text_stays_as_it_is_spelled(folder, words, word):
    (job,) = grid(folder, words, f"    text: {word}\n    names: [[{word}]]")
    assert job.full["text"] == word and job.full["names"] == [word]
    jobs = grid(folder, words, f"    text: [{word}, b]")
    assert [job.full["text"] for job in jobs] == [word, "b"]


@pytest.mark.parametrize(
    ("spelled", "count", "rate"),
    [("007", 7, 7.0), ("010", 10, 10.0), ("1e5", 100000, 1e5), ("1_000", 1000, 1000.0),
     ("0x1F", 31, 31.0), ("1.10", None, 1.1), (".5", None, 0.5), ("-3", -3, -3.0),
     ("12:30", None, None), ("2024-01-01", None, None), ("on", None, None),
     (".inf", None, float("inf")), ("1,000", None, None)],
)  # fmt: skip
def test_a_number_is_the_one_that_a_person_means(folder, words, spelled, count, rate):
    for name, value in {"count": count, "rate": rate}.items():
        for read in (
            lambda n=name: grid(folder, words, f"    {n}: {spelled}")[0].full[n],
            lambda n=name: complete(words, {n: spelled})[n],
        ):
            if value is None:
                with pytest.raises(LabError, match=f"'{name}' is of type .*not '{spelled}'"):
                    read()
            else:
                assert read() == value and type(read()) is type(value)


@pytest.mark.parametrize(("word", "value"), [("on", True), ("No", False), ("TRUE", True)])
def test_a_switch_is_on_or_off(folder, words, word, value):
    assert grid(folder, words, f"    fast: {word}")[0].full["fast"] is value
    assert complete(words, {"fast": word})["fast"] is value


def test_a_parameter_without_a_kind_takes_what_json_says(folder, words):
    jobs = grid(folder, words, "    limit: [3, 0.5, null, true, 007, a b]")
    assert [job.full["limit"] for job in jobs] == [3, 0.5, None, True, "007", "a b"]


def test_yaml_keeps_its_anchors_tags_and_names_that_look_like_switches(folder, write_notebook):
    path = cell(folder, write_notebook, "on = 0\nno = 'a'\nseed = 0")
    lines = "    <<: &both {seed: 1, no: off}\n    on: !!int '3'"
    assert grid(folder, path, lines)[0].full == {"on": 3, "no": "off", "seed": 1}


@pytest.mark.parametrize(
    ("source", "right"),
    [
        ("a = 'it''s'\nb = '''two\n# x = 3\n'''  # c = 4", {"a": "its", "b": "two\n# x = 3\n"}),
        ("a = b = -1; c = +2.5", {"a": -1, "b": -1, "c": 2.5}),
        ("import os\n%matplotlib inline\n!true\n'''Why.'''\na: float = 1e-3", {"a": 1e-3}),
        ("a = (\n  1,\n  'x = 2',\n)  # which one?\nif a:\n    b = 2", {"a": (1, "x = 2")}),
        ("# nothing but a word", {}),
        ("", {}),
    ],
)
def test_a_cell_of_parameters_as_people_write_it(folder, write_notebook, source, right):
    assert defaults(cell(folder, write_notebook, source)) == right


@pytest.mark.parametrize(
    ("source", "where"),
    [
        ("a = 1\nroot = os.environ['HOME']", "cell 2, line 2: root is no parameter"),
        ("name = f'run {1}'", "line 1: name is no parameter"),
        ("a, b = 1, 2", "line 1: .*a, b.* is no parameter"),
        ("a = 1\n\na += 1", "line 3: a is no parameter"),
        ("a = 3 * 4", "line 1: a is no parameter"),
        ("limit: int", "line 1: limit is no parameter"),
        ("files = !ls", "line 1: files is no parameter"),
        ("a = 1\nb = = 2", "cell 2, line 2: invalid syntax"),
    ],
)
def test_what_is_no_literal_is_refused_with_name_and_line(folder, write_notebook, source, where):
    with pytest.raises(LabError, match=where):
        defaults(cell(folder, write_notebook, source))


P = (["parameters"], "seed = 0")


def test_the_metadata_that_other_tools_leave_out_is_not_needed(runs, folder):
    """No kernel, an older minor format, a byte order mark, no tags."""
    body = (None, "print(seed)")
    bare = raw(folder, P, body, nbformat_minor=0)
    marked = raw(folder, (None, "print('no parameters')"))
    marked.write_text("\ufeff" + marked.read_text())
    results = run_grid([Job(bare, {"seed": "3"}), Job(marked, {})])
    assert [r.status for r in results] == ["ok", "ok"], results
    assert load(results[0].folder)["parameters"] == {"seed": 3}


def test_a_notebook_of_format_3_is_upgraded(runs, folder):
    path = folder / "old.ipynb"
    code = {"cell_type": "code", "language": "python", "outputs": [], "collapsed": False}
    cells = [
        code | {"input": ["seed = 0"], "metadata": {"tags": ["parameters"]}},
        code | {"input": ["assert seed == 4\n"], "metadata": {}},
    ]
    sheets = [{"cells": cells, "metadata": {}}]
    about = {"nbformat": 3, "nbformat_minor": 0, "metadata": {"name": ""}, "worksheets": sheets}
    path.write_text(json.dumps(about))
    result = run_notebook(path, {"seed": 4})
    assert result.status == "ok", result.error


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "it is empty"),
        ("# %%\nseed = 0", "does not appear to be JSON"),
        ("[]", "is not a readable notebook"),
        ("{}", "is not a readable notebook"),
        ('{"nbformat": 4, "nbformat_minor": 5, "cells": []}', "missing an expected key: metadata"),
        ('{"nbformat": 9, "metadata": {}, "cells": []}', "version 9"),
    ],
)
def test_what_is_no_notebook_is_told_in_a_sentence(folder, text, why, capsys):
    path = folder / f"x{next(NUMBERS)}.ipynb"
    path.write_text(text)
    with pytest.raises(SystemExit) as ended:
        main(["run", str(path)])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and why in said and path.name in said
    assert len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("cells", "about", "sentence"),
    [
        ([P, (None, "1"), P], {}, "parameters are in cell 1 and 3, .*keep one"),
        ([P, (["injected-parameters"], "seed = 5")], {}, "cell 1 and 2, .*by an earlier run"),
        ([P], {"metadata": {"kernelspec": {"name": "ir", "display_name": "", "language": "R"}}},
         "is a notebook for R"),
        ([P], {"metadata": {"language_info": {"name": "julia"}}}, "is a notebook for julia"),
    ],
)  # fmt: skip
def test_what_would_run_with_other_parameters_or_not_at_all_is_refused(
    runs, folder, cells, about, sentence
):
    with pytest.raises(LabError, match=sentence):
        run_notebook(raw(folder, *cells, **about), {"seed": 1})
    assert not runs.exists()


@pytest.mark.parametrize(
    "leave",
    ["import sys\nsys.exit(0)", "quit()", "exit", "raise SystemExit('why')"],
)
def test_who_leaves_early_has_not_finished(runs, folder, leave):
    """Neither before the last cell nor in it, unless all has been saved by then."""
    result = run_notebook(raw(folder, P, (None, leave), (None, "x = 1")))
    assert result.status == "failed" and "leaves in cell 2 by exit(" in result.error
    assert load(result.folder) is None


def test_an_exit_at_the_very_end_is_one(runs, folder, write_notebook):
    path = write_notebook(folder / "09_end.ipynb", "run.save({'value': 1})\nexit()")
    result = run_notebook(path)
    assert result.status == "ok" and load(result.folder)["metrics"] == {"value": 1}
    path = write_notebook(folder / "09_lost.ipynb", "exit()\nrun.save({'value': 1})")
    assert run_notebook(path).status == "failed"


def test_metadata_that_is_null_or_one_text_is_read(folder):
    null = {"kernelspec": None, "language_info": None}
    path = raw(folder, ("parameters", "seed = 3"), metadata=null)
    assert defaults(path) == {"seed": 3}
