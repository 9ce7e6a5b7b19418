"The report's numbers by hand, its verdicts, and the bytes of what it saves."

import io
import math
import os
from collections import namedtuple
from types import SimpleNamespace

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from atm_sae.methods import ARCHITECTURES, MASKS, METHODS, get_method, method_name, method_style
from atm_sae.report.figures import (
    FEW,
    FigureText,
    axis_limits,
    curve_style,
    few_colours,
    figure_text,
    label_ends,
    legend_above,
    draw_band,
    draw_interval,
    plot_curves,
    plot_intervals,
    range_text,
    save_figure,
    seeds_text,
    set_style,
    share_height,
    split_by_mask,
    spread,
    stamp,
)
from atm_sae.report.tables import (
    SMOKE,
    SUMMARY_COLUMNS,
    chose_no_mask,
    compare_published,
    difference_table,
    pretty,
    read_summary,
    reports_folder,
    save_summary,
    save_table,
    score_runs,
    summary_table,
    to_latex,
    to_markdown,
)
from atm_sae.stats import (
    at_l0,
    claim_verdict,
    format_bytes,
    format_interval,
    format_margin,
    format_number,
    format_seconds,
    holm_intervals,
    mean_interval,
    misses_l0,
    paired_difference,
    summarise,
)


@pytest.fixture
def rows():
    return pd.DataFrame(
        {
            "world": "planted",
            "method": ["atm", "atm", "topk", "topk"],
            "sparsity": 8,
            "seed": [0, 1, 0, 1],
            "l0": [8.2, 7.8, 8.0, 8.0],
            "fvu": [0.11, 0.13, 0.10, 0.12],
            "absorption": [0.05, 0.07, 0.20, 0.24],
        }
    )


@pytest.fixture
def summary(rows):
    return summary_table(rows, ["absorption", "fvu"])


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


# mean of 1..5 is 3, s = sqrt(10/4), t_4 = 2.7764, half width 2.7764 * sqrt(2.5/5) = 1.9632
def test_interval_by_hand():
    mean, low, high = mean_interval([1, 2, 3, 4, 5])
    assert (
        mean == 3 and high - 3 == pytest.approx(1.9632, abs=1e-4) and low + high == pytest.approx(6)
    )
    # 80%, two values: t_1 = 3.0777, s/sqrt(2) = 1
    assert mean_interval([0, 2], level=0.8)[2] - 1 == pytest.approx(3.0777, abs=1e-4)


def test_holm_by_hand():
    """Three comparisons of three seeds, sorted by p. At level L and two degrees of freedom the
    quantile of t is L sqrt(2 / (1 - L^2)): 7.649 at 1 - 0.05/3 and 6.205 at 1 - 0.05/2."""
    found = holm_intervals([[0.4, 0.5, 0.6], [9.0, 10.0, 11.0], [-1.0, 0.0, 1.5]])
    quantiles = [(i.high - i.low) / 2 / (s / math.sqrt(3)) for i, s in zip(found, (0.1, 1.0))]
    assert [i.mean for i in found[:2]] == pytest.approx([0.5, 10])
    assert sorted(quantiles) == pytest.approx([6.2053, 7.6488], rel=1e-4)
    assert [claim_verdict(i) for i in found] == ["fails", "fails", "undecided"]


def test_holm_stops_at_the_first_that_is_not_significant():
    "p of 0.030 and 0.040: the first needs 0.025, so the second shows nothing at 0.05 either."
    first, second = ([x + m for x in (-0.1, 0.0, 0.1)] for m in (0.3283, 0.2827))
    assert [claim_verdict(mean_interval(x)) for x in (first, second)] == ["fails", "fails"]
    found = holm_intervals([first, second])
    assert [claim_verdict(i) for i in found] == ["undecided", "undecided"]
    assert found[1].high - found[1].low == pytest.approx(found[0].high - found[0].low)


def test_holm_of_few_seeds():
    one, two = holm_intervals([[0.5], [0.1, 0.3]])
    assert one.mean == 0.5 and math.isnan(one.low)
    assert two == mean_interval([0.1, 0.3]) + (2,)  # a single seed is not tested, nor counted
    same, zero = holm_intervals([[0.2, 0.2], [0.0, 0.0]])
    assert (same.low, same.high) == (0.2, 0.2) and claim_verdict(zero) == "undecided"
    assert holm_intervals([]) == []


@pytest.mark.parametrize(
    "numbers, text",
    [
        ((-0.0757, 0.0249), "-0.076 ± 0.025"),
        ((0.5, math.nan), "0.500"),
        ((0.2, 0.0), "0.200 ± 0.000"),
        ((0, 0), "0.00 ± 0.00"),
    ],
)
def test_format_margin(numbers, text):
    assert format_margin(*numbers) == text


def test_settings_that_hide_nothing_are_not_called_masked():
    rates = {"matryoshka+atm": (0.0, 0.0), "topk+atm": (0.0, 0.1), "topk": (math.nan, math.nan)}
    table = pd.DataFrame(
        [
            dict(world="w", method=m, sparsity=t, seed=0, l0=t, mask_rate=rate)
            for m, pair in rates.items()
            for t, rate in zip((4, 8), pair)
        ]
    )
    assert chose_no_mask(table) == {"matryoshka+atm"}
    assert chose_no_mask(table.drop(columns="mask_rate")) == set()
    names = pretty(summary_table(table, "mask_rate")).method
    assert [*dict.fromkeys(names)] == ["Matryoshka + ATM (chose no mask)", "TopK + ATM", "TopK"]


def test_interval_of_one_or_none():
    assert mean_interval([4.0])[0] == 4 and all(map(math.isnan, mean_interval([4.0])[1:]))
    assert all(map(math.isnan, mean_interval([])))
    assert mean_interval([1, math.nan, 3])[0] == 2


@pytest.mark.parametrize(
    "numbers, text",
    [
        ((0.1402, 0.1312, 0.1492), "0.1402 [0.1312, 0.1492]"),
        ((-0.16, -0.287, -0.033), "-0.16 [-0.29, -0.03]"),
        ((2665.9, 2545.9, 2785.9), "2666 [2546, 2786]"),
        ((0.25, math.nan, math.nan, 1), "0.250 (n = 1)"),
        ((1.0, 1.0, 1.0), "1.00 [1.00, 1.00]"),
        ((math.nan,), "–"),
    ],
)
def test_format_interval(numbers, text):
    assert format_interval(*numbers) == text


def test_sizes_and_durations_have_a_unit_that_fits():
    sizes = (0, 999, 1000, 9_940, 9_960, 999_499, 999_500, 3e6, 128e9, 2.5e15)
    assert [format_bytes(n) for n in sizes] == [
        *("0 B", "999 B", "1.0 kB", "9.9 kB", "10 kB", "999 kB", "1.0 MB", "3.0 MB", "128 GB"),
        "2,500 TB",
    ]
    assert [format_seconds(s) for s in (0, 0.042, 1.4, 99, 100, 5900, 6000, 360_000)] == [
        *("0 s", "0.04 s", "1 s", "99 s", "2 min", "98 min", "1.7 h", "100.0 h")
    ]


def test_format_number():
    assert [format_number(x) for x in (0.0068, 40.0, 16384, 0.0, math.nan, None, "a", True)] == [
        "0.00680",
        "40.0",
        "16384",
        "0.00",
        "–",
        "–",
        "a",
        "True",
    ]
    assert format_number(1e-9) == "1.00e-09"


def test_summary_has_l0_on_each_line(summary):
    assert tuple(summary) == SUMMARY_COLUMNS and len(summary) == 4
    assert (
        list(summary["mean"].round(10)) == [0.06, 0.12, 0.22, 0.11] and list(summary.n) == [2] * 4
    )
    assert summary.l0.round(9).eq(8).all()
    # atm's L0: 8 +- 12.706 * 0.2
    assert (
        summary.l0_high[0] == pytest.approx(8 + 12.7062 * 0.2, abs=1e-3) and summary.l0_high[2] == 8
    )


def test_summary_without_sparsity_or_l0():
    table = summary_table(
        pd.DataFrame({"world": "w", "method": "random", "fvu": [1.0, 3.0]}), ["fvu"]
    )
    assert len(table) == 1 and table["mean"][0] == 2 and math.isnan(table.l0[0])


def test_missing_column_is_named(rows):
    with pytest.raises(ValueError, match="no column 'absorbtion'; the rows have 'world'"):
        summarise(rows, "method", "absorbtion")


def test_pretty(summary):
    table = pretty(summary, metrics={"absorption": "absorbed"})
    assert list(table) == ["method", "sparsity", "L0", "absorbed"] and list(table.method) == [
        "ATM",
        "TopK",
    ]
    assert table.absorbed[0] == "0.06 [-0.07, 0.19]"


def test_a_missed_target_is_marked(rows):
    "ATM's mean is 8.5, 6.25% from its target; TopK's 8.3 is near enough."
    l0 = [8.6, 8.4, 8.3, 8.3]
    off, near = pretty(summary_table(rows.assign(l0=l0), "fvu"))["L0"]
    assert off == "8.5 [7.2, 9.8], off target" and near == "8.30 [8.30, 8.30]"
    free = summary_table(rows.assign(l0=l0, sparsity=math.nan), "fvu")
    assert not pretty(free)["L0"].str.contains("off").any()


@pytest.mark.parametrize(
    "reached, target, slack, missed",
    [
        (12.3, 8, 0.05, True),
        (7.5, 8, 0.05, True),
        (8.4, 8, 0.05, False),
        (6.6, 6, 0.1, False),
        (6.61, 6, 0.1, True),
        (0.0, 8, 0.05, True),
        (math.nan, 8, 0.05, True),
        (12.3, None, 0.05, False),
        (12.3, math.nan, 0.05, False),
    ],
)
def test_misses_l0(reached, target, slack, missed):
    assert misses_l0(reached, target, slack) == missed


def test_at_l0_is_linear_in_log_and_never_guesses():
    curve = pd.DataFrame(
        {"world": "w", "method": "topk", "seed": 0, "l0": [16, 4], "fvu": [0.3, 0.1]}
    )
    assert at_l0(curve, 8, "fvu").fvu[0] == pytest.approx(0.2) and at_l0(curve, 4, "fvu").fvu[
        0
    ] == pytest.approx(0.1)
    assert math.isnan(at_l0(curve, 3, ["fvu"]).fvu[0])


def test_paired_difference(rows):
    d = paired_difference(rows, "atm", "topk", "absorption")
    assert (
        d.mean == pytest.approx(-0.16)
        and d.low == pytest.approx(-0.16 - 12.7062 * 0.01, abs=1e-5)
        and d.n == 2
    )
    # pairing: unpaired noise would be far larger than the constant shift of 1 between paired seeds
    noisy = pd.DataFrame(
        {
            "method": ["atm"] * 3 + ["topk"] * 3,
            "seed": [0, 1, 2] * 2,
            "x": [10.0, 20.0, 30.0, 11.0, 21.0, 31.0],
        }
    )
    assert paired_difference(noisy, "atm", "topk", "x")[:3] == pytest.approx((-1, -1, -1))


def test_paired_difference_refuses(rows):
    with pytest.raises(ValueError, match="'atm' has more than one row for the same seed"):
        paired_difference(pd.concat([rows, rows]), "atm", "topk", "fvu")
    with pytest.raises(ValueError, match="share no seed"):
        paired_difference(rows, "atm", "jumprelu", "fvu")


def test_difference_table(rows):
    table = difference_table(rows, ["absorption"], [("atm", "topk"), ("atm", "random")])
    assert (
        list(table.method) == ["atm - topk"]
        and table["mean"][0] == pytest.approx(-0.16)
        and table.l0[0] == pytest.approx(8)
    )


def test_floors_are_compared_only_on_request(rows):
    floor = rows[rows.method == "topk"].assign(method="frozen decoder")
    every = pd.concat([rows, floor])
    found = [pair for pair in difference_table(every, ["absorption"]).method]
    assert "atm - topk" in found and "atm - frozen decoder" not in found
    pairs = [("atm", "frozen decoder")]
    assert {*difference_table(every, ["absorption"], pairs).method} == {"atm - frozen decoder"}


@pytest.mark.parametrize(
    "interval, expect, verdict",
    [
        ((-1, -2, -0.1), "lower", "holds"),
        ((-1, -2, -0.1), "higher", "fails"),
        ((1, 0.1, 2), "lower", "fails"),
        ((1, 0.1, 2), "higher", "holds"),
        ((-1, -2, 0), "lower", "undecided"),
        ((-1, math.nan, math.nan), "lower", "undecided"),
        ((0, 0, 0), "higher", "undecided"),
    ],
)
def test_claim_verdict(interval, expect, verdict):
    assert claim_verdict(interval, expect) == verdict


def test_claim_verdict_of_a_table_line(rows):
    line = difference_table(rows, ["absorption"]).iloc[0]
    assert claim_verdict(line[["mean", "low", "high"]]) == "holds"


def test_claim_verdict_refuses():
    with pytest.raises(ValueError, match="higher"):
        claim_verdict((0, 0, 0), "less")


def entry(**more):
    "A published value whose place is the planted world."
    known = {"method": "topk", "metric": "absorption", "value": 0.23, "l0": 8}
    return known | {"at": {"world": "planted"}} | more


AT_8 = {"world": "planted", "sparsity": 8}
AT_40 = {"world": "planted", "sparsity": 40}


@pytest.mark.parametrize(
    "published, verdict, reason",
    [
        (entry(), "reproduced", "at the published L0"),
        (entry(value=0.25), "differs", "at the published L0"),
        (entry(value=0.25, tolerance=0.05), "reproduced", "at the published L0"),
        (entry(l0=40), "not comparable", "published at L0 40.0, ours is at 8.00"),
        (entry(l0=None), "not comparable", "published without its L0"),
        (entry(l0=None, at=AT_8), "reproduced", "ours is at L0 8.00"),
        (entry(metric="fvu", value=0.11), "not comparable", "no tolerance"),
        (entry(l0=9.9), "reproduced", "at the published L0"),
        (entry(l0=10.1), "not comparable", "published at L0 10.1"),
        (entry(method="jumprelu"), "not measured", "no absorption of jumprelu in planted"),
        (entry(l0=None, at=AT_40), "not measured", "of topk in planted at target L0 40"),
        (entry(at={"world": "moon"}), "not measured", "no absorption of topk in moon"),
        (entry(at={}), "not measured", "no absorption of topk"),
    ],
)
def test_compare_published(summary, published, verdict, reason):
    line = compare_published([published], summary, {"absorption": 0.015}).iloc[0]
    assert line.verdict == verdict and reason in line.reason


def test_nothing_stands_in_for_what_was_not_measured(summary):
    "Neither another world, nor another target, nor the line of median L0."
    missing = [
        entry(at={"world": "moon"}),
        entry(at={}),
        entry(l0=None, at=AT_40),
        entry(l0=None),
    ]
    table = compare_published(missing, summary, {"absorption": 1})
    assert table[["ours", "low", "high", "n", "l0", "difference"]].isna().all().all()


def test_compare_with_another_model(summary):
    line = compare_published([entry()], summary, {"absorption": 0.02}, "another model").iloc[0]
    assert (line.verdict, line.reason) == ("not comparable", "another model")
    assert line.ours == pytest.approx(0.22) and line.difference == pytest.approx(-0.01)


def test_comparison_takes_the_language_model_and_the_nearest_l0(summary):
    lm = summary.assign(world="nano-gemma2")
    both = pd.concat([summary, lm.assign(mean=0.5, l0=20.0), lm.assign(mean=0.6, l0=9.0)])
    assert compare_published([entry(at={})], both, {"absorption": 1}).ours[0] == 0.6
    assert compare_published([entry()], both, {"absorption": 1}).ours[0] == pytest.approx(0.22)


def test_names_and_styles():
    bases = [m for m in METHODS if "+" not in m]
    assert len({method_name(m) for m in bases}) == len(bases)
    looks = {(method_style(m)["color"], method_style(m)["marker"]) for m in bases}
    colours = {get_method(m).colour for m in bases if not get_method(m).is_floor}
    assert len(looks) == len(bases) and len(colours) == len(ARCHITECTURES) + 2
    assert (
        method_name("batchtopk+dropout") == "BatchTopK + dropout"
        and method_name("atm c=1 - atm") == "ATM c=1 − ATM"
    )
    masked = [m for m in METHODS if get_method(m).architecture == "topk" and "+" in m]
    looks = [method_style(m) for m in ["topk", *masked]]
    assert len({look["marker"] for look in looks}) == len(MASKS)
    assert [method_name(m) for m in ("topk+activity", "standard+shuffled", "topk+off r=2")] == [
        "TopK + activity dropout",
        "ReLU + L1 + shuffled ATM",
        "TopK (mask off) r=2",
    ]
    assert method_name("frozen decoder v2 - random") == "frozen decoder v2 − random"
    with pytest.raises(ValueError, match="unknown method 'topq'.*topk"):
        method_name("topq")


def test_floors_are_grey_and_dashed():
    floors = [m for m in METHODS if get_method(m).is_floor]
    assert floors == ["random", "frozen decoder", "frozen encoder"]
    for style in map(method_style, floors):
        colour = style["color"]
        assert colour[1:3] == colour[3:5] == colour[5:7] and style["linestyle"] == "--"
    assert get_method("frozen encoder v2").is_floor and not get_method("dropout").is_floor


def test_spread_by_hand():
    assert spread([0, 10, 0], 2).tolist() == [-1, 10, 1]
    assert spread([1, 1, 1], 3).tolist() == [-2, 1, 4]
    assert spread([], 1).tolist() == []
    y = np.random.default_rng(0).normal(size=20)
    assert np.diff(np.sort(spread(y, 0.5))).min() >= 0.5 - 1e-9


WORDS = dict(caption="Absorption; n = 2. Lower is better.", alt="ATM is lowest: 0.06 − “small”.")


def test_figure_bytes_are_the_same_each_time(tmp_path, rows, summary):
    set_style()

    def draw(folder):
        fig, ax = plt.subplots()
        plot_curves(ax, summary, "absorption", rows)
        paths = save_figure(fig, folder, "f", summary, "default", **WORDS)
        return [p.read_bytes() for p in paths]

    one, two = draw(tmp_path / "a"), draw(tmp_path / "b")
    assert (
        one == two
        and one[0][:4] == b"\x89PNG"
        and b"Matplotlib" not in one[0] + one[1]
        and b"<dc:date>" not in one[1]
    )
    assert one[2].startswith(b"world,method") and b"0.06," in one[2]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["f.csv", "f.png", "f.svg"]


def test_caption_and_alternative_are_in_the_files(tmp_path, rows, summary):
    "Smaller than before it was reduced or not, the PNG keeps its words; the SVG has a title."
    set_style()
    fig, ax = plt.subplots()
    plot_curves(ax, summary, "absorption", rows)
    png, svg, _ = save_figure(fig, tmp_path, "f", summary, "default", **WORDS)
    assert figure_text(png) == FigureText(**WORDS)
    assert f"<title>{WORDS['alt']}</title>" in svg.read_text(encoding="utf-8")
    plain = tmp_path / "plain.png"
    Image.new("RGB", (1, 1)).save(plain)
    assert figure_text(plain) == FigureText("", "")


@pytest.mark.parametrize("missing", ["caption", "alt"])
def test_a_figure_without_words_is_refused(tmp_path, summary, missing):
    fig = plt.figure()
    with pytest.raises(ValueError, match=f"figure 'f': its {missing} is empty"):
        save_figure(fig, tmp_path, "f", summary, "default", **WORDS | {missing: " "})
    assert not list(tmp_path.iterdir())


def test_a_saved_png_has_few_colours_and_looks_the_same(tmp_path, rows, summary):
    set_style()
    fig, ax = plt.subplots()
    plot_curves(ax, summary, "absorption", rows)
    saved = save_figure(fig, tmp_path, "f", summary, "default", **WORDS)[0].read_bytes()
    many = io.BytesIO()
    fig.savefig(many, format="png", dpi=160)
    one, two = (Image.open(io.BytesIO(png)) for png in (saved, many.getvalue()))
    assert one.mode == "P" and len(saved) < len(many.getvalue()) / 2
    shift = np.abs(np.asarray(one.convert("RGB"), int) - np.asarray(two.convert("RGB"), int))
    assert shift.mean() < 1 and few_colours(saved) == saved


def test_svg_bytes_do_not_depend_on_the_layouts_last_bits(tmp_path, rows, summary):
    "matplotlib names a clip path after coordinates that the file shows rounded."

    def svg(folder, width):
        fig, axes = plt.subplots(1, 2, figsize=(width, 3))
        for ax in axes:
            plot_curves(ax, summary, "absorption", rows)
        path = save_figure(fig, tmp_path / folder, "f", summary, "default", **WORDS)[1]
        return path.read_text()

    one, two = svg("a", 6.0), svg("b", 6.0 + 1e-12)
    assert one == two and 'clip-path="url(#clip0)"' in one and '<clipPath id="clip1">' in one


def test_stamp_once_and_loudly_for_smoke():
    fig = plt.figure()
    stamp(stamp(fig, "smoke"), "smoke")
    assert [t.get_text() for t in fig.texts] == [SMOKE, SMOKE]
    assert [t.get_text() for t in stamp(fig, "full").texts] == ["profile: full"]


def test_intervals_of_two_seeds_do_not_flatten_the_axis(summary):
    fig, ax = plt.subplots()
    wide = summary[summary.metric == "absorption"].assign(low=-50.0, high=50.0)
    plot_intervals(ax, wide, "absorption")
    assert -0.2 < ax.get_xlim()[0] and ax.get_xlim()[1] < 0.5


def test_bands_and_bars_do_not_move_the_limits():
    _, ax = plt.subplots()
    ax.plot([0, 1], [0, 1])
    draw_band(ax, [0, 1], [-50, -50], [50, 50], "black")
    draw_interval(ax, [(0, -50), (0, 50)], "black")
    draw_interval(ax, [(0, math.nan), (0, math.nan)], "black")
    ax.autoscale_view()
    assert ax.get_ylim() == pytest.approx((-0.05, 1.05)) and len(ax.collections) == 2


def test_below_four_seeds_single_runs_are_drawn_and_no_interval(rows):
    "Two seeds of ATM are two points; five of TopK have a bar, and their runs are not drawn."
    topk = pd.concat([rows[rows.method == "topk"]] * 2 + [rows[rows.seed == 1].tail(1)])
    topk = topk.assign(seed=range(5))
    both = pd.concat([rows[rows.method == "atm"], topk])
    summary = summary_table(both, ["absorption"])
    assert sorted(summary.n) == [2, 5] and 2 < FEW < 5
    _, ax = plt.subplots()
    plot_curves(ax, summary, "absorption", both, label=False)
    drawn = {tuple(line.get_ydata()) for line in ax.lines}
    assert (0.05, 0.07) in drawn and len(ax.collections) == 1
    bottom, top = ax.get_ylim()
    assert bottom < 0.05 and 0.2 < top < 0.3
    assert seeds_text(summary) == (
        "Each curve is a mean over seeds (n = 2 to 5). Bars are 95% t-intervals. "
        "Below 4 seeds, small points are the single runs instead."
    )


def test_floors_are_one_grey_band_from_the_lowest_to_the_highest():
    lines = [
        (method, target, "absorption", value, 2, target)
        for method, values in {"random": (0.1, 0.2), "frozen decoder": (0.3, 0.25)}.items()
        for target, value in zip((4, 8), values)
    ]
    columns = ["method", "sparsity", "metric", "mean", "n", "l0"]
    summary = pd.DataFrame(lines, columns=columns).assign(low=math.nan, high=math.nan)
    runs = summary.rename(columns={"mean": "absorption"})
    _, ax = plt.subplots()
    plot_curves(ax, summary, "absorption", runs, label=False)
    (band,) = ax.collections
    corners = {tuple(map(float, point)) for point in band.get_paths()[0].vertices}
    assert corners == {(4, 0.1), (8, 0.2), (4, 0.3), (8, 0.25)}
    assert ax.get_legend_handles_labels()[1] == ["floor"]


def test_panels_of_a_row_share_limits_that_hold_each():
    fig, (left, right) = plt.subplots(1, 2)
    left.set_ylim(0, 1)
    right.set_ylim(-2, 0.5)
    share_height([left, right])
    assert left.get_ylim() == right.get_ylim() == (-2, 1)
    fig.draw_without_rendering()
    shown = [any(t.label1.get_visible() for t in ax.yaxis.get_major_ticks()) for ax in fig.axes]
    assert shown == [True, False]


def test_methods_split_by_mask():
    assert split_by_mask(["atm", "topk", "random", "topk+atm", "dropout"]) == {
        "Without a mask": ["topk", "random"],
        "With a mask": ["atm", "topk+atm", "dropout", "random"],
    }
    assert split_by_mask(["topk", "random"]) == {"Without a mask": ["topk", "random"]}


def test_ticks_of_l0_do_not_touch(rows):
    "On a panel of one inch only some of six targets have a label; on a wide one all of them."
    targets = (16, 32, 40, 64, 80, 128)
    many = pd.concat([rows.assign(sparsity=t, l0=float(t)) for t in targets])
    summary = summary_table(many, ["absorption"])
    found = []
    for width in (1.5, 7):
        _, ax = plt.subplots(figsize=(width, 2))
        plot_curves(ax, summary, "absorption", many, label=False)
        found.append(list(ax.get_xticks()))
    assert found[1] == list(targets) and len(found[0]) < 5 and found[0][0] == 16


@pytest.mark.parametrize(
    "draw, problem",
    [
        (lambda: plt.figure(figsize=(9.2, 3)), "it is 9.2 inches wide"),
        (lambda: plt.figure().text(0, 0, "small", fontsize=7).figure, "'small' has 7 pt"),
    ],
)
def test_a_figure_that_cannot_be_read_in_print_is_refused(tmp_path, summary, draw, problem):
    set_style()
    with pytest.raises(ValueError, match=f"figure 'f': {problem}"):
        save_figure(draw(), tmp_path, "f", summary, "default", **WORDS)


def test_the_words_on_a_range_by_hand():
    lines = pd.DataFrame(
        [
            ("atm", 4, 0.1),
            ("topk", 4, 0.3),
            ("random", 4, 0.0),
            ("atm", 8, 0.2),
            ("random", 8, 0.5),
        ],
        columns=["method", "sparsity", "mean"],
    )
    assert range_text(lines) == (
        "at target L0 4 from ATM 0.100 to TopK 0.300 (floor: random 0.00); "
        "at target L0 8 from ATM 0.200 (floor: random 0.500)"
    )


def test_methods_differ_without_colour():
    "Marker, line and face; the mask changes line and face and keeps the marker."
    looks = {}
    for method in [
        *ARCHITECTURES,
        *[f"{name}+atm" for name in ARCHITECTURES if name != "standard"],
    ]:
        style = curve_style(method)
        looks[method] = (style["marker"], style["linestyle"], style["markerfacecolor"] == "white")
    assert len(set(looks.values())) == len(looks)
    assert curve_style("topk+atm")["marker"] == curve_style("topk")["marker"]
    floors = [curve_style(name) for name in ("random", "frozen decoder")]
    assert len({style["marker"] for style in floors}) == 2
    assert {style["linestyle"] for style in floors} == {":"}


def test_the_legend_has_each_name_of_any_panel_once(rows, summary):
    set_style()
    fig, (left, right) = plt.subplots(1, 2)
    plot_curves(left, summary, "absorption", rows, methods=["atm"], label=False)
    plot_curves(right, summary, "absorption", rows, methods=["atm", "topk"], label=False)
    legend_above(fig)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["ATM", "TopK"]


def test_plotting_one_point_or_a_difference(rows, summary):
    fig, (left, right) = plt.subplots(1, 2)
    assert len(plot_curves(left, summary[summary.method == "atm"], "absorption", rows)) == 1
    plot_intervals(right, difference_table(rows, ["absorption"]), "absorption")
    assert [t.get_text() for t in right.get_yticklabels()] == ["ATM − TopK"]


def test_markdown_and_latex():
    table = pd.DataFrame({"a|b": ["x|y", "p_q"], "n": [1.5, 40.0]})
    assert to_markdown(table) == "| a\\|b | n |\n|---|---:|\n| x\\|y | 1.50 |\n| p_q | 40.0 |\n"
    tex = to_latex(table, "50% & more")
    assert (
        r"p\_q & 40.0 \\" in tex
        and r"\caption{50\% \& more}" in tex
        and r"\begin{tabular}{lr}" in tex
    )


def test_save_table_and_summary(tmp_path, summary):
    csv, md, tex = save_table(pretty(summary), tmp_path, "t", "A table.", "smoke")
    assert (
        md.read_text().startswith(f"A table. {SMOKE}\n\n| method")
        and SMOKE in tex.read_text()
        and csv.read_text().startswith("method,")
    )
    assert save_summary(summary, tmp_path, "t") == tmp_path / "tables" / "t-summary.csv"
    assert read_summary(tmp_path / "tables" / "t-summary.csv")["mean"].round(6).tolist() == [
        0.06,
        0.12,
        0.22,
        0.11,
    ]
    with pytest.raises(ValueError, match="no column 'world'"):
        read_summary(csv)


def test_reports_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ATM_SAE_CACHE", str(tmp_path))
    assert (
        reports_folder("", "full") == tmp_path / "by-hand" / "full"
        and (tmp_path / "by-hand" / "full" / "figures").is_dir()
    )
    assert reports_folder(str(tmp_path / "x")) == tmp_path / "x"


# ---- from runs to rows


def toy_runs(n):
    spec = namedtuple("Spec", "method l0 seed")
    return [
        namedtuple("Run", "spec strength")(spec("atm" if i % 2 else "topk", 4.0, i // 2), i)
        for i in range(n)
    ]


def test_score_runs_keeps_the_order_and_joins_what_was_measured():
    rows = score_runs(lambda run: dict(twice=2 * run.strength), toy_runs(3), "toy", progress=False)
    assert rows.to_dict("list") == dict(
        world=["toy"] * 3,
        method=["topk", "atm", "topk"],
        sparsity=[4.0] * 3,
        seed=[0, 0, 1],
        twice=[0, 2, 4],
    )


def test_score_runs_takes_several_rows_of_a_run():
    rows = score_runs(
        lambda run: pd.DataFrame(dict(letter=["A", "B"], n=[run.strength, 9])),
        toy_runs(2),
        "toy",
        progress=False,
    )
    assert (
        rows.letter.tolist() == ["A", "B", "A", "B"]
        and rows.n.tolist() == [0, 9, 1, 9]
        and rows.seed.tolist() == [0] * 4
    )


def test_score_runs_side_by_side_gives_the_same():
    runs = [(r.spec, r.strength) for r in toy_runs(8)]
    plain = [
        SimpleNamespace(spec=SimpleNamespace(method=s.method, l0=s.l0, seed=s.seed), strength=k)
        for s, k in runs
    ]

    def score(run):
        return dict(threads=torch.get_num_threads(), square=run.strength**2, process=os.getpid())

    one, two = (score_runs(score, plain, "toy", workers=w, progress=False) for w in (1, 2))
    assert (
        two.process.nunique() == 2
        and os.getpid() not in two.process.values
        and (two.threads == 1).all()
    )
    assert one.drop(columns=["process", "threads"]).equals(two.drop(columns=["process", "threads"]))


def test_no_lines_no_labels_and_no_numbers_no_limits():
    figure, ax = plt.subplots()
    label_ends(ax)
    assert not ax.texts
    assert axis_limits([math.nan], [math.nan], [math.nan]) == (0.0, 1.0)
    plt.close(figure)


def test_the_error_of_a_score_is_raised():
    def broken(run):
        raise KeyError("no such metric")

    with pytest.raises(KeyError, match="no such metric"):
        score_runs(broken, [SimpleNamespace(spec=None)], "world", workers=1, progress=False)
