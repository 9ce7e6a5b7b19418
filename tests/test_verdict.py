"The verdict: curves at equal L0, differences over all L0s, and the sentences made of them."

import math
import shutil
from pathlib import Path

import pandas as pd
import pytest

from atm_sae.report.manifest import load_manifest
from atm_sae.report.page import markdown_page, profile_results, write_index
from atm_sae.report.tables import SUMMARY_COLUMNS, read_summary
from atm_sae.report.verdict import (
    SUBJECTS,
    equal_explained_table,
    equal_l0_rows,
    equal_l0_table,
    mean_difference,
    mean_differences,
    verdict_sentence,
    verdict_sentences,
)
from atm_sae.stats import format_interval

REPORTS = Path(__file__).resolve().parent.parent / "reports"


def rows(**curves):
    "One row for each point of {method: [(l0, absorption), ...]}; two seeds, 0.1 apart."
    return pd.DataFrame(
        [
            dict(world="planted", method=m, seed=s, sparsity=l0, l0=l0, absorption=a + 0.1 * s)
            for m, points in curves.items()
            for l0, a in points
            for s in (0, 1)
        ]
    )


def lines(*found, metric="excess_absorption", world="planted"):
    "A summary of (rival, mean, low, high)."
    return pd.DataFrame(
        [
            (world, f"atm - {m}", math.nan, metric, mean, low, high, 5, 20.0, 4.0, 64.0)
            for m, mean, low, high in found
        ],
        columns=SUMMARY_COLUMNS,
    )


def test_curves_are_read_at_the_same_l0_and_never_beyond_their_ends():
    read = equal_l0_rows(
        rows(atm=[(2, 0.4), (8, 0.2)], topk=[(4, 0.6), (16, 0.3)]),
        ["absorption"],
        [2, 4, 8, 16, 32],
    )
    assert {m: sorted(g.l0.unique()) for m, g in read.groupby("method")} == {
        "atm": [2, 4, 8],
        "topk": [4, 8, 16],
    }
    assert read.query(
        'method == "atm" and l0 == 4 and seed == 0'
    ).absorption.item() == pytest.approx(0.3)


def test_a_method_that_one_seed_misses_is_not_averaged_over_fewer_seeds():
    table = rows(atm=[(4, 0.1), (8, 0.1)], topk=[(4, 0.3), (8, 0.5)])
    table["l0"] = table.l0.astype(float)
    table.loc[(table.method == "topk") & (table.seed == 1) & (table.l0 == 8), "l0"] = (
        7.5  # seed 1 of TopK ends before 8
    )
    read = equal_l0_rows(table, ["absorption"], [4, 8])
    line = mean_difference(read, "atm", "topk", "absorption")
    assert line["mean"] == pytest.approx(-0.2) and (line["l0_low"], line["l0_high"], line["n"]) == (
        4,
        4,
        2,
    )


def test_mean_difference_by_hand():
    read = equal_l0_rows(
        rows(atm=[(4, 0.1), (16, 0.1)], topk=[(4, 0.5), (16, 0.1)]), ["absorption"], [4, 8, 16]
    )
    line = mean_difference(
        read, "atm", "topk", "absorption"
    )  # -0.4, -0.2, 0 with both seeds: their shift is in both methods
    assert line["mean"] == pytest.approx(-0.2) and line["high"] - line["low"] == pytest.approx(
        0, abs=1e-12
    )
    assert mean_difference(read, "atm", "jumprelu", "absorption") is None
    assert len(mean_differences(read, ["absorption"], [("atm", "topk"), ("atm", "jumprelu")])) == 1


def test_differences_stand_at_each_l0_that_both_reach():
    read = equal_l0_rows(
        rows(atm=[(2, 0.4), (8, 0.2)], topk=[(4, 0.6), (16, 0.3)]), ["absorption"], [2, 4, 8, 16]
    )
    table = equal_l0_table(read, ["absorption"])
    assert table[table.method == "atm - topk"].sparsity.tolist() == [4, 8]
    assert table[table.method == "topk"].sparsity.tolist() == [4, 8, 16]


def test_reading_at_equal_explained_variance_by_hand():
    "FVU 0.1 lies halfway along both curves: absorption 0.3 and 0.5, L0 5 and 10; seeds 0.1 apart."
    table = rows(atm=[(2, 0.4), (8, 0.2)], topk=[(4, 0.6), (16, 0.4)])
    table["fvu"] = table.l0.map({2: 0.15, 8: 0.05, 4: 0.12, 16: 0.08})
    pairs = [("atm", "topk"), ("atm", "jumprelu")]
    found = equal_explained_table(table, "absorption", pairs, [0.9, 0.99])
    line = found.iloc[0]
    assert len(found) == 1  # neither reaches 0.99, and there is no JumpReLU
    assert (line.a, line.b, line.explained, line.n) == ("atm", "topk", 0.9, 2)
    assert [line["mean"], line.low, line.high] == pytest.approx([-0.2] * 3)
    assert [line.l0_a, line.l0_b] == pytest.approx([5, 10])


def test_one_common_seed_is_no_difference_at_equal_explained_variance():
    table = rows(atm=[(2, 0.4), (8, 0.2)], topk=[(4, 0.6), (16, 0.4)])
    table["fvu"] = 1 / table.l0
    table.loc[table.method == "topk", "seed"] += 1
    assert equal_explained_table(table, "absorption", [("atm", "topk")], [0.8]).empty


@pytest.mark.parametrize(
    "bounds, word",
    [
        ((-0.2, -0.3, -0.1), "less than TopK"),
        ((0.2, 0.1, 0.3), "more than TopK"),
        ((0.01, -0.1, 0.12), "undecided against TopK"),
    ],
)
def test_a_sentence_says_on_which_side_of_zero_the_interval_lies(bounds, word):
    said = verdict_sentence(lines(("topk", *bounds)), SUBJECTS[1])
    assert (
        f"{word} ({format_interval(*bounds)})" in said
        and "n = 5 seeds" in said
        and "L0 4 to 64" in said
    )


def test_rivals_are_grouped_and_none_is_left_out():
    said = verdict_sentence(
        lines(
            ("topk", -0.2, -0.3, -0.1),
            ("matryoshka", 0.2, 0.1, 0.3),
            ("jumprelu", -0.1, -0.2, -0.05),
            ("batchtopk", 0.0, -0.1, 0.1),
        ),
        SUBJECTS[1],
    )
    assert (
        said.index("less than TopK")
        < said.index("JumpReLU")
        < said.index("more than Matryoshka")
        < said.index("undecided against BatchTopK")
    )


def test_a_sentence_says_which_l0s_its_mean_covers():
    "One rival ends at 16: the sentence gives the range of all, and says that not all reach it."
    table = lines(("topk", -0.2, -0.3, -0.1), ("jumprelu", -0.2, -0.3, -0.1))
    assert "mean over L0 4 to 64)." in verdict_sentence(table, SUBJECTS[1])
    table.loc[0, "l0_high"] = 16
    assert "mean over L0 4 to 64 as far as both reach)." in verdict_sentence(table, SUBJECTS[1])


def test_a_sentence_needs_its_own_metric_world_and_method():
    table = lines(("topk", -0.2, -0.3, -0.1))
    assert (
        verdict_sentence(table, SUBJECTS[0])
        == verdict_sentence(table, SUBJECTS[2])
        == verdict_sentence(table, SUBJECTS[1], "topk+atm")
        == ""
    )
    assert (
        verdict_sentence(table.assign(sparsity=8.0), SUBJECTS[1]) == ""
    )  # a line at one L0 is no mean


def test_no_file_no_sentence(tmp_path):
    assert verdict_sentences(tmp_path) == []


# the committed verdict


@pytest.fixture
def committed(tmp_path):
    "A copy of the committed full reports that may be broken."
    return Path(shutil.copytree(REPORTS / "full", tmp_path / "full"))


def test_breaking_a_result_changes_the_sentence_and_the_page(committed):
    before, manifest = verdict_sentences(committed), load_manifest()
    page = markdown_page(profile_results(manifest, "full", committed))
    assert len(before) == 3 and all(s in page for s in before)
    path = committed / "tables" / "verdict-summary.csv"
    table = read_summary(path)
    hit = (
        (table.method == "atm - topk")
        & table.sparsity.isna()
        & (table.metric == "excess_absorption")
    )
    assert hit.sum() == 1
    table.loc[hit, ["mean", "low", "high"]] = [0.3, 0.2, 0.4]
    table.to_csv(path, index=False)
    after = verdict_sentences(committed)
    assert (
        "more than" in after[1]
        and "TopK (0.30 [0.20, 0.40])" in after[1]
        and after[1] != before[1]
        and after[::2] == before[::2]
    )
    write_index(manifest, "full", committed)
    page = (committed / "index.html").read_text()
    assert "TopK (0.30 [0.20, 0.40])" in page and after[1] in (committed / "index.md").read_text()


def test_readme_and_pages_hold_the_committed_sentences():
    said = verdict_sentences(REPORTS / "full")
    readme, page = (
        (p).read_text() for p in (REPORTS.parent / "README.md", REPORTS / "full" / "index.md")
    )
    assert len(said) == 3
    for s in said:
        assert s in readme and s in page
