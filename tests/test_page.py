"The landing pages: what they say, that every link leads somewhere, and that nothing comes from outside."

import base64, io, re
from html.parser import HTMLParser
import pytest
from PIL import Image
from atm_sae.report.manifest import load_manifest
from atm_sae.report.page import _cell, _headline, _leading, html_page, result_folders, tally
from readme import ROOT
from toy import DOUBLE, notebook, real, toy  # real and toy are fixtures

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
)
VOID = {"meta", "link", "input", "img", "br", "hr"}


def test_landing_page(toy):
    toy.run()
    page = (toy.out / "index.md").read_text()
    assert (
        "| [Counting](#counting) | 1 reproduced | 1 holds |" in page
        and "SMOKE: not a result" in page
    )
    assert (
        "| TopK | total | 6 | 8.00 | a book (primary) | 6.00 [5.50, 6.50] | 8.00 | 0.00 | 0.500 | **reproduced**: at the published L0 |"
        in page
    )
    assert (
        "| less | w | 8.00 [8.00, 8.00] | -2.0 [-3.0, -1.0] | 3 | holds |" in page
        and "`steps = 3`, `rate = 0.5`" in page
        and "characters" in page
    )
    assert str(toy.folder) not in page
    toy.run(profile="default", out=toy.folder / "d")
    assert (
        "**not comparable**: because" in (toy.folder / "d" / "index.md").read_text()
        and "SMOKE" not in (toy.folder / "d" / "index.md").read_text()
    )


def test_landing_page_survives_a_broken_summary(toy):
    toy.run()
    (toy.out / "tables/count-summary.csv").write_text("a,b")
    notebook(toy.path.parent / "10_count.ipynb", "1/0")
    assert toy.run()[0] == {"count": "FAILED", "double": "skipped"}
    assert "Older than its sources" in (toy.out / "index.md").read_text()


# ---- the page for a browser


class Reader(HTMLParser):
    "Checks that tags are closed in order; gathers identifiers, what is linked to and what is loaded."

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
        "-2.0 [-3.0, -1.0]",
        "0 compared",
    ):
        assert words in text, words
    assert (
        'class="chip reproduced"' in text
        and 'class="chip holds"' in text
        and 'class="stamp">SMOKE' in text
        and str(drawn.folder) not in text
    )
    assert page.tags.count("math") == 4 and "Older than" not in text and "Not run yet" not in text


def test_same_results_same_bytes(drawn):
    drawn.run()
    manifest = load_manifest(drawn.path)
    home, folders = result_folders(manifest, "smoke", drawn.out)
    assert (home, folders) == (drawn.out, {"smoke": drawn.out})
    pages = {html_page(manifest, folders, home) for _ in range(2)} | {
        (drawn.out / "index.html").read_text(encoding="utf-8")
    }
    assert len(pages) == 1


def test_what_is_missing_or_old_is_said(drawn):
    drawn.run(only=["count"])
    text, page = check(drawn.out / "index.html")
    assert (
        "Not run yet:</strong> atm-sae reproduce --profile smoke --only double" in text
        and "1 not run yet" in text
        and page.images == []
    )
    drawn.run()
    notebook(drawn.path.parent / "10_count.ipynb", "1/0")
    drawn.run()
    assert (
        "Older than its sources</strong> (changed: notebook)" in check(drawn.out / "index.html")[0]
    )
    (drawn.out / "tables/count-summary.csv").unlink()
    drawn.run(only=["count"])
    check(drawn.out / "index.html")


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
        "1 compared: 1 not comparable." in text
        and "smoke runs are shown, not counted" in text
        and not (drawn.out / "smoke" / "index.html").exists()
    )


def test_a_folder_that_happens_to_be_called_like_a_profile_is_its_own_home(drawn):
    drawn.run(out=drawn.folder / "smoke")
    check(drawn.folder / "smoke" / "index.html")
    assert not (drawn.folder / "index.html").exists()


def test_sort_keys():
    assert (
        _cell("x", float("nan"))["key"] == _cell("x", float("inf"))["key"] == ""
        and _cell("x", 3)["key"] == "3.0"
        and _cell("x")["key"] is None
    )
    assert (
        _leading("1.5e-07 [0, 1]") == 1.5e-7
        and _leading("−2 [−3, −1]") == -2
        and tally(["a", "b", "a"]) == "2 a, 1 b"
    )
    assert _headline([])[0] == ("Published values", "0 compared: –.")


def test_the_committed_page():
    text, page = check(ROOT / "reports" / "index.html")
    profiles = 1 + (ROOT / "reports" / "full" / "index.md").is_file()
    assert len(page.images) >= 10 * profiles and len(text) < 3_000_000
