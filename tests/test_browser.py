"The page of results in a real browser, without network: figures, sorting, filter, links, print."

import pytest
from readme import ROOT

from atm_sae.report.manifest import load_manifest
from atm_sae.report.page import write_index


@pytest.fixture(scope="module")
def landing(tmp_path_factory):
    "The page that the present code makes from the committed reports."
    folder = tmp_path_factory.mktemp("reports")
    for path in (ROOT / "reports").iterdir():
        if path.is_dir():
            (folder / path.name).symlink_to(path)
    return write_index(load_manifest(), "default", folder)


@pytest.fixture
def visit(browser, landing):
    "Opens the page; whatever goes wrong in it fails the test at its end."
    contexts, trouble = [], []

    def open_page(width=1280, height=900, place="", **more):
        context = browser.new_context(
            offline=True, viewport={"width": width, "height": height}, **more
        )
        contexts.append(context)
        page = context.new_page()
        page.on(
            "console", lambda m: trouble.append(m.text) if m.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda e: trouble.append(str(e)))
        page.on("requestfailed", lambda r: trouble.append(r.url[:200]))
        page.on(
            "request",
            lambda r: None
            if r.url.startswith((landing.parent.as_uri() + "/", "data:"))
            else trouble.append(f"asked for {r.url[:200]}"),
        )
        page.goto(landing.as_uri() + place)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


def column(page, table, number):
    rows = f"section[aria-labelledby={table}] > .scroll > table > tbody > tr"
    return page.locator(f"{rows} > td:nth-child({number + 1})")


def keys(page, table, number):
    return [
        float(k) if k else None
        for k in column(page, table, number).evaluate_all("cells => cells.map(c => c.dataset.key)")
    ]


def heading(page, table, number):
    return page.locator(f"section[aria-labelledby={table}] > .scroll > table > thead th").nth(
        number
    )


def focused(page):
    "The text of the element with the focus."
    return page.evaluate("document.activeElement.textContent.trim()")


def test_it_loads_with_all_its_pictures(visit, landing):
    page = visit()
    widths = page.locator("img").evaluate_all(
        "images => Promise.all(images.map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert len(widths) >= 10 and min(widths) > 0 and landing.stat().st_size < 1_500_000
    assert page.locator("h1").count() == 1 and page.locator(".object").count() >= 10
    assert page.locator("details[open]").count() == 0  # folded, it is some fourteen screens long
    assert page.evaluate("document.documentElement.scrollHeight") < 15 * 900


def test_a_claim_of_a_smaller_profile_that_was_shown_is_folded(visit):
    page = visit()
    again = page.locator("#claims-again td.what > details")
    ids = again.evaluate_all("rows => rows.map(row => row.id)")
    assert ids and all(name.startswith("default-") for name in ids)
    assert not again.first.is_visible()
    assert page.locator("details[id^=full-planted-]").first.is_visible()


def test_the_answer_comes_first_then_figures_of_the_largest_profile(visit):
    page = visit()
    order = page.locator("h2").evaluate_all("all => all.map(h => h.id)")
    assert order == ["answer", "figures", "published", "claims", "objects"]
    # the answer in words, with its limits, ends within a window and a half
    assert page.locator(".answer h3").first.bounding_box()["y"] < 1350
    profiles = page.locator(".tile").evaluate_all("all => all.map(e => e.dataset.profile)")
    assert {*profiles} == {"full", "default"} and profiles == sorted(profiles, reverse=True)


def test_formulas_can_be_unfolded(visit):
    page = visit()
    assert not page.locator(".formula").first.is_visible()
    page.locator("#reading > summary").click()
    boxes = [m.bounding_box() for m in page.locator(".formula").all()]
    assert len(boxes) == 4 and all(b["height"] > 15 and b["width"] > 60 for b in boxes)
    letter, index = page.locator(".formula i").first, page.locator(".formula sub").first
    assert index.bounding_box()["height"] < letter.bounding_box()["height"]


def test_numbers_sort_as_numbers_and_unknown_ones_come_last(visit):
    page = visit()
    button, th = heading(page, "published", 1).locator("button"), heading(page, "published", 1)
    before = keys(page, "published", 1)
    button.click()
    assert keys(page, "published", 1) == sorted(before) != before
    assert th.get_attribute("aria-sort") == "ascending"
    button.focus()
    page.keyboard.press("Enter")
    assert keys(page, "published", 1) == sorted(before, reverse=True)
    assert th.get_attribute("aria-sort") == "descending"
    heading(page, "published", 2).locator("button").click()
    l0 = keys(page, "published", 2)
    known = [x for x in l0 if x is not None]
    assert known == sorted(known) and l0[: len(known)] == known and None in l0
    assert page.locator("section[aria-labelledby=published] th[aria-sort]").count() == 1


def test_every_table_can_be_sorted_and_keeps_its_rows(visit):
    page = visit()
    found = page.evaluate("""() => [...document.querySelectorAll('table')].map(table => {
        const body = table.tBodies[0], before = body.rows.length;
        const buttons = [...table.tHead.rows[0].cells].map(th => th.querySelector('button'));
        buttons.at(-1).click();
        const sorted = table.tHead.querySelectorAll('[aria-sort=ascending]').length;
        return buttons.every(Boolean) && sorted === 1 && body.rows.length === before;
    })""")
    assert len(found) > 20 and all(found)


def test_a_line_unfolds_its_reason_and_puts_itself_into_the_address(visit):
    page = visit()
    line = page.locator("section[aria-labelledby=published] details").first
    reason = line.locator("dd").first
    assert not reason.is_visible()
    line.locator("summary").focus()
    page.keyboard.press("Enter")
    assert reason.is_visible() and len(reason.inner_text()) > 10
    assert reason.bounding_box()["width"] > 400  # it lies below the other cells too
    line.locator("a").click(trial=True)  # and can be clicked there
    assert page.url.endswith("#" + line.get_attribute("id"))


def test_filters(visit):
    page = visit()
    kinds = ("tr[data-profile]", ".tile", ".object")
    rows, tiles, objects = (page.locator(f"{kind}:not([hidden])") for kind in kinds)
    everything = rows.count(), tiles.count(), objects.count()
    page.locator("#text").fill("jumprelu absorb")
    assert 0 < rows.count() < everything[0]
    assert all("jumprelu" in t.lower() for t in rows.all_text_contents())
    page.locator("#text").fill("no such words")
    assert rows.count() == tiles.count() == objects.count() == 0
    assert page.locator("#count").inner_text().startswith("0 of")
    page.locator("#text").fill("")
    assert (rows.count(), tiles.count(), objects.count()) == everything
    for verdict in page.locator("#verdict option").evaluate_all(
        "options => options.map(o => o.value).filter(Boolean)"
    ):
        page.locator("#verdict").select_option(verdict)
        assert rows.count() > 0 and objects.count() > 0
        assert all(verdict in t for t in rows.all_text_contents())
        assert rows.first.is_visible()  # also among those that are folded at first


def test_a_figure_opens_large_by_mouse_and_keyboard(visit):
    page = visit()
    tiles, viewer = page.locator(".tile"), page.locator("#viewer")
    tiles.nth(1).locator("img").click()
    assert viewer.is_visible() and page.locator("#place").inner_text().startswith("2 of ")
    page.locator("#close").click()
    assert not viewer.is_visible()
    tiles.first.locator("a.paper").focus()
    page.keyboard.press("Enter")
    small, large = tiles.first.locator("img"), viewer.locator("img")
    assert large.get_attribute("src") == small.get_attribute("src")
    assert large.get_attribute("alt") == small.get_attribute("alt")
    assert large.bounding_box()["width"] > 3 * small.bounding_box()["width"]
    caption = tiles.first.locator(".caption").text_content()
    assert viewer.locator(".caption").inner_text() == " ".join(caption.split())
    links = viewer.locator("a").all_inner_texts()
    assert {"data", "notebook", "object"} <= set(links)
    page.keyboard.press("ArrowRight")
    assert page.url.endswith("#" + tiles.nth(1).get_attribute("id"))
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.url.endswith("#" + tiles.last.get_attribute("id"))
    page.keyboard.press("Escape")
    assert not viewer.is_visible()
    last = tiles.last.locator("a.paper").get_attribute("aria-label")
    page.wait_for_function("l => document.activeElement.getAttribute('aria-label') === l", arg=last)


def test_a_link_shows_what_is_folded_or_hidden(visit):
    page = visit()
    folded = page.locator("#unmeasured tbody details").first.get_attribute("id")
    figure = page.locator(".tile").nth(3).get_attribute("id")
    for id in ("default-layer", folded, "reading"):
        details = visit(place=f"#{id}").locator(f'[id="{id}"]')
        assert details.get_attribute("open") is not None
        assert details.locator("> :not(summary)").first.is_visible()
    assert visit(place=f"#{figure}").locator("#viewer").is_visible()
    page.locator("#text").fill("no such words")
    page.evaluate("location.hash = '#default-layer'")
    page.wait_for_function("document.getElementById('default-layer').open")
    assert page.locator("#text").input_value() == "" and "Which layer" in focused(page)
    page.get_by_role("link", name="figure layer").first.click()
    assert page.locator("#viewer").is_visible()
    page.locator("#viewer a", has_text="object").click()
    assert not page.locator("#viewer").is_visible() and "Which layer" in focused(page)


def test_the_keyboard_reaches_everything_from_the_top(visit):
    page = visit()
    page.keyboard.press("Tab")
    assert focused(page) == "Skip to the results"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.querySelector('main').contains(document.activeElement)")
    skipped = """() => [...document.querySelectorAll('a, button, summary, select, input')]
        .filter(e => e.checkVisibility() && e.tabIndex < 0).length"""
    assert page.evaluate(skipped) == 0


def test_dark_by_the_system_and_by_the_button(visit):
    brightness = """() => {
        const numbers = getComputedStyle(document.body).backgroundColor.match(/\\d+/g);
        return numbers.slice(0, 3).map(Number).reduce((a, b) => a + b) / 3;
    }"""
    page = visit(color_scheme="light")
    assert page.evaluate(brightness) > 230
    page.locator("#theme").click()
    assert page.evaluate(brightness) < 40 and page.locator("#theme").inner_text() == "Light"
    dark = visit(color_scheme="dark")
    assert dark.evaluate(brightness) < 40
    dark.locator("#theme").click()
    assert dark.evaluate(brightness) > 230


def test_figures_are_dark_in_dark_mode(visit):
    page = visit(color_scheme="dark")
    style = "e => { const s = getComputedStyle(e); return [s.filter, s.backgroundColor]; }"
    for tile in (page.locator(".tile").first, page.locator(".answer figure")):
        assert tile.locator("img").evaluate(style)[0].startswith("invert(1)")
        assert tile.locator(".paper").evaluate(style)[1] == "rgb(32, 31, 28)"
    page.locator("#theme").click()
    assert page.locator(".tile img").first.evaluate(style)[0] == "none"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast_of_text(visit, scheme):
    "At least 4.5 to 1 for every kind of text, as WCAG 2 asks."
    page = visit(color_scheme=scheme)
    ratios = page.evaluate("""() => {
        const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
        const light = colour => {
            const v = colour.match(/[\\d.]+/g).slice(0, 3).map(x => linear(x / 255));
            return .2126 * v[0] + .7152 * v[1] + .0722 * v[2];
        };
        const clear = ['rgba(0, 0, 0, 0)', 'transparent'];
        const ground = e => {
            for (; e; e = e.parentElement) {
                const colour = getComputedStyle(e).backgroundColor;
                if (!clear.includes(colour)) return colour;
            }
            return 'rgb(255, 255, 255)';
        };
        const kinds = 'h1, h3, p, a, td, th button, .chip, .doubt, dt, dd, summary, label, .quiet';
        document.querySelectorAll('details').forEach(d => { d.open = true; });
        const shown = [...document.querySelectorAll(kinds)].filter(e => e.offsetParent);
        return shown.map(e => {
            const [a, b] = [light(getComputedStyle(e).color), light(ground(e))];
            return [(Math.max(a, b) + .05) / (Math.min(a, b) + .05), e.className || e.tagName];
        });
    }""")
    assert ratios and min(ratios)[0] >= 4.5, min(ratios)


def test_a_phone_needs_no_scrolling_sideways(visit):
    page = visit(390, 844, device_scale_factor=2, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#reading > summary").click()
    page.evaluate("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = page.locator(".scroll").evaluate_all(
        "all => all.map(e => [e.scrollWidth, e.clientWidth])"
    )
    page.locator(".tile a.paper").first.click()
    assert page.locator("#viewer").bounding_box()["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert all(shown <= 390 for _, shown in boxes)  # wide tables scroll inside their boxes
    assert any(whole > shown for whole, shown in boxes)


def test_every_link_leads_to_a_file_or_a_place_on_the_page(visit, landing):
    page = visit()
    links = page.locator("a").evaluate_all(
        'links => links.map(a => [a.getAttribute("href"), a.protocol])'
    )
    assert len(links) > 50
    for href, protocol in links:
        assert protocol == "file:"
        if href.startswith("#"):
            assert page.locator(f'[id="{href[1:]}"]').count() == 1, href
        else:
            assert (landing.parent / href).is_file(), href


def test_print_shows_everything_but_the_controls(visit):
    page = visit()
    page.emulate_media(media="print", color_scheme="dark")
    page.wait_for_function("[...document.querySelectorAll('details')].every(d => d.open)")
    for controls in (".bar", "#theme", "nav", "#viewer"):
        assert not page.locator(controls).is_visible()
    assert (
        page.locator("table").first.is_visible() and page.locator("#reading p").first.is_visible()
    )
    assert page.locator(".tile img").first.evaluate("e => getComputedStyle(e).filter") == "none"
    assert page.locator(".tile img").first.bounding_box()["width"] > 500
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    page.emulate_media(media="screen")
    page.wait_for_function("document.querySelectorAll('details[open]').length === 0")
