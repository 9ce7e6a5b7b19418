"SAEBench's JSON: every field checked, ours written and read, other versions, joins, messages."

import copy
import json
import math
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from jsonschema import Draft202012Validator

from atm_sae.evals.absorption import AbsorptionResult
from atm_sae.evals.probing import ProbingResult
from atm_sae.sae.sae import SAE, SAEConfig
from atm_sae.evals.saebench import (
    EVALUATIONS,
    absorption_json,
    core_json,
    join_evaluations,
    probing_json,
    read_saebench,
    sae_probes_json,
    saebench_details,
    saebench_path,
    saebench_result,
    validate_saebench,
)

FIXTURES = Path(__file__).parent / "fixtures" / "saebench"
EXAMPLES = {
    json.loads(f.read_text())["eval_type_id"]: f
    for f in sorted((FIXTURES / "example").rglob("*.json"))
}


def example(name):
    return json.loads(EXAMPLES[name].read_text())


# ---- small results, written by hand

SAE_DICT = dict(d_in=4, d_sae=8, architecture="batchtopk", k=2)
CONFIG = dict(
    max_k=10,
    jump=0.03,
    cos_full=0.025,
    cos_fraction=0.1,
    share=0.4,
    absorbers=3,
    min_f1=0.6,
    min_letters=20,
    l1_share=0.01,
    model="nano",
    layer=2,
    site="resid_post",
    seeds=[7],
    position=-6,
    lm_dtype="bfloat16",
    protocol="exact",
)


def letters(rows):
    names = [
        "first_letter",
        "eval_seed",
        "mean_absorption_fraction",
        "full_absorption_rate",
        "num_full_absorption",
        "num_probe_true_positives",
        "num_split_features",
    ]
    return pd.DataFrame(rows, columns=names)


def absorption_result(rows=(("A", 0, 0.25, 0.5, 5, 10, 1), ("B", 0, 0.0, 0.0, 0, 4, 3)), **config):
    return AbsorptionResult(letters(rows), pd.DataFrame(), CONFIG | config, SAE_DICT)


def probing_result():
    tasks = pd.DataFrame(
        dict(
            task=list("abc"),
            group=["mail", "mail", "maths"],
            n_train=[40, 60, 50],
            n_test=[12, 20, 16],
            sae_top_1_test_accuracy=[0.6, 0.8, 0.9],
            sae_top_3_test_accuracy=[0.5, 0.5, 0.5],
            sae_test_accuracy=[1.0, 0.8, 0.9],
            llm_test_accuracy=[0.9, 0.9, 1.0],
        )
    )
    return ProbingResult(
        tasks,
        dict(
            sae_top_1_test_accuracy=0.8,
            sae_top_3_test_accuracy=0.5,
            sae_test_accuracy=0.9,
            llm_test_accuracy=0.95,
        ),
    )


def benchmark_result():
    tasks = pd.DataFrame(
        dict(
            task=["1_cats", "2_dogs"],
            group=["1_cats", "2_dogs"],
            n_train=[200, 300],
            n_test=[99, 50],
            sae_top_1_test_auc=[0.6, 0.8],
            sae_top_1_val_auc=[0.65, 0.85],
            sae_top_3_test_auc=[0.7, 0.9],
            llm_test_auc=[0.9, 1.0],
            llm_test_f1=[0.8, 0.9],
        )
    )
    return ProbingResult.of([(tasks.to_dict("records"), 0)])


RECONSTRUCTION = dict(
    mse=4096.0,
    mse_saebench=2.0,
    cosine=0.9,
    explained_variance=0.75,
    fvu=0.25,
    l0=2.0,
    l1=3.0,
    dead_share=0.25,
    shrinkage=0.875,
    n_tokens=100,
)
SPLICED = dict(
    ce_loss_score=0.9,
    kl_score=0.8,
    ce_orig=2.0,
    ce_sae=3.0,
    ce_zero=12.0,
    kl_sae=1.0,
    kl_zero=5.0,
    n_tokens=90,
)
WHERE = dict(model="nano", layer=2, name="one")


def ours(path=None, **more):
    return [
        absorption_json(absorption_result(), path, name="one", **more),
        probing_json(probing_result(), SAE_DICT, path, **WHERE, **more),
        sae_probes_json(benchmark_result(), SAE_DICT, path, **WHERE, **more),
        core_json(
            RECONSTRUCTION,
            SAE_DICT,
            SPLICED,
            torch.tensor([0.5, 0.125, 0.005, 0]),
            path,
            **WHERE,
            **more,
        ),
    ]


# ---- the form


def fields(schema, part=None, path=()):
    "(path, schema, required?) of every field; lists are entered at their first entry."
    part = schema if part is None else part
    if "$ref" in part:
        part = schema["$defs"][part["$ref"].rsplit("/", 1)[1]]
    for name, sub in part.get("properties", {}).items():
        yield (*path, name), sub, name in part.get("required", ())
        if "items" in sub:
            yield from fields(schema, sub["items"], (*path, name, 0))
        else:
            yield from fields(schema, sub, (*path, name))


def said(path):
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def changed(data, path, value=None, drop=False):
    data = copy.deepcopy(data)
    *way, last = path
    part = data
    for p in way:
        part = part[p]
    if drop:
        del part[last]
    else:
        part[last] = value
    return data


ALL = [(name, *field) for name, schema in EVALUATIONS.items() for field in fields(schema)]
REQUIRED = [case for case in ALL if case[3]]
TYPED = [case for case in ALL if case[2]]


def ids(cases):
    return [f"{name}:{said(path)}" for name, path, *_ in cases]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_schemas_are_schemas(name):
    Draft202012Validator.check_schema(EVALUATIONS[name])


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_saebench_itself_wrote_is_accepted(name):
    assert validate_saebench(example(name)) is None


def test_all_evaluations_have_an_example_and_enough_required_fields():
    assert set(EXAMPLES) == set(EVALUATIONS)
    count = {name: sum(n == name for n, *_ in REQUIRED) for name in EVALUATIONS}
    # ten of the envelope, and: 1 group + 6 metrics + 6 of a letter;
    # 2 groups + 1 metric + 2 of a data set; 2 groups + 1 of a data set; 7 groups + 26 metrics
    # + 8 of a latent
    probing = dict(sparse_probing=10 + 5, sparse_probing_sae_probes=10 + 3)
    assert count == dict(absorption_first_letter=10 + 13, core=10 + 41) | probing


@pytest.mark.parametrize("name, path", [case[:2] for case in REQUIRED], ids=ids(REQUIRED))
def test_each_required_field_is_missed(name, path):
    with pytest.raises(ValueError) as e:
        validate_saebench(changed(example(name), path, drop=True))
    assert str(e.value).startswith(f"{said(path)}: found nothing, expected ")


@pytest.mark.parametrize("name, path", [case[:2] for case in TYPED], ids=ids(TYPED))
def test_each_wrong_type_is_named(name, path):
    wrong = "cores" if path == ("eval_type_id",) else object  # the second is no JSON value at all
    with pytest.raises(ValueError) as e:
        validate_saebench(changed(example(name), path, wrong))
    assert str(e.value).startswith(f"{said(path)}: found {wrong!r}, expected ")


@pytest.mark.parametrize("name, path, kind, required", ALL, ids=ids(ALL))
def test_optional_fields_may_be_missing_and_null_only_where_allowed(name, path, kind, required):
    data = example(name)
    if not required and path[:2] != ("eval_result_details", 0):
        validate_saebench(changed(data, path, drop=True))
    if "null" in kind.get("type", ["null"]):
        return validate_saebench(changed(data, path, None))
    with pytest.raises(ValueError, match="found (None|nothing)"):
        validate_saebench(changed(data, path, None))


@pytest.mark.parametrize(
    "path, good, bad",
    [
        ("f1_jump_threshold", [0, -1, 0.5], [True, "1", math.nan, math.inf, None]),  # number
        ("random_seed", [3, 615.0, -6], [2.5, True, math.nan, math.inf, "3"]),  # integer
        ("min_feats_for_eval", [1], [0, -1, 1.5]),  # count
        ("model_name", ["", "a"], [1, None, ["a"]]),  # text
        ("precalc_k_sparse_probe_sae_acts", [True, False], [0, 1, "true"]),  # flag
        (("datetime_epoch_millis",), [0, 9999999999999], [-1, 10**13, 0.5]),
        (("eval_result_details", 0, "first_letter"), ["a", "Z"], ["", "ab", "1", 1, "_"]),
        (("sae_cfg_dict",), [{}, {"a": 1}, None], [[], "a"]),
        (("eval_result_unstructured",), [None, 1, "a", [1]], []),
    ],
)
def test_kinds(path, good, bad):
    data, path = example("absorption_first_letter"), path
    if isinstance(path, str):
        path = ("eval_config", path)
    for value in good:
        validate_saebench(changed(data, path, value))
    for value in bad:
        with pytest.raises(ValueError, match=f"^{re.escape(said(path))}: found"):
            validate_saebench(changed(data, path, value))


def test_lists_are_checked_entry_by_entry():
    data = example("sparse_probing")
    with pytest.raises(
        ValueError, match=r"^eval_config.k_values\[1\]: found 'two', expected a whole number$"
    ):
        validate_saebench(changed(data, ("eval_config", "k_values"), [1, "two"]))
    with pytest.raises(
        ValueError, match=r"^eval_result_details\[1\].dataset_name: found nothing, expected text$"
    ):
        validate_saebench(changed(data, ("eval_result_details", 1, "dataset_name"), drop=True))


def test_unknown_fields_pass_and_unknown_evaluations_do_not():
    validate_saebench(example("core") | {"more": 1})
    known = "absorption_first_letter, sparse_probing, sparse_probing_sae_probes, core"
    with pytest.raises(
        ValueError, match=f"^eval_type_id: found 'absorption', expected one of {known}$"
    ):
        validate_saebench(example("core") | {"eval_type_id": "absorption"})
    with pytest.raises(ValueError, match="^eval_type_id: found nothing, expected one of"):
        validate_saebench({})
    with pytest.raises(ValueError, match=r"^the result: found \[\], expected an object$"):
        validate_saebench([])


def test_lenient_check_misses_nothing_but_absences():
    data = changed(example("absorption_first_letter"), ("sae_bench_commit_hash",), drop=True)
    data["eval_result_metrics"]["mean"]["mean_full_absorption_score"] = math.nan
    validate_saebench(data, complete=False)
    with pytest.raises(ValueError, match="^sae_bench_commit_hash: found nothing, expected text$"):
        validate_saebench(data)
    data["eval_result_metrics"]["mean"]["mean_full_absorption_score"] = "low"
    with pytest.raises(
        ValueError, match="mean_full_absorption_score: found 'low', expected a finite number"
    ):
        validate_saebench(data, complete=False)


# ---- our results


def test_what_we_write_is_valid_and_read_back_unchanged(tmp_path):
    results = ours(tmp_path)
    for r in results:
        validate_saebench(r)
        assert json.loads(saebench_path(tmp_path, r).read_text()) == r
    table = read_saebench(tmp_path).set_index("eval_type")
    assert table.source.tolist() == ["atm-sae"] * 4 and set(table.sae_id) == {"one"}
    assert set(table.method) == {"batchtopk"} and set(table.layer) == {2}
    a, p, c = table.loc["absorption_first_letter"], table.loc["sparse_probing"], table.loc["core"]
    assert (
        a.mean_full_absorption_score,
        a.mean_absorption_fraction_score,
        a.mean_num_split_features,
    ) == (0.25, 0.125, 2)
    assert (
        a.std_dev_full_absorption_score,
        a.std_dev_absorption_fraction_score,
        a.std_dev_num_split_features,
    ) == pytest.approx((0.5**1.5, 0.25 * 0.5**0.5, 2**0.5))
    assert (p.sae_top_1_test_accuracy, p.sae_test_accuracy, p.llm_test_accuracy) == (0.8, 0.9, 0.95)
    assert (
        c.l0,
        c.l1,
        c.mse,
        c.cossim,
        c.explained_variance,
        c.relative_reconstruction_bias,
        c.frac_alive,
    ) == (2, 3, 2, 0.9, 0.75, 0.875, 0.75)
    assert (
        c.ce_loss_score,
        c.ce_loss_with_sae,
        c.ce_loss_with_ablation,
        c.ce_loss_without_sae,
    ) == (0.9, 3, 12, 2)
    assert (c.kl_div_score, c.kl_div_with_sae, c.kl_div_with_ablation) == (0.8, 1, 5)
    assert (c.total_tokens_eval_reconstruction, c.total_tokens_eval_sparsity_variance) == (90, 100)
    assert (
        table[["l2_ratio", "explained_variance_legacy", "average_max_decoder_cosine_sim"]]
        .isna()
        .all(axis=None)
    )


def test_files_lie_where_saebench_looks_for_them(tmp_path):
    absorption_json(absorption_result(), tmp_path, release="a/b", name="layer_2/x")
    core_json(RECONSTRUCTION, SAE_DICT, path=tmp_path, release="a/b", name="layer_2/x")
    found = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json"))
    assert found == [
        "absorption/a_b/a_b_layer_2_x_eval_results.json",
        "core/a_b/a_b_layer_2_x_eval_results.json",
    ]
    absorption_json(absorption_result(), tmp_path / "mine.json")
    assert (tmp_path / "mine.json").is_file()


def test_equal_results_have_equal_bytes_and_different_ones_another_id(tmp_path):
    def files(folder):
        ours(folder)
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*.json")}

    first = files(tmp_path / "a")
    assert first == files(tmp_path / "b") and len(first) == 4
    base = absorption_json(absorption_result())
    others = [
        absorption_json(absorption_result(), name="two"),
        absorption_json(absorption_result(seeds=[8])),
        absorption_json(absorption_result(), method="topk"),
    ]
    assert len({r["eval_id"] for r in [base, *others]}) == 4
    assert (
        base["datetime_epoch_millis"] == 0
        and absorption_json(absorption_result(), datetime_epoch_millis=5)["datetime_epoch_millis"]
        == 5
    )


def test_nothing_invalid_reaches_the_disk(tmp_path):
    bad = absorption_result([("A", 0, 0.25, 0.5, 5, 10, 1)])  # a single letter has no deviation
    with pytest.raises(
        ValueError, match="^eval_result_metrics.mean.std_dev_absorption_fraction_score: found nan"
    ):
        absorption_json(bad, tmp_path / "x.json")
    with pytest.raises(ValueError, match="^datetime_epoch_millis: found -1"):
        core_json(RECONSTRUCTION, SAE_DICT, path=tmp_path, datetime_epoch_millis=-1)
    with pytest.raises(ValueError, match="^eval_type_id: found 'tpp'"):
        saebench_result("tpp", {}, {}, [], SAE_DICT, path=tmp_path)
    assert not list(tmp_path.iterdir())


def test_absorption_settings_and_letters():
    out = absorption_json(absorption_result())
    assert out["eval_config"] == dict(
        model_name="nano",
        random_seed=7,
        f1_jump_threshold=0.03,
        max_k_value=10,
        prompt_template="{word} has the first letter:",
        prompt_token_pos=-6,
        llm_dtype="bfloat16",
        min_GT_probe_f1=0.6,
        min_feats_for_eval=20,
    )
    assert out["eval_result_details"][1] == dict(
        first_letter="B",
        mean_absorption_fraction=0.0,
        full_absorption_rate=0.0,
        num_full_absorption=0,
        num_probe_true_positives=4,
        num_split_features=3,
    )
    assert (
        out["eval_result_unstructured"] == CONFIG | dict(n_letters=2)
        and out["sae_bench_commit_hash"].startswith("atm-sae ")
        and out["sae_lens_version"] is None
    )
    assert (
        "prompt_token_pos" not in absorption_json(absorption_result(position=None))["eval_config"]
    )


def test_letters_of_several_seeds_become_one_entry():
    rows = [
        ("A", 0, 0.1, 0.2, 2, 10, 1),
        ("B", 0, 0.0, 0.0, 0, 3, 2),
        ("A", 1, 0.3, 0.4, 8, 20, 2),
        ("A", 2, 0.2, 0.3, 3, 10, 3),
    ]
    out = absorption_json(absorption_result(rows, seeds=[4, 5, 6]))
    a, b = out["eval_result_details"]
    assert (
        a["first_letter"] == "A"
        and a["mean_absorption_fraction"] == pytest.approx(0.2)
        and a["full_absorption_rate"] == pytest.approx(0.3)
    )
    assert (a["num_full_absorption"], a["num_probe_true_positives"], a["num_split_features"]) == (
        13,
        40,
        2,
    ) and b["num_split_features"] == 2
    assert out["eval_config"]["random_seed"] == 4 and out["eval_result_unstructured"]["seeds"] == [
        4,
        5,
        6,
    ]


def test_probing_details_are_means_of_groups():
    out = probing_json(probing_result(), SAE_DICT, seed=3, lm_dtype="bfloat16", **WHERE)
    assert [d["dataset_name"] for d in out["eval_result_details"]] == ["mail", "maths"]
    assert out["eval_result_details"][0]["sae_top_1_test_accuracy"] == pytest.approx(0.7) and out[
        "eval_result_details"
    ][0]["sae_test_accuracy"] == pytest.approx(0.9)
    assert out["eval_config"] == dict(
        random_seed=3,
        dataset_names=["mail", "maths"],
        probe_train_set_size=60,
        probe_test_set_size=20,
        llm_dtype="bfloat16",
        model_name="nano",
        k_values=[1, 3],
    )
    assert (
        "sae_top_3_test_accuracy" not in out["eval_result_metrics"]["sae"]
        and out["eval_result_unstructured"]["summary"]["sae_top_3_test_accuracy"] == 0.5
    )


def test_sae_probes_has_an_entry_for_each_task():
    out = sae_probes_json(benchmark_result(), SAE_DICT, penalty="l2", lm_dtype="float16", **WHERE)
    assert out["eval_result_details"][0] == dict(
        dataset_name="1_cats", sae_top_1_test_auc=0.6, llm_test_auc=0.9, llm_test_f1=0.8
    )
    config = out["eval_config"]
    assert (config["dataset_names"], config["ks"]) == (["1_cats", "2_dogs"], [1, 3])
    assert (config["random_seed"], config["reg_type"], config["setting"]) == (42, "l2", "normal")
    assert config["include_llm_baseline"] and "llm_dtype" not in config
    scores = out["eval_result_metrics"]
    assert scores["llm"] == pytest.approx(dict(llm_test_auc=0.95, llm_test_f1=0.85))
    assert scores["sae"] == pytest.approx(dict(sae_top_1_test_auc=0.7))  # no val_auc, no k of 3
    more = out["eval_result_unstructured"]
    assert more["summary"]["sae_top_3_test_auc"] == pytest.approx(0.8)
    assert (more["llm_dtype"], more["tasks"][1]["n_test"]) == ("float16", 50)
    bare = benchmark_result()
    bare.summary.pop("llm_test_auc")
    assert not sae_probes_json(bare, SAE_DICT)["eval_config"]["include_llm_baseline"]


def test_sae_probes_and_sparse_probing_stay_apart_in_one_row(tmp_path):
    "Both have scores of the same name in SAEBench's files."
    probing_json(probing_result(), SAE_DICT, tmp_path, **WHERE)
    result = benchmark_result()
    result.summary["llm_test_accuracy"] = 0.5
    sae_probes_json(result, SAE_DICT, tmp_path, **WHERE)
    (row,) = join_evaluations(read_saebench(tmp_path)).to_dict("records")
    assert (row["llm_test_accuracy"], row["sae_probes_llm_test_accuracy"]) == (0.95, 0.5)
    assert row["sae_probes_sae_top_1_test_auc"] == pytest.approx(0.7)
    details = saebench_details(tmp_path, "sparse_probing_sae_probes")
    assert details.dataset_name.tolist() == ["1_cats", "2_dogs"]


def test_the_dtype_is_the_models_or_is_not_there():
    config = core_json(RECONSTRUCTION, SAE_DICT, lm_dtype="float16", **WHERE)["eval_config"]
    assert config["llm_dtype"] == "float16"
    for out in ours()[1:]:  # probing and core, of which nothing is known
        assert "llm_dtype" not in out["eval_config"]


def test_the_protocol_of_each_file(tmp_path):
    ours(tmp_path)
    published = FIXTURES / "example"
    tables = (read_saebench(folder).set_index("eval_type") for folder in (tmp_path, published))
    found = [table.protocol.fillna("").to_dict() for table in tables]
    nothing = dict(sparse_probing="", sparse_probing_sae_probes="", core="")
    assert found == [
        dict(absorption_first_letter="exact") | nothing,
        dict(absorption_first_letter="saebench") | nothing,
    ]


def test_core_says_minus_one_where_nothing_is_known():
    out = core_json(RECONSTRUCTION | {"shrinkage": math.nan}, SAE_DICT, **WHERE)
    m = out["eval_result_metrics"]
    assert (
        set(m["model_behavior_preservation"].values())
        == set(m["model_performance_preservation"].values())
        == {-1}
    )
    assert (
        set(m["shrinkage"].values()) == {-1}
        and m["misc_metrics"]["freq_over_1_percent"] == -1
        and m["misc_metrics"]["frac_alive"] == 0.75
    )
    assert (
        m["token_stats"]
        == dict(total_tokens_eval_reconstruction=0, total_tokens_eval_sparsity_variance=100)
        and not out["eval_config"]["compute_kl"]
    )
    assert (
        m["reconstruction_quality"]["mse"] == 2
        and out["eval_result_unstructured"]["reconstruction"]["mse"] == 4096
    )


def frequencies(values):
    out = core_json(RECONSTRUCTION, SAE_DICT, frequency=torch.tensor(values), **WHERE)
    return out["eval_result_metrics"]["misc_metrics"]


def test_frequencies():
    m = frequencies([0.5, 0.0625, 0.0078125, 0])  # two above 1%, one above 10%
    assert (m["freq_over_1_percent"], m["freq_over_10_percent"]) == (0.5, 0.25)
    assert m["normalized_freq_over_1_percent"] == pytest.approx(0.5625 / 0.5703125) and m[
        "normalized_freq_over_10_percent"
    ] == pytest.approx(0.5 / 0.5703125)
    zeros = frequencies([0.0, 0, 0])
    assert {v for k, v in zeros.items() if "freq" in k} == {0}


def test_an_sae_describes_itself():
    sae = SAE(SAEConfig(4, 8, "batchtopk", k=2))
    cfg = core_json(RECONSTRUCTION, sae, **WHERE)["sae_cfg_dict"]
    assert (
        cfg["architecture"],
        cfg["d_in"],
        cfg["d_sae"],
        cfg["k"],
        cfg["hook_name"],
        cfg["hook_layer"],
        cfg["model_name"],
    ) == ("batch_topk", 4, 8, 2, "blocks.2.hook_resid_post", 2, "nano")
    cfg = core_json(RECONSTRUCTION, sae, **WHERE, site="mlp_out")["sae_cfg_dict"]
    assert cfg["hook_name"] == "blocks.2.hook_mlp_out"
    assert (
        core_json(RECONSTRUCTION, sae, method="atm", **WHERE)["sae_cfg_dict"]["architecture"]
        == "atm"
    )


# ---- reading


def test_example_of_saebench(tmp_path):
    table = read_saebench(FIXTURES / "example")
    assert table.eval_type.tolist() == [
        "absorption_first_letter",
        "core",
        "sparse_probing",
        "sparse_probing_sae_probes",
    ] and set(table.source) == {"SAEBench"}
    assert (
        set(table.method) == {"batchtopk"}
        and set(table.d_sae) == {16}
        and set(table.layer) == {3}
        and set(table.model) == {"example-model"}
    )
    assert (
        table.l0[1] == 20
        and np.isnan(table.l0[0])
        and table.kl_div_score.isna().all()
        and table.l0.dtype == float
    )
    assert table.sae_probes_sae_top_1_test_auc.tolist()[3] == 0.78
    one = read_saebench(EXAMPLES["sparse_probing"])
    assert (
        len(one) == 1
        and one.sae_top_5_test_accuracy[0] == 0.85
        and one.sae_top_100_test_accuracy.isna().all()
    )


def test_details():
    table = saebench_details(FIXTURES / "example")
    assert (
        table.first_letter.tolist() == ["a", "b"]
        and table.full_absorption_rate.tolist() == [0.2, 0.4]
        and set(table.sae_id) == {"example_sae"}
    )
    assert saebench_details(FIXTURES / "example", "sparse_probing").dataset_name.tolist() == [
        "example/one",
        "example/two",
    ]
    assert saebench_details(FIXTURES / "example", "core")["index"].tolist() == [0, 1]
    with pytest.raises(ValueError, match="^eval_type: found 'letters', expected one of"):
        saebench_details(FIXTURES / "example", "letters")


def write(path, data):
    path.write_text(json.dumps(data))
    return path


def test_files_of_early_2025_and_of_2024(tmp_path):
    data = example("absorption_first_letter")
    mean = data["eval_result_metrics"]["mean"]
    for k in [k for k in mean if k.startswith("std")]:
        del mean[k]
    new = read_saebench(write(tmp_path / "a.json", data)).iloc[0]
    assert new.mean_full_absorption_score == 0.3 and "std_dev_full_absorption_score" not in new

    old = dict(
        eval_type_id="absorption_first_letter",
        eval_config=dict(model_name="pythia"),
        eval_id="x",
        datetime_epoch_millis=1,
        eval_result_metrics=dict(mean=dict(mean_absorption_score=0.2, mean_num_split_features=1.5)),
        eval_result_details=[
            dict(
                first_letter="a",
                num_absorption=3,
                absorption_rate=0.3,
                num_probe_true_positives=10.0,
                num_split_features=1,
            )
        ],
    )
    file = write(tmp_path / "release_name_eval_results.json", old)
    row = read_saebench(file).iloc[0]
    assert (
        row.mean_full_absorption_score == 0.2
        and row.sae_id == "release_name"
        and row.model == "pythia"
        and row.method is None
    )
    assert saebench_details(file)[
        ["full_absorption_rate", "num_full_absorption"]
    ].values.tolist() == [[0.3, 3]]
    assert read_saebench(tmp_path).mean_absorption_fraction_score.isna().tolist() == [False, True]


def test_bundles_of_published_numbers():
    table = read_saebench(FIXTURES / "published")
    assert "unlearning" not in set(table.eval_type) and len(table) == 5 * 2 + 3
    joined = join_evaluations(table).set_index("sae_id")
    assert joined.loc[
        [
            "final_info_topk",
            "final_info_topk_k80",
            "final_info_topk_k320",
            "final_info_jumprelu",
            "final_info_standard",
        ],
        ["l0", "mean_full_absorption_score"],
    ].values.tolist() == [
        [40, 0.140248],
        [80, 0.0583],
        [320, 0.0296],
        [2665.9, 0.011419],
        [8724.1, 0.016106],
    ]
    assert joined.method.to_dict() == dict(
        final_info_topk="topk",
        final_info_topk_k80="topk",
        final_info_topk_k320="topk",
        final_info_jumprelu="jumprelu",
        final_info_standard="standard",
    )
    assert joined.sae_top_1_test_accuracy.dropna().sort_values().tolist() == [
        0.6379,
        0.7154,
        0.7698,
    ] and set(joined.d_sae) == {16384}


def test_newer_files_keep_the_hook_elsewhere(tmp_path):
    data = example("core")
    data["sae_cfg_dict"] = dict(
        d_sae=16,
        architecture="JumpRelu",
        metadata=dict(hook_name="blocks.11.hook_resid_post", model_name="m"),
    )
    row = read_saebench(write(tmp_path / "a.json", data)).iloc[0]
    assert (row.layer, row.site, row.model, row.method) == (11, "resid_post", "m", "jumprelu")
    data["sae_cfg_dict"]["metadata"]["hook_name"] = "blocks.11.attn.hook_z"
    row = read_saebench(write(tmp_path / "a.json", data)).iloc[0]
    assert row.layer == 11 and row.site is None
    row = read_saebench(write(tmp_path / "a.json", data | {"sae_cfg_dict": None})).iloc[0]
    assert row.layer is None and row.d_sae is None and row.model == "example-model" and row.l0 == 20


@pytest.mark.parametrize(
    "text, says",
    [
        ('{"eval_type_id": "core", ', "is not valid JSON"),
        ("[1]", "holds a list, where an object was expected: is it a SAEBench result"),
        ('{"weights": 3}', "found no field eval_result_metrics"),
        ('{"a": {"b": {}}}', "found no field eval_result_metrics"),
        ('{"eval_result_metrics": {}}', "eval_type_id: found nothing, expected one of"),
        (
            '{"eval_type_id": ["core"], "eval_result_metrics": {}}',
            "eval_type_id: found ['core'], expected one of",
        ),
        (
            '{"eval_type_id": "core_2", "eval_result_metrics": {}}',
            "eval_type_id: found 'core_2', expected one of",
        ),
        (
            '{"eval_type_id": "core", "eval_result_metrics": {}}',
            "eval_result_metrics: found no numbers, expected the metrics of core",
        ),
        ('{"eval_type_id": "core"}', "eval_result_metrics: found no numbers"),
        (
            '{"eval_type_id": "core", "eval_result_metrics": {"sparsity": {"l0": -1}}}',
            "eval_result_metrics: found no numbers",
        ),
        (
            '{"eval_type_id": "core", "eval_result_metrics": [1]}',
            "eval_result_metrics: found [1], expected an object",
        ),
        (
            '{"eval_type_id": "core", "eval_result_metrics": {"sparsity": {"l0": "40"}}}',
            "eval_result_metrics.sparsity.l0: found '40', expected a finite number",
        ),
        (
            '{"eval_type_id": "tpp", "eval_result_metrics": {"tpp_metrics": {}}}',
            f"holds no results of {', '.join(EVALUATIONS)}",
        ),
    ],
)
def test_damaged_files_are_named(tmp_path, text, says):
    file = tmp_path / "broken.json"
    file.write_text(text)
    for path in (file, tmp_path):
        with pytest.raises(ValueError) as e:
            read_saebench(path)
        assert says in str(e.value) and str(path) in str(e.value)


def test_missing_and_empty_places(tmp_path):
    with pytest.raises(ValueError, match="nowhere does not exist: give a file or a folder"):
        read_saebench(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no results of"):
        read_saebench(tmp_path)


# ---- joining


def test_join_has_one_row_for_each_sae(tmp_path):
    ours(tmp_path)
    core_json(RECONSTRUCTION | {"l0": 5.0}, SAE_DICT, path=tmp_path, name="two")
    table = join_evaluations(
        pd.concat([read_saebench(tmp_path), read_saebench(FIXTURES / "example")])
    ).set_index("sae_id")
    assert table.l0.to_dict() == {"one": 2, "two": 5, "example_sae": 20}
    assert table.mean_full_absorption_score.fillna(-9).to_dict() == {
        "one": 0.25,
        "two": -9,
        "example_sae": 0.3,
    }
    assert (
        table.sae_top_1_test_accuracy["one"] == 0.8
        and table.method["one"] == "batchtopk"
        and "eval_type" not in table
    )


def test_the_same_evaluation_twice_is_refused(tmp_path):
    ours(tmp_path / "a"), ours(tmp_path / "b")
    with pytest.raises(
        ValueError, match="evaluated more than once.*absorption_first_letter of atm-sae/one"
    ):
        join_evaluations(read_saebench(tmp_path))
    theirs = read_saebench(tmp_path / "b").assign(
        source="SAEBench"
    )  # but the same SAE measured by them and by us is two rows
    assert len(join_evaluations(pd.concat([read_saebench(tmp_path / "a"), theirs]))) == 2


# ---- SAEBench's own classes, if there is a Python that has them: ATM_SAE_SAEBENCH=/path/to/python

ASK = """
import json, sys
from pydantic import TypeAdapter
from sae_bench.evals.absorption.eval_output import AbsorptionEvalOutput
from sae_bench.evals.core.eval_output import CoreEvalOutput
from sae_bench.evals.sparse_probing.eval_output import SparseProbingEvalOutput
from sae_bench.evals.sparse_probing_sae_probes.eval_output import SparseProbingSaeProbesEvalOutput
classes = dict(
    absorption_first_letter=AbsorptionEvalOutput,
    core=CoreEvalOutput,
    sparse_probing=SparseProbingEvalOutput,
    sparse_probing_sae_probes=SparseProbingSaeProbesEvalOutput,
)
for file in sys.argv[1:]:
    text = open(file).read()
    TypeAdapter(classes[json.loads(text)['eval_type_id']]).validate_json(text)
print(json.dumps({name: TypeAdapter(c).json_schema() for name, c in classes.items()}))
"""


@pytest.mark.skipif(
    "ATM_SAE_SAEBENCH" not in os.environ, reason="ATM_SAE_SAEBENCH names no Python with sae-bench"
)
def test_saebench_accepts_our_files_and_has_our_fields(tmp_path):
    ours(tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [os.environ["ATM_SAE_SAEBENCH"], "-c", ASK, *map(str, tmp_path.rglob("*.json"))],
        capture_output=True,
        text=True,
        env=env,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for name, schema in json.loads(done.stdout).items():
        theirs = {path: required for path, _, required in fields(schema)}
        theirs |= {("eval_type_id",): True}  # the one field of which we ask more
        mine = {path: required for path, _, required in fields(EVALUATIONS[name])}
        mine |= {("eval_config",): True}
        assert mine == theirs, name
