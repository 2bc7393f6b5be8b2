"""The command line as a user meets it: exit codes, one-line errors, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opentrans_lab import __version__
from opentrans_lab.cli import main
from opentrans_lab.records import PROJECT, run_dir

SAVE = 'run.save({"value": seed})'
USERS = "from opentrans_lab.errors import LabError\nraise LabError('no folder /x; name another')"
COMMAND = [str(Path(sys.executable).with_name("opentrans-lab"))]


@pytest.fixture
def lab(runs, tmp_path, write_notebook):
    """``lab(*args)`` runs the installed command among three notebooks."""
    write_notebook(tmp_path / "01_tiny.ipynb", SAVE)
    write_notebook(tmp_path / "02_user.ipynb", USERS)
    write_notebook(tmp_path / "03_bad.ipynb", "1 / 0")
    (tmp_path / "one.yaml").write_text("runs: [01_tiny]")

    def run(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run([*COMMAND, *args], capture_output=True, text=True, cwd=tmp_path)

    return run


def test_run_with_parameters_and_report(lab, runs):
    done = lab("run", "01_tiny.ipynb", "-p", "seed", "-4", "-p", "name", "x y")
    assert done.returncode == 0, done.stderr
    full = {"seed": -4, "scale": 1.0, "name": "x y", "fast": False, "dataset": "scenes"}
    assert str(run_dir("01_tiny", full)) in done.stdout
    report = lab("report")
    assert report.returncode == 0 and (runs / "report" / "index.html").is_file()
    assert report.stdout.splitlines()[-1] == f"report: {runs / 'report' / 'index.html'}"


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("run", "01_tiny.ipynb", "-p", "sede", "1"), "no parameter 'sede'; did you mean 'seed'?"),
        (("run", "01_tiny.ipynb", "-p", "seed", "x"), "'seed' is of type int"),
        (("run", "09_none.ipynb"), "no notebook 09_none.ipynb; there are: 01_tiny.ipynb"),
        (("run", "none.yaml"), "no grid none.yaml"),
        (("run", "none.yaml", "-p", "a", "1"), "-p goes with a notebook"),
        (("run", "02_user.ipynb"), "no folder /x; name another"),
        (("campaign", "--grid", "none.yaml"), "no grid none.yaml"),
        (("campaign", "--grid", "one.yaml", "--minutes", "nan"), "minutes=nan must be 0 or more"),
        (("plan", "one.yaml", "--images-per-second", "nan"), "images_per_second=nan must be"),
        (("run", "one.yaml", "--workers", "2", "--scheduler", "tcp://x:1"), "leave --workers out"),
        (("run", "01_tiny.ipynb", "--workers", "0"), "--workers and --scheduler go with a grid"),
        (("plan", "one.yaml", "--out", "."), "--out . is a folder; name a file in it"),
        (("data", "check", "nope"), "nope"),
    ],
)
def test_users_mistake_is_one_line_and_exit_code_2(lab, runs, args, sentence):
    done = lab(*args)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("opentrans-lab: ") and sentence in done.stderr
    assert not any(path.is_file() for path in runs.rglob("*"))


def test_failed_notebook_gives_exit_code_1_and_the_grid_goes_on(lab, tmp_path):
    (tmp_path / "g.yaml").write_text("runs: [03_bad, 01_tiny]")
    done = lab("campaign", "--grid", "g.yaml", "--minutes", "5")
    assert done.returncode == 1
    assert "03_bad.ipynb, cell 4" in done.stdout and "ZeroDivisionError" in done.stdout
    assert "01_tiny: ok" in done.stdout and "report: " in done.stdout.splitlines()[-1]
    (tmp_path / "g.yaml").write_text("runs: [01_tiny]")
    again = lab("run", "g.yaml")
    assert again.returncode == 0 and "0 run now" in again.stdout
    assert "1 finished before" in again.stdout


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from opentrans_lab import cli\n"
        "try: cli.main(['--help'])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'pandas', 'papermill', 'matplotlib') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.splitlines()[-1] == "[]"
    for name in ("run", "report", "alpha", "cost", "mask", "campaign", "mini-clip"):
        assert name in told.stdout


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "PASSIVE"}, {"GOMP_SPINCOUNT": "7"}])
def test_threads_wait_quietly_unless_the_user_says_how(own):
    code = (
        "import sys, os, opentrans_lab; names = 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'\n"
        "print({n: os.environ[n] for n in names if n in os.environ}, 'torch' in sys.modules)"
    )
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    where = {k: v for k, v in os.environ.items() if k not in names} | own
    told = subprocess.run([sys.executable, "-c", code], env=where, capture_output=True, text=True)
    assert told.stdout.strip() == f"{own or {'GOMP_SPINCOUNT': '1000'}} False", "before torch loads"


def test_version():
    told = subprocess.run([*COMMAND, "--version"], capture_output=True, text=True, check=True)
    assert told.stdout == f"opentrans-lab {__version__}\n"


def test_alpha_of_the_mini_and_of_a_bare_file(tmp_path):
    """The same numbers from the built tower and from a state dict, which builds no model."""
    import pandas as pd
    from safetensors.torch import save_file

    from opentrans_lab.clip import load_backbone

    tower = load_backbone("mini", device="cpu").visual
    file = tmp_path / "tower.safetensors"
    save_file({f"model.{k}": v.contiguous() for k, v in tower.state_dict().items()}, file)
    tables = []
    for target in (["mini"], [str(file), "--prefix", "model."]):
        out = tmp_path / f"{len(tables)}.csv"
        told = subprocess.run(
            [*COMMAND, "alpha", *target, "--rule", "mid", "--out", str(out)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "layers fitted, median alpha" in told.stdout
        tables.append(pd.read_csv(out).set_index("name")["alpha"].dropna().sort_index())
    assert len(tables[0]) > 30
    pd.testing.assert_series_equal(*tables)


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("RN5O",), "backbone 'RN5O' is unknown"),
        (("mini", "--rule", "magic"), "unknown rule='magic'; use one of csn"),
        (("ViT-B-16", "--checkpoint", "none"), "no tag of ViT-B-16; its tags are openai"),
        (("mini", "--compare", "friends"), "--compare friends is unknown"),
        (("mini", "--prefix", "visual."), "--prefix goes with a file"),
        (("README.md", "--checkpoint", "openai"), "README.md is a file already"),
        (("mini", "--bootstrap", "-1"), "bootstrap=-1 must be 0 or more"),
        (("mini", "--bootstrap", "2", "--seed", "-1"), "seed=-1 must be from 0"),
        (("mini", "--out", "."), "--out . is a folder"),
        (("mini", "--compare", "authors"), "not the visual tower of CLIP RN50"),
    ],
)
def test_alpha_says_what_is_wrong(monkeypatch, capsys, args, sentence):
    monkeypatch.chdir(PROJECT)
    with pytest.raises(SystemExit, match="2"):
        main(["alpha", *args])
    assert sentence in capsys.readouterr().err


def test_alpha_writes_its_table_before_it_compares_and_says_what_it_left_out(tmp_path, capsys):
    import pandas as pd

    tables, without = [], ["--exclude", "attnpool", "--exclude", "conv1"]
    for k, more in enumerate((["--compare", "authors"], without)):
        out = tmp_path / f"{k}.csv"
        with pytest.raises(SystemExit, match=("2", "0")[k]):
            main(["alpha", "mini", "--out", str(out), *more])
        tables.append(pd.read_csv(out))
    every, some = tables
    kept = every[~every["name"].str.startswith("attnpool") & (every["name"] != "conv1")]
    assert list(some["name"]) == list(kept["name"]) and len(some) < len(every) - 4
    told, median = capsys.readouterr().out, f"{some['alpha'].median():.4f}"
    told = told.partition("layers (without attnpool, conv1) fitted, median alpha over these ")[2]
    assert told.startswith(f"{some['alpha'].notna().sum()}: {median}")


@pytest.mark.parametrize(
    ("model", "tag"),
    [("ViT-B-16", "dfn2b"), ("ViT-B-16-SigLIP", "webli"), ("ViTamin-S", "datacomp1b")],
)
def test_alpha_of_a_tag_on_the_hub_alone_says_where_to_get_it(monkeypatch, capsys, model, tag):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SystemExit, match="2"):
        main(["alpha", model, "--checkpoint", tag])
    told = capsys.readouterr().err
    assert f"'{tag}' of {model} are not in the cache" in told
    assert "fetch http://127.0.0.1:9/" in told and " or  " not in told


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """``command(*args)`` as the installed one, but in this process, which has torch already."""
    monkeypatch.chdir(tmp_path)

    def run(*args: str) -> subprocess.CompletedProcess:
        with pytest.raises(SystemExit) as ended:
            main(list(args))
        told = capsys.readouterr()
        return subprocess.CompletedProcess(args, ended.value.code, told.out, told.err)

    return run


@pytest.fixture
def mask_files(tmp_path):
    """(mask, checkpoint whose CLIP tower lies deep, small tower) on disk."""
    import torch
    from open_clip.modified_resnet import ModifiedResNet

    from opentrans_lab.masks import Mask

    tower = ModifiedResNet((1, 1, 1, 1), output_dim=16, heads=4, image_size=64, width=8)
    mask = Mask(Mask.random_global(tower, 3000), loss="L_KD both", seed=3)
    mask.save(tmp_path / "m.safetensors")
    state = {f"backbone.clip_model.visual.{k}": v for k, v in tower.state_dict().items()}
    torch.save({"model": state | {"head.weight": torch.ones(3, 3)}}, tmp_path / "full.pth")
    torch.save(tower.state_dict(), tmp_path / "tower.pt")
    return mask, tower


def test_mask_commands_describe_apply_and_convert(command, tmp_path, mask_files):
    from opentrans_lab.files import read_state_dict
    from opentrans_lab.masks import Mask

    mask, tower = mask_files
    told = command("mask", "info", "m.safetensors")
    assert told.returncode == 0, told.stderr
    assert "loss: L_KD both" in told.stdout and f"{mask.kept:,} of {mask.total:,}" in told.stdout
    assert all(name.removesuffix(".weight") in told.stdout for name in mask)

    for flags in ([], ["--compact"]):
        out = f"out{len(flags)}.safetensors"
        told = command("mask", "apply", "m.safetensors", "full.pth", "--out", out, *flags)
        assert told.returncode == 0, told.stderr
        matched = f"{len(mask)} of {len(mask)} tensors matched under 'backbone.clip_model.visual.'"
        assert matched in told.stdout
        state = read_state_dict(tmp_path / out)
        assert mask.verify(state) and state["head.weight"].all()
    sizes = [(tmp_path / f"out{i}.safetensors").stat().st_size for i in (0, 1)]
    assert sizes[1] < sizes[0]
    again = command("mask", "apply", "m.safetensors", "full.pth", "--out", "out0.safetensors")
    assert again.returncode == 2 and "exists" in again.stderr

    told = command("mask", "convert", "m.safetensors", "imp.pth", "--checkpoint", "tower.pt")
    assert told.returncode == 0, told.stderr
    told = command("mask", "convert", "imp.pth", "back.safetensors")
    assert told.returncode == 0 and Mask.load(tmp_path / "back.safetensors") == mask


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        (("info", "none.safetensors"), "none.safetensors"),
        (("info", "full.pth"), "layer1.0.conv1.weight_mask"),
        (
            ("apply", "m.safetensors", "full.pth", "--prefix", "head", "--out", "x.safetensors"),
            "under 'head.'",
        ),
        (("apply", "m.safetensors", "none.pt", "--out", "x.safetensors"), "none.pt does not exist"),
        (("apply", "m.safetensors", "full.pth", "--out", "x.pth"), "must end in .safetensors"),
        (("convert", "m.safetensors", "x.pth"), "--checkpoint"),
    ],
)
def test_mask_says_what_is_wrong_and_writes_nothing(command, tmp_path, mask_files, args, sentence):
    before = sorted(tmp_path.iterdir())
    told = command("mask", *args)
    assert told.returncode == 2 and sentence in told.stderr and "Traceback" not in told.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_cost_prints_both_conventions_and_writes_exact_numbers(command, tmp_path):
    import pandas as pd

    out = tmp_path / "cost.csv"
    told = command("cost", "--out", str(out))
    assert told.returncode == 0, told.stderr
    assert "reconstructed" in told.stdout and "uniform" in told.stdout
    table = pd.read_csv(out).set_index(["convention", "component"])
    assert table.loc[("uniform", "trunk"), "params"] == 23_527_264
    bad = command("cost", "--size", "800")
    assert bad.returncode == 2 and "800" in bad.stderr and "Traceback" not in bad.stderr
