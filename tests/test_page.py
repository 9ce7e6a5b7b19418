"The pages of results: what they say, that every link leads somewhere, that nothing is loaded."

import base64
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from types import SimpleNamespace

import pandas as pd
import pytest
from readme import ROOT
from toy import COUNT, DOUBLE, notebook

from atm_sae.report import page
from atm_sae.report.manifest import NEVER_RUN, ObjectState, load_manifest, read_record
from atm_sae.report.page import (
    Cell,
    find_doubt,
    headline,
    html_page,
    markdown_page,
    markdown_tables,
    number_cell,
    profile_results,
    result_folders,
    tally,
    templates,
    words_table,
)
from atm_sae.report.verdict import PUBLISHED_STANDING

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
VOID = {"meta", "link", "input", "img", "br", "hr"}


def test_markdown_page(toy):
    toy.run()
    page = (toy.out / "index.md").read_text()
    assert (
        "| Counting | smoke: SMOKE: not a result | 1 reproduced | – | [executed notebook]" in page
    )
    assert "(notebooks/count.ipynb)" in page and "[results page](index.html)" in page
    assert str(toy.folder) not in page and "\n\n\n" not in page
    toy.run(profile="default", out=toy.folder / "d")
    page = (toy.folder / "d" / "index.md").read_text()
    assert "| Counting | default | 1 not comparable | 1 holds |" in page and "SMOKE" not in page


def test_one_text_covers_all_profiles(toy):
    toy.run(profile="default")
    toy.run(profile="smoke", out=toy.out / "smoke")
    found = sorted(p.relative_to(toy.out).as_posix() for p in toy.out.rglob("index.*"))
    assert found == ["index.html", "index.md"]
    page = (toy.out / "index.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert {"smoke/notebooks/count.ipynb", "notebooks/count.ipynb"} <= set(links)
    assert all((toy.out / link).is_file() for link in links)


def test_a_claim_says_whose_it_is_and_a_missing_l0_is_no_number(toy):
    toy.replace("text: less,", "text: less, by: paper,")
    toy.replace("value: 6, l0: 8,", "value: 6,")
    notebook(toy.path.parent / "10_count.ipynb", COUNT.replace("-2,-3,-1", "-2,-3,1"))
    toy.run(profile="default")
    (card,) = (c for c in cards(toy, "default") if c.claims)
    (claim,), (published,) = card.claims, card.published
    texts = {name: cell.text for name, cell in claim.cells.items()}
    assert texts == {
        "profile": "default",
        "claim": "Less",
        "by": "paper",
        "world": "w",
        "L0": "8.00 [8.00, 8.00]",
        "difference": "-2.0 [-3.0, 1.0]",
        "n": "3",
    }
    assert claim.verdicts == ("no difference shown",) and claim.parts is None
    assert published.cells["its L0"] == Cell("not published", "")
    toy.replace("by: paper", "by: nobody")
    assert "by" in toy.error()


def cards(toy, profile):
    "The cards of a run in the toy's reports folder."
    return profile_results(load_manifest(toy.path), profile, toy.out).cards


def test_a_claim_is_one_row_with_a_part_for_each_l0(toy):
    second = '    "w,atm - topk,4,total,1,0.5,2,5,4.5,4,5",\n]'
    notebook(toy.path.parent / "10_count.ipynb", COUNT.replace("]\nPath", second + "\nPath", 1))
    toy.run(profile="default")
    (card,) = (c for c in cards(toy, "default") if c.claims)
    (row,) = card.claims
    assert row.counts() == [("holds", 1), ("fails", 1)] and row.id == "default-count-less"
    assert row.cells["L0"] == Cell("4.50 to 8.00", "4.5")
    assert row.cells["difference"] == Cell("-2 to 1", "-2.0") and row.cells["n"].text == "3 to 5"
    assert [[c.text for c in line] for line in row.parts.rows] == [
        ["4.50 [4.00, 5.00]", "1.00 [0.50, 2.00]", "5", "fails"],
        ["8.00 [8.00, 8.00]", "-2.0 [-3.0, -1.0]", "3", "holds"],
    ]
    assert "1 fails, 1 holds" in (toy.out / "index.md").read_text()


def test_pages_survive_a_broken_summary(toy):
    toy.run()
    (toy.out / "tables/count-summary.csv").write_text("a,b")
    notebook(toy.path.parent / "10_count.ipynb", "1/0")
    assert toy.run()[0] == {"count": "FAILED", "double": "skipped"}
    assert "not made again since (changed: notebook" in (toy.out / "index.md").read_text()


def test_tables_of_markdown():
    text = "A *title*.\n\n| a | b | c |\n|---|---:|---|\n| x \\| y | **lower** -2.5 ± 1 | 3 |\n"
    first, second = markdown_tables(text + "| z | – | text |\n\nMore.\n| d |\n|---|\n| 1e |")
    assert first.caption == "A *title*." and first.columns == ("a", "b", "c")
    assert [cell.text for cell in first.rows[0]] == ["x | y", "lower -2.5 ± 1", "3"]
    assert [row[1].key for row in first.rows] == ["-2.5", ""]
    assert {row[i].key for row in first.rows for i in (0, 2)} == {None}  # texts are among them
    assert (second.caption, second.rows) == ("More.", ((Cell("1e"),),))


def test_the_most_absorbed_word_of_each_sae_and_its_latent():
    word = dict(letter="I", A=2.0, M=0.0, T=1.5, world="w", method="atm", sparsity=16, full=True)
    lines = [
        dict(text="insu", fraction=1.0, absorber=261, seed=0),
        dict(text="inclusion", fraction=0.5, absorber=7, seed=0),
        dict(text="iron", fraction=0.25, absorber=9, seed=1),
    ]
    table = words_table(pd.DataFrame([word | line for line in lines]))
    shown = [dict(zip(table.columns, (c.text for c in row))) for row in table.rows]
    assert [(s["word"], s["absorbing latent"]) for s in shown] == [("insu", "261"), ("iron", "9")]
    assert shown[0]["method"] == "ATM" and shown[0]["absorption fraction"] == "1.00"


# ---- the page for a browser


class Reader(HTMLParser):
    "Checks that tags are closed in order; gathers identifiers, links and what is loaded."

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.links, self.loads, self.tags, self.images = [], [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        a = dict(attributes)
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in a:
            self.ids.append(a["id"])
        if tag == "a":
            self.links.append(a["href"])
        if tag == "img":
            self.images.append(a)
        self.loads += [
            v
            for k, v in a.items()
            if k in ("src", "srcset", "poster", "data") or k == "href" and tag != "a"
        ]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check(path):
    "A whole page: well-formed, each picture and link leads to a file beside it or a place on it."
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    assert len(set(page.ids)) == len(page.ids)
    for load in page.loads:
        assert load.startswith("data:") or (path.parent / load).is_file(), load
    assert "@import" not in text and not re.search(r"url\(|fetch\(|XMLHttpRequest|https?://", text)
    for link in page.links:
        assert link[1:] in page.ids if link[0] == "#" else (path.parent / link).is_file(), link
    assert (
        all(i["alt"] for i in page.images)
        and page.tags.count("h1") == page.tags.count("main") == page.tags.count("title") == 1
    )
    return text, page


@pytest.fixture
def drawn(toy):
    "The toy, with a figure."
    toy.replace("[tables/double.md]", '["figures/double.{png,csv}", tables/double.md]')
    notebook(
        toy.path.parent / "20_double.ipynb",
        DOUBLE,
        f'Path(out, "figures/double.png").write_bytes({PIXEL!r})',
        'Path(out, "figures/double.csv").write_text("x");',
    )
    return toy


def test_page_is_whole(drawn):
    drawn.run()
    text, page = check(drawn.out / "index.html")
    assert (drawn.out / page.images[0]["src"]).read_bytes() == PIXEL
    assert {
        "figures/double.csv",
        "figures/double.png",
        "tables/double.md",
        "notebooks/double.ipynb",
        "provenance/double.json",
    } <= set(page.links)
    for words in (
        "a book",
        "primary",
        "6.00 [5.50, 6.50]",
        "at the published L0",
        "0 shown",
    ):
        assert words in text, words
    assert (
        'class="chip reproduced"' in text
        and 'class="chip holds"' not in text  # a smoke run decides no claim
        and 'class="stamp">SMOKE' in text
        and str(drawn.folder) not in text
    )
    assert text.count('class="formula"') == 4 and "all made by the present code" in text
    assert "not made again since" not in text and "Not run yet" not in text
    drawn.run(profile="default", out=drawn.folder / "d")
    text, _ = check(drawn.folder / "d" / "index.html")
    assert 'class="chip holds"' in text and "-2.0 [-3.0, -1.0]" in text


def test_same_results_same_bytes(drawn):
    drawn.run()
    manifest = load_manifest(drawn.path)
    assert result_folders(manifest, "smoke", drawn.out) == (drawn.out, {"smoke": drawn.out})
    results = profile_results(manifest, "smoke", drawn.out)
    assert html_page([results]) == html_page([results])
    assert html_page([results]) == (drawn.out / "index.html").read_text(encoding="utf-8")
    assert markdown_page([results]) == (drawn.out / "index.md").read_text(encoding="utf-8")


def test_what_is_missing_or_old_is_said(drawn):
    drawn.run(only=["count"])
    text, page = check(drawn.out / "index.html")
    assert "Not run yet:</strong> atm-sae reproduce --profile smoke --only double" in text
    assert "1 not run yet" in text and page.images == []
    drawn.run()
    notebook(drawn.path.parent / "10_count.ipynb", "1/0")
    drawn.run()
    text = check(drawn.out / "index.html")[0]
    assert "not made again since</strong> (changed: notebook" in text
    assert "6.00 [5.50, 6.50]" in text  # the old result stays, with that remark
    (drawn.out / "tables/count-summary.csv").unlink()
    drawn.run(only=["count"])
    assert "6.00 [5.50, 6.50]" not in check(drawn.out / "index.html")[0]


def test_results_of_other_code_name_its_commit(toy):
    toy.run()
    manifest = load_manifest(toy.path)
    count, record = manifest.pick("count"), read_record(toy.out, "count")

    def doubt(reason, **more):
        return find_doubt(ObjectState(count, record | more, reason), "smoke")

    sha = "0123456789abcdef" * 2
    old = doubt("changed: library", git_sha=sha)
    assert (old.head, old.commit) == ("Made by commit 0123456789ab, not made again since", sha[:12])
    assert doubt("changed: library", git_sha=None).head.startswith("Made by other code")
    assert doubt("missing: tables/a.csv", git_sha=sha).commit == ""
    assert doubt("made elsewhere") is None and doubt(None) is None
    assert find_doubt(ObjectState(count, None, NEVER_RUN), "smoke").head == "Not run yet:"


def test_a_profile_of_other_code_says_so_once_at_its_top(toy):
    toy.run()
    toy.replace("steps: 3", "steps: 4")
    results = profile_results(load_manifest(toy.path), "smoke", toy.out)
    assert results.notice.startswith("1 of 2 objects of profile smoke were made by ")
    page = markdown_page([results])
    assert page.count(results.notice) == 1 and page.index(results.notice) < page.index("| object")
    assert html_page([results]).count(results.notice) == 1


def test_data_is_never_markup(drawn):
    evil = '<script>alert(1)</script>"&'
    for old in ("source: a book", "text: less", "title: Doubling"):
        drawn.replace(old, old.split(":")[0] + f": '{evil}'")
    drawn.run()
    text, page = check(drawn.out / "index.html")
    assert (
        page.tags.count("script") == 1
        and "alert(1)</script>" not in text
        and text.count("&lt;script&gt;alert(1)") >= 3
    )


def test_all_profiles_on_one_page(drawn):
    drawn.run(profile="default")
    drawn.run(profile="smoke", out=drawn.out / "smoke")
    text, page = check(drawn.out / "index.html")
    assert {"default-count", "smoke-count"} <= set(page.ids) and {
        "tables/double.md",
        "smoke/tables/double.md",
    } <= set(page.links)
    assert (
        "<option>default</option>" in text
        and "<option>smoke</option>" in text
        and '<option value="">all</option><option>smoke' not in text
    )
    assert (
        "1 shown, none comparable at this scale." in text
        and "smoke runs are shown, not counted" in text
        and not (drawn.out / "smoke" / "index.html").exists()
    )


def test_a_folder_that_happens_to_be_called_like_a_profile_is_its_own_home(drawn):
    drawn.run(out=drawn.folder / "smoke")
    check(drawn.folder / "smoke" / "index.html")
    assert not (drawn.folder / "index.html").exists()


def test_sort_keys():
    assert number_cell("x", float("nan")) == number_cell("x", float("inf")) == Cell("x", "")
    assert number_cell("x", None) == Cell("x", "") and number_cell("x", 3) == Cell("x", "3.0")
    assert tally(["a", "b", "a"]) == "2 a, 1 b"
    assert headline([])[0] == ("Published values", f"0 shown: –. {PUBLISHED_STANDING}")


def test_templates_are_package_data():
    "A wheel has the files that the page is made from."
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns = settings["package-data"]["atm_sae.report"]
    files = sorted(p.name for p in (ROOT / "atm_sae/report/templates").iterdir())
    explore = ["explore.css", "explore.html.j2", "explore.js"]
    pages = ["index.md.j2", "page.css", "page.html.j2", "page.js", "theme.js"]
    assert files == ["experiment.ipynb", "experiment.yaml", *explore, *pages]
    assert all(any(fnmatch(f"templates/{f}", p) for p in patterns) for f in files)
    assert sorted(templates().list_templates()) == files


def test_the_committed_page():
    text, page = check(ROOT / "reports" / "index.html")
    assert len(page.images) >= 10 and len(text) < 1_500_000


def test_figures_that_are_not_there_are_left_out(tmp_path):
    assert page._pictures(SimpleNamespace(outputs=("figures/a.png",)), tmp_path) == ()
