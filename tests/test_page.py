"The pages of results: what they say, that every link leads somewhere, that nothing is loaded."

import base64
import io
import re
import tomllib
from fnmatch import fnmatch
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
from PIL import Image
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
    number_cell,
    profile_results,
    result_folders,
    tally,
    templates,
)
from atm_sae.report.verdict import PUBLISHED_STANDING

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
VOID = {"meta", "link", "input", "img", "br", "hr"}


def test_markdown_page(toy):
    toy.run()
    page = (toy.out / "index.md").read_text()
    assert "| [Counting](#counting) | 1 reproduced | – |" in page
    assert "SMOKE: not a result" in page
    assert (
        "| TopK | total | 6 | 8.00 | 6.00 [5.50, 6.50] | 3 | 8.00 | reproduced | 0.00 | 0.500 "
        "| at the published L0 | a book | primary |" in page
    )
    assert "| less | ours |" not in page  # a smoke run decides no claim
    assert "Parameters: `steps = 3`, `rate = 0.5`. Runtime 0:0" in page
    assert "characters" in page and "[executed notebook](notebooks/count.ipynb) · " in page
    assert str(toy.folder) not in page and "\n\n\n" not in page
    toy.run(profile="default", out=toy.folder / "d")
    page = (toy.folder / "d" / "index.md").read_text()
    assert "| not comparable | 0.00 | 0.500 | because |" in page and "SMOKE" not in page
    assert "| less | ours | w | 8.00 [8.00, 8.00] | -2.0 [-3.0, -1.0] | 3 | holds |" in page


def test_a_claim_says_whose_it_is_and_a_missing_l0_is_no_number(toy):
    toy.replace("text: less,", "text: less, by: paper,")
    toy.replace("value: 6, l0: 8,", "value: 6,")
    notebook(toy.path.parent / "10_count.ipynb", COUNT.replace("-2,-3,-1", "-2,-3,1"))
    toy.run(profile="default")
    page = (toy.out / "index.md").read_text()
    assert "| less | paper | w | 8.00 [8.00, 8.00] | -2.0 [-3.0, 1.0] | 3 | no difference" in page
    assert "| TopK | total | 6 | not published | – |" in page and "undecided" not in page
    toy.replace("by: paper", "by: nobody")
    assert "by" in toy.error()


def test_markdown_page_survives_a_broken_summary(toy):
    toy.run()
    (toy.out / "tables/count-summary.csv").write_text("a,b")
    notebook(toy.path.parent / "10_count.ipynb", "1/0")
    assert toy.run()[0] == {"count": "FAILED", "double": "skipped"}
    assert "not made again since* (changed: notebook" in (toy.out / "index.md").read_text()


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
    "A whole page: well-formed, complete in itself, each link leads to a file or a place on it."
    text = path.read_text(encoding="utf-8")
    page = Reader(text)
    assert len(set(page.ids)) == len(page.ids) and all(x.startswith("data:") for x in page.loads)
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


def pixels(png):
    return Image.open(io.BytesIO(png)).convert("RGB").tobytes()


def test_page_is_whole(drawn):
    drawn.run()
    text, page = check(drawn.out / "index.html")
    kind, _, data = page.images[0]["src"].partition(",")
    assert kind == "data:image/png;base64" and pixels(base64.b64decode(data)) == pixels(PIXEL)
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
    assert markdown_page(results) == (drawn.out / "index.md").read_text(encoding="utf-8")


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
    page = markdown_page(results)
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
    profiles = 1 + (ROOT / "reports" / "full" / "index.md").is_file()
    assert len(page.images) >= 10 * profiles and len(text) < 3_000_000


def test_figures_that_are_not_there_are_left_out(tmp_path):
    assert page._pictures(SimpleNamespace(outputs=("figures/a.png",)), tmp_path) == ()
