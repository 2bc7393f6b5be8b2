"""Every number that the README gives of a run is what the published runs say, with its caption.

Sentences and captions are made here from the records and looked for whole, so that a number that
stands at another place, or beside other settings, is found.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from inspect import signature
from io import StringIO
from statistics import mode

import pandas as pd
import pytest
from PIL import Image

from opentrans_lab.costs import meta_backbone, printed_cells
from opentrans_lab.data import scenes
from opentrans_lab.data.painter import COLOURS, SHAPES, STUFF, TEXTURES
from opentrans_lab.heads import FRAMEWORKS
from opentrans_lab.masks import prunable
from opentrans_lab.pruning import ROWS, recalibrate
from opentrans_lab.records import PROJECT, collect
from opentrans_lab.report.claims import (
    KEPT,
    RANDOM,
    UNTRAINED,
    claim_table,
    compared,
    freezing_verdict,
    judged,
)
from opentrans_lab.report.tables import lines, summary

README = (PROJECT / "README.md").read_text()
RECORDS = PROJECT / "results" / "bench"
COUNT = dict(enumerate("no one two three four five".split()))
TITLE = {"deeplabv3": "DeepLabV3", "han": "Han et al.", "fcclip": "FC-CLIP"}
TABLE1 = dict(dataset="scenes", prune_lr=1e-4, terms="both", backbone_lr=0.1)
TABLE2 = {"selects": "none random high_alpha low_alpha"}
TABLE4 = {"selects": "none low_alpha"}


@pytest.fixture(autouse=True)
def published(monkeypatch, tmp_path):
    """Nothing but what is committed."""
    monkeypatch.setenv("OPENTRANS_RESULTS", str(PROJECT / "results"))
    monkeypatch.setenv("OPENTRANS_RUNS", str(tmp_path))


def section(heading: str) -> str:
    """From this bold heading to the next."""
    return README.split(f"**{heading}")[1].split("\n**")[0].split("\n## ")[0]


def cells(heading: str) -> list[list[str]]:
    """The lines of the section's table under its head."""
    found = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in found[2:]]


def levels(line: pd.Series | Mapping, *scores: str, sign: str = "") -> str:
    """Means with their intervals where there are several seeds, as "54.0 ± 0.8 / 33.3 ± 0.8"."""
    return " / ".join(
        f"{line[s]:{sign}.1f}" + f" ± {line[f'{s} ±']:.1f}" * bool(line["n"] > 1) for s in scores
    )


def gap(line) -> str:
    """A line of ``compared``."""
    return f"{line.gain:+.1f}" + f" ± {line.half:.1f}" * bool(line.n > 1)


def by_framework(values: Mapping[str, object], unit: str) -> str:
    """"600 steps, FC-CLIP 1,200": what most have, and the others."""
    usual = mode(values.values())
    told = [f"{TITLE[k]} {_number(v)}" for k, v in values.items() if v != usual]
    return ", ".join([f"{_number(usual)} {unit}{'s' * (usual != 1)}", *told])


def _number(value) -> str:
    return COUNT.get(value, f"{value:,}")


def caption(found: pd.DataFrame) -> str:
    """How these lines (``tables.lines``) came about: size, cores, seeds, steps, of which lab."""
    runs = collect().set_index("folder").loc[sorted(set(found["folder"]))]
    assert set(runs["parameters.dataset"]) == {"scenes"} and set(runs["seed"]) <= set(range(5))
    (size,) = set(runs["parameters.size"])
    (images,) = set(runs["parameters.eval_images"])
    cores = sorted({int(re.fullmatch(r"cpu, (\d+) threads", d)[1]) for d in runs["device"]})
    where = " or ".join(COUNT[n] for n in cores) + f" CPU core{'s' * (cores != [1])}"
    per = {k: part for k, part in found.groupby("parameters.framework")}
    seeds = by_framework({k: part["seed"].nunique() for k, part in per.items()}, "seed")
    steps = by_framework({k: int(p["parameters.steps"].unique().item()) for k, p in per.items()},
                         "fine-tuning step")  # fmt: skip
    rounds = set(runs["parameters.prune_steps"])
    assert images == 256 and len(rounds) == 1, "say so above the tables, else"
    return f"(mini lab, {size} px, {where}, {seeds}, {rounds.pop()} steps a round, {steps};"


def test_sections_have_captions_of_the_runs_behind_them():
    transfer = lines("03_transfer", "transfer", **TABLE1)
    frozen = lines("03_transfer", "transfer", framework="fcclip", backbone_lr=0.0)
    grid = lines("04_selective_finetuning", "selection",
                 selects="none random high_alpha low_alpha prefix")  # fmt: skip
    ablation = lines("03_transfer", "transfer", prune_lr=5e-4, framework="deeplabv3")
    for heading, found in (
        ("Does one mask serve", transfer),
        ("Where CLIP stays frozen", frozen),
        ("Does freezing heavy-tailed", grid),
        ("In the paper's own test-bed", lines("04_selective_finetuning", "selection", **TABLE2)),
        ("Both contributions", lines("04_selective_finetuning", "both", **TABLE4)),
        ("Which loss should prune?", ablation),
    ):
        assert caption(found) in section(heading), (heading, caption(found))
    assert "256 pictures of the evaluation split" in README
    (few,) = grid["parameters.few"].unique()
    assert f"*few*: {few} images;" in section("Does freezing")
    assert set(grid["parameters.framework"]) == {"deeplabv3"}
    (warmup,) = grid["parameters.warmup"].unique()
    assert warmup == 0.2 and "frozen after a fifth of the steps" in section("Does freezing")
    (run,) = collect("02_prune_imp").to_dict("records")
    rounds = run["metrics.rounds"]
    assert f"{rounds} rounds of 10 %" in README
    assert f"→ {100 * 0.9**rounds:.2f} % of weights" in README
    density = f"{run['metrics.density']:.4f}"
    assert density == "0.0985"
    for heading in ("Does one mask", "Does sparsity pay", "Which loss should prune?"):
        assert f"density {density}" in section(heading)
    (steps,) = ablation["parameters.prune_steps"].unique()
    (after,) = ablation["parameters.steps"].unique()
    assert (
        f"{rounds * steps} supervised steps on the very classes of the downstream task are training"
        f" for it, beside {after} steps of fine-tuning"
    ) in section("Which loss should")


def test_what_is_said_of_the_mini_lab_and_of_masks():
    parts = f"{len(TEXTURES)} textures × {len(COLOURS)} colours × {len(SHAPES)} shapes"
    assert f"{parts}, {len(STUFF)} backgrounds, exact labels" in README
    things = len(scenes.THINGS)
    unseen = sum(not seen for seen in scenes.SEEN[:things])
    assert f"{unseen} of the {things} names are *unseen*" in README
    weights = prunable(meta_backbone("RN50").visual)
    assert f'"{len(weights)} of {len(weights)} tensors matched' in README
    size = sum(weight.numel() for weight in weights.values()) / 8e6
    assert f"one bit a weight, {size:.1f} MB for RN50" in README
    batches = signature(recalibrate).parameters["count"].default
    assert f"re-estimated under each mask on {batches} batches" in README


def test_one_mask_in_three_frameworks():
    text = section("Does one mask serve")
    said = {line[0]: line[1:] for line in cells("Does one mask serve")}
    assert len(said) == 7 and said.keys() <= ROWS.keys()
    scores = ("seen", "unseen")
    for column, framework in enumerate(FRAMEWORKS):
        found = summary(
            "03_transfer", "transfer", ["row"], scores, framework=framework, **TABLE1
        )  # one setting alone
        assert set(found.index) == set(said) and (found["n"] >= 3).all()
        for row, line in said.items():
            assert line[column] == levels(found.loc[row], *scores)
    every, told, words = lines("03_transfer", "transfer", **TABLE1), [], {}
    for score in scores:
        gaps = compared(every, "row", "ours", RANDOM, ["parameters.framework"], score)
        gaps = gaps.set_index("parameters.framework").loc[list(FRAMEWORKS)]
        told.append(", ".join(f"{TITLE[line.Index]} {gap(line)}" for line in gaps.itertuples()))
        words[score] = gaps["verdict"].to_dict()
        wide = every.pivot_table(score, ["parameters.framework", "seed"], "row")
        assert (wide["ours"] > wide[list(RANDOM)].max(axis=1)).all(), "with each seed"
        assert (wide["oneshot"] > wide[list(UNTRAINED)].max(axis=1)).all()
    assert f"By these points on seen names: {told[0]}; on unseen names: {told[1]}." in text
    assert "With each seed, in each of the three frameworks, the one mask is ahead" in text
    for score, word in (("seen", "wins"), ("unseen", "ties")):
        assert words[score] == {"deeplabv3": "wins", "han": "wins", "fcclip": word}
    seeds = COUNT[every[every["parameters.framework"] == "fcclip"]["seed"].nunique()]
    assert (
        f"On unseen names FC-CLIP's interval holds 0, so that {seeds} seeds do not settle it there;"
        " all else is settled"
    ) in text
    means = every.pivot_table("seen", "parameters.framework", "row")
    assert (means["ours"] - means["oneshot"] > 5).all() and "stay far behind ours" in text
    assert means.loc["deeplabv3", "ours"] < means.loc["deeplabv3", "dense"] - 5
    assert "That DeepLabV3 ends above dense with the mask" in text


def test_a_clip_that_stays_frozen_and_the_ensemble():
    found = lines("03_transfer", "transfer", framework="fcclip", backbone_lr=0.0)
    found = found.set_index(["row", "parameters.norm"])
    said = {line[0]: line[1:] for line in cells("Where CLIP stays frozen")}
    assert len(said) == 9 and len(found) == 16
    missing = {(row, "train") for row in ("ours_kd", "ours_mask_kd")}  # of uncommitted code alone
    for row, line in said.items():
        for norm, cell in zip(("train", "recalibrated"), line, strict=True):
            if (row, norm) in missing:
                assert cell == "–" and (row, norm) not in found.index
            else:
                assert cell == "{seen:.1f} / {unseen:.1f}".format(**found.loc[(row, norm)])
    seen = found["seen"].unstack("parameters.norm")
    gained, text = seen["recalibrated"] - seen["train"], section("Where CLIP stays frozen")
    assert gained["ours"] < gained["ours_mask_only"] and "`ours` gains less" in text
    rival = "random_layerwise_kd"
    assert (seen.loc[["ours", "ours_mask_only"]] < seen.loc[rival]).all(axis=None)
    trained = seen.loc[["ours_kd", "ours_mask_kd"], "recalibrated"]
    assert (trained > seen.loc[rival, "recalibrated"] + 5).all()
    assert f"Neither passes `{rival}`" in text
    assert "then ours are far ahead of it (`ours_kd`, `ours_mask_kd`; shown for re-est" in text
    parts = lines("03_transfer", "parts", framework="fcclip", norm="train")
    parts = parts[parts["part"] == "head"]
    first = parts[parts["seed"] == 0].set_index(["row", "parameters.backbone_lr", "names"])

    def gain(*which) -> str:
        line = first.loc[which]
        return f"{line['gain']:+.1f} [{line['low']:.1f}, {line['high']:.1f}]"

    text = section("Does FC-CLIP's ensemble pay?")
    assert (
        f"{gain('dense', 0.1, 'seen')} on seen and {gain('dense', 0.1, 'unseen')} on unseen names "
        f"with a tuned CLIP, {gain('dense', 0.0, 'seen')} and {gain('dense', 0.0, 'unseen')} with a"
        f" frozen one. For `ours`: {gain('ours', 0.1, 'seen')} and {gain('ours', 0.1, 'unseen')} "
        f"tuned, {gain('ours', 0.0, 'seen')} and {gain('ours', 0.0, 'unseen')} frozen."
    ) in text
    others = parts[(parts["row"] == "dense") & (parts["seed"] > 0)].sort_values("seed")
    told = []
    for names in ("seen", "unseen"):
        *some, last = (f"{g:+.1f}" for g in others[others["names"] == names]["gain"])
        told.append(f"{', '.join(some)} and {last}")
    assert f"`dense` gains {told[0]} on seen and {told[1]} on unseen names" in text


def test_latencies():
    (run,) = collect("02_prune_imp").to_dict("records")
    gains = {k.removeprefix("metrics.speedup_of_zeros."): v for k, v in run.items()}
    onnx, disk = run["metrics.over_torch.ONNX Runtime"], run["metrics.disk_ratio_float32"]
    text = section("Does sparsity pay in real time?")
    assert run["device"] == "cpu, 2 threads"
    assert f"(mini lab, density 0.0985, {run['parameters.latency_size']} px, two CPU cores," in text
    assert f"{disk:.1f} times smaller in float32" in text
    assert (
        f"the zeros gain {gains['torch']:.2f} in plain torch, which is noise, "
        f"{gains['dead channels removed']:.2f} with dead channels removed (there are none), "
        f"{gains['1x1 convolutions as sparse products']:.2f} with 1x1 convolutions as sparse "
        f"products, and {gains['ONNX Runtime']:.2f} in ONNX Runtime, which is {onnx:.1f} times "
        "faster than torch"
    ) in text


def test_the_map_of_freezing():
    table = summary("04_selective_finetuning", "selection", ["regime", "select"], ["seen_gain"],
                    selects="none random high_alpha low_alpha prefix")  # fmt: skip
    found, text = judged(table), section("Does freezing heavy-tailed")
    assert f"{freezing_verdict(found)} {freezing_verdict(found, 'prefix')}" in text
    gains = found["gain"].unstack("select")
    assert (gains["low_alpha"] < gains.max(axis=1)).all() and "here it never is" in text
    expected = {}
    for line in found.reset_index().to_dict("records"):
        half = f" ± {line['half']:.1f}" if line["n"] > 1 else ""
        key = (line["regime"], str(line["parameters.backbone_lr"]), line["parameters.rule"])
        cell = expected.setdefault((*key, str(line["n"])), {})
        cell[line["select"]] = f"{line['gain']:+.1f}{half}"
    order = ["random", "high_alpha", "low_alpha", "prefix"]
    said = {tuple(line[:4]): dict(zip(order, line[4:], strict=True))
            for line in cells("Does freezing heavy-tailed")}  # fmt: skip
    assert said == expected and len(said) == 12
    assert sum(int(key[3]) >= 3 for key in said) >= 6
    steps = pd.read_csv(RECORDS / "steps.csv").query("model == 'trunk'").set_index("select")
    about, saving = steps.iloc[0], steps["step_saving"]
    assert about["device"] == "cpu, 2 threads"
    assert (
        f"on two CPU cores, RN50's trunk at {about['size']} px and batch {about['batch_size']}, "
        f"the prefix saves {saving['prefix']:.1f} % of a step and the paper's selection "
        f"{saving['low_alpha']:.1f} %"
    ) in text


def test_the_papers_test_bed():
    scores = ["seen", "unseen"]
    said = {line[0].split(" (")[0].replace(" ", "_"): line[1:]
            for line in cells("In the paper's own test-bed")}  # fmt: skip
    for framework, columns in (("han", slice(0, 2)), ("fcclip", slice(2, 4))):
        found = summary("04_selective_finetuning", "selection", ["select"], [*scores, "seen_gain"],
                        framework=framework, **TABLE2)  # fmt: skip
        assert set(said) == set(found.index) and (found["n"] >= 2).all()
        for select, line in said.items():
            own = found.loc[select]
            points = "–" if select == "none" else levels(own, "seen_gain", sign="+")
            assert line[columns] == [levels(own, *scores), points]


def wide_test_bed(framework: str, score: str) -> pd.DataFrame:
    every = lines("04_selective_finetuning", "selection", framework=framework, **TABLE2)
    return every.pivot_table(score, "seed", "select")


def test_what_the_test_bed_is_said_to_show():
    text = section("In the paper's own test-bed")
    assert (
        "In Han et al., with every seed, small alpha is behind full fine-tuning on seen names, and "
        "freezing large alpha is ahead of it: the opposite of the paper's order"
    ) in text
    assert "On unseen names nothing is decided." in text
    wide = wide_test_bed("han", "seen")
    assert (wide["low_alpha"] < wide["none"]).all() and (wide["high_alpha"] > wide["none"]).all()
    assert not (wide_test_bed("han", "unseen").pipe(lambda w: w["low_alpha"] > w["none"])).all()
    wide = wide_test_bed("fcclip", "seen")
    ahead = (wide["low_alpha"] > wide["none"]).sum()
    assert f"behind with {COUNT[len(wide) - ahead]} seed and ahead with {COUNT[ahead]}" in text
    assert (wide["high_alpha"] > wide["none"]).all()
    assert f"freezing large alpha is ahead with all {COUNT[len(wide)]}" in text


def test_both_together():
    every = lines("04_selective_finetuning", "both", **TABLE4)
    found = summary("04_selective_finetuning", "both", ["has"], ["seen", "unseen", "training"],
                    **TABLE4).reset_index()  # fmt: skip
    said = {line[0].split(" ")[0]: line[1:] for line in cells("Both contributions")}
    assert len(said) == 4 and len(found) == 12
    for line in found.to_dict("records"):
        column = list(FRAMEWORKS).index(line["parameters.framework"])
        cell = f"{levels(line, 'seen', 'unseen')} ({line['training']:.0f} %)"
        assert said[line["has"]][column] == cell
    told = {}
    for has in ("both", "selection"):
        gaps = compared(every, "has", has, ["neither"], ["parameters.framework"], "seen")
        gaps = gaps.set_index("parameters.framework").loc[list(FRAMEWORKS)]
        told[has] = [gap(line) for line in gaps.itertuples()]
    one, two, three = told["both"]
    assert (
        f"{one} points on seen names in DeepLabV3, {two} in Han et al., {three} in FC-CLIP. "
        "Selection alone makes {}, {} and {} points of difference".format(*told["selection"])
    ) in section("Both contributions")


def test_which_loss_should_prune():
    words = {"both terms of L_KD": "both", "plain term": "plain", "text-guided term": "text",
             "class labels": "class"}  # fmt: skip
    found = lines("03_transfer", "transfer", prune_lr=5e-4, framework="deeplabv3")
    assert (found.groupby(["parameters.terms", "row"]).size() == 1).all()
    found = found.set_index(["parameters.terms", "row"])

    def cell(*which) -> str:
        return "{seen:.1f} / {unseen:.1f}".format(**found.loc[which])

    said = {line[0]: line[1:] for line in cells("Which loss should prune?")}
    for word, terms in words.items():
        assert said.pop(word) == [cell(terms, "ours"), cell(terms, "ours_mask_only")]
    for word, (nothing, told) in said.items():
        assert nothing == "–" and told == cell("both", re.search(r"`(\w+)`?\)?$", word)[1])
    assert len(said) == 2
    masks = found.xs("ours_mask_only", level="row")["seen"]
    assert masks.min() > found.xs("oneshot", level="row")["seen"].item() + 10
    assert masks.idxmax() == "class"


def test_the_five_claims():
    own = {"backbone": "mini", "dataset": "scenes"}
    expected = claim_table(
        lines("03_transfer", "transfer", terms="both", **own),
        lines("04_selective_finetuning", "selection", **own),
        lines("04_selective_finetuning", "both", **own),
        printed_cells(),
        list(FRAMEWORKS),
    )
    assert f"for C4, {KEPT:g} points are what the paper's own" in section("The paper's five")
    assert cells("The paper's five claims") == [
        [f"{r.claim} {r.says}", r.verdict, r.evidence] for r in expected.itertuples()
    ]
    shown = pd.read_csv(StringIO(Image.open(PROJECT / "docs" / "report.png").text["claims"]))
    assert shown.to_dict() == expected.to_dict(), "python tests/shoot_report.py takes it anew"


def test_path_checks_are_of_a_hundred_photographs_or_more():
    tables = sorted((PROJECT / "results" / "path_checks").glob("*.csv"))
    images = [int(re.search(r"(\d+) images", pd.read_csv(t)["data"][0])[1]) for t in tables]
    assert len(tables) == 3 and min(images) >= 100
    assert "a hundred photographs or more each of COCO, VOC and CamVid" in README


def test_times_of_the_demo():
    """``demo.csv``: seconds of ``make demo`` and of each of its notebooks."""
    table = pd.read_csv(RECORDS / "demo.csv").set_index("what")
    assert set(table["device"]) == {"cpu, 2 threads"}
    seconds = table["seconds"]
    for notebook in seconds.index[seconds.index.str.match(r"\d\d_")]:
        (line,) = [x for x in README.splitlines() if x.startswith(f"| [{notebook}](")]
        taken = seconds[notebook]
        told = f"{10 * round(taken / 10)} s" if taken < 55 else f"{round(taken / 60)} min"
        assert line.strip("| ").split(" | ")[-1].startswith(told), (notebook, told)
    assert sum(seconds.index.str.match(r"\d\d_")) == 7
    assert 0.7 < seconds["make demo"] / 60 / 15 < 1.4
    assert "the demo takes about a quarter of an hour" in README
