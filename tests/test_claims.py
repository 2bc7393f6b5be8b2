"""Verdicts on the paper's claims follow from the data and change with them (made-up metrics)."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest

from opentrans_lab.costs import printed_cells
from opentrans_lab.figures import charts
from opentrans_lab.records import paper
from opentrans_lab.report.claims import CLAIMS, KEPT, RANDOM, UNTESTED, claim_table, compared
from opentrans_lab.report.tables import cost_points, paper_points

FRAMEWORKS = ("a", "b")
NOTHING = pd.DataFrame()


def transfer(gaps, frameworks=FRAMEWORKS):
    """``ours`` ahead of the best random row by ``gaps`` points, a seed each; frameworks differ."""
    rows = []
    for f, framework in enumerate(frameworks):
        for seed, gap in enumerate(gaps[f] if isinstance(gaps, dict) else gaps):
            scores = {"dense": 60.0, "ours": 20 + gap, "ours_mask_only": 20 + gap}
            scores |= {row: 20.0 - i + seed for i, row in enumerate(RANDOM)}
            scores |= {row: scores[row] + seed for row in ("ours", "ours_mask_only")}
            rows += [{"row": row, "seen": seen, "parameters.framework": framework, "seed": seed}
                     for row, seen in scores.items()]  # fmt: skip
    return pd.DataFrame(rows)


def selection(low):
    scores = {"none": 30.0, "random": 29.0, "high_alpha": 28.0}
    return pd.DataFrame(
        {"select": select, "regime": "plenty", "seen": seen, "parameters.framework": "a",
         "seed": seed}
        for seed, value in enumerate(low)
        for select, seen in (scores | {"low_alpha": value}).items()
    )  # fmt: skip


def both(value, training=60.0, frameworks=FRAMEWORKS):
    return pd.DataFrame(
        {"has": has, "seen": seen, "training": cost, "parameters.framework": framework,
         "seed": seed}
        for framework in frameworks
        for seed in (0, 1, 2)
        for has, seen, cost in (("neither", 30.0 + seed, 100.0),
                                ("both", value + 1.1 * seed, training))
    )  # fmt: skip


def judged(first=NOTHING, third=NOTHING, fourth=NOTHING, costs=None):
    costs = pd.DataFrame({"counted": [], "printed": []}) if costs is None else costs
    table = claim_table(first, third, fourth, costs, FRAMEWORKS).set_index("claim")
    assert list(table.index) == list(CLAIMS)
    return table


@pytest.mark.parametrize("gaps, word", [
    ([5, 6, 5.5], "holds"),
    ([-5, -6, -5.5], "does not hold"),
    ([5, -6, 0.5], "mixed"),  # undecided in both
    ({0: [5, 6, 5.5], 1: [-5, -6, -5.5]}, "mixed"),
    ({0: [5, -6, 0.5], 1: [-5, -6, -5.5]}, "does not hold"),  # refuted, and nowhere borne out
    ([5], "holds, one seed"),
    ([-5], "does not hold, one seed"),
    ({0: [5, 6, 5.5], 1: [4]}, "holds, partly one seed"),
    ({0: [5, 6, 5.5], 1: []}, "holds where tested"),
])  # fmt: skip
def test_the_mask_is_judged_in_every_framework(gaps, word):
    table = judged(transfer(gaps))
    assert table.loc["C1", "verdict"] == word
    assert ("not tested in b" in table.loc["C1", "evidence"]) == ("where tested" in word)
    assert (table.loc[["C3", "C4", "C5"], "verdict"] == UNTESTED).all()


def test_the_weights_and_the_mask_are_two_claims():
    found = transfer([5, 6, 5.5])
    found.loc[found["row"] == "ours_mask_only", "seen"] -= 20
    assert list(judged(found)["verdict"][:2]) == ["holds", "does not hold"]


@pytest.mark.parametrize("low, word", [
    ([33, 33.5, 32.8], "holds"), ([29.5, 29.4, 29.6], "does not hold"), ([31, 27, 33], "mixed"),
    ([31], "holds, one seed"),
])  # fmt: skip
def test_small_alpha_must_beat_all_three(low, word):
    line = judged(third=selection(low)).loc["C3"]
    assert line["verdict"] == f"{word} where tested" and "not tested in b" in line["evidence"]


def test_both_together_keep_accuracy_only_at_a_lower_cost():
    assert judged(fourth=both(30.0)).loc["C4", "verdict"] == "holds"
    assert judged(fourth=both(20.0)).loc["C4", "verdict"] == "does not hold"
    assert judged(fourth=both(30.0, training=101.0)).loc["C4", "verdict"] == "does not hold"
    dear = pd.concat([both(30.0, frameworks=["a"]), both(30.0, 101.0, frameworks=["b"])])
    line = judged(fourth=dear).loc["C4"]
    assert line["verdict"] == "mixed"  # a setting's cost is its own, and tells nothing of accuracy
    assert "within 3.7 points in 2 of 2 and further off in 0 of 2" in line["evidence"]
    dear.loc[(dear["parameters.framework"] == "a") & (dear["seed"] == 1), "training"] = 102.0
    assert judged(fourth=dear).loc["C4", "verdict"] == "does not hold"  # the dearest seed counts
    alone = dear[(dear["parameters.framework"] == "a") | (dear["has"] == "neither")]
    assert judged(fourth=alone).loc["C4", "evidence"].endswith("not tested in b")
    unknown = both(30.0, float("nan"), frameworks=["a"])
    assert judged(fourth=unknown).loc["C4", "verdict"] == UNTESTED
    mixed = pd.concat([both(30.0, frameworks=["a"]), both(20.0, frameworks=["b"])])
    assert judged(fourth=mixed).loc["C4", "verdict"] == "mixed"


@pytest.mark.parametrize("gains, word", [
    ([-5, -20], "mixed"), ([-30, -10, -5], "mixed"), ([-30, -29, -31], "does not hold"),
    ([0.2, -0.1, 0.1], "holds"), ([-0.1], "holds, one seed"), ([-5], "does not hold, one seed"),
])  # fmt: skip
def test_noise_is_no_kept_accuracy(gains, word):
    found = both(30.0)
    found = found[found["seed"] < len(gains)]
    found.loc[found["has"] == "neither", "seen"] = 30.0
    for seed, gain in enumerate(gains):
        found.loc[(found["has"] == "both") & (found["seed"] == seed), "seen"] = 30.0 + gain
    assert judged(fourth=found).loc["C4", "verdict"] == word


def test_costs_are_held_against_what_is_printed():
    costs = pd.DataFrame({"counted": [100.4, 50.0, 7.0], "printed": [100.0, 50.2, None]})
    assert judged(costs=costs).loc["C5", "verdict"] == "holds"
    costs.loc[1, "counted"] = 60.0
    table = judged(costs=costs)
    assert table.loc["C5", "verdict"] == "mixed" and "1 of 2 cells" in table.loc["C5", "evidence"]


def test_one_seed_decides_nothing_where_there_are_several():
    rate = "parameters.backbone_lr"
    tuned = transfer([5, 6, 5.5]).assign(**{rate: 0.1})
    table = judged(pd.concat([tuned, transfer([-9], ["b"]).assign(**{rate: 0.0})])).loc["C1"]
    assert table["verdict"] == "holds"
    assert "in 2 of 2 settings (wins 2), +5.5 to +5.5 points" in table["evidence"]
    assert "with one seed, which decides nothing, in 0 of 1" in table["evidence"]
    less = both(10.0, frameworks=["b"]).query("seed == 0").assign(**{rate: 0.0})
    table = judged(fourth=pd.concat([both(30.0).assign(**{rate: 0.1}), less])).loc["C4"]
    assert table["verdict"] == "holds" and "further off in 1 of 1" in table["evidence"]


def test_a_rival_that_ran_once_takes_no_seed_from_the_others():
    found = transfer([5, 6, 5.5])
    once = found[~((found["row"] == "random_global") & (found["seed"] > 0))]
    once.loc[once["row"] == "random_global", "seen"] = 99.0
    line = judged(once).loc["C1"]
    assert line["verdict"] == "holds" and "(wins 2), +5.5 to +5.5" in line["evidence"]
    apart = found[(found["row"] != RANDOM[0]) | (found["seed"] == 0)]
    apart = apart[(apart["row"] != RANDOM[1]) | (apart["seed"] > 0)]
    assert judged(apart).loc["C1", "verdict"] == "holds"


def test_the_trained_control_is_told_beside_and_decides_nothing():
    found = transfer([5, 6, 5.5])
    found.loc[found["row"] == "random_layerwise_kd", "seen"] += 50
    table = judged(found)
    assert table.loc[["C1", "C2"], "verdict"].tolist() == ["holds", "holds"]
    told = "as much L_KD as ours included, in 0 of 2 settings (loses 2)"
    assert told in table.loc["C1", "evidence"] and "L_KD" not in table.loc["C2", "evidence"]


def test_small_alpha_is_judged_regime_by_regime_and_against_all_three_or_not_at_all():
    good, bad = selection([33, 33.5, 32.8]), selection([29.5, 29.4, 29.6]).assign(regime="few")
    assert judged(third=pd.concat([good, bad])).loc["C3", "verdict"] == "mixed where tested"
    assert judged(third=good[good["select"] != "high_alpha"]).loc["C3", "verdict"] == UNTESTED


def test_what_counts_as_kept_is_what_the_paper_keeps():
    table = paper("table3").query("dataset == 'coco'").dropna(subset="framework")
    wide = table.pivot_table("value", "framework", "row")
    assert KEPT == pytest.approx((wide["dense"] - wide["ours"]).max())


def test_ahead_of_all_is_ahead_of_each_and_chance_favours_nobody():
    """Four equal arms: neither ahead nor behind is said more often than in one of twenty."""
    random = np.random.default_rng(0)
    words, rivals = Counter(), ["x", "y", "z"]
    against = ("row", "ours", rivals, ["parameters.framework"], "seen")
    for _ in range(400):
        scores = random.normal(size=(3, 4))
        found = pd.DataFrame(scores, columns=["ours", *rivals]).melt(
            var_name="row", value_name="seen", ignore_index=False
        )
        found = found.assign(**{"parameters.framework": "a"}).reset_index(names="seed")
        words[compared(found, *against)["verdict"].item()] += 1
    assert words["loses"] <= 0.05 * 400 and words["wins"] <= 0.05 * 400
    clear = found.assign(seen=found["seen"] + 50 * (found["row"] == "ours"))
    assert compared(clear, *against)["verdict"].item() == "wins"
    behind = found.assign(seen=found["seen"] + 50 * (found["row"] == "y"))
    line = compared(behind, *against).iloc[0]
    assert (line["verdict"], line["rival"]) == ("loses", "y") and line["gain"] < -40


def test_a_gap_is_taken_seed_by_seed():
    found = compared(transfer([5, 6, 7]), "row", "ours", RANDOM, ["parameters.framework"], "seen")
    assert found["gain"].tolist() == pytest.approx([6.0, 6.0])  # seeds differ by 1, in both rows
    assert found["half"].tolist() == pytest.approx([2.484, 2.484], abs=1e-3)
    assert found["n"].tolist() == [3, 3] and found["verdict"].tolist() == ["wins"] * 2


def test_the_papers_costs_are_counted_and_points_stand_beside_its_own(runs):
    cells = printed_cells()
    assert len(cells) == 17 and cells["printed"].notna().all()
    table = judged(costs=cells)
    off = (cells["counted"] / cells["printed"] - 1).abs()
    assert table.loc["C5", "verdict"] == ("holds" if (off <= 0.01).all() else "mixed")
    theirs = paper_points().set_index(["framework", "row"])
    assert theirs.loc[("han", "dense"), ["GMACs", "params_M", "mIoU"]].tolist() == [268.2, 44.1, 46]
    assert len(theirs) == 9 and theirs.notna().all().all()
    found = transfer([5]).assign(macs=2e9, params=3e6)
    ours = cost_points(found)
    assert len(ours) == 2 * 3 and ours["GMACs"].eq(2).all()
    none = cost_points(NOTHING)
    figure = charts.cost_bubbles({"ours": ours, "theirs": theirs.reset_index(), "none": none})
    assert [len(axis.texts) for axis in figure.axes] == [len(ours), 9, 0]
    assert none.empty


def test_runs_that_differ_in_many_parameters_are_settings_not_their_combinations():
    """Twelve parameters of six values each: six settings, and not two thousand million."""
    table = pd.DataFrame([
        {"row": row, "seed": 0, "seen": seen + i, "parameters.framework": "han"}
        | {f"parameters.p{k}": i for k in range(12)}
        for i in range(6) for row, seen in (("ours", 20.0), ("random_global", 10.0))
    ])  # fmt: skip
    found = compared(table, "row", "ours", ["random_global"], ["parameters.framework"], "seen")
    assert len(found) == 6 and (found["gain"] == 10).all()
