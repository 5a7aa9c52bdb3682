"""The page in a real browser: it renders, stays silent and offline, and answers to pointer and keys."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.browser


@dataclass
class Tab:
    """A page, with what it said on its console and asked of a network."""

    page: Any
    said: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return str(self.page.inner_text(selector))

    def style(self, selector: str, name: str) -> str:
        script = "([s, n]) => getComputedStyle(document.querySelector(s)).getPropertyValue(n)"
        return str(self.page.evaluate(script, [selector, name]))


@pytest.fixture(scope="module")
def address(page: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    path: Path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(page, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def tab(chromium: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Tab]:
    """The report, opened with the options of the test's parameter."""
    options = getattr(request, "param", {"viewport": {"width": 1100, "height": 900}})
    context = chromium.new_context(**options)
    opened = Tab(context.new_page())
    opened.page.on("console", lambda message: opened.said.append(message.text))
    opened.page.on("pageerror", lambda error: opened.said.append(str(error)))
    opened.page.on("request", lambda asked: opened.asked.append(asked.url))
    opened.page.goto(address)
    yield opened
    assert opened.said == []
    assert [url for url in opened.asked if url != address and not url.startswith("data:")] == []
    context.close()


PHONE = {"viewport": {"width": 360, "height": 740}, "has_touch": True, "is_mobile": True}
DARK = {"viewport": {"width": 1100, "height": 900}, "color_scheme": "dark"}


def test_every_section_and_chart_is_drawn(tab: Tab) -> None:
    names = [
        "promise",
        "chunks",
        "pipeline",
        "memory",
        "frontier",
        "alternatives",
        "why",
        "sources",
    ]
    shown = tab.page.eval_on_selector_all("main > section", "all => all.map(it => it.id)")
    assert shown == names
    assert tab.page.locator("svg.wide:visible").count() == 5
    assert tab.page.locator("svg.narrow:visible").count() == 0
    assert tab.page.locator("#chunks path[class^=part]:visible").count() == 5


def test_pointing_at_a_chart_reads_that_chunk_in_both_charts(tab: Tab) -> None:
    charts = tab.page.locator("#chunks svg.wide")
    first = charts.nth(0).locator(".hit").first
    first.scroll_into_view_if_needed()
    first.hover()
    assert tab.text("#read-start") == "0"
    assert tab.text("#read-chunk").startswith("1 of ")
    assert tab.page.input_value("#chunk") == "0"
    at = first.get_attribute("data-x1")
    cursors = [charts.nth(i).locator(".cursor").get_attribute("x1") for i in (0, 1)]
    assert cursors == [at, at]
    times = tab.page.locator("#chunks .read-part").all_inner_texts()
    assert len(times) == 5
    assert all(times)


def test_the_keyboard_reaches_every_chunk(tab: Tab) -> None:
    tab.page.focus("#chunk")
    tab.page.keyboard.press("Home")
    assert tab.text("#read-chunk").startswith("1 of ")
    sizes = [tab.text("#read-size")]
    for _ in range(int(tab.page.get_attribute("#chunk", "max"))):
        tab.page.keyboard.press("ArrowRight")
        sizes.append(tab.text("#read-size"))
    number, _, count = tab.text("#read-chunk").partition(" of ")
    assert number == count
    assert len(set(sizes)) > 5
    spoken = tab.page.get_attribute("#chunk", "aria-valuetext")
    assert spoken.startswith(f"chunk {number} of {count}, {sizes[-1]} tokens after ")


def test_pointer_and_keys_read_the_plans_of_the_frontier(tab: Tab) -> None:
    dots = tab.page.locator("#frontier svg.wide .dot")
    count = dots.count()
    assert count == int(tab.page.get_attribute("#point", "max")) + 1 > 2
    dots.first.scroll_into_view_if_needed()
    box = dots.first.bounding_box()
    tab.page.mouse.move(
        box["x"] - 6, box["y"] + box["height"] / 2
    )  # beside it: the nearest is read
    assert tab.text("#read-point") == f"1 of {count}"
    cursor = tab.page.locator("#frontier svg.wide .cursor")
    assert cursor.get_attribute("cx") == dots.first.get_attribute("data-cx")
    tab.page.focus("#point")
    tab.page.keyboard.press("End")
    assert tab.text("#read-point") == f"{count} of {count}"
    assert cursor.get_attribute("cx") == dots.last.get_attribute("data-cx")
    spoken = tab.page.get_attribute("#point", "aria-valuetext")
    for name in ("gpus", "ttft", "tbt", "layout", "verdict"):
        assert tab.text(f"#read-{name}") in spoken
    assert tab.text("#read-point") in tab.text("#frontier .reading label")


def test_charts_can_be_read_as_tables(tab: Tab) -> None:
    details = tab.page.locator("#chunks details")
    assert not details.locator("table").is_visible()
    details.locator("summary").press("Enter")
    assert details.locator("table").is_visible()
    rows = details.locator("tbody tr").count()
    assert rows == int(tab.page.get_attribute("#chunk", "max")) + 1


@pytest.mark.parametrize(
    ("tab", "colours"), [({}, ("255", "18")), (DARK, ("18", "255"))], indirect=["tab"]
)
def test_the_system_chooses_light_or_dark_and_a_button_changes_it(
    tab: Tab, colours: tuple[str, str]
) -> None:
    seen = [tab.style("body", "background-color")]
    tab.page.click("#theme")
    seen.append(tab.style("body", "background-color"))
    assert [colour.removeprefix("rgb(").partition(",")[0] for colour in seen] == list(colours)
    assert tab.page.get_attribute("#theme", "aria-pressed") == str(colours[1] == "18").lower()


@pytest.mark.parametrize("tab", [PHONE], indirect=True)
def test_a_phone_shows_it_without_scrolling_sideways(tab: Tab) -> None:
    assert tab.page.evaluate("document.documentElement.scrollWidth") == 360
    assert tab.page.locator("svg.wide:visible").count() == 0
    assert tab.page.locator("svg.narrow:visible").count() == 5
    sizes = "all => all.map(it => parseFloat(getComputedStyle(it).fontSize))"
    assert min(tab.page.eval_on_selector_all("svg.narrow text", sizes)) >= 11
    tab.page.locator("#chunks svg.narrow").last.locator(".hit").first.tap()
    assert tab.page.input_value("#chunk") == "0"


@pytest.mark.parametrize("tab", [DARK], indirect=True)
def test_on_paper_it_is_light_and_has_nothing_to_press(tab: Tab) -> None:
    tab.page.emulate_media(media="print")
    assert tab.style("body", "background-color") == "rgb(255, 255, 255)"
    for selector in ("#theme", "#chunk", "#chunks details"):
        assert not tab.page.locator(selector).is_visible()
    assert tab.page.locator("#frontier details td").first.is_visible()
    paper = tab.page.pdf(format="A4")
    assert paper.startswith(b"%PDF")
    assert 2 <= paper.count(b"/Type /Page\n") + paper.count(b"/Type /Page ") <= 12


@pytest.mark.parametrize("tab", [DARK, {}], indirect=True)
def test_text_stands_out_from_the_page(tab: Tab) -> None:
    """WCAG 2: a contrast of 4.5 for text."""
    pairs = tab.page.evaluate(
        """['body', '.lead', 'dt', 'h1 span', '.figure span', '.chart .tick'].map(name => {
            const it = document.querySelector(name), style = getComputedStyle(it);
            return [it instanceof SVGElement ? style.fill : style.color,
                    getComputedStyle(document.body).backgroundColor];
        })"""
    )
    for ink, page in pairs:
        light, dark = sorted((_luminance(ink), _luminance(page)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
