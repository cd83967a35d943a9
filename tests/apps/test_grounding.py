"""Grounded answers: regions found as in the original's demo, and drawn at their coordinates."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tinygptv_ds.apps.demo import drawing
from tinygptv_ds.apps.demo.drawing import COLORS, WIDTH, color, draw_regions
from tinygptv_ds.apps.demo.grounding import Region, find_regions, painted_box, text_spans, with_painted_box

WHOLE = (0, 0, 100, 100)


@pytest.mark.parametrize(
    ("answer", "regions"),
    [
        ("<p>a bus</p> {<1><2><30><40>}", [("a bus", [(1, 2, 30, 40)])]),
        ("<p>two</p> {<1><2><3><4>}<delim>{<5><6><7><8>} end", [("two", [(1, 2, 3, 4), (5, 6, 7, 8)])]),
        ("<p>a</p> {<1><2><3><4>} and <p>b</p> {<5><6><7><8>}", [("a", [(1, 2, 3, 4)]), ("b", [(5, 6, 7, 8)])]),
        ("<p>a</p> {<1><2><3><4>} <p>a</p> {<5><6><7><8>}", [("a", [(1, 2, 3, 4), (5, 6, 7, 8)])]),
        ("<p>cut</p> {<1><2><3><4>} <p>off</p> {<5><6", [("cut", [(1, 2, 3, 4)])]),  # what follows the last brace goes
        ("<p>three</p> {<1><2><3>} <p>b</p> {<5><6><7><8>}", [("b", [(5, 6, 7, 8)])]),
        ("<p>five</p> {<1><2><3><4><5>}", []),
        ("<p>no end {<1><2><3><4>}", []),
        ("<p>a</p> {<1><2><3><4>}<p>b</p> {<5><6><7><8>}", []),  # as in the original: a `<` after the brace
        ("<p>fog</p> and <p>men</p> {<1><2><3><4>}", []),  # the same: a phrase without a box takes the next with it
        ("{<10><20><30><40>}", [(None, [(10, 20, 30, 40)])]),
        ("at 10, 20, 30 and -40", [(None, [(10, 20, 30, -40)])]),
        ("10 20 30 40 50", []),
        ("1 2 3 99999999999999999999", []),
        ("", []),
    ],
)
def test_regions(answer: str, regions: list) -> None:
    assert find_regions(answer) == [Region(phrase, tuple(boxes)) for phrase, boxes in regions]


def read(answer: str) -> list[tuple[str, int | None]]:
    return text_spans(answer, find_regions(answer))


def test_text_without_boxes_and_the_color_of_each_phrase() -> None:
    answer = "I see <p>a bus</p> {<1><2><3><4>}<delim>{<5><6><7><8>}, <p>men</p> {<1><2><3><9>} and <p>fog</p>."
    assert read(answer) == [
        ("I see ", None),
        ("a bus", 0),
        (", ", None),
        ("men", 1),
        (" and ", None),
        ("fog", None),
        (".", None),
    ]


def test_equal_phrases_have_one_color() -> None:
    assert read("<p>a</p> {<1><2><3><4>} <p>b</p> {<1><2><3><4>} <p>a</p> {<5><6><7><8>}")[::2] == [
        ("a", 0),
        ("b", 1),
        ("a", 0),
    ]


@pytest.mark.parametrize("answer", ["{<1><2><3><4>}", "a red bus", "<p>a</p> {<1>}", "a <b> c"])
def test_other_answers_stay(answer: str) -> None:
    assert read(answer) == [(answer, None)]


_MARKS = ("<p>", "</p>", "{", "}", "<delim>", "<1>", "<99>", "<-7>", "<100000>", " ", "a red bus", "\n", "\0", "7", "٣")


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(_MARKS), max_size=40).map("".join)))
def test_nothing_that_a_model_says_makes_it_fail(answer: str) -> None:
    regions = find_regions(answer)
    assert all(region.boxes and all(len(box) == 4 for box in region.boxes) for region in regions)
    assert draw_regions(Image.new("RGB", (25, 10)), regions).size == (500, 200)
    shown = text_spans(answer, regions)
    assert {number for _, number in shown} <= {None, *range(len(regions))}
    if not regions:
        assert "".join(text for text, _ in shown) == answer


def test_a_box_is_drawn_where_it_is_said_to_be() -> None:
    image = Image.new("RGB", (1000, 400), "white")
    drawn = draw_regions(image, [Region(None, ((20, 10, 60, 50),))])
    assert drawn.size == (WIDTH, 200)
    red = {(x, y) for x in range(drawn.width) for y in range(drawn.height) if drawn.getpixel((x, y)) == COLORS[0]}
    inside = {(x, y) for x in range(102, 299) for y in range(22, 99)}
    assert red == {(x, y) for x in range(100, 301) for y in range(20, 101)} - inside


def test_corners_the_wrong_way_round_are_the_same_box() -> None:
    image = Image.new("RGB", (50, 50))
    there, back = (draw_regions(image, [Region("a", (box,))]) for box in ((10, 30, 60, 90), (60, 90, 10, 30)))
    assert there.tobytes() == back.tobytes()


def test_colors_repeat() -> None:
    image = Image.new("RGB", (500, 500), "white")
    regions = [Region(None, ((5 * n, 0, 5 * n + 4, 100),)) for n in range(17)]
    drawn = draw_regions(image, regions)
    ink = [drawn.getpixel((25 * n, 250)) for n in range(17)]
    assert ink == [*COLORS, COLORS[0]] and len(set(COLORS)) == 16
    assert color(33) == COLORS[1]


def labels(monkeypatch: pytest.MonkeyPatch, size: tuple[int, int], regions: list[Region]) -> list[tuple]:
    """Return where labels lie, as (text, (x1, y1, x2, y2))."""
    placed: list[tuple] = []
    draw = drawing._label
    monkeypatch.setattr(drawing, "_label", lambda *args: (draw(*args), placed.extend(args[-1][len(placed) :])))
    draw_regions(Image.new("RGB", size), regions)
    return placed


def test_labels_cover_no_other_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirteen boxes in one place: some labels go below and, at the lower edge, the others above."""
    regions = [Region(f"phrase {n}", ((30, 40 + n, 60, 90),)) for n in range(13)]
    places = [area for _, area in labels(monkeypatch, (500, 500), regions)]
    assert len(places) == 13
    assert all(x1 >= 0 and y1 >= 0 and x2 <= 500 and y2 <= 500 for x1, y1, x2, y2 in places)
    rows = sorted((y1, y2) for _, y1, _, y2 in places)
    assert all(before[1] <= after[0] for before, after in pairwise(rows))


def test_a_label_stands_above_its_box_or_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = [Region("above", ((10, 50, 30, 70),)), Region("inside", ((50, 1, 90, 30),))]
    (_, above), (_, inside) = labels(monkeypatch, (500, 500), regions)
    assert above[3] == 250 and inside[1] == 5 + drawing.LINE_WIDTH


def test_the_same_label_in_the_same_place_comes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    regions = [Region("bus", ((10, 50, 30, 70), (10, 50, 80, 90), (10, 80, 30, 90)))]
    assert len(labels(monkeypatch, (500, 500), regions)) == 2


@pytest.mark.parametrize("size", [(1, 9000), (9000, 1), (1, 1)])
def test_strips_stay_small(size: tuple[int, int]) -> None:
    drawn = draw_regions(Image.new("L", size), [Region("a long label", (WHOLE,))])
    assert max(drawn.size) <= 2000 and min(drawn.size) >= 1


def test_the_painted_box_is_tight() -> None:
    mask = Image.new("L", (400, 200))
    mask.paste(255, (40, 20, 81, 61))
    assert painted_box(mask) == "{<10><10><19><29>}"
    assert painted_box(Image.new("L", (400, 200))) == ""
    assert painted_box(Image.new("L", (40, 40), 1)) == "{<0><0><99><99>}"


@pytest.mark.parametrize(
    ("question", "asked"),
    [
        ("[identify] what is this ", "[identify] what is this {<0><0><99><99>}"),
        ("[identify] 1 2 3", "[identify] 1 2 3{<0><0><99><99>}"),
        ("[identify] {<1><2><3><4>}", "[identify] {<1><2><3><4>}"),
        ("[vqa] what is this?", "[vqa] what is this?"),
    ],
)
def test_only_identify_takes_the_painted_box(question: str, asked: str) -> None:
    assert with_painted_box(question, Image.new("L", (10, 10), 255)) == asked
    assert with_painted_box(question, None) == question
