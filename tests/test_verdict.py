"The verdict: curves at equal L0, differences over all L0s, and the sentences made of them."

import html
import json
import math
import re
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from readme import ROOT

from atm_sae.report import verdict
from atm_sae.report.manifest import load_manifest, object_states
from atm_sae.report.answer import (
    LEAD_TERMS,
    answer_caption,
    answer_figure,
    answer_lines,
    answer_lead,
    answer_overview,
    answer_sentences,
    density_lead,
    other_leads,
    l0_lines,
    rate_sentence,
    read_answer,
    scale_lead,
    write_answer,
)
from atm_sae.report.page import html_page, markdown_page, profile_results, verdict_lines
from atm_sae.report.verdict import (
    ABLATION_RATE,
    AGREEMENT,
    BEYOND,
    EFFECT_COLUMNS,
    FRACTION,
    FRACTION_SCORE,
    FULL,
    FULL_SCORE,
    LEAD,
    PUBLISHED_L0,
    MISSES,
    PUBLISHED_STANDING,
    RAW,
    SAEBENCH,
    SIDE_EFFECTS,
    TUNED,
    TWIN,
    Evidence,
    compare_pairs,
    control_table,
    describe_effects,
    effect_lines,
    equal_explained_table,
    equal_l0_rows,
    equal_l0_table,
    explained_sentences,
    floor_sentence,
    layer_sentence,
    left_out_sentences,
    mask_caption,
    mask_table,
    mean_difference,
    mean_differences,
    misses_sentence,
    protocol_sentence,
    protocols_differ,
    published_rows,
    read_evidence,
    repetition_sentence,
    rival_table,
    seeds_range,
    shuffled_sentences,
    split_sentences,
    twin_note,
    unavailable_order,
    verdict_sentences,
)

REPORTS = ROOT / "reports"
RUNS = ROOT / "tests/data/verdict"  # five seeds of 13 methods, planted world and nano-gemma2


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


def test_curves_are_read_near_a_trained_sae_and_never_beyond_their_ends():
    "4.5 lies between 4 and 5; 8 lies in a gap of ATM, a factor of 1.6 from 5 and of 2 from 16."
    read = equal_l0_rows(
        rows(atm=[(4, 0.4), (5, 0.2), (16, 0.1)], topk=[(7, 0.6), (9, 0.3)]),
        ["absorption"],
        [3.9, 4, 4.5, 8, 16, 17],
    )
    assert {m: sorted(g.l0.unique()) for m, g in read.groupby("method")} == {
        "atm": [4, 4.5, 16],
        "topk": [8],
    }
    at = read.query('method == "atm" and l0 == 4.5 and seed == 0').absorption.item()
    share = math.log(4.5 / 4) / math.log(5 / 4)
    assert at == pytest.approx(0.4 - 0.2 * share)


def test_an_l0_is_near_by_what_each_seed_reached():
    table = rows(atm=[(4, 0.4), (8, 0.2)])
    table["l0"] = table.l0.astype(float)
    table.loc[(table.seed == 1) & (table.l0 == 8), "l0"] = 10.1  # from 8, a factor above 1.25
    assert equal_l0_rows(table, ["absorption"], [8]).seed.tolist() == [0]


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
    curves = dict(atm=[(4, 0.1), (8, 0.1), (16, 0.1)], topk=[(4, 0.5), (8, 0.3), (16, 0.1)])
    read = equal_l0_rows(rows(**curves), ["absorption"], [4, 8, 16])
    line = mean_difference(
        read, "atm", "topk", "absorption"
    )  # -0.4, -0.2, 0 with both seeds: their shift is in both methods
    assert line["mean"] == pytest.approx(-0.2) and line["high"] - line["low"] == pytest.approx(
        0, abs=1e-12
    )
    assert mean_difference(read, "atm", "jumprelu", "absorption") is None
    assert len(mean_differences(read, ["absorption"], [("atm", "topk"), ("atm", "jumprelu")])) == 1


def test_differences_stand_at_each_l0_that_both_reach():
    curves = dict(atm=[(2, 0.4), (4, 0.3), (8, 0.2)], topk=[(4, 0.6), (8, 0.4), (16, 0.3)])
    read = equal_l0_rows(rows(**curves), ["absorption"], [2, 4, 8, 16])
    table = equal_l0_table(read, ["absorption"])
    assert table[table.method == "atm - topk"].sparsity.tolist() == [4, 8]
    assert table[table.method == "topk"].sparsity.tolist() == [4, 8, 16]


def test_reading_at_equal_explained_variance_by_hand():
    "A share of 0.9 lies halfway along both curves: absorption 0.3 and 0.5, L0 4 and 8."
    table = rows(atm=[(2, 0.4), (8, 0.2)], topk=[(4, 0.6), (16, 0.4)])
    table["explained_variance"] = table.l0.map({2: 0.85, 8: 0.95, 4: 0.88, 16: 0.92})
    pairs = [("atm", "topk"), ("atm", "jumprelu")]
    found = equal_explained_table(table, "absorption", pairs, [0.9, 0.99])
    line = found.iloc[0]
    assert len(found) == 1  # neither reaches 0.99, and there is no JumpReLU
    assert (line.a, line.b, line.explained, line.n) == ("atm", "topk", 0.9, 2)
    assert [line["mean"], line.low, line.high] == pytest.approx([-0.2] * 3)
    assert [line.l0_a, line.l0_b] == pytest.approx([4, 8]) and line.agree == 2


def test_a_curve_that_has_a_share_at_two_l0s_is_not_read():
    "ATM explains 0.9 between L0 2 and 4, and again between L0 8 and 16."
    table = rows(atm=[(2, 0.4), (4, 0.3), (8, 0.2), (16, 0.1)], topk=[(4, 0.6), (9, 0.4)])
    explained = {2: 0.85, 4: 0.95, 8: 0.95, 16: 0.85, 9: 0.85}
    table["explained_variance"] = table.l0.map(explained)
    pairs = [("atm", "topk")]
    assert equal_explained_table(table, "absorption", pairs, [0.9]).empty
    once = table[table.l0 != 16]
    line = equal_explained_table(once, "absorption", pairs, [0.9]).iloc[0]
    assert [line.l0_a, line.l0_b, line["mean"]] == pytest.approx([8**0.5, 6, 0.35 - 0.5])


def test_one_common_seed_is_no_difference_at_equal_explained_variance():
    table = rows(atm=[(2, 0.4), (8, 0.2)], topk=[(4, 0.6), (16, 0.4)])
    table["explained_variance"] = 1 - 1 / table.l0
    table.loc[table.method == "topk", "seed"] += 1
    assert equal_explained_table(table, "absorption", [("atm", "topk")], [0.8]).empty


# several pairs at once, and what is said of them


def effects(*found):
    "A table of (measure, base, mean, low, high), each base with the mask minus the base."
    masked = {"standard": "atm", "topk": "topk+atm", "jumprelu": "jumprelu+atm"}
    return pd.DataFrame(
        [
            (
                "planted" if measure.planted else "nano-gemma2",
                measure.metric,
                masked[base],
                base,
                mean,
                low,
                high,
                5,
                5,
                4,
                32,
                "4, 32",
            )
            for measure, base, mean, low, high in found
        ],
        columns=EFFECT_COLUMNS,
    )


def test_pairs_are_corrected_together():
    "Seeds differ by 0.1 around a mean of -0.15: alone this excludes zero, beside another pair not."
    table = rows(atm=[(4, 0.0)], standard=[(4, 0.15)], topk=[(4, 0.0)], jumprelu=[(4, 0.0)])
    more = table[table.seed == 1].assign(seed=2)
    table = pd.concat([table, more], ignore_index=True)
    noise = {0: -0.04, 1: 0.0, 2: 0.04}
    table.loc[table.method == "atm", "absorption"] += table.seed.map(noise)
    table.loc[table.method == "topk", "absorption"] -= table.seed.map(noise)
    pairs = [("atm", "standard"), ("topk", "jumprelu")]
    read = equal_l0_rows(table, ["absorption"], [4])
    one, both = (compare_pairs(read, ["absorption"], pairs[:n]) for n in (1, 2))
    half = [(t.high - t.low).iloc[0] / 2 for t in (one, both)]
    error = 0.04 / math.sqrt(3)
    assert half == pytest.approx([4.30265 * error, 6.20535 * error], rel=1e-4)
    assert both.agree.tolist() == [3, 1] and both.n.tolist() == [3, 3]


@pytest.mark.parametrize(
    "bounds, words",
    [
        (
            (-0.2, -0.3, -0.1),
            "lower on ReLU + L1 by raw absorption and by absorption beyond misses",
        ),
        ((0.2, 0.1, 0.3), "higher on ReLU + L1 by raw absorption and by absorption beyond misses"),
        (
            (0.01, -0.1, 0.12),
            "no difference shown on ReLU + L1 (the data would have shown one of at least "
            "0.11 by raw absorption, 0.11 by absorption beyond misses)",
        ),
    ],
)
def test_two_measures_that_agree(bounds, words):
    table = effects((RAW, "standard", *bounds), (BEYOND, "standard", *bounds))
    assert describe_effects(table, [RAW, BEYOND]) == words


@pytest.mark.parametrize(
    "beyond, words",
    [
        ((0.2, 0.1, 0.3), "lower by raw absorption, higher by absorption beyond misses"),
        (
            (0.0, -0.1, 0.1),
            "lower by raw absorption, no difference shown by absorption beyond misses "
            "(the data would have shown one of at least 0.10)",
        ),
    ],
)
def test_two_measures_that_disagree_say_so(beyond, words):
    table = effects((RAW, "standard", -0.2, -0.3, -0.1), (BEYOND, "standard", *beyond))
    said = describe_effects(table, [RAW, BEYOND])
    assert said == f"on ReLU + L1 the measures disagree: {words}"
    than = describe_effects(table, [RAW, BEYOND], than=True)
    assert than == f"against ReLU + L1 the measures disagree: {words}"


def test_pairs_are_grouped_and_a_measure_that_is_missing_says_nothing():
    lower, higher = (-0.2, -0.3, -0.1), (0.2, 0.1, 0.3)
    found = [(m, base, *lower) for base in ("standard", "jumprelu") for m in (RAW, BEYOND)]
    found += [(m, "topk", *higher) for m in (RAW, BEYOND)]
    said = describe_effects(effects(*found), [RAW, BEYOND], than=True)
    assert (
        said.startswith("lower than ReLU + L1 and JumpReLU by raw") and "; higher than TopK" in said
    )
    assert describe_effects(effects(*found), [FULL_SCORE, FRACTION_SCORE]) == ""
    assert describe_effects(effects((RAW, "topk", *lower)), [RAW, BEYOND]) == ""


def test_one_seed_shows_nothing():
    nan = math.nan
    table = effects((RAW, "standard", -0.2, nan, nan), (BEYOND, "standard", -0.2, nan, nan))
    said = describe_effects(table, [RAW, BEYOND])
    assert said == "no difference shown on ReLU + L1 (one seed gives no interval)"


NO_MASK = " On Matryoshka, tuning chose no mask."  # ends the first sentence of each world


@pytest.mark.parametrize(
    "missing, kept, gone",
    [
        ("planted", "Language model", "Planted world"),
        ("absorption", "Planted world", "Language model"),
    ],
)
def test_one_world_alone_has_a_verdict(runs, missing, kept, gone):
    "The tables and sentences of the other world stay as they are."
    before = subjects(runs)
    measured = ("planted",) if missing == "planted" else ("absorption", "importance")
    for name in (*measured, "stability"):
        (runs / "tables" / f"{name}-runs.csv").unlink()
    after = subjects(runs)
    assert before[kept] == after[kept] and after[kept].endswith(NO_MASK)
    assert gone not in after and {"Reconstruction", "Importance"} <= after.keys()
    evidence = read_evidence(runs)
    columns = [*mask_table(evidence), *rival_table(evidence)]
    word = "planted:" if missing == "planted" else "model:"
    assert columns and not any(column.startswith(word) for column in columns)
    assert (
        "Agreement" not in mask_caption(evidence)
        and "JumpReLU" in mask_table(evidence).base.tolist()
    )


def test_the_ablation_rate_stands_beside_the_scores_where_it_was_measured(runs):
    assert ABLATION_RATE.heading not in mask_table(read_evidence(runs))
    path = runs / "tables" / "absorption-runs.csv"
    table = pd.read_csv(path)
    rate = 0.2 + 0.1 * (table.method == "topk+atm") + 0.01 * table.seed
    table.assign(**{ABLATION_RATE.metric: rate}).to_csv(path, index=False)
    table = mask_table(read_evidence(runs)).set_index("base")
    tuned = table.minus.str.startswith("base tuned")
    cells = table[ABLATION_RATE.heading]
    assert cells[tuned]["TopK"].startswith("**higher** 0.10")
    assert cells["JumpReLU"].startswith("0.00")


def test_no_file_no_sentence(tmp_path):
    assert verdict_sentences(read_evidence(tmp_path)) == [] and layer_sentence(tmp_path) == ""
    assert read_evidence(tmp_path) is None


# tables of runs


@pytest.fixture
def runs(tmp_path):
    "A copy of tables of runs and their parameters, to be changed."
    return shutil.copytree(RUNS, tmp_path / "runs")


def test_each_world_is_read_at_its_own_l0s(runs):
    evidence = read_evidence(runs, [4], [8])
    assert {*evidence.planted.sparsity} == {4}
    assert {*evidence.letters.sparsity} == {8}
    assert {*read_evidence(runs, [4]).letters.sparsity} <= {4}


def move(folder, name, method, column, by):
    "Moves a column of a method's runs by a number."
    path = folder / "tables" / f"{name}-runs.csv"
    table = pd.read_csv(path)
    assert (table.method == method).any()
    table.loc[table.method == method, column] += by
    table.to_csv(path, index=False)


def subjects(folder):
    "{subject: sentence}"
    return {s.split("**")[1]: s for s in verdict_sentences(read_evidence(folder))}


@pytest.fixture(scope="module")
def before():
    "The sentences of the unchanged tables."
    return subjects(RUNS)


def changed(before, after):
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.mark.parametrize(
    "name, method, column, by, words, expected",
    [
        (
            "planted",
            "topk+atm",
            "absorption",
            0.5,
            "on TopK the measures disagree: "
            "higher by raw absorption, lower by absorption beyond misses",
            "Planted world, base tuned by itself",
        ),
        (
            "planted",
            "topk+atm",
            "excess_absorption",
            0.5,
            "on TopK the measures disagree: "
            "lower by raw absorption, higher by absorption beyond misses",
            "Planted world, base tuned by itself",
        ),
        (
            "absorption",
            "topk+atm",
            "mean_absorption_fraction_score",
            0.5,
            "on TopK the measures disagree: lower by the full score, higher by the fraction score",
            "Language model, base tuned by itself",
        ),
        (
            "stability",
            "jumprelu+atm",
            "frequent_cosine",
            0.5,
            "on JumpReLU the measures disagree: "
            "lower over all latents, lower one to one, higher over the most frequent",
            "Stability",
        ),
        (
            "absorption",
            "topk+atm",
            "explained_variance",
            0.3,
            "on the language model, lower on ReLU + L1 and BatchTopK by explained variance; "
            "higher on TopK",
            "Reconstruction",
        ),
        (
            "planted",
            "dropout",
            "absorption",
            -0.5,
            "on ReLU + L1 the measures disagree: higher by raw absorption, lower",
            "Importance",
        ),
        (
            "absorption",
            "jumprelu+atm anneal=0.5",
            "mean_full_absorption_score",
            0.5,
            "the measures disagree: higher by the full score",
            "The best attempt",
        ),
    ],
)
def test_moving_a_column_of_runs_changes_its_sentence_alone(
    before, runs, name, method, column, by, words, expected
):
    move(runs, name, method, column, by)
    after = subjects(runs)
    assert changed(before, after) == {expected}
    assert words in after[expected] and words not in before[expected]


def test_a_rival_changes_what_is_said_of_atm_and_of_its_base(before, runs):
    evidence = rival_table(read_evidence(runs)).set_index("minus")
    move(runs, "absorption", "batchtopk", "mean_full_absorption_score", -0.5)
    move(runs, "absorption", "batchtopk+atm", "mean_full_absorption_score", -0.5)
    after = subjects(runs)
    share = "ATM and its base"
    others = {"Language model, against other SAEs", "The best attempt"}
    assert changed(before, after) == others | {share}
    words = (
        "against BatchTopK the measures disagree: "
        "higher by the full score, lower by the fraction score"
    )
    assert after["Language model, against other SAEs"].count(words) == 2
    table = rival_table(read_evidence(runs)).set_index("minus")
    moved = table.loc["BatchTopK", FULL_SCORE.heading]
    assert moved.startswith("**0.48") and moved != evidence.loc["BatchTopK", FULL_SCORE.heading]
    assert (table.drop("BatchTopK") == evidence.drop("BatchTopK")).all(axis=None)


def test_atm_and_its_base_meet_a_rival_at_the_same_l0s():
    "In the planted world ATM ends below 64, so its base is read there neither."
    evidence = read_evidence(RUNS)
    planted = evidence.planted[evidence.planted.sparsity <= 32]
    assert {*planted.sparsity} < {*evidence.planted.sparsity}
    alone = compare_pairs(planted, ["absorption"], [("standard", "jumprelu")])["mean"].item()
    cell = rival_table(evidence).set_index("minus").loc["JumpReLU", RAW.heading]
    assert cell.split(" / ")[1].strip("*") == f"{alone:.3f}"


def test_settings_that_hide_nothing_are_no_mask(runs):
    "In each world by itself: a mask that hides latents in one is compared there."
    evidence = read_evidence(runs)
    line = mask_table(evidence).set_index("base").loc["Matryoshka"]
    assert line.minus == "tuning chose no mask" and {*line.drop("minus")} == {"–"}
    said = " ".join(verdict_sentences(evidence))
    assert said.count("On Matryoshka, tuning chose no mask.") == 2
    move(runs, "planted", "matryoshka+atm", "mask_rate", 0.2)
    evidence = read_evidence(runs)
    cells = mask_table(evidence).set_index("base").loc["Matryoshka"]
    assert cells[RAW.heading] != "–" and cells[FULL_SCORE.heading] == "–"
    after = subjects(runs)
    assert NO_MASK not in after["Planted world"] and NO_MASK in after["Language model"]


def test_the_mask_table_says_how_sure_it_is_and_what_else_differs(runs):
    evidence = read_evidence(runs)
    table = mask_table(evidence).set_index("base")
    cells = table[table.minus.str.startswith("base tuned")].loc["ReLU + L1"]
    assert cells.minus == "base tuned by itself (learning rate × 2.6)"
    assert cells[RAW.heading] == "**lower** -0.076 ± 0.025 (5/5)"
    assert cells[BEYOND.heading] == "**lower** -0.0535 ± 0.0096 (5/5)"
    assert cells[FULL_SCORE.heading] == "-0.0012 ± 0.0027 (4/5)"
    assert cells[FRACTION_SCORE.heading].startswith("**higher** 0.016")
    assert "of 5 seeds" in mask_caption(evidence) and table.loc["JumpReLU"].minus == "twin"


def write_layers(folder, **columns):
    "The table of an experiment `layer` whose SAEs read block 2."
    (folder / "figures").mkdir(exist_ok=True)
    (folder / "provenance").mkdir(exist_ok=True)
    pd.DataFrame(columns).to_csv(folder / "figures/layer.csv", index=False)
    (folder / "provenance/layer.json").write_text('{"parameters": {"layer": 2}}')


def test_another_learning_rate_is_said_for_the_world_that_has_it(runs):
    "In the planted world TopK + ATM has 4.2 times the rate of TopK; on the model it gets the same."
    path = runs / "provenance/absorption.json"
    found = json.loads(path.read_text())
    found["parameters"]["tuned"] = {method: {} for method in found["parameters"]["tuned"]}
    path.write_text(json.dumps(found))
    evidence = read_evidence(runs)
    tuned = "base tuned by itself"
    assert f"{tuned} (planted: learning rate × 4.2)" in {*mask_table(evidence).minus}
    of_model = mask_table(evidence.of_world(planted=False))
    assert {*of_model.minus} == {"twin", "tuning chose no mask"}
    of_planted = mask_table(evidence.of_world(planted=True))
    assert f"{tuned} (learning rate × 4.2)" in {*of_planted.minus}


def test_the_layer_sentence_follows_the_swap(tmp_path):
    table = dict(layer=[0, 2], swapped=[1.0, 0.0], n=[40, 40], reads=[True, False])
    write_layers(tmp_path, **table)
    said = layer_sentence(tmp_path)
    assert "after block 2" in said and "in 0% of 40 pairs" in said
    assert "does not read the word" in said and said.endswith("no causal meaning.")
    write_layers(tmp_path, **table | dict(swapped=[1.0, 0.75], reads=[True, True]))
    said = layer_sentence(tmp_path)
    assert "in 75% of" in said and "the model reads the word there." in said


def test_sentences_that_lead(before):
    said = ["**Reconstruction cost**: a.", "**Stability**: b.", "**Planted world**, c."]
    assert split_sentences(said) == (["**Stability**: b."], [said[0], said[2]])
    assert {*LEAD} - {"The layer"} <= before.keys()


def test_the_pages_hold_the_sentences_and_change_with_them(tmp_path):
    "The committed reports of the default profile."
    for name in ("tables", "provenance", "figures", "notebooks"):
        shutil.copytree(REPORTS / name, tmp_path / name)
    manifest = load_manifest()
    states = object_states(manifest, "default", tmp_path)

    def pages():
        results = profile_results(manifest, "default", tmp_path, states=states)
        said = verdict_sentences(read_evidence(tmp_path))
        page = html.unescape(html_page([results])).replace("\u00a0", " ")
        return said, markdown_page([results]), page, results

    before, markdown, page, results = pages()
    lead, rest = verdict_lines([results])
    assert len(lead) + len(rest) == len(before) >= 6 and lead[0][0] == "The layer (default)"
    assert all(sentence in page for _, sentence in [*lead, *rest])
    assert all(sentence in markdown for _, sentence in lead)
    cells = mask_table(read_evidence(tmp_path)).to_numpy().ravel().tolist()
    assert all(cell.replace("**", "") in page for cell in cells)
    assert PUBLISHED_STANDING in markdown
    move(tmp_path, "absorption", "topk+atm", "mean_full_absorption_score", 5)  # two seeds
    after, _, page, _ = pages()
    (new,) = {s for s in set(after) - set(before) if s.startswith("**Language model** (")}
    assert new.partition("** ")[2] in page and "higher by the full score" in page


def worlds(folder):
    evidence = read_evidence(folder)
    return {
        "Planted world": evidence.of_world(planted=True),
        "Language model": evidence.of_world(planted=False),
    }


def as_twins(folder):
    "The worlds, as if each base had the settings of its masked form."
    return {world: replace(of, tuned={}) for world, of in worlds(folder).items()}


def lead(evidence):
    "The answer of all worlds as one text."
    return " ".join(f"{of.bold} {of.rest}".strip() for of in answer_lead(evidence))


def brief(evidence):
    "{heading: table by its first column}, without the values of random dictionaries."
    tables = {
        of.heading: of.table.set_index(of.table.columns[0]) for of in answer_overview(evidence)
    }
    for table in tables.values():
        table.index = table.index.str.replace(r", random dictionary -?[\d.]+", "", regex=True)
    return tables


def test_the_answer_in_short_names_the_bases(runs):
    planted = {"Planted world": as_twins(runs)["Planted world"]}
    first, importance = answer_lead(planted)
    assert importance.bold == (
        "Does it matter which latents the mask hides? In the planted world (5 seeds): on ReLU + L1."
    )
    assert importance.more == (
        "Planted world. Compared with each control, absorption is lower on ReLU + L1 by both "
        "measures."
    )
    assert first.bold == (
        "In the planted world (5 seeds, L0 4, 8, 16, 32 or 4, 8, 16, 32, 64), absorption with the "
        "mask is lower on 2 of 4 bases (ReLU + L1 and TopK) by both measures, on 2 of 4 bases "
        "(BatchTopK and JumpReLU) by absorption beyond misses only; on Matryoshka, tuning chose no "
        "mask."
    )
    assert first.rest.startswith("On ReLU + L1, the base of the published ATM: raw absorption -0.0")
    assert first.rest.endswith(
        "Without L0 4, raw absorption is lower on no base; absorption beyond misses is lower on "
        "ReLU + L1 and TopK. Side effects: explained variance lower on all 4 (by 0.005 to 0.029); "
        "agreement between seeds lower on ReLU + L1, BatchTopK and JumpReLU."
    )
    assert first.more == (
        "At 95% explained variance (L0 1.2 to 4.7 times that of the twin): raw absorption lower "
        "on BatchTopK; absorption beyond misses lower on all 4."
    )
    move(runs, "planted", "topk+atm", "absorption", 0.5)
    move(runs, "planted", "topk+atm", "excess_absorption", 0.5)
    planted = {"Planted world": as_twins(runs)["Planted world"]}
    assert (
        "lower on 1 of 4 bases (ReLU + L1) by both measures, on 2 of 4 bases (BatchTopK and "
        "JumpReLU) by absorption beyond misses only, and higher on 1 of 4 bases (TopK) by both "
        "measures; on Matryoshka"
    ) in lead(planted)
    free = small(planted={"standard": (0.2, 0.2), "atm": (0.1, 0.1)})
    assert "explained variance no difference shown on ReLU + L1, the only one" in lead(
        {"Planted world": free}
    )
    assert answer_lead({}) == []


def test_the_answer_in_brief_has_a_table_for_each_question(runs):
    evidence = as_twins(runs)
    tables = brief(evidence)
    assert next(iter(tables)).startswith(
        "Planted world (5 seeds, L0 4, 8, 16, 32 or 4, 8, 16, 32, 64)"
    )
    assert [re.sub(", L0 [^)]*", "", heading) for heading in tables] == [
        "Planted world (5 seeds): base with ATM minus its twin",
        "Language model (5 seeds): base with ATM minus its twin",
        "Planted world (5 seeds): base with ATM minus each control",
        "Language model (5 seeds): base with ATM minus each control",
        "Language model (5 seeds): the published order, ATM < JumpReLU < TopK",
    ]
    planted, model, controls, _, order = tables.values()
    line = effect_lines(evidence["Planted world"].mask_effects, RAW)["topk+atm", "topk"]
    half = (line.high - line.low) / 2
    assert planted.loc["Raw absorption", "TopK"].startswith(
        f"**lower** {verdict.format_margin(line.mean, half)} (0."
    )
    assert planted.Matryoshka.iloc[0] == "tuning chose no mask"
    assert {*planted.Matryoshka.iloc[1:]} == {"–"}
    assert planted.loc["Explained variance"].iloc[0].startswith("**lower** -0.")
    assert model.loc["Fraction score", "ReLU + L1"].startswith("**higher** ")
    assert {*controls["Raw absorption"].str[:9]} == {"**lower**"}
    assert {*controls.L0} == {*evidence["Planted world"].control_effects.l0s} == {"4, 8, 16"}
    assert list(order.index) == ["ATM minus JumpReLU", "JumpReLU minus TopK"]
    assert answer_overview({}) == []


def test_scores_stand_beside_those_of_a_random_dictionary():
    (model, _) = answer_overview({"Language model": language_model()})
    assert list(model.table.measure)[:2] == [
        "Full score, random dictionary 0.010",
        "Fraction score, random dictionary 0.020",
    ]


def test_a_result_against_a_control_that_rests_on_one_l0_is_named():
    "Minus shuffled, ATM is lower by 1 at L0 4 and higher by 0.1 elsewhere."
    rows = read_rows("planted", {"atm": (0.5, 0.5), "standard+shuffled": (0.5, 0.5)}, (4, 8, 16))
    at_4, atm = rows.sparsity == 4, rows.method == "atm"
    for column in ("absorption", "excess_absorption"):
        rows.loc[atm, column] += 0.1
        rows.loc[atm & at_4, column] -= 1.1
    evidence = replace(small(planted={}), planted=rows)
    (said,) = left_out_sentences(evidence)
    assert said.startswith("**Planted world, its controls, one L0 left out** of the mean")
    words = "higher on ReLU + L1 minus ATM's probabilities shuffled among the latents by raw"
    assert f"without L0 4, {words}" in said


def test_the_value_of_the_twin_stands_in_brackets():
    planted, _ = brief({"Planted world": small(planted=TWINS, tuned=FASTER)}).values()
    assert planted.loc["Raw absorption", "ReLU + L1"].startswith("**lower** -0.1000 ± ")
    assert planted.loc["Raw absorption", "ReLU + L1"].endswith(" (0.200)")
    assert planted.loc["Explained variance", "JumpReLU"].endswith(" (0.900)")


def test_a_measure_from_another_number_of_seeds_names_it(runs):
    evidence = as_twins(runs)["Planted world"]
    controls = {*evidence.control_effects.b}
    few = evidence.planted[~evidence.planted.method.isin(controls) | (evidence.planted.seed < 3)]
    tables = brief({"Planted world": replace(evidence, planted=few)})
    assert list(tables)[1] == "Planted world (3 seeds): base with ATM minus each control"
    fewer = replace(evidence, agreement=evidence.agreement[evidence.agreement.seed < 4])
    index = brief({"Planted world": fewer})[next(iter(tables))].index
    assert ["(4 seeds; L0 " in name for name in index] == ["Agreement" in n for n in index]


def test_the_answer_says_where_the_mean_over_l0_hides_a_change_of_sign(runs):
    by_l0 = l0_lines(as_twins(runs))[0]
    assert by_l0.startswith(
        "Planted world, raw absorption, single L0s (not corrected): L0 4: lower on all 4; L0 8: "
    )
    assert "L0 16: no difference shown on any of 4; L0 32: higher on ReLU + L1 and" in by_l0


def test_the_answer_changes_with_the_table(runs):
    def cell():
        return [*brief(as_twins(runs)).values()][1].loc["Full score", "TopK"]

    assert cell().startswith("**lower** ")
    assert "(TopK) by both measures" in lead(as_twins(runs)).partition("language model")[2]
    move(runs, "absorption", "topk+atm", "mean_full_absorption_score", 0.5)
    assert cell().startswith("**higher** ")
    assert "(TopK) by the full score only" in lead(as_twins(runs))


def test_intervals_wider_than_the_scores_are_called_too_few_seeds(runs):
    path = runs / "tables/absorption-runs.csv"
    table = pd.read_csv(path)
    scores = ["mean_full_absorption_score", "mean_absorption_fraction_score"]
    wide = 5 * (-1.0) ** table.seed
    for score in scores:
        table[score] += wide * table.method.str.contains("atm") + 0.001
    table.to_csv(path, index=False)
    said = lead({"Language model": as_twins(runs)["Language model"]})
    assert "absorption with the mask is not shown to differ on all 4 bases" in said
    assert ". Too few seeds: the widest intervals exceed the scores." in said


def test_each_world_is_read_from_the_largest_profile_that_has_it(runs, tmp_path):
    other = tmp_path / "smoke"
    shutil.copytree(runs, other)
    (other / "tables/planted-runs.csv").unlink()
    found = read_answer({"smoke": runs, "default": other})
    assert [of.profile for of in found.values()] == ["smoke", "default"]
    assert read_answer({"default": tmp_path / "empty"}) == {}


def test_the_figure_draws_the_numbers_of_the_table(runs, tmp_path):
    found = read_answer({"full": runs})
    path = write_answer(found, tmp_path)
    drawn = pd.read_csv(path.with_suffix(".csv"))
    table = next(iter(brief(worlds(runs)).values()))
    raw = drawn[drawn.panel == "Planted: raw absorption"]
    assert list(raw.base) == ["standard", "topk", "batchtopk", "jumprelu"] and len(drawn) == 24
    line = raw[raw.minus.str.contains("twin")].iloc[0]
    margin = verdict.format_margin(line["mean"], (line.high - line.low) / 2)
    assert margin in table.loc["Raw absorption", verdict.method_name(line.base)]
    bytes_of = path.read_bytes(), path.with_suffix(".svg").read_bytes()
    write_answer(found, tmp_path)
    assert bytes_of == (path.read_bytes(), path.with_suffix(".svg").read_bytes())
    assert write_answer({}, tmp_path) is None and answer_lines({}).empty


def test_the_rates_of_base_and_mask_are_said_where_they_differ(runs):
    evidence = read_evidence(runs)
    said = rate_sentence(evidence, "planted")
    assert "times 2.6 on ReLU + L1, 4.2 on TopK" in said and "JumpReLU" not in said
    assert rate_sentence(replace(evidence, tuned={}), "planted") == ""
    assert f"Planted world. {said}" in answer_sentences({"Planted world": evidence})


def test_readme_and_results_hold_the_committed_sentences_and_tables():
    readme, index = (ROOT / "README.md").read_text(), (REPORTS / "index.md").read_text()
    found = read_answer({"default": REPORTS, "full": REPORTS / "full"})
    committed = {world: of.evidence for world, of in found.items()}
    tables = answer_overview(committed)
    for lead in other_leads({"default": REPORTS, "full": REPORTS / "full"}):
        assert f"**{lead.bold}** {lead.rest}" in readme and f"{lead.rest} {lead.more}" in index
    cells = [cell for of in tables for cell in [of.heading, *of.table.to_numpy().ravel()]]
    first = [PUBLISHED_STANDING, LEAD_TERMS, *sum(answer_lead(committed), ()), *cells]
    for cell in [*first, answer_caption(found)]:
        assert cell in readme, cell
    for cell in [*cells, *answer_sentences(committed)]:
        assert cell in index, cell
    assert len(readme.splitlines()) < 265
    places = [readme.index(text) for text in (*first[:2], "make reports", cells[0])]
    assert places == sorted(places) and places[-1] < readme.index("## The tut")


def test_published_values_of_atm_are_called_secondary():
    published = [v for e in load_manifest().experiments for v in e.published]
    assert all(v["confidence"].startswith("secondary") for v in published if v["method"] == "atm")
    assert all("inferred" in v["confidence"] for v in published if v["method"] != "atm")


def test_a_method_that_missed_its_l0_has_no_agreement():
    evidence = replace(read_evidence(RUNS), tuned={})

    def bases(of):
        return {*of.mask_effects.b[of.mask_effects.metric == "best_cosine"]}

    rows = evidence.agreement.copy()
    rows.loc[rows.method == "topk+atm", "l0"] = 0.1
    assert bases(replace(evidence, agreement=rows)) == bases(evidence) - {"topk"}
    assert "topk" in bases(evidence)


# small tables, made for one question


def read_rows(world, methods, l0s=(4, 8)):
    """What `equal_l0_rows` returns, of {method: (first measure, second measure)}.

    Five seeds. The difference of two methods varies by 0.004 between seeds."""
    first, second = (FULL, FRACTION) if world != "planted" else ("absorption", "excess_absorption")
    return pd.DataFrame(
        [
            {
                "world": world,
                "method": method,
                "seed": seed,
                "l0": l0,
                "sparsity": l0,
                first: one + 0.001 * number * (seed - 2),
                second: other + 0.001 * number * (seed - 2),
                "explained_variance": 0.9,
            }
            for number, (method, (one, other)) in enumerate(methods.items())
            for seed in range(5)
            for l0 in l0s
        ],
        columns=["world", "method", "seed", "l0", "sparsity", first, second, "explained_variance"],
    )


def agree_rows(agreement, l0s=(4, 8), seeds=5):
    """Agreement between seeds, of {world: {method: (all latents, most frequent)}}.

    The difference of two methods varies by 0.002 between seeds."""
    return pd.DataFrame(
        [
            (world, method, l0, seed, l0, one + by, one + by, other + by)
            for world, methods in agreement.items()
            for number, (method, (one, other)) in enumerate(methods.items())
            for l0 in l0s
            for seed in range(seeds)
            for by in [0.0005 * number * (seed - 2)]
        ],
        columns=["world", "method", "sparsity", "seed", "l0", *AGREEMENT],
    )


def small(planted=None, letters=None, tuned=None, agreement=None, controls=None, **more):
    """The evidence of small tables; every base is the twin of its masked form without `tuned`.

    The controls of the language model stand in `letters` if `controls` is not given."""
    return Evidence(
        planted=read_rows("planted", planted or {}),
        letters=read_rows("nano-gemma2", letters or {}),
        controls=read_rows("nano-gemma2", (letters if controls is None else controls) or {}),
        agreement=agree_rows(agreement or {}),
        unmasked={},
        tuned={world: tuned or {} for world in ("planted", "model")},
        **more,
    )


FASTER = {
    "atm": {"lr_scale": 2.0, "c": 0.5},
    "jumprelu+atm": {"c": 0.5},
}  # settings of masked forms
TWINS = {
    "atm": (0.1, 0.1),
    "standard+off": (0.2, 0.2),
    "standard": (0.05, 0.05),
    "jumprelu": (0.3, 0.3),
    "jumprelu+atm": (0.1, 0.1),
    "jumprelu+off": (0.4, 0.4),
}


def test_the_twin_comes_first_and_the_tuned_base_stands_beside_it():
    "Minus the twin ATM is lower, minus the tuned base it is higher. JumpReLU is its own twin."
    evidence = small(planted=TWINS, tuned=FASTER)
    assert evidence.mask_pairs("planted") == {
        ("atm", "standard+off"): TWIN,
        ("atm", "standard"): TUNED,
        ("jumprelu+atm", "jumprelu"): TWIN,
    }
    twins, tuned = brief({"Planted world": evidence}).items()
    assert twins[0].endswith("minus its twin") and tuned[0].endswith("the base tuned by itself")
    assert [*twins[1].columns] == ["ReLU + L1", "JumpReLU"] and [*tuned[1]] == ["ReLU + L1"]
    assert {*twins[1].loc["Raw absorption"].str[:10]} == {"**lower** "}
    assert tuned[1].loc["Raw absorption"].item().startswith("**higher** 0.0500 ± ")
    assert not any("Agreement" in name for name in tuned[1].index)
    first, second, *_ = verdict_sentences(evidence)
    assert first.startswith("**Planted world**, absorption of base with the mask minus its twin")
    assert "lower on ReLU + L1 and JumpReLU by raw" in first
    assert "For JumpReLU the twin and the base tuned by itself are the same SAE" in first
    assert (
        second.startswith("**Planted world, base tuned by itself**") and "higher on ReLU" in second
    )
    table = mask_table(evidence).set_index(["base", "minus"])[RAW.heading]
    assert table["ReLU + L1", "twin"].startswith("**lower** -0.1000 ± ")
    assert table["ReLU + L1", "base tuned by itself (learning rate × 2)"].startswith(
        "**higher** 0.0500 ± "
    )
    assert table["JumpReLU", "twin"].startswith("**lower** -0.2000 ± ")


def test_a_twin_that_was_not_run_is_named():
    evidence = small(planted={m: TWINS[m] for m in ("atm", "standard")}, tuned=FASTER)
    (heading,) = brief({"Planted world": evidence})
    assert heading.endswith("base with ATM minus the base tuned by itself")
    assert twin_note(evidence, "planted") == "No twin was run for ReLU + L1."
    assert verdict_sentences(evidence)[0].endswith("L0 4, 8). No twin was run for ReLU + L1.")


def test_twins_and_tuned_bases_are_corrected_together():
    "The interval of one comparison is wider beside others of the same question."
    twins = small(planted=TWINS, tuned=FASTER).mask_effects
    alone = small(planted=TWINS).compare([("atm", "standard+off")], ["planted"])
    line, other = (effect_lines(of, RAW)["atm", "standard+off"] for of in (twins, alone))
    assert line.high - line.low > 1.2 * (other.high - other.low)
    assert line.mean == other.mean


def test_the_effects_of_the_mask_are_computed_once(monkeypatch):
    calls = []
    monkeypatch.setattr(verdict, "compare_pairs", lambda *a: calls.append(a) or compare_pairs(*a))
    evidence = {"Planted world": small(planted=TWINS, tuned=FASTER)}
    answer_overview(evidence), answer_sentences(evidence), answer_lines(evidence)
    assert len(calls) == 4  # the mask, the controls, and each of two L0s left out


CONTROLLED = {
    "atm": (0.10, 0.10),
    "standard": (0.20, 0.20),
    "dropout": (0.30, 0.30),
    "standard+activity": (0.05, 0.20),
    "standard+shuffled": (0.12, 0.09),
}


def test_atm_is_compared_with_each_control():
    evidence = small(planted=CONTROLLED, letters=CONTROLLED)
    _, importance = answer_lead({"Planted world": evidence.of_world(planted=True)})
    assert importance.bold.endswith("In the planted world (5 seeds): not on ReLU + L1.")
    assert importance.rest == (
        "Controls hide latents without regard to their importance. It matters where absorption "
        "with ATM is lower than with each control by both measures. In the planted world, on ReLU "
        "+ L1 it is higher than with dropout of activity by raw absorption, higher than with "
        "shuffled probabilities by absorption beyond misses. In the planted world, shuffled "
        "probabilities alone give 80% to 110% of the mask's reduction."
    )
    assert importance.more == (
        "Planted world. Compared with dropout of latents, absorption is lower on ReLU + L1 by both "
        "measures. Compared with dropout of activity, absorption is lower on ReLU + L1 by "
        "absorption beyond misses only, and higher on ReLU + L1 by raw absorption only. Compared "
        "with shuffled probabilities, absorption is lower on ReLU + L1 by raw absorption only, and "
        "higher on ReLU + L1 by absorption beyond misses only. Of the mask's reduction, "
        "shuffled probabilities give 80% on ReLU + L1 by raw absorption, 110% on ReLU + L1 by "
        "absorption beyond misses."
    )
    said = {s.split("**")[1]: s for s in verdict_sentences(evidence)}["Importance"]
    assert said.startswith("**Importance** (n = 5 seeds): Base with the mask minus dropout of the")
    assert (
        "in the planted world (L0 4, 8), on ReLU + L1 the measures disagree: higher by raw"
    ) in said
    table = control_table(evidence)
    assert (
        table.shape == (3, 7)
        and {*table.L0} == {"4, 8"}
        and table[RAW.heading][0].startswith("**lower** -0.2000 ± ")
    )
    assert control_table(small(planted=TWINS)).empty


def test_on_the_language_model_the_controls_stand_beside_an_atm_of_their_own():
    "The SAEs of the object `importance` are compared with each other, and with no others."
    shifted = {method: (one + 0.3, other + 0.3) for method, (one, other) in TWINS.items()}
    evidence = small(letters=shifted, controls=CONTROLLED)
    line = effect_lines(evidence.control_effects, FULL_SCORE)["atm", "dropout"]
    assert line.mean == pytest.approx(CONTROLLED["atm"][0] - 0.30)
    assert effect_lines(evidence.mask_effects, FULL_SCORE)["atm", "standard"].mean == (
        pytest.approx(TWINS["atm"][0] - TWINS["standard"][0])
    )
    assert small(letters=CONTROLLED, controls={}).control_effects.empty
    assert evidence.of_world(planted=True).control_effects.empty


def test_the_share_of_the_shuffled_control_by_hand():
    "0.12 - 0.20 is 80% of 0.10 - 0.20. No share where the mask lowers nothing."
    (said,) = shuffled_sentences(small(planted=CONTROLLED))
    assert (
        "by raw absorption, ReLU + L1 -0.0800 against -0.100 (80% at L0 4, 8; single seeds" in said
    )
    assert "by absorption beyond misses, ReLU + L1 -0.110 against -0.100 (110% at L0 4, 8; " in said
    assert shuffled_sentences(small(planted=CONTROLLED | {"standard": (0.05, 0.05)})) == []
    assert shuffled_sentences(small(planted=TWINS)) == []


@pytest.mark.parametrize(
    "jumprelu, word, words, side",
    [
        (
            (0.2, 0.2),
            "reproduced",
            "reproduced by the full score and by the fraction score",
            "**lower** -0.1",
        ),
        (
            (0.2, 0.1),
            "not shown",
            "reproduced by the full score; not shown by the fraction score",
            "**lower** -0.1",
        ),
        (
            (0.05, 0.05),
            "contradicted",
            "contradicted by the full score and by the fraction score",
            "**higher** 0.05",
        ),
    ],
)
def test_the_published_order_at_equal_l0(jumprelu, word, words, side):
    methods = {"atm": (0.1, 0.1), "jumprelu": jumprelu, "topk": (0.3, 0.3)}
    evidence = small(letters=methods, largest_l0=41)
    answer = answer_lead({"Language model": evidence})[-1]
    assert answer.bold.endswith(f"At equal L0, ATM < JumpReLU < TopK is {words}.")
    assert "JumpReLU is 2666, the largest L0 here is 41" in answer.rest
    assert "JumpReLU < TopK holds by the full score" in answer.more
    table = brief({"Language model": evidence}).popitem()[1]
    assert table.loc["ATM minus JumpReLU", "Full score"].startswith(side)
    said = verdict_sentences(evidence)[-1]
    assert said.startswith("**The published order** (ATM < JumpReLU < TopK): At the published L0s:")
    assert f"At equal L0: {word}." in said


def test_the_published_l0s_are_compared_where_saes_were_trained_there():
    "JumpReLU at 2,600 and TopK at 40, which lie within a factor of 1.25 of the published L0s."
    rows = pd.concat(
        [
            read_rows("gemma", {"atm": (0.1, 0.1)}, (35, 45)),
            read_rows("gemma", {"standard": (0, 0), "jumprelu": (0.2, 0.2)}, (2600, 2700)),
            read_rows("gemma", {"topk": (0.3, 0.3)}, (35, 45)),
        ]
    )
    rows = rows.assign(l0=rows.l0.astype(float))
    there = published_rows(rows)
    assert {*there.method} == {"jumprelu", "topk"} and {*there.sparsity} == {0}
    evidence = small(letters={"atm": (0, 0), "jumprelu": (0, 0), "topk": (0, 0)})
    evidence = replace(evidence, at_published=there, largest_l0=2700.0)
    assert unavailable_order(evidence) == "the L0 of ATM was not published"
    said = verdict_sentences(evidence)[-1]
    assert "At the published L0s: JumpReLU: lower than TopK by the full score and by" in said


def test_the_published_l0s_are_those_of_the_manifest():
    values = load_manifest().pick("absorption").published
    lowest = {v["method"]: v.get("l0") for v in reversed(values)}
    assert {method: lowest[method] for method in PUBLISHED_L0} == PUBLISHED_L0
    scores = {v["method"]: v["value"] for v in reversed(values)}
    assert sorted(PUBLISHED_L0, key=lambda method: scores[method]) == [*PUBLISHED_L0]


def test_the_best_attempt_and_ortsae_are_compared_with_atm_in_one_family():
    methods = {"atm": (0.1, 0.1), "standard": (0.2, 0.2), "ortsae": (0.09, 0.09)}
    best = "jumprelu+atm anneal=0.5"
    alone = small(planted=methods)
    both = small(planted=methods | {best: (0.05, 0.05)}, best=best)
    halves = []
    for evidence in (alone, both):
        line = effect_lines(evidence.rival_effects["atm"], RAW)["atm", "ortsae"]
        halves.append((line.high - line.low) / 2)
    assert halves[1] >= halves[0] > 0
    (said,) = [s for s in verdict_sentences(both) if s.startswith("**The best attempt**")]
    assert "minus other SAEs: in the planted world, lower than OrtSAE by raw absorption" in said
    assert "OrtSAE" in {*rival_table(alone).minus}


def test_few_seeds_are_drawn_as_single_runs():
    "Three seeds: their differences, and no interval."
    evidence = small(planted=TWINS, tuned=FASTER)
    lines = answer_lines({"Planted world": evidence})
    assert {*lines.runs} == {""}
    few = replace(evidence, planted=evidence.planted.query("seed < 3"))
    lines = answer_lines({"Planted world": few})
    first = lines[lines.base == "standard"].iloc[0]
    assert [float(run) for run in first.runs.split()] == pytest.approx([-0.098, -0.099, -0.1])
    (ax, *_) = answer_figure(lines).axes
    drawn = [len(line.get_xdata()) for line in ax.lines]
    assert drawn.count(3) == 3 and [text.get_text() for text in ax.texts][0] == "3/3"
    wide = answer_figure(answer_lines({"Planted world": evidence})).axes[0]
    assert not any(len(line.get_xdata()) == 5 for line in wide.lines)


def test_nothing_is_said_of_a_layer_without_a_swap(tmp_path):
    write_layers(tmp_path, layer=[0, 4], swapped=[1.0, 0.9], n=[9, 9], reads=[True, True])
    assert layer_sentence(tmp_path) == ""


def test_a_difference_that_is_missing_is_a_dash():
    assert verdict._short_cell(None) == "–"


# a language model with five bases, which are their own twins


def language_model(**others):
    """What `equal_l0_rows` returns: five bases, ATM 0.1 lower by each score, and two floors.

    Five seeds, of which Matryoshka has three. `others` changes columns: {column: {method: by}}."""
    bases = ["standard", "topk", "batchtopk", "jumprelu", "matryoshka"]
    masked = ["atm", "topk+atm", "batchtopk+atm", "jumprelu+atm", "matryoshka+atm"]
    floors = {"random": (0.01, 0.02), "frozen decoder": (0.03, 0.04)}
    scores = dict.fromkeys(bases, (0.3, 0.3)) | dict.fromkeys(masked, (0.2, 0.2)) | floors
    rows = read_rows("smollm2", scores, (17, 38))
    few = rows.method.str.startswith("matryoshka") & (rows.seed > 2)
    full, fraction = (measure.metric for measure in SAEBENCH)
    rows = rows.assign(**{full: rows[FULL] + 0.1, fraction: rows[FRACTION] + 0.2})[~few]
    for column, by in others.items():
        rows[column] = rows.get(column, 0.5) + rows.method.map(by).fillna(0) + rows.seed / 1e4
    evidence = small(letters={})
    return replace(evidence, letters=rows.reset_index(drop=True))


def test_bases_that_are_their_own_twins_are_compared_once():
    evidence = language_model()
    table = mask_table(evidence)
    assert list(table.minus) == ["twin"] * 5 and "tuned" not in mask_caption(evidence)
    said = verdict_sentences(evidence)
    assert not any("minus the base tuned by itself" in sentence for sentence in said)
    assert not any("tuned" in heading for heading in brief({"Language model": evidence}))
    assert lead({"Language model": evidence}).startswith(
        "On the language model (SmolLM2-135M, 3 to 5 seeds, L0 17, 38), absorption with the mask "
        "is lower on all 5 bases"
    )


def test_each_pair_has_its_own_number_of_seeds():
    evidence = language_model()
    cells = mask_table(evidence).set_index("base")[FULL_SCORE.heading]
    assert cells["Matryoshka"].endswith("(3/3)") and cells["TopK"].endswith("(5/5)")
    assert "of 3–5 seeds" in mask_caption(evidence)
    assert "(n = 3 to 5 seeds; L0 17, 38)" in verdict_sentences(evidence)[0]
    some = evidence.letters.query("method != 'topk' or seed < 3")
    table = mask_table(replace(evidence, letters=some)).set_index("base")
    assert table.loc["TopK", FULL_SCORE.heading].endswith("(3/3)")
    assert next(iter(brief({"Language model": evidence}))).startswith(
        "Language model (3 to 5 seeds"
    )


def test_the_seeds_of_agreement_are_not_those_of_absorption():
    lines = pd.DataFrame(
        dict(metric=["absorption", "explained_variance", "best_cosine"], n=[20, 20, 5])
    )
    assert seeds_range(lines) == "n = 20 seeds"
    assert seeds_range(lines.assign(n=[20, 5, 5])) == "n = 5 to 20 seeds"


def test_methods_with_different_seeds_are_read_where_each_has_all_of_its_own():
    "The third L0 is reached by only one seed of ATM."
    rows = read_rows("smollm2", {"atm": (0.1, 0.1), "standard": (0.2, 0.2)}, (4, 8, 16))
    one = (rows.method == "atm") & (rows.sparsity == 16) & (rows.seed > 0)
    rows = rows[~one & ~((rows.method == "standard") & (rows.seed > 2))]
    there = replace(small(letters={}), letters=rows).where_all(["atm", "standard"])
    assert {*there.letters.sparsity} == {4, 8} and {*there.letters.seed} == {0, 1, 2, 3, 4}


def test_protocols_that_do_not_show_the_same_are_named():
    full, fraction = (measure.metric for measure in SAEBENCH)
    assert protocols_differ(language_model()) == []
    assert "shows the same on each base" in protocol_sentence(language_model())
    evidence = language_model(**{full: {"topk+atm": 0.3}, fraction: {"topk+atm": 0.3}})
    assert protocols_differ(evidence) == ["topk"]
    assert protocol_sentence(evidence).endswith(
        "higher on TopK by SAEBench's full score and by SAEBench's fraction score. "
        "The exact protocol shows something else on TopK."
    )
    said = lead({"Language model": evidence})
    assert (
        "; by SAEBench's protocol it is lower on 4 of 5 bases (ReLU + L1, BatchTopK, Matryoshka "
        "and JumpReLU) by both measures, and higher on 1 of 5 bases (TopK) by both measures."
    ) in said
    without = replace(evidence, letters=evidence.letters.drop(columns=[full, fraction]))
    assert protocol_sentence(without) == "" and protocols_differ(without) == []


def test_the_published_order_is_judged_by_both_protocols():
    full, fraction = (measure.metric for measure in SAEBENCH)
    lower = {full: {"jumprelu": -0.05, "atm": -0.2}, fraction: {"jumprelu": -0.05, "atm": -0.2}}
    evidence = replace(language_model(**lower), largest_l0=41.0)
    assert "By SAEBench's protocol, at equal L0: reproduced." in verdict_sentences(evidence)[-1]
    said = answer_lead({"Language model": evidence})[-1].bold
    assert (
        "is not shown by the full score and by the fraction score; reproduced by SAEBench's full "
        "score and by SAEBench's fraction score."
    ) in said


def test_the_floor_is_given_by_each_score():
    said = floor_sentence(language_model())
    assert "by the full score 0.010 (random), 0.030 (frozen decoder)" in said
    assert "by SAEBench's full score 0.11 (random), 0.13 (frozen decoder)" in said
    assert floor_sentence(small(planted=TWINS)) == ""


def test_side_effects_have_a_sentence_and_rows():
    masked = ["atm", "topk+atm", "batchtopk+atm", "jumprelu+atm", "matryoshka+atm"]
    evidence = language_model(letter_f1=dict.fromkeys(masked, -0.1), dead_share={"atm": 0.1})
    (said,) = [s for s in verdict_sentences(evidence) if s.startswith("**Side effects**")]
    assert "lower on ReLU + L1, TopK, BatchTopK, Matryoshka and JumpReLU by the letter F1" in said
    assert "higher on ReLU + L1 by the share of dead latents" in said
    table = next(iter(brief({"Language model": evidence}).values()))
    assert {*table.loc["Letter F1"].str[:10]} == {"**lower** "}
    dead = table.loc["Share of dead latents"].str.startswith("**higher** ")
    assert [*dead[dead].index] == ["ReLU + L1"]
    table = mask_table(evidence, SIDE_EFFECTS["Language model"]).set_index("base")
    assert table.loc["TopK", "model: letter F1"].startswith("**lower** -0.1")
    assert not any("Side effects" in sentence for sentence in verdict_sentences(language_model()))


# agreement between seeds

AGREE = {
    "planted": {"standard+off": (0.5, 0.5), "atm": (0.6, 0.7), "random": (0.2, 0.3)},
    "nano-gemma2": {"topk": (0.4, 0.4), "topk+atm": (0.3, 0.3), "random": (0.1, 0.1)},
}


def two_worlds(agreement, **more):
    "ReLU + L1 has a twin in the planted world, TopK is its own on the language model."
    planted, letters = ({m: (0.1, 0.1) for m in AGREE[w]} for w in ("planted", "nano-gemma2"))
    faster = {"atm": {"lr_scale": 2.0}}
    return small(planted, letters, tuned=faster, agreement=agreement, **more)


def side_by_side(evidence):
    planted, letters = (evidence.of_world(planted=planted) for planted in (True, False))
    return {"Planted world": planted, "Language model": letters}


def agreement(evidence):
    "The rows on agreement between seeds of the two worlds, the only base of each."
    tables = list(brief(side_by_side(evidence)).values())[:2]
    return [of.iloc[:, 0][of.index.str.startswith("Agreement")] for of in tables]


def test_agreement_is_compared_with_the_twin_in_both_worlds():
    evidence = two_worlds(AGREE)
    planted, model = agreement(evidence)
    name = "Agreement over all latents, random dictionaries"
    assert planted[f"{name} 0.20"].startswith("**higher** 0.1000 ± ")
    assert planted[f"{name} 0.20"].endswith(" (0.500)")
    frequent = "Agreement over the most frequent, random dictionaries 0.30"
    assert planted[frequent].startswith("**higher** 0.2000 ± ")
    assert model[f"{name} 0.10"].startswith("**lower** -0.1000 ± ")
    assert (
        "L0 4 to 8 in the planted world and L0 4 to 8 on the language model"
        in (answer_sentences(side_by_side(evidence))[-1])
    )
    (said,) = [s for s in verdict_sentences(evidence) if s.startswith("**Stability**")]
    measures = "over all latents and one to one and over the most frequent"
    assert f"In the planted world, higher on ReLU + L1 {measures}" in said
    assert f"On the language model, lower on TopK {measures}" in said
    table = mask_table(evidence).set_index(["base", "minus"])
    assert table.loc[("ReLU + L1", "twin"), "planted: agreement"].startswith("**higher** 0.1000")
    assert table.loc[("TopK", "twin"), "model: agreement"].startswith("**lower** -0.1000")
    assert "over L0 4 to 8 (planted world) and L0 4 to 8 (language" in mask_caption(evidence)


def test_a_table_of_agreement_changes_the_answer_of_its_world_alone():
    moved = AGREE | {"planted": AGREE["planted"] | {"atm": (0.4, 0.7)}}
    before, after = (agreement(two_worlds(of)) for of in (AGREE, moved))
    assert after[0].iloc[0].startswith("**lower** -0.1000 ± ")
    assert before[1].equals(after[1])
    same = AGREE | {"planted": AGREE["planted"] | {"atm": (0.6, 0.5)}}
    frequent = agreement(two_worlds(same))[0].iloc[2]
    assert frequent.lstrip("-").startswith("0.000") and "**" not in frequent


def test_agreement_without_random_dictionaries_says_so():
    methods = {m: of for m, of in AGREE["planted"].items() if m != "random"}
    planted, model = agreement(two_worlds(AGREE | {"planted": methods}))
    assert all(name.endswith(", random dictionaries not measured") for name in planted.index)
    assert all(name.endswith(", random dictionaries 0.10") for name in model.index)


@pytest.mark.parametrize("seeds", [0, 2])
def test_stability_has_a_row_where_it_was_not_measured(seeds):
    "The jackknife needs three seeds."
    evidence = replace(two_worlds({}), agreement=agree_rows(AGREE, seeds=seeds))
    assert [list(rows) for rows in agreement(evidence)] == [["not measured"]] * 2
    assert "Stability" not in " ".join(verdict_sentences(evidence))
    evidence = two_worlds({"planted": AGREE["planted"]})
    assert list(agreement(evidence)[1]) == ["not measured"]


def test_agreement_has_the_intervals_of_the_jackknife_over_the_common_l0s():
    """By hand: pseudo-values of 0.7, 0.5, 0.6 are 1.0, 0.2, 0.6; the others are all 0.5.

    ATM has no SAE at L0 8, and at L0 16 it ends at 10. So L0 4 alone is compared."""
    rows = agree_rows({"nano-gemma2": {"standard": (0.5, 0.5), "atm": (0, 0)}}, (4, 8, 16), 3)
    rows = rows.assign(best_cosine=0.5, frequent_cosine=0.5, l0=rows.l0.astype(float))
    atm = rows.method == "atm"
    rows.loc[atm, "best_cosine"] = rows.seed.map({0: 0.7, 1: 0.5, 2: 0.6})
    rows.loc[atm & (rows.sparsity == 16), "l0"] = 10.0
    rows = rows[~(atm & (rows.sparsity == 8))]
    letters = {"standard": (0.1, 0.1), "atm": (0.1, 0.1)}
    evidence = replace(small(letters=letters), agreement=rows)
    lines = evidence.mask_effects
    line = lines[lines.metric == "best_cosine"].iloc[0]
    half = 4.302653 * 0.4 / math.sqrt(3)
    assert [line["mean"], (line.high - line.low) / 2] == pytest.approx([0.1, half])
    assert (line.a, line.b, line.n, line.l0_low, line.l0_high) == ("atm", "standard", 3, 4, 4)


# what a mean over L0, or a difference of two shares, can hide


def test_the_lead_names_the_l0s_at_which_all_bases_change_their_sign():
    "Both bases are lower at L0 4 and higher at L0 16."
    methods = {m: (0.5, 0.5) for m in ("topk", "topk+atm", "jumprelu", "jumprelu+atm")}
    rows = read_rows("planted", methods, (4, 8, 16))
    masked = rows.method.str.endswith("+atm")
    for l0, by in ((4, -0.2), (16, 0.1)):
        rows.loc[masked & (rows.sparsity == l0), "absorption"] += by
    said = "Raw absorption is lower at L0 4, and higher at L0 16, on all 2 (not corrected)."
    evidence = replace(small(planted={}), planted=rows)
    assert said in lead({"Planted world": evidence})
    one = rows.method.isin(["topk", "topk+atm"]) | (rows.sparsity < 16)
    some = replace(evidence, planted=rows[one])
    assert "and higher at" not in lead({"Planted world": some})


def test_a_result_that_rests_on_one_l0_is_named():
    "TopK is lower by 1 at L0 4 and slightly higher elsewhere. JumpReLU is higher at L0 4."
    methods = {m: (0.5, 0.5) for m in ("topk", "topk+atm", "jumprelu", "jumprelu+atm")}
    rows = read_rows("planted", methods, (4, 8, 16))
    at_4 = rows.sparsity == 4
    for method, there, elsewhere in (("topk+atm", -1.0, 0.01), ("jumprelu+atm", 0.2, -0.1)):
        for column in ("absorption", "excess_absorption"):
            rows.loc[rows.method == method, column] += elsewhere
            rows.loc[at_4 & (rows.method == method), column] += there - elsewhere
    evidence = replace(small(planted={}), planted=rows)
    (said,) = left_out_sentences(evidence)
    assert said.startswith("**Planted world, one L0 left out** of the mean")
    assert "without L0 4, higher on TopK, lower on JumpReLU by raw absorption" in said
    assert lead({"Planted world": evidence}).endswith(
        "Without L0 4, raw absorption is lower on JumpReLU, higher on TopK; absorption beyond "
        "misses is lower on JumpReLU, higher on TopK. Side effects: explained variance no "
        "difference shown on any of 2."
    )
    two = replace(evidence, planted=rows[rows.sparsity != 16])
    assert [l0 for _, l0 in two.left_out] == [4, 8]
    assert "without L0 4, higher on TopK" in left_out_sentences(two)[0]
    one = replace(evidence, planted=rows[at_4])
    assert left_out_sentences(one) == [] and one.left_out == {}
    assert left_out_sentences(small(planted=TWINS)) == []


def test_the_miss_rate_stands_beside_absorption_beyond_misses():
    "BatchTopK: raw absorption is the same, the miss rate is higher by 0.1."
    methods = {"batchtopk": (0.3, 0.2), "batchtopk+atm": (0.3, 0.1)}
    evidence = small(planted=methods)
    rows = evidence.planted
    rows = rows.assign(miss_rate=rows.absorption - rows.excess_absorption)
    evidence = replace(evidence, planted=rows)
    said = misses_sentence(evidence)
    assert "the mask changes the miss rate by: BatchTopK 0.100 ± " in said
    for table in (mask_table(evidence), mask_table(evidence, [MISSES])):
        assert table[MISSES.heading][0].startswith("**higher** 0.100")
    table = next(iter(brief({"Planted world": evidence}).values()))
    assert table.loc["Miss rate", "BatchTopK"].startswith("**higher** 0.100")
    assert table.loc["Miss rate", "BatchTopK"].endswith(" (0.100)")
    assert "Planted: miss rate" in {*answer_lines({"Planted world": evidence}).panel}
    assert misses_sentence(small(planted=TWINS)) == ""


def test_few_seeds_are_not_compared_at_each_l0():
    evidence = small(planted=TWINS)
    assert len(l0_lines({"Planted world": evidence})) == 2
    few = replace(evidence, planted=evidence.planted.query("seed < 3"))
    assert l0_lines({"Planted world": few}) == []


def test_the_verdict_is_given_the_settings_of_the_runs_that_it_reads(runs):
    "Its notebook runs in a folder without their provenance. Without settings, all bases are twins."
    manifest = load_manifest()
    for profile in manifest.profiles:
        given = manifest.pick("verdict").resolved(profile)["tuned"]
        for world, name in (("planted", "planted"), ("model", "absorption")):
            assert given[world] == manifest.pick(name).resolved(profile)["tuned"], (profile, name)
    there = read_evidence(runs)
    shutil.rmtree(runs / "provenance")
    found = read_evidence(runs, [4, 8, 16, 32, 64], None, "", there.tuned)
    assert found.mask_pairs("planted") == there.mask_pairs("planted")
    assert TUNED in {*found.mask_pairs("planted").values()}
    notebook = json.loads((ROOT / "nbs/experiments/90_verdict.ipynb").read_text())
    source = "".join("".join(cell["source"]) for cell in notebook["cells"])
    assert 'read_evidence(folder, l0s, model_l0s, best if best in trained else "", tuned)' in source


def test_what_stands_at_equal_explained_variance_and_which_l0_it_needs():
    "At a share of 0.9 the mask has L0 8 and absorption 0.1, the twin L0 4 and absorption 0.3."
    curves = read_rows("planted", {"atm": (0.1, 0.3), "standard": (0.3, 0.1)}, (2, 4, 8, 16))
    explained = {2: 0.8, 4: 0.9, 8: 0.94, 16: 0.96}
    later = curves.l0 / (1 + (curves.method == "atm"))  # the mask needs twice the L0
    curves["explained_variance"] = later.map({1: 0.7} | explained)
    evidence = replace(small(planted=TWINS), curves={"planted": curves})
    ninety, *more = explained_sentences(evidence)
    assert ninety.startswith("**Planted world, at 90% explained variance** (not at equal L0)")
    words = (
        "on ReLU + L1 the measures disagree: lower by raw absorption, higher by absorption beyond"
    )
    assert words in ninety and ninety.endswith("twin: ReLU + L1 8 and 4.")
    assert more == []  # the mask does not reach 95%
    found = answer_lead({"Planted world": evidence})[0].rest
    assert "explained variance (L0" not in found
    assert explained_sentences(small(planted=TWINS)) == []


def test_the_effect_of_the_mask_is_read_at_the_ends_of_size_and_length(tmp_path):
    "By hand: two seeds, 0.1 lower at 128 latents; at 256 one seed is lower by 0.2, one higher."
    points = [(20, 128, -0.1, -0.1), (20, 256, -0.2, 0.1), (60, 128, 0.3, 0.3)]
    rows = [
        (method, 8, seed, steps, d_sae, steps / 10, *[0.5 + by * (method == "topk+atm")] * 3)
        for steps, d_sae, *both in points
        for seed, by in enumerate(both)
        for method in ("topk", "topk+atm")
    ]
    columns = ["method", "sparsity", "seed", "steps", "d_sae", "tokens"]
    columns += [FULL, FRACTION, "explained_variance"]
    (tmp_path / "tables").mkdir()
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(tmp_path / "tables/scale-runs.csv", index=False)
    found = scale_lead({"full": tmp_path})
    assert found.bold.endswith(
        "With 128 and 256 latents, the mask changes the fraction score by -0.100 and -0.050."
    )
    assert found.rest == (
        "Exploratory: TopK + ATM minus TopK on the language model, L0 8, 2 seeds, too few for an "
        "interval."
    )
    first, second = found.more.split(". ")
    assert first.startswith("With 128 and 256 latents, the fraction score by -0.100 and -0.050; ")
    assert second.startswith("With 2 and 6 million training tokens, the fraction score by -0.100")
    assert second.endswith("explained variance by -0.100 and 0.300.")
    assert scale_lead({"smoke": tmp_path}) is None and scale_lead({"full": tmp_path / "no"}) is None


def test_full_scores_from_sparse_to_dense_stand_beside_the_implied_l0(tmp_path):
    "By hand: the means of two seeds, for two methods at two targets; the random SAE is left out."
    (tmp_path / "tables").mkdir()
    rows = [
        (method, target, seed, 2048, score + seed * 0.02, 1 - score)
        for (method, target), score in {
            ("topk", 16): 0.1,
            ("standard", 16): 0.3,
            ("topk", 1400): 0.0,
            ("standard", 1400): 0.0,
            ("random", 16): 0.9,
        }.items()
        for seed in (0, 1)
    ]
    columns = ["method", "sparsity", "seed", "d_sae", FULL, FRACTION]
    pd.DataFrame(rows, columns=columns).to_csv(tmp_path / "tables/density-runs.csv", index=False)
    shares = {"implied L0": ["4,182", "3,929"], "share of the latents": ["25.5%", "24.0%"]}
    pd.DataFrame(shares).to_csv(tmp_path / "tables/density.csv", index=False)
    (found,) = other_leads({"full": tmp_path})
    assert found.bold.endswith("an L0 of 3,929 to 4,182, which is 24.0% to 25.5% of its latents.")
    assert found.rest.endswith(
        "On the language model (2,048 latents, no mask) the full score is 0.110 to 0.310 at target "
        "L0 16 and 0.010 at 1400, 68% of the latents."
    )
    assert found.more == (
        "TopK and ReLU + L1, 2 seeds, by target L0: the full score is 0.110 to 0.310 at 16 and "
        "0.010 at 1,400; the fraction score is 0.700 to 0.900 at 16 and 1.000 at 1,400."
    )
    assert density_lead({"smoke": tmp_path}) is None and other_leads({}) == []


def test_the_saes_beside_the_controls_are_a_second_training():
    letters = {m: (one + 0.1, other + 0.1) for m, (one, other) in CONTROLLED.items()}
    said = repetition_sentence(small(letters=letters, controls=CONTROLLED))
    assert said.startswith("**Language model, trained again** (the SAEs beside the controls)")
    assert "lower on ReLU + L1 by the full score and by the fraction score" in said
    assert "(n = 5 seeds; L0 4, 8)" in said and "By the full score: ReLU + L1 -0.1000 ± " in said
    assert repetition_sentence(small(letters=letters, controls={})) == ""
    assert repetition_sentence(small(planted=CONTROLLED)) == ""
