"The verdict: curves at equal L0, differences over all L0s, and the sentences made of them."

import html
import json
import math
import shutil
from dataclasses import replace

import pandas as pd
import pytest

from readme import ROOT

from atm_sae.report import verdict
from atm_sae.report.manifest import load_manifest, object_states
from atm_sae.report.answer import (
    answer_caption,
    answer_lines,
    answer_table,
    l0_lines,
    rate_sentence,
    read_answer,
    write_answer,
)
from atm_sae.report.page import html_page, markdown_page, profile_results, verdict_lines
from atm_sae.report.tables import read_summary
from atm_sae.report.verdict import (
    ABLATION_RATE,
    ALIKE,
    BEYOND,
    EFFECT_COLUMNS,
    FRACTION_SCORE,
    FULL_SCORE,
    LEAD,
    PUBLISHED_STANDING,
    RAW,
    compare_pairs,
    describe_effects,
    effect_lines,
    equal_explained_table,
    equal_l0_rows,
    equal_l0_table,
    layer_sentence,
    mask_caption,
    mask_effects,
    twin_effects,
    mask_table,
    mean_difference,
    mean_differences,
    read_evidence,
    rival_table,
    split_sentences,
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
        ((-0.2, -0.3, -0.1), "less on ReLU + L1 by raw absorption and by absorption beyond misses"),
        ((0.2, 0.1, 0.3), "more on ReLU + L1 by raw absorption and by absorption beyond misses"),
        (
            (0.01, -0.1, 0.12),
            "no difference shown on ReLU + L1 (95% interval ± "
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
        ((0.2, 0.1, 0.3), "less by raw absorption, more by absorption beyond misses"),
        (
            (0.0, -0.1, 0.1),
            "less by raw absorption, no difference shown by absorption beyond misses "
            "(95% interval ± 0.10)",
        ),
    ],
)
def test_two_measures_that_disagree_say_so(beyond, words):
    table = effects((RAW, "standard", -0.2, -0.3, -0.1), (BEYOND, "standard", *beyond))
    said = describe_effects(table, [RAW, BEYOND])
    assert said == f"on ReLU + L1 the two measures disagree: {words}"
    than = describe_effects(table, [RAW, BEYOND], than=True)
    assert than == f"against ReLU + L1 the two measures disagree: {words}"


def test_pairs_are_grouped_and_a_measure_that_is_missing_says_nothing():
    less, more = (-0.2, -0.3, -0.1), (0.2, 0.1, 0.3)
    found = [(m, base, *less) for base in ("standard", "jumprelu") for m in (RAW, BEYOND)]
    found += [(m, "topk", *more) for m in (RAW, BEYOND)]
    said = describe_effects(effects(*found), [RAW, BEYOND], than=True)
    assert said.startswith("less than ReLU + L1 and JumpReLU by raw") and "; more than TopK" in said
    assert describe_effects(effects(*found), [FULL_SCORE, FRACTION_SCORE]) == ""
    assert describe_effects(effects((RAW, "topk", *less)), [RAW, BEYOND]) == ""


def test_one_seed_shows_nothing():
    nan = math.nan
    table = effects((RAW, "standard", -0.2, nan, nan), (BEYOND, "standard", -0.2, nan, nan))
    said = describe_effects(table, [RAW, BEYOND])
    assert said == "no difference shown on ReLU + L1 (one seed gives no interval)"


NO_MASK = " On Matryoshka, tuning chose no mask."  # ends the first sentence


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
    (runs / "tables" / f"{missing}-runs.csv").unlink()
    (runs / "tables" / "stability-runs.csv").unlink()
    after = subjects(runs)
    said = [words[kept].removesuffix(NO_MASK) for words in (before, after)]
    assert said[0] == said[1] and any(words.endswith(NO_MASK) for words in after.values())
    assert gone not in after and {"Reconstruction cost", "Dropout control"} <= after.keys()
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
    cells = mask_table(read_evidence(runs)).set_index("base")[ABLATION_RATE.heading]
    assert cells["TopK (learning rate × 4.2)"].startswith("**more** 0.10")
    assert cells["JumpReLU"].startswith("0.00")


def test_no_file_no_sentence(tmp_path):
    assert verdict_sentences(read_evidence(tmp_path)) == [] and layer_sentence(tmp_path) == ""
    assert read_evidence(tmp_path) is None


# tables of runs


@pytest.fixture
def runs(tmp_path):
    "A copy of tables of runs and their parameters, to be changed."
    return shutil.copytree(RUNS, tmp_path / "runs")


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
            "on TopK the two measures disagree: "
            "more by raw absorption, less by absorption beyond misses",
            "Planted world",
        ),
        (
            "planted",
            "topk+atm",
            "excess_absorption",
            0.5,
            "on TopK the two measures disagree: "
            "less by raw absorption, more by absorption beyond misses",
            "Planted world",
        ),
        (
            "absorption",
            "topk+atm",
            "mean_absorption_fraction_score",
            0.5,
            "on TopK the two measures disagree: less by the full score, more by the fraction score",
            "Language model",
        ),
        (
            "stability",
            "topk+atm",
            "best_cosine",
            0.5,
            "on TopK the two measures disagree: more over all latents, less over the most frequent",
            "Stability",
        ),
        (
            "absorption",
            "topk+atm",
            "explained_variance",
            0.3,
            "on TopK the two measures disagree: "
            "more in the planted world, less on the language model",
            "Reconstruction cost",
        ),
        (
            "planted",
            "dropout",
            "absorption",
            -0.5,
            "against ReLU + dropout the two measures disagree: more by raw absorption, less",
            "Dropout control",
        ),
        (
            "absorption",
            "jumprelu+atm anneal=0.5",
            "mean_full_absorption_score",
            0.5,
            "against JumpReLU the two measures disagree: more by the full score",
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
    assert changed(before, after) == {"Language model, against other SAEs", share}
    words = (
        "against BatchTopK the two measures disagree: "
        "more by the full score, less by the fraction score"
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
    evidence = read_evidence(runs)
    line = mask_table(evidence).set_index("base").loc["Matryoshka: tuning chose no mask"]
    assert {*line} == {"–"} and "On Matryoshka, tuning chose no mask." in " ".join(
        verdict_sentences(read_evidence(runs))
    )
    move(runs, "planted", "matryoshka+atm", "mask_rate", 0.2)
    table = mask_table(read_evidence(runs))
    assert not table.base.str.contains("no mask").any() and table.base.str.match("Matryoshka").any()
    assert "chose no mask" not in " ".join(verdict_sentences(read_evidence(runs)))


def test_the_mask_table_says_how_sure_it_is_and_what_else_differs(runs):
    evidence = read_evidence(runs)
    table = mask_table(evidence).set_index("base")
    cells = table.loc["ReLU + L1 (learning rate × 2.6)"]
    assert cells[RAW.heading] == "**less** -0.076 ± 0.025 (5/5)"
    assert cells[BEYOND.heading] == "**less** -0.0535 ± 0.0096 (5/5)"
    assert cells[FULL_SCORE.heading] == "-0.0012 ± 0.0027 (4/5)"
    assert cells[FRACTION_SCORE.heading].startswith("**more** 0.016")
    assert "of 5 seeds" in mask_caption(evidence) and "JumpReLU" in table.index


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
    assert "TopK (planted: learning rate × 4.2)" in {*mask_table(evidence).base}
    assert "TopK" in {*mask_table(evidence.of_world(planted=False)).base}
    assert "TopK (learning rate × 4.2)" in {*mask_table(evidence.of_world(planted=True)).base}


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
        page = html.unescape(html_page([results]))
        return said, markdown_page([results]), page, results

    before, markdown, page, results = pages()
    lead, rest = verdict_lines([results])
    assert len(lead) + len(rest) == len(before) >= 6 and lead[0][0] == "The layer (default)"
    assert all(sentence in page for _, sentence in [*lead, *rest])
    assert all(sentence in markdown for _, sentence in lead)
    cells = mask_table(read_evidence(tmp_path)).to_numpy().ravel().tolist()
    assert all(cell.replace("**", "") in page for cell in cells)
    assert PUBLISHED_STANDING in markdown
    move(tmp_path, "absorption", "topk+atm", "mean_full_absorption_score", 0.5)
    after, _, page, _ = pages()
    (new,) = {s for s in set(after) - set(before) if s.startswith("**Language model** (")}
    assert new.partition("** ")[2] in page and "more by the full score" in page


def worlds(folder):
    evidence = read_evidence(folder)
    return {
        "Planted world": evidence.of_world(planted=True),
        "Language model": evidence.of_world(planted=False),
    }


def test_the_answer_in_three_rows(runs):
    table = answer_table(worlds(runs))
    planted, model, importance, price = table.itertuples(index=False)
    assert planted.answer.startswith("ReLU + L1 and TopK: lower;") and planted.seeds == "5"
    assert "JumpReLU: lower in absorption beyond misses only; Matryoshka: left" in planted.answer
    assert planted[2].startswith("raw absorption -0.118 to 0.005 (± 0.040 or less); absorption be")
    assert planted[3].startswith("raw absorption 0.082 to 0.241; ")
    assert importance.answer.startswith("Planted world: ReLU + dropout: lower. Language model: ")
    assert price.answer.startswith("Planted world: all 4 bases: lower. Language model: ")
    assert ": higher in " in model.answer and "Too few seeds" not in model.answer
    assert answer_table({"Planted world": worlds(runs)["Planted world"]}).shape == (3, 5)


def test_the_answer_says_where_the_mean_over_l0_hides_a_change_of_sign(runs):
    by_l0 = l0_lines(worlds(runs))[0]
    assert by_l0.startswith("Planted world, raw absorption: L0 4: lower on all 4; L0 8: lower on ")
    assert "L0 16: no difference shown on any of 4; L0 32: higher on ReLU + L1 and" in by_l0


def test_the_answer_changes_with_the_table(runs):
    assert "disagree" not in answer_table(worlds(runs)).answer[1]
    move(runs, "absorption", "topk+atm", "mean_full_absorption_score", 0.5)
    assert "TopK: the two measures disagree" in answer_table(worlds(runs)).answer[1]


def test_intervals_wider_than_the_scores_are_called_too_few_seeds(runs):
    path = runs / "tables/absorption-runs.csv"
    table = pd.read_csv(path)
    scores = ["mean_full_absorption_score", "mean_absorption_fraction_score"]
    wide = 5 * (-1.0) ** table.seed
    for score in scores:
        table[score] += wide * table.method.str.contains("atm") + 0.001
    table.to_csv(path, index=False)
    answer = answer_table(worlds(runs)).answer[1]
    assert answer == (
        "all 4 bases: no difference shown. Too few seeds: the widest intervals exceed the scores"
    )


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
    table = answer_table(worlds(runs))
    raw = drawn[drawn.panel == "Planted: raw absorption"]
    assert list(raw.base) == ["standard", "topk", "batchtopk", "jumprelu"] and len(drawn) == 24
    assert table.iloc[0, 2].startswith(f"raw absorption {raw['mean'].min():.3f} to ")
    bytes_of = path.read_bytes(), path.with_suffix(".svg").read_bytes()
    write_answer(found, tmp_path)
    assert bytes_of == (path.read_bytes(), path.with_suffix(".svg").read_bytes())
    assert write_answer({}, tmp_path) is None and answer_lines({}).empty


def test_the_rates_of_base_and_mask_are_said_where_they_differ(runs):
    evidence = read_evidence(runs)
    said = rate_sentence(evidence, "planted")
    assert "times 2.6 on ReLU + L1, 4.2 on TopK" in said and "JumpReLU" not in said
    assert rate_sentence(replace(evidence, tuned={}), "planted") == ""


def test_the_readme_holds_the_committed_sentences_and_tables():
    readme = (ROOT / "README.md").read_text()
    found = read_answer({"default": REPORTS, "full": REPORTS / "full"})
    committed = {world: of.evidence for world, of in found.items()}
    table = answer_table(committed)
    assert answer_caption(found) in readme
    for cell in [PUBLISHED_STANDING, *table.to_numpy().ravel(), *l0_lines(committed)]:
        assert cell in readme, cell
    assert len(readme.splitlines()) < 200
    assert readme.index(PUBLISHED_STANDING) < readme.index(table.answer[0])
    assert readme.index(table.answer[3]) < readme.index("make reports") < readme.index("## The tut")


def test_published_values_of_atm_are_called_secondary():
    published = [v for e in load_manifest().experiments for v in e.published]
    assert all(v["confidence"].startswith("secondary") for v in published if v["method"] == "atm")
    assert all("inferred" in v["confidence"] for v in published if v["method"] != "atm")


def test_agreement_has_the_intervals_of_the_jackknife():
    """Pairs share their seeds. The summary has the intervals of the jackknife. The
    correction widens them: two of four bases are significant, the others stand at 1 - 0.05/2."""
    table = mask_effects(read_evidence(RUNS))
    line = table[(table.metric == ALIKE.metric) & (table.b == "topk")].iloc[0]
    summary = read_summary(RUNS / "tables/stability-summary.csv")
    difference = summary.method.str.startswith("topk+atm - topk+")  # minus its twin
    off = summary[difference & (summary.metric == ALIKE.metric)]
    assert line["mean"] == pytest.approx(off["mean"].item(), rel=1e-3)
    half = (off.high - off.low).item() / 2 * 3.495406 / 2.776445  # quantiles of t at 4 degrees
    assert (line.high - line.low) / 2 == pytest.approx(half, rel=1e-3)


def test_masked_methods_are_compared_with_their_bases_and_with_their_twins():
    "Twins 0.1 above their masked form in all four seeds: 0.1 less, whatever the base does."
    evidence = read_evidence(RUNS)
    assert evidence.mask_pairs[:2] == [("atm", "standard"), ("topk+atm", "topk")]
    assert evidence.twin_pairs == [] and twin_effects(evidence).empty
    masked = evidence.planted[evidence.planted.method.isin(["atm", "topk+atm"])]
    names = {"atm": "standard+off", "topk+atm": "topk+off"}
    off = masked.assign(method=masked.method.map(names), absorption=masked.absorption + 0.1)
    evidence = replace(evidence, planted=pd.concat([evidence.planted, off], ignore_index=True))
    assert evidence.twin_pairs == [*names.items()]
    lines = effect_lines(twin_effects(evidence), RAW)
    assert {pair: round(line.mean, 6) for pair, line in lines.items()} == {
        ("atm", "standard+off"): -0.1,
        ("topk+atm", "topk+off"): -0.1,
    }
    (said,) = [s for s in verdict_sentences(evidence) if s.startswith("**Same settings**")]
    assert "in the planted world" in said and "TopK (mask off)" in said
    assert effect_lines(mask_effects(evidence), RAW).keys() == set(evidence.mask_pairs)


def test_atm_is_compared_with_each_control():
    evidence = read_evidence(RUNS)
    control = evidence.planted[evidence.planted.method == "atm"].assign(method="standard+shuffled")
    evidence = replace(evidence, planted=pd.concat([evidence.planted, control], ignore_index=True))
    (said,) = [s for s in verdict_sentences(evidence) if s.startswith("**Dropout control**")]
    assert "ATM minus ReLU + dropout and ReLU + L1 + shuffled ATM:" in said


def test_nothing_is_said_of_a_layer_without_a_swap(tmp_path):
    write_layers(tmp_path, layer=[0, 4], swapped=[1.0, 0.9], n=[9, 9], reads=[True, True])
    assert layer_sentence(tmp_path) == ""


def test_a_difference_that_is_missing_is_a_dash():
    assert verdict._short_cell(None) == "–"
