"The page of results in a real browser, without network: sorting, filter, dark mode, phone."

import pytest
from readme import ROOT

PAGE = ROOT / "reports" / "index.html"


@pytest.fixture
def visit(browser):
    "Opens the page; whatever goes wrong in it fails the test at its end."
    contexts, trouble = [], []

    def open_page(width=1280, height=900, **more):
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
            if r.url == PAGE.as_uri() or r.url.startswith("data:")
            else trouble.append(f"asked for {r.url[:200]}"),
        )
        page.goto(PAGE.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert trouble == []


def column(page, table, number):
    return page.locator(f"section[aria-labelledby={table}] tbody tr td:nth-child({number + 1})")


def keys(page, table, number):
    return [
        float(k) if k else None
        for k in column(page, table, number).evaluate_all("cells => cells.map(c => c.dataset.key)")
    ]


def heading(page, table, number):
    return page.locator(f"section[aria-labelledby={table}] th").nth(number)


def test_it_loads_with_all_its_pictures(visit):
    page = visit()
    widths = page.locator("img").evaluate_all(
        "images => Promise.all(images.map(i => i.decode().then(() => i.naturalWidth)))"
    )
    assert len(widths) >= 10 and min(widths) > 0
    assert page.locator("h1").count() == 1 and page.locator("article").count() >= 10


def test_formulas_can_be_unfolded(visit):
    page = visit()
    assert not page.locator(".formula").first.is_visible()
    page.get_by_text("How to read this page").click()
    boxes = [m.bounding_box() for m in page.locator(".formula").all()]
    assert len(boxes) == 4 and all(b["height"] > 15 and b["width"] > 60 for b in boxes)
    letter, index = page.locator(".formula i").first, page.locator(".formula sub").first
    assert index.bounding_box()["height"] < letter.bounding_box()["height"]


def test_numbers_sort_as_numbers_and_unknown_ones_come_last(visit):
    page = visit()
    button, th = heading(page, "published", 3).locator("button"), heading(page, "published", 3)
    before = keys(page, "published", 3)
    button.click()
    assert (
        keys(page, "published", 3) == sorted(before) != before
        and th.get_attribute("aria-sort") == "ascending"
    )
    button.focus()
    page.keyboard.press("Enter")
    assert (
        keys(page, "published", 3) == sorted(before, reverse=True)
        and th.get_attribute("aria-sort") == "descending"
    )
    heading(page, "published", 4).locator("button").click()
    l0 = keys(page, "published", 4)
    known = [x for x in l0 if x is not None]
    assert known == sorted(known) and l0[: len(known)] == known and None in l0
    assert page.locator("section[aria-labelledby=published] th[aria-sort]").count() == 1


def test_filters(visit):
    page = visit()
    rows, cards = page.locator("tr[data-profile]:visible"), page.locator("article:visible")
    everything = rows.count(), cards.count()
    page.locator("#text").fill("jumprelu absorb")
    assert 0 < rows.count() < everything[0] and all(
        "jumprelu" in t.lower() for t in rows.all_inner_texts()
    )
    page.locator("#text").fill("no such words")
    assert rows.count() == cards.count() == 0 and page.locator("#count").inner_text().startswith(
        "0 of"
    )
    page.locator("#text").fill("")
    assert (rows.count(), cards.count()) == everything
    for verdict in page.locator("#verdict option").evaluate_all(
        "options => options.map(o => o.value).filter(Boolean)"
    ):
        page.locator("#verdict").select_option(verdict)
        assert (
            rows.count() > 0
            and cards.count() > 0
            and set(page.locator("tbody tr:visible .chip").all_inner_texts()) == {verdict}
        )


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
        const kinds = 'h1, h3, p, a, td, th button, .chip, .doubt, dt, dd, summary, label';
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
    page.get_by_text("How to read this page").click()
    for details in page.locator("article details summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    boxes = page.locator(".scroll").evaluate_all(
        "all => all.map(e => [e.scrollWidth, e.clientWidth])"
    )
    assert all(shown <= 390 for _, shown in boxes)  # wide tables scroll inside their boxes
    assert any(whole > shown for whole, shown in boxes)


def test_every_link_leads_to_a_file_or_a_place_on_the_page(visit):
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
            assert (PAGE.parent / href).is_file(), href


def test_print_shows_everything_but_the_controls(visit):
    page = visit()
    page.emulate_media(media="print", color_scheme="dark")
    assert (
        not page.locator(".bar").is_visible()
        and not page.locator("#theme").is_visible()
        and page.locator("table").first.is_visible()
    )
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
